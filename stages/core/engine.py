"""vLLM inside this process: prompts to completions, with weights that can be swapped without a restart.

What was left out on purpose: top-p and top-k (they bias the importance ratio), tensor parallelism, a server.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from stages.core import policies
from stages.core.lifetime import Stopped

if TYPE_CHECKING:
    import torch

MAX_BATCHED_TOKENS = 4096  # tokens in one pass of the engine on the CPU


class Completion(NamedTuple):
    """One sampled continuation; `token_ids` include the end token, `log_probs` are the sampled tokens' own, in nats.

    `log_probs` is empty where the call did not ask for them.
    """

    text: str
    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """How to sample: `seed` for the whole call, or `seeds`, one a prompt (slower, but free of batch order).

    Sample i of a prompt draws from a generator seeded with the prompt's seed + i. `stop_token_ids` end a completion
    beside the policy's own end tokens; `stop` does so as text, which stays in the completion.
    """

    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    seeds: Sequence[int] | None = None
    log_probs: bool = True


OnGroup = Callable[[int, list[Completion]], None]
ShouldStop = Callable[[], bool]


class Engine(Protocol):
    """What the stages need of an engine; tests hand over a scripted one."""

    def sleep(self) -> None:
        """Free the accelerator's memory."""

    def wake(self) -> None:
        """Take it back; `load` follows."""

    def load(self, weights: Iterable[tuple[str, "torch.Tensor"]]) -> None:
        """Replace the weights by (checkpoint name, tensor) pairs."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        on_group: OnGroup,
        should_stop: ShouldStop = lambda: False,
    ) -> list[list[Completion]]:
        """Sample; call `on_group(index, completions)` when all samples of a prompt are done, in any order.

        Looks at `should_stop` often, and raises Stopped once it is true.
        """


class VllmEngine:
    """One in-process vLLM engine. On the CPU it runs eagerly; on a GPU it can sleep while the trainer works."""

    def __init__(
        self,
        policy: Path,
        *,
        max_model_len: int,
        dtype: str = "auto",
        memory_fraction: float = 0.9,
        sleeps: bool = False,
        distributed: bool = False,
        empty: bool = False,
    ):
        """Start from the checkpoint `policy`; its weights are read in too, unless `empty`: then `load` must follow."""
        configure()
        import torch
        from vllm import LLM

        self.on_gpu = torch.cuda.is_available()
        if not self.on_gpu:  # one small function of vLLM's is compiled on its first call: seconds, and a C++ compiler
            torch._dynamo.config.disable = True
        if dtype == "auto":  # vLLM's own choice would depend on the checkpoint's type
            dtype = "bfloat16" if self.on_gpu else "float32"
        self.sleeps = sleeps and self.on_gpu
        self._asleep = False
        self.tokenizer = policies.load_tokenizer(policy)
        extra: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if distributed else {}
        if not self.on_gpu:  # a prompt cut in two can't take back its seeded draw: "CPU Generator does not use offset"
            extra |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, MAX_BATCHED_TOKENS)}
        self._llm = LLM(
            model=str(policy),
            load_format="dummy",
            hf_overrides={"tie_word_embeddings": False},
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=max_model_len,
            max_num_seqs=512,
            enforce_eager=not self.on_gpu,
            gpu_memory_utilization=memory_fraction,
            enable_sleep_mode=self.sleeps,
            logprobs_mode="processed_logprobs",
            **extra,
        )
        if not empty:
            self.load(policies.disk_weights(policy))

    def load(self, weights: Iterable[tuple[str, "torch.Tensor"]]) -> None:
        """Replace the weights by (checkpoint name, tensor) pairs and forget every cached prefix."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        assert self._llm.reset_prefix_cache(), "the prefix cache is busy: a request is still running"

    def sleep(self) -> None:
        """Free the GPU's memory for the trainer; weights and cache are gone until `wake` and `load`."""
        if self.sleeps:
            self._llm.sleep(level=2)
            self._asleep = True

    def wake(self) -> None:
        """Take the GPU's memory back after `sleep`; `load` must follow before the next `generate`."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        on_group: OnGroup | None = None,
        should_stop: ShouldStop = lambda: False,
    ) -> list[list[Completion]]:
        """Sample `num_samples` completions for each tokenised prompt; the same call gives the same samples.

        The engine draws from torch's global generator, seeded here. With `seeds`, each prompt has a generator of
        its own, and the samples don't depend on which prompts share the batch, up to float rounding of the batch.
        """
        import torch

        self._llm.reset_prefix_cache()
        torch.manual_seed(sampling.seed)
        core: Any = self._llm.llm_engine
        for index, prompt in enumerate(prompts):
            core.add_request(str(index), {"prompt_token_ids": prompt}, self._params(sampling, index))
        groups: list[list[Completion]] = [[] for _ in prompts]
        try:
            while core.has_unfinished_requests():
                if should_stop():
                    raise Stopped
                for output in core.step():
                    if not output.finished:
                        continue
                    index = int(output.request_id)
                    groups[index] = self._completions(output.outputs)
                    if on_group is not None:
                        on_group(index, groups[index])
        finally:  # an interrupted call leaves nothing behind for the next one
            core.abort_request([str(index) for index, group in enumerate(groups) if not group])
        assert all(len(group) == sampling.num_samples for group in groups), "the engine lost completions"
        return groups

    def _params(self, sampling: Sampling, index: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.num_samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=None if sampling.seeds is None else sampling.seeds[index],
            stop=list(sampling.stop) or None,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            logprobs=0 if sampling.log_probs else None,
            flat_logprobs=sampling.log_probs,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completions(self, outputs: list[Any]) -> list[Completion]:
        outputs = sorted(outputs, key=lambda output: output.index)
        token_ids = [list(output.token_ids) for output in outputs]
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [
            Completion(text, ids, list(output.logprobs.logprobs) if output.logprobs else [], str(output.finish_reason))
            for text, ids, output in zip(texts, token_ids, outputs, strict=True)
        ]


def configure() -> None:
    """Set vLLM's environment before its first import; what the user has set stays."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])

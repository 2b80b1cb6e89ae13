"""vLLM inside this process: prompts to completions, with weights that can be swapped without a restart.

Start a VllmEngine on a checkpoint, then `generate`; `load` swaps the weights. There is no top-p or top-k, which would
bias the importance ratio. Of several processes each has its own engine, or `tensor_parallel` in a row share one: each
then holds a part of every weight, and all of them call the same methods with the same arguments.
"""

import gc
import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from stages.core.drawing import kernels
from stages.core.errors import InputError, in_one_line
from stages.core.lifetime import Stopped
from stages.core.options import ROUNDING, OptionGroup, above, at_least, at_most, one_of
from stages.core.policy import checkpoints
from stages.core.progress import warn
from stages.core.ranks import STEP_LIMIT

if TYPE_CHECKING:
    import torch

MAX_BATCHED_TOKENS = 4096  # tokens in one pass of the engine on the CPU
BLOCK_TOKENS = 32  # of the CPU's cache: the smallest it takes; only whole blocks of a prompt are shared by its samples
MAX_SEQUENCES = 512  # at once, unless asked for otherwise: the largest batch that vLLM captures as a CUDA graph
SILENCE_S = 30  # seconds without a finished group, after which a call says how far it is
SEED_BITS = 62  # sample i of a prompt has the prompt's seed + i, which must stay a signed 64-bit number
PROBE_TOKENS = 24
PROBE_BOUNDS = {"float32": 1e-3}  # mean difference in nats a token between two ways to the same weights
PROBE_BOUND_HALF = 0.05  # in bfloat16 and float16; wrong weights are tenths of a nat away, or more

Weights = Iterable[tuple[str, "torch.Tensor"]]
MemoryFraction = Annotated[float, "share of a GPU's memory for the engine", above(0), at_most(1), ROUNDING]


@dataclass(frozen=True, kw_only=True)
class EngineOptions(OptionGroup):
    """What a stage that draws adds to its options. They change results by no more than rounding, but for the type."""

    dtype: Annotated[
        str,
        "compute type: float32, bfloat16, float16, or auto (bfloat16 on a GPU, float32 elsewhere)",
        one_of("auto", "float32", "bfloat16", "float16"),
    ] = "auto"
    memory_fraction: MemoryFraction = 0.9
    max_sequences: Annotated[
        int,
        "sequences that an engine works on at once; 0 is what fits its cache at half the longest length, at most "
        f"{MAX_SEQUENCES}",
        at_least(0),
        ROUNDING,
    ] = 0
    tensor_parallel: Annotated[
        int,
        "processes in a row that share one engine, each with a part of every weight, for a policy that one GPU cannot "
        "hold",
        at_least(1),
        ROUNDING,
    ] = 1
    compile: Annotated[
        bool,
        "on a CPU, let the engine run compiled code: it starts about a minute later and draws faster (on a GPU it "
        "always does)",
        ROUNDING,
    ] = False


class Completion(NamedTuple):
    """One sampled continuation; `token_ids` include the end token, `log_probs` are the sampled tokens' own, in nats.

    `log_probs` is empty if the call did not ask for them.
    """

    text: str
    token_ids: Sequence[int]
    log_probs: Sequence[float]
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """How to sample. `generate` needs `seeds`, one a prompt; sample i of a prompt draws from the prompt's seed + i.

    `stop_token_ids` end a completion beside the policy's own end tokens; `stop` does so as text, which stays in the
    completion.
    """

    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seeds: Sequence[int] = ()
    log_probs: bool = True


def seed_of(*parts: object) -> int:
    """A seed hashed from `parts`, SEED_BITS wide, so that two prompts' samples hardly ever share a seed."""
    hashed = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(hashed[:8], "little") >> (64 - SEED_BITS)


OnGroup = Callable[[int, list[Completion]], None]
ShouldStop = Callable[[], bool]


class Engine(Protocol):
    """What the stages need of an engine. Tests use a scripted one."""

    max_sequences: int  # that it works on at once
    num_preemptions: int | None  # so far: sequences that were dropped from the cache and computed again

    def sleep(self) -> None:
        """Free the accelerator's memory."""

    def wake(self) -> None:
        """Take the memory back; call `load` next."""

    def load(self, weights: Weights) -> None:
        """Replace the weights by (checkpoint name, tensor) pairs."""

    def swap_fault(self, weights: Callable[[], Weights]) -> str | None:
        """What goes wrong when `weights`, those the engine started with, are swapped in; None if all goes well.

        The engine is left with other weights: `load` or `close` follows.
        """

    def close(self) -> None:
        """Free all memory; the engine is of no more use."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        on_group: OnGroup,
        should_stop: ShouldStop = lambda: False,
    ) -> list[list[Completion]]:
        """Sample; call `on_group(index, completions)` when all samples of a prompt are done, in any order.

        Of the ranks that share an engine only the first calls `on_group`; all get the completions. Looks at
        `should_stop` often, and raises Stopped on all ranks of the engine once it is true on one.
        """


class VllmEngine:
    """One in-process vLLM engine. On a GPU it can sleep while the trainer works.

    `cache_tokens` fit its cache, and it works on `max_sequences` at once. `num_preemptions` is None if vLLM runs in
    another process and can't be asked.
    """

    tensor_parallel = 1  # ranks that share the engine

    def __init__(
        self,
        policy: Path,
        options: EngineOptions = EngineOptions(),
        *,
        max_model_len: int,
        sleeps: bool = False,
        distributed: bool = False,
        quantization: str | None = None,
    ):
        """Start with the checkpoint `policy`, read by vLLM's own loader; InputError if vLLM cannot.

        `distributed` engines start on all ranks at the same time, `tensor_parallel` ranks in a row sharing one. With a
        `quantization` by vLLM's name it rounds weights that are loaded, then and later.
        """
        configure()
        import torch

        from stages.core.policy.acceleration import uses_bfloat16

        self.on_gpu = torch.cuda.is_available()
        dtype, max_sequences = options.dtype, options.max_sequences
        if dtype == "auto":  # vLLM's own choice would depend on the checkpoint's type
            dtype = "bfloat16" if uses_bfloat16(dtype) else "float32"
        self.sleeps = sleeps and self.on_gpu
        self.tensor_parallel = options.tensor_parallel
        self._asleep = False
        self._probe_bound = PROBE_BOUNDS.get(dtype, PROBE_BOUND_HALF)
        self._num_probe_tokens = min(PROBE_TOKENS, max_model_len - 1)
        self._vocabulary = checkpoints.load_config(policy).get_text_config().vocab_size
        self.tokenizer = checkpoints.load_tokenizer(policy)
        self._num_known = len(self.tokenizer)
        self._is_told = False
        self._llm = _start(
            policy,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_sequences or MAX_SEQUENCES,
            gpu_memory_utilization=options.memory_fraction,
            enable_sleep_mode=self.sleeps,
            quantization=quantization,
            logprobs_mode="processed_logprobs",
            use_tqdm_on_load=False,
            **self._distributed(distributed),
            **({} if self.on_gpu else _on_cpu(max_model_len, options.compile)),
        )
        self._max_model_len = max_model_len
        cache = self._llm.llm_engine.vllm_config.cache_config
        self.cache_tokens = int(
            getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size  # before vLLM 0.30
        )
        self.max_sequences = max_sequences or fitting(self.cache_tokens, max_model_len)
        core = getattr(self._llm.llm_engine.engine_core, "engine_core", None)  # None if it is another process
        self._under_way: dict[str, Any] | None = None if core is None else core.scheduler.requests
        self.num_preemptions = None if self._under_way is None else 0

    @property
    def capacity(self) -> str:
        """What fits the cache, and what is under way at once, in words."""
        return (
            f"the engine's cache holds {self.cache_tokens:,} tokens, "
            f"{self.cache_tokens // self._max_model_len:,} sequences of the longest length ({self._max_model_len:,}); "
            f"at most {self.max_sequences:,} are under way at once (--max-sequences)"
        )

    def _distributed(self, is_distributed: bool) -> dict[str, Any]:
        """vLLM's arguments for many ranks: as the launcher numbers them, each `tensor_parallel` of them make a group.

        To vLLM the groups are independent: none waits for another after the start. Those that it makes itself have the
        time limit of the others, as far as the installed version lets it be told.
        """
        if not is_distributed:
            return {}
        from vllm.distributed import parallel_state
        from vllm.engine.arg_utils import EngineArgs

        parallel_state.destroy_distributed_environment = lambda: None  # accelerate began the group: it goes on
        options = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": self.tensor_parallel}
        limits = ("distributed_timeout_seconds", "cpu_distributed_timeout_seconds")
        options |= {name: int(STEP_LIMIT.total_seconds()) for name in limits if hasattr(EngineArgs, name)}
        if self.on_gpu:
            return options
        from stages.core.drawing.cpu_worker import Worker

        return options | {"worker_cls": f"{Worker.__module__}.{Worker.__qualname__}"}

    def load(self, weights: Weights) -> None:
        """Replace the weights by (checkpoint name, tensor) pairs and forget every cached prefix."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self.on_gpu:
            self._llm.apply_model(_repack)
        assert self._llm.reset_prefix_cache(), "the prefix cache is busy: a request is still running"

    def swap_fault(self, weights: Callable[[], Weights]) -> str | None:
        """What goes wrong when `weights`, those the engine started with, are swapped in; None if all goes well.

        Three swaps show it, on a probe of some tokens: with the vocabulary moved on by one, the moved tokens must have
        the log-probabilities that the tokens had as loaded (a head that is left behind shows); the weights as they
        are must give these again; and with all but the vocabulary enlarged, they must not (weights that never arrive
        show). The engine is left with the enlarged weights. Many ranks call this together.
        """
        tokens = [7919 * index % (self._vocabulary - 1) for index in range(self._num_probe_tokens)]
        loaded = self._log_probs(tokens)
        try:
            self.load(self._moved(weights()))
            moved = self._distance(loaded, [token + 1 for token in tokens])
            self.load(weights())
            same = self._distance(loaded, tokens)
            self.load(self._enlarged(weights()))
            enlarged = self._distance(loaded, tokens)
        except (ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:  # of vLLM's loaders
            return f"vLLM says: {in_one_line(error)}"
        worst = max(moved, same, key=lambda distance: (distance != distance, distance))
        if not worst <= self._probe_bound:
            return f"log-probabilities are then {worst:.2g} nats a token from those of the same weights as loaded"
        return "they change nothing" if enlarged <= self._probe_bound else None

    def close(self) -> None:
        """Free all memory; the engine is of no more use."""
        import torch

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _moved(self, weights: Weights) -> Iterator[tuple[str, "torch.Tensor"]]:
        """`weights` with the vocabulary shifted by one: each token takes the position of the next."""
        for name, tensor in weights:
            yield name, tensor.roll(1, 0) if tensor.shape[:1] == (self._vocabulary,) else tensor

    def _enlarged(self, weights: Weights) -> Iterator[tuple[str, "torch.Tensor"]]:
        for name, tensor in weights:
            yield name, tensor if tensor.shape[:1] == (self._vocabulary,) else 4 * tensor

    def _log_probs(self, tokens: list[int]) -> "torch.Tensor":
        """Log-probabilities of `tokens`, from the second on, in nats."""
        import torch
        from vllm import SamplingParams

        self._llm.reset_prefix_cache()
        how = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, seed=0)
        (output,) = self._llm.generate([{"prompt_token_ids": tokens}], how, use_tqdm=False)
        scored = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        return torch.tensor([log_probs[token].logprob for log_probs, token in scored])

    def _distance(self, loaded: "torch.Tensor", tokens: list[int]) -> float:
        return float((self._log_probs(tokens) - loaded).abs().mean())

    def sleep(self) -> None:
        """Free the GPU's memory for the trainer; weights and cache are gone until `wake` and `load`.

        InputError if another process takes as much of the GPU meanwhile, which vLLM does not bear.
        """
        if self.sleeps:
            try:
                self._llm.sleep(level=2)
            except AssertionError as error:
                raise InputError(
                    f"vLLM's sleep mode wants the GPU for itself ({in_one_line(error)}): end what else runs on it, or "
                    "give another one by CUDA_VISIBLE_DEVICES; then the same command goes on"
                ) from error
            self._asleep = True

    def wake(self) -> None:
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
        """Sample `num_samples` completions for each tokenised prompt.

        A sample depends on the weights, its prompt and its seed; up to float rounding of the batch, not on which
        prompts share it. So ranks that share the engine draw the same, and step together.
        """
        self._llm.reset_prefix_cache()
        core: Any = self._llm.llm_engine
        pairs = list(zip(prompts, sampling.seeds, strict=True))
        groups: list[list[Completion]] = [[] for _ in prompts]
        preemptions: dict[str, int] = {}
        heartbeat, num_begun = _Heartbeat(len(pairs)), 0
        try:
            while num_begun < len(pairs) or core.has_unfinished_requests():
                if self._any(should_stop()):
                    raise Stopped
                while num_begun < len(pairs) and core.get_num_unfinished_requests() < self.max_sequences:
                    prompt, seed = pairs[num_begun]
                    core.add_request(str(num_begun), {"prompt_token_ids": prompt}, self._params(sampling, seed))
                    num_begun += 1
                for output in core.step():
                    if not output.finished:
                        continue
                    index = int(output.request_id)
                    groups[index] = self._completions(output.outputs)
                    heartbeat.drawn(groups[index])
                    if on_group is not None and self.keeps:
                        on_group(index, groups[index])
                under_way = self._under_way or {}  # vLLM's own count of preemptions comes with costly statistics
                preemptions |= {name: num for name, one in under_way.items() if (num := one.num_preemptions)}
                heartbeat.beat(under_way)
        finally:  # an interrupted call leaves nothing behind for the next one
            core.abort_request([str(index) for index in range(num_begun) if not groups[index]])
            if self.num_preemptions is not None and self.keeps:  # an engine of several ranks counts once
                self.num_preemptions += sum(preemptions.values())
        assert all(len(group) == sampling.num_samples for group in groups), "the engine lost completions"
        return groups

    @property
    def keeps(self) -> bool:
        """Whether this rank is the first of those that share the engine, the one that keeps what is drawn."""
        return self.tensor_parallel == 1 or _sharing().is_first_rank

    def _any(self, here: bool) -> bool:
        """Whether it is true on any rank that shares the engine: one that stepped without the others would hang."""
        if self.tensor_parallel == 1:
            return here
        import torch

        flag = torch.tensor(here, dtype=torch.int32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, _sharing().cpu_group)
        return bool(flag)

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.num_samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=seed,
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
        if self._vocabulary > self._num_known:
            self._tell_of_unknown(token_ids)
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [
            Completion(text, ids, list(output.logprobs.logprobs) if output.logprobs else [], str(output.finish_reason))
            for text, ids, output in zip(texts, token_ids, outputs, strict=True)
        ]

    def _tell_of_unknown(self, token_ids: list[list[int]]) -> None:
        """Say once that ids were sampled which stand for no text, as those of a padded vocabulary may be."""
        unknown = [token for ids in token_ids for token in ids if token >= self._num_known]
        if unknown and not self._is_told:
            self._is_told = True
            warn(
                f"the policy samples ids that its tokenizer lacks, such as {unknown[0]}: its vocabulary is padded from "
                f"{self._num_known} to {self._vocabulary}; they stand for no text and stay in the token ids"
            )


class _Heartbeat:
    """Says how far a call is whenever no group has been done for SILENCE_S: long completions take minutes."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._num_done = self._num_tokens = 0
        self._start = self._last = time.monotonic()

    def drawn(self, completions: list[Completion]) -> None:
        """Count a finished group."""
        self._num_done += 1
        self._num_tokens += sum(len(completion.token_ids) for completion in completions)
        self._last = time.monotonic()

    def beat(self, under_way: Mapping[str, Any]) -> None:
        """Say a line if it is time; `under_way` are the scheduler's requests. Of several processes the first does."""
        now = time.monotonic()
        if now - self._last < SILENCE_S or not under_way or os.environ.get("RANK", "0") != "0":
            return
        tokens = self._num_tokens + sum(request.num_output_tokens for request in under_way.values())
        speed = f"{tokens / max(1e-9, now - self._start):,.0f} tokens/s"
        warn(f"drawing: {self._num_done} of {self._num_prompts} groups done, {tokens:,} tokens so far, {speed}")
        self._last = now


def _start(policy: Path, **options: Any) -> Any:
    import vllm

    kernels.key_by_content()
    try:
        return vllm.LLM(model=str(policy), **options)
    except Exception as error:  # vLLM, torch and pydantic raise a dozen kinds, all of which mean that it does not start
        kinds = ", ".join(checkpoints.load_config(policy).architectures or ["no architecture"])
        raise InputError(
            f"policy {policy}: vLLM {vllm.__version__} does not start with it ({kinds}): {in_one_line(error)}"
        ) from error


def _sharing() -> Any:
    """vLLM's group of the ranks that share this engine."""
    from vllm.distributed import get_tp_group

    return get_tp_group()


def fitting(cache_tokens: int, longest: int) -> int:
    """How many sequences to have under way at once: as many as fit at half of the `longest` length, in tokens.

    They are at different lengths, and most end before the longest: few of so many are preempted.
    """
    return max(1, min(MAX_SEQUENCES, 2 * cache_tokens // longest))


def _on_cpu(max_model_len: int, is_compiled: bool) -> dict[str, Any]:
    """vLLM's arguments where there is no GPU.

    A prompt cut in two can't take back its seeded draw there ("CPU Generator does not use offset"), so none is cut.
    """
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_model_len, MAX_BATCHED_TOKENS)}
    return whole | kernels.options(is_compiled) | {"block_size": BLOCK_TOKENS}


def _repack(model: Any) -> None:
    """Repack tied heads and experts, which vLLM's CPU build packs when it loads but not when it reloads."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, VocabParallelEmbedding):
            method.process_weights_after_loading(module)
        elif (kernel := getattr(method, "moe_kernel", None)) is not None:
            kernel.fused_experts.process_weights_after_loading(module)


def configure() -> None:
    """Set vLLM's environment variables before its first import; those that the user has set stay."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # for top-p and top-k; asked for or not, the engine imports it at its start
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])

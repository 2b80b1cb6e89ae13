"""KL divergence of policies to a base, on completions that each drew itself: what `eval --kl-to` adds.

    KL(p || q) = E_y [sum_t KL_t],  y drawn from p,  KL_t = sum_v p(v | y_<t) (log p(v | y_<t) - log q(v | y_<t))

p is the policy and q the base, both at the temperature of sampling. KL_t is summed over the whole vocabulary, not
estimated from the token that was drawn (log p - log q, which is k1, or k3; see Schulman, "Approximating KL
divergence"): by the chain rule the sum is unbiased just the same, it is never negative, and it varies less. Completions
end at --max-tokens, and so does the divergence. In bfloat16 the rounding of logits adds some 1e-4 nats a token.

transformers runs both policies, once the engines are gone: two passes over a few completions a problem, where drawing
took a pass a token for all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.drawing.request import Request
from stages.core.drawing.rollouts import Prompt
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.core.policy.batching import microbatches
from stages.core.progress import StepProgress
from stages.core.records import Divergence
from stages.eval import partial
from stages.eval.drawing import Drawing
from stages.eval.partial import Groups, Writer

if TYPE_CHECKING:
    import torch

AT_ONCE = 64  # problems that are kept together, their completions sorted by length into micro-batches
TOKEN_BUDGET = 16384  # of a micro-batch; fewer if the vocabulary is large
MAX_LOGITS = 2**28  # of a micro-batch, for each of the two policies
CHUNK = 2**22  # logits that are held in float32 at a time

Share = Sequence[tuple[str, Prompt]]  # groups to score, each with the stem of the file for it


def checked(name: str, num_scored: int, temperatures: Sequence[float], request: Request) -> Path | None:
    """The directory of the base that --kl-to names, None if it names none; InputError if it can't be compared."""
    if not name:
        return None
    if 0 in temperatures:
        raise InputError("--kl-to: at --temperature 0 a policy is no distribution: leave one of them out")
    if num_scored > request.sampling.num_samples:
        raise InputError(f"--kl-samples {num_scored}: there are {request.sampling.num_samples} samples (--num-samples)")
    if request.ranks.tensor_parallel > 1:
        raise InputError("--kl-to: each process holds two whole policies for it: leave out --tensor-parallel")
    base, first = checkpoints.resolve(name), next(iter(request.policies.values()))
    prompts, longest = request.prompts, request.longest()
    if (size := _vocabulary(base)) != (expected := _vocabulary(first)):
        raise InputError(f"--kl-to {name}: its vocabulary has {size} tokens, that of the policies {expected}")
    encoded = checkpoints.encode(checkpoints.load_tokenizer(base), [prompt.text for prompt in prompts])
    if encoded != [prompt.token_ids for prompt in prompts]:
        raise InputError(f"--kl-to {name}: its tokenizer is another than that of the policies")
    if longest > (context := checkpoints.context_length(base)):
        raise InputError(f"--kl-to {name}: a prompt and --max-tokens are {longest} tokens, its context is {context}")
    if request.ranks.is_first:
        checkpoints.check_shapes(base)
    return base


def _vocabulary(path: Path) -> int:
    return int(checkpoints.load_config(path).get_text_config().vocab_size)


class UnscoredCompletion(NamedTuple):
    """A completion to score: of which problem and sample, and its tokens."""

    problem_id: str
    sample: int
    prompt_ids: list[int]
    token_ids: list[int]


def score_missing(drawing: Drawing, base: Path, base_digest: str, directory: Path) -> Drawing:
    """Score what is drawn in `directory` and not scored there yet; return it, as what is stored in files of its own.

    Each rank takes a share, and all meet at the end.
    """
    request, num_scored = drawing.request, drawing.num_scored
    stems = {key: f"kl{num_scored}-{base_digest[:16]}-{stem}" for key, stem in drawing.stems.items()}
    ranks = request.ranks
    known = ranks.on_first(lambda: {stem: partial.kept(directory, stem) for stem in stems.values()})
    shares = {name: ranks.share(partial.missing(request, name, stems, known)) for name in request.policies}
    tokens = {scored: partial.tokens_stem(drawing.stems[key], num_scored) for key, scored in stems.items()}
    ranks.together(lambda: _score(request, shares, tokens, base, directory))
    return Drawing(request, stems, {})


def _score(
    request: Request, shares: Mapping[str, Share], tokens: Mapping[str, str], base: Path, directory: Path
) -> None:
    """Score the share of each policy; `tokens` has the stems of the completions' tokens by those to write."""
    models, num_done = _Models(base, request), 0
    parts = [(name, own[i : i + AT_ONCE]) for name, own in shares.items() for i in range(0, len(own), AT_ONCE)]
    with StepProgress("KL", sum(map(len, shares.values())), quiet=not request.ranks.is_first) as progress:
        for name, part in parts:
            for stem, own in groupby(part, key=lambda pair: pair[0]):
                prompts = {prompt.problem["id"]: prompt.token_ids for _, prompt in own}
                scored = models.score(name, _drawn(directory, tokens[stem], prompts))
                with Writer(directory, stem, request.ranks.rank) as writer:
                    for of_problem in scored:
                        writer.add(of_problem)
            num_done += len(part)
            progress.step(num_done, name)


def _drawn(directory: Path, stem: str, prompts: dict[str, list[int]]) -> list[UnscoredCompletion]:
    """The completions whose tokens are kept, of these problems, given with the tokens of their prompts."""
    with Groups(directory, stem) as groups:
        return [
            UnscoredCompletion(problem_id, sample, token_ids, record["token_ids"])
            for problem_id, token_ids in prompts.items()
            for sample, record in enumerate(groups.get(problem_id))
        ]


class _Models:
    """The base and one policy after another, each loaded when it is needed."""

    def __init__(self, base: Path, request: Request) -> None:
        self._base, self._request = base, request
        self._loaded: dict[Path, Any] = {}
        self._budget = min(TOKEN_BUDGET, MAX_LOGITS // _vocabulary(base))

    def score(self, policy: str, completions: Sequence[UnscoredCompletion]) -> Iterator[list[Divergence]]:
        """The Divergences of a policy's completions, problem by problem."""
        own, base = (self._model(path) for path in (self._request.policies[policy], self._base))
        nats = [0.0] * len(completions)
        for batch in microbatches([len(c.prompt_ids) + len(c.token_ids) for c in completions], self._budget):
            scored = divergences(own, base, [completions[i] for i in batch], self._request.sampling.temperature)
            for index, value in zip(batch, scored, strict=True):
                nats[index] = value
        records: list[Divergence] = [
            {
                "problem_id": c.problem_id,
                "policy": policy,
                "sample": c.sample,
                "num_tokens": len(c.token_ids),
                "kl_nats": value,
            }
            for c, value in zip(completions, nats, strict=True)
        ]
        for _, of_problem in groupby(records, key=lambda record: record["problem_id"]):
            yield list(of_problem)

    def _model(self, path: Path) -> Any:
        if path not in self._loaded:
            self._loaded = {known: model for known, model in self._loaded.items() if known == self._base}
            self._loaded[path] = self._load(path)
        return self._loaded[path]

    def _load(self, path: Path) -> Any:
        import torch

        from stages.core.policy import acceleration
        from stages.core.ranks import process_state

        dtype = self._request.options.dtype
        if dtype == "auto":
            dtype = "bfloat16" if acceleration.uses_bfloat16(dtype) else "float32"
        return checkpoints.load_model(path, getattr(torch, dtype)).to(process_state().device)


def divergences(own: Any, base: Any, completions: Sequence[UnscoredCompletion], temperature: float) -> list[float]:
    """KL(own || base) along each completion, in nats, from one pass of both models.

    Padding is on the right, where causal attention never looks.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(c.prompt_ids + c.token_ids) for c in completions]
    input_ids = pad_sequence(rows, True, checkpoints.PADDING).to(own.device)
    with torch.inference_mode():
        p, q = (model(input_ids=input_ids, use_cache=False).logits for model in (own, base))
        spans = [slice(len(c.prompt_ids) - 1, len(c.prompt_ids) + len(c.token_ids) - 1) for c in completions]
        return [
            float(token_kl(p[row, span], q[row, span], temperature).double().sum()) for row, span in enumerate(spans)
        ]


def token_kl(own: "torch.Tensor", base: "torch.Tensor", temperature: float) -> "torch.Tensor":
    """KL_t at each position, from the logits of both (positions, vocabulary); float32, in nats."""
    import torch

    size = max(1, CHUNK // own.shape[-1])
    parts = []
    for p, q in zip(own.split(size), base.split(size), strict=True):
        log_p, log_q = ((logits.float() / temperature).log_softmax(-1) for logits in (p, q))
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)

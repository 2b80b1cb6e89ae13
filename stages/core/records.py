"""The records that pass between stages, one JSON object a line, and the check that each file holds them.

    problem       a question with its answer, which the verifier can compare with
    prompt        the exact text that a policy continues; a template or a chat template makes it of the problem
    completion    what a policy writes after a prompt; it stops by itself or is truncated at the token limit
    rollout       a completion with its reward and verdict (the paper's trajectory)
    group         the rollouts drawn together for one prompt; the group size is their number
    reward        what the verifier, or rewards of one's own, give a completion
    pass rate     the share of successes among a problem's rollouts; a problem with a low one is hard
    policy        the weights of a model with its tokenizer; a checkpoint is a directory that holds one
    start policy  what an iteration explores from, and what it fine-tunes afterwards
    step          a training step of RL: rollouts drawn, then one or more updates of the weights
    iteration     a turn of the loop: explore (rl), filter, fine-tune (rft)
    example       a rollout to fine-tune on; an epoch of rft sees each once
    result        how often one policy solved one problem in an evaluation
    log-prob      the natural logarithm of a token's probability, in nats

Records are plain dictionaries, so unknown keys travel along untouched and no time goes into conversion.
A missing or ill-typed field is an InputError that names file, line and field. Counts are stored, never rates:
every metric can be recomputed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, cast, get_args, get_type_hints

import msgspec

from stages.core import jsonl
from stages.core.errors import InputError

Verdict = Literal["correct", "unevaluated", "wrong", "no_answer", "rejected", "timeout", "error"]
FinishReason = Literal["stop", "length"]


class Message(TypedDict):
    """A turn of a chat; further keys go to the chat template with it.

    {"role": "user", "content": "What is 3 + 4?"}
    """

    role: str
    content: str


class Problem(TypedDict):
    """Made by prepare and toy, read by rl, sample and eval.

    {"id": "math-500/7", "problem": "What is 3 + 4?", "answer": "7", "source": "math-500"}

    `prompt` is how the problem itself says it: a text that the engine sees as it is, or the messages of a chat, which
    the policy's chat template renders. It replaces --template, but for the template's stop texts; without
    one, or with null, the template renders `problem`. `other_answers`, if there are any, are right as well as `answer`.
    """

    id: str
    problem: str
    answer: str
    source: str
    other_answers: NotRequired[list[str] | None]
    prompt: NotRequired[str | list[Message] | None]


class Rollout(TypedDict):
    """A completion with its reward; made by rl, sample and eval, read by filter, analyze and report.

    {"problem_id": "math-500/7", "sample": 0, "step": 12, "policy": "runs/0/policy", "prompt": "What is 3 + 4?",
     "completion": "3 + 4 = \\boxed{7}", "answer": "7", "reward": 1.0, "verdict": "correct", "num_tokens": 9,
     "finish_reason": "stop"}

    `reward` is never shaped: the verifier's 0.0 or 1.0, or the weighted sum of rewards of one's own, of any value;
    `verdict` is `correct` from 1.0 on. `token_ids` are the sampled tokens, with the one that ended them if they were
    not truncated, and `log_probs` their log-probs when they were drawn, packed as in core/drawing/tokens.py.
    """

    problem_id: str
    sample: int
    step: int  # 0 outside rl
    policy: str
    prompt: str
    completion: str
    answer: str
    other_answers: NotRequired[list[str]]  # the problem's
    reward: float
    verdict: Verdict
    num_tokens: int
    finish_reason: FinishReason
    token_ids: NotRequired[str]
    log_probs: NotRequired[str]  # of rl
    rewards: NotRequired[dict[str, float | None]]  # of one's own, by name; null if one does not apply
    trained: NotRequired[bool]  # of rl: did its group enter an update
    shaped_reward: NotRequired[float]  # of rl: what its advantage was taken from


class Example(TypedDict):
    """A rollout worth learning from, in TRL's prompt/completion columns; made by filter, read by rft.

    {"problem_id": "math-500/7", "prompt": "What is 3 + 4?", "completion": "3 + 4 = \\boxed{7}", "pass_rate": 0.05}

    `token_ids` and `log_probs` are the rollout's. `weight` multiplies its loss, 1 if it is not there; a negative one
    is a failure's, from which rft moves away.
    """

    problem_id: str
    prompt: str
    completion: str
    pass_rate: float
    token_ids: NotRequired[str]
    log_probs: NotRequired[str]
    weight: NotRequired[float]


class Result(TypedDict):
    """What one policy did on one problem; made by eval, read by analyze and report.

    {"problem_id": "math-500/7", "policy": "runs/1/policy", "temperature": 1.0, "num_samples": 32, "num_correct": 5,
     "num_truncated": 0, "num_no_answer": 2, "num_tokens": 9216,
     "verdicts": {"wrong": 25, "correct": 5, "no_answer": 2}}

    `num_tokens` is the sum over the samples. Only metrics need the fields that may be missing: eval writes those up to
    `verdicts` always, `wrong_votes` (the sizes of the classes of wrong answers, the largest first) with --maj,
    `num_greedy_correct` (0 or 1) with --greedy, and the last three, sums over the completions scored, with --kl-to.
    """

    problem_id: str
    policy: str
    num_samples: int
    num_correct: int
    num_truncated: int
    temperature: NotRequired[float]
    num_no_answer: NotRequired[int]
    num_tokens: NotRequired[int]
    verdicts: NotRequired[dict[Verdict, int]]
    wrong_votes: NotRequired[list[int]]
    num_greedy_correct: NotRequired[int]
    num_kl_samples: NotRequired[int]
    num_kl_tokens: NotRequired[int]
    kl_nats: NotRequired[float]


class Divergence(TypedDict):
    """KL(policy || base) along one completion that the policy drew, in nats; made by eval --kl-to.

    {"problem_id": "math-500/7", "policy": "runs/1/policy", "sample": 0, "num_tokens": 9, "kl_nats": 0.31}
    """

    problem_id: str
    policy: str
    sample: int
    num_tokens: int
    kl_nats: float


class Matrix(TypedDict):
    """A quantity of checkpoints i (rows) and j (columns) of a run on one set; made by analyze, read by report.

    {"name": "forgetting", "set": "valid", "run": "RL", "number": "2b", "definition": "share of ...", "labels": ["0",
     "30"], "policies": ["runs/0/policy", "runs/vanilla/rl/checkpoints/step_000030"], "values": [[0, 0.1], [0.2, 0]]}

    `number` is the figure of the paper, "" for none; `run` is "" and `compared` "RL - RLoop" if it is a difference of
    two runs.
    """

    name: str
    set: str
    run: str
    number: str
    definition: str
    labels: list[str]
    policies: list[str]
    values: list[list[float]]
    compared: NotRequired[str]
    temperature: NotRequired[str]  # of the samples; "0.6, 1" if those of policies differ


class Point(TypedDict):
    """A point of a Curve: its line, x, and y with a 95 % interval; the policy, or policies joined by " | "."""

    series: str
    x: float
    y: float
    low: float
    high: float
    policy: str
    after_rft: NotRequired[int]


class Curve(TypedDict):
    """Shares over steps or numbers of policies, a line a run; made by analyze, read by report.

    {"name": "retention", "set": "valid", "definition": "of the problems ...", "x_label": "RL steps", "rows": [
     {"series": "RL", "x": 30, "y": 0.8, "low": 0.7, "high": 0.9, "after_rft": 0, "policy": "runs/vanilla/..."}]}
    """

    name: str
    set: str
    definition: str
    x_label: str
    rows: list[Point]
    temperature: NotRequired[str]


class Similarity(TypedDict):
    """How alike a checkpoint's completions are within it and to the run's others; made by analyze, read by report.

    {"run": "RL", "step": 30, "after_rft": 0, "within": 0.5, "within_distinct": 0.4, "to_others": 0.3, "policy": "..."}

    `within_distinct` is without the pairs of a completion and itself, NaN (null) if there are no others.
    """

    run: str
    step: int
    after_rft: int
    within: float
    within_distinct: float
    to_others: float
    policy: str


class Column(NamedTuple):
    """A column: what it means, its unit, and what metrics.json holds of all rows: their sum, or the largest."""

    meaning: str
    unit: str = ""
    total: Literal["", "sum", "max"] = ""


class LogRow(TypedDict):
    """A step of rl: a line of its log.tsv, where a value that there is none of is empty; read by report and check.

    Rewards of one's own add `rewards/<name>`, the mean of each where it applies.
    """

    step: Annotated[int, Column("training step, from 1")]
    reward: Annotated[float, Column("mean reward of the rollouts as it enters the advantage")]
    pass_rate: Annotated[float, Column("share of correct rollouts")]
    num_groups: Annotated[int, Column("groups drawn", total="sum")]
    num_kept: Annotated[int, Column("groups in the batch", total="sum")]
    num_surplus: Annotated[int, Column("informative groups beyond a full batch", total="sum")]
    num_dropped: Annotated[int, Column("groups that teach nothing: all rewards equal", total="sum")]
    num_rounds: Annotated[int, Column("sampling rounds", total="sum")]
    acceptance: Annotated[float, Column("running share of informative groups, by which the next step draws")]
    short_batch: Annotated[int, Column("1 if the batch was not full", total="sum")]
    num_rollouts: Annotated[int, Column("rollouts drawn", total="sum")]
    num_trained: Annotated[int, Column("rollouts in an update that was made", total="sum")]
    loss: Annotated[float, Column("mean loss", "a token")]
    entropy: Annotated[float, Column("mean entropy of the policy along what it is trained on", "nats a token")]
    entropy_drawn: Annotated[
        float, Column("the same along all rollouts drawn: mean of -log p of the tokens", "nats a token")
    ]
    entropy_weight: Annotated[float, Column("weight of the entropy in the loss (--entropy-target)")]
    grad_norm: Annotated[float, Column("mean norm of the gradients before clipping")]
    grad_norm_max: Annotated[float, Column("largest norm of a gradient", total="max")]
    grad_alarms: Annotated[int, Column("gradients with a norm above --alarm-grad-norm", total="sum")]
    skipped_updates: Annotated[int, Column("updates left out for a non-finite loss or gradient", total="sum")]
    clip_low_frac: Annotated[float, Column("share of tokens clipped from below")]
    clip_high_frac: Annotated[float, Column("share of tokens clipped from above")]
    mismatch: Annotated[float, Column("mean difference between engine and trainer", "nats a token")]
    mismatch_max: Annotated[float, Column("largest difference between engine and trainer", "nats")]
    mismatch_alarms: Annotated[int, Column("1 if the mean difference was far above that of the start", total="sum")]
    lr: Annotated[float, Column("learning rate")]
    mean_tokens: Annotated[float, Column("mean length of a completion", "tokens")]
    max_tokens: Annotated[int, Column("longest completion", "tokens")]
    truncated: Annotated[float, Column("share of rollouts that reached --max-tokens")]
    no_answer: Annotated[float, Column("share of rollouts without an answer")]
    unevaluated: Annotated[float, Column("share of rollouts that equal the answer, but leave something to do")]
    timeouts: Annotated[int, Column("rollouts that the verifier gave up on", total="sum")]
    errors: Annotated[int, Column("rollouts on which a reward failed", total="sum")]
    rollout_tokens: Annotated[int, Column("length of all completions", "tokens", "sum")]
    update_tokens: Annotated[int, Column("length of the completions trained on", "tokens", "sum")]
    tokens_per_s: Annotated[float, Column("rollout_tokens over the seconds of the step without --valid", "tokens/s")]
    seconds: Annotated[float, Column("the whole step", "s", "sum")]
    generate_s: Annotated[float, Column("drawing", "s", "sum")]
    verify_s: Annotated[float, Column("waiting for rewards once all is drawn", "s", "sum")]
    update_s: Annotated[float, Column("updates", "s", "sum")]
    handover_s: Annotated[float, Column("handing the weights to the engine", "s", "sum")]
    peak_memory_gib: Annotated[float, Column("most memory in use on any GPU", "GiB", "max")]
    num_preemptions: Annotated[
        float, Column("sequences dropped from the engine's cache and computed again", total="sum")
    ]
    halvings: Annotated[int, Column("times that the micro-batch was halved for want of memory", total="sum")]
    rounding_changes: Annotated[int, Column("options and versions that round otherwise from here on", total="sum")]
    valid: Annotated[float, Column("avg@k on --valid after the step")]
    valid_start: Annotated[float, Column("avg@k of the start policy, in the first step's row")]
    valid_s: Annotated[float, Column("measuring on --valid", "s", "sum")]


def columns(table: type[LogRow]) -> dict[str, Column]:
    """The columns of a table by name, in the order of the file."""
    hints = get_type_hints(table, include_extras=True)
    return {name: next(mark for mark in hint.__metadata__ if isinstance(mark, Column)) for name, hint in hints.items()}


Record = TypeVar("Record", Problem, Rollout, Example, Result, Divergence)


def read(path: str | Path, kind: type[Record]) -> Iterator[Record]:
    """Yield the records of `path`, each checked against `kind`."""
    with jsonl.opened(path) as file:
        for _, _, record in scan(file, jsonl.name_of(path), kind):
            yield record


def scan(file: jsonl.LineSource, name: str, kind: type[Record]) -> Iterator[tuple[int, int, Record]]:
    """Yield (line number from 1, offset of the line in bytes, record checked against `kind`) of an open file."""
    return cast(Iterator[tuple[int, int, Record]], jsonl.scan(file, name, checker(kind)))


def read_problems(path: str | Path) -> list[Problem]:
    """All problems of `path`; InputError for a duplicate id, an ill-formed prompt, or a file without any."""
    seen: dict[str, int] = {}
    problems = []
    for number, problem in enumerate(_said_how_to_make(path), 1):
        if problem["id"] in seen:
            first = seen[problem["id"]]
            raise InputError(f"{path}:{number}: problem id {problem['id']!r} was already used on line {first}")
        if fault := prompt_fault(problem.get("prompt")) or _answers_fault(problem.get("other_answers")):
            raise InputError(f"{path}:{number}: {fault}")
        seen[problem["id"]] = number
        problems.append(problem)
    return problems


def _said_how_to_make(path: str | Path) -> Iterator[Problem]:
    """The problems of `path`; the error for a file of another form, or of rows as others have them, names prepare."""
    try:
        yield from read(path, Problem)
    except InputError as error:
        is_of_others = Path(path).suffix != ".jsonl" or "of Problem is missing" in str(error)
        if not Path(path).is_file() or not is_of_others:
            raise
        raise InputError(f"{error}; rloop prepare --source {path} makes a file of problems") from None


def accepted(record: Problem | Rollout) -> list[str]:
    """Every answer that is right."""
    return [record["answer"], *(record.get("other_answers") or ())]


def _answers_fault(answers: Any) -> str | None:
    if answers is None or (isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)):
        return None
    return f"field 'other_answers' of Problem must be a list of texts, found {answers!r:.60}"


def prompt_fault(prompt: Any) -> str | None:
    """A sentence on why `prompt` can't be a problem's own; None if it can, or if it is None."""
    try:
        msgspec.convert(prompt, _PROMPT)
    except msgspec.ValidationError as error:
        wanted = "a text, or a list of messages, each with the texts role and content"
        return f"field 'prompt' of Problem must be {wanted}: {error}"
    return None


_PROMPT = Annotated[str, msgspec.Meta(min_length=1)] | Annotated[list[Message], msgspec.Meta(min_length=1)] | None


def checker(kind: type[Record]) -> Callable[[dict[str, Any]], str | None]:
    """A function from a dictionary to None, or to a sentence on the first needed field that `kind` forbids.

    A JSON number without a point is an int to JSON writers in other languages, so ints pass as floats;
    booleans never pass as numbers, and ints are counts or positions, so negative ones don't pass.
    """
    needed = cast(Any, kind).__required_keys__
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in needed}
    fields: dict[str, Any] = {name: COUNT if hint is int else hint for name, hint in hints.items()}
    shape = msgspec.defstruct(kind.__name__, [*fields.items()])

    def check(record: dict[str, Any]) -> str | None:
        try:
            msgspec.convert(record, shape)  # a struct that goes at once: msgspec has no check without one
        except msgspec.ValidationError:
            faults = (_fault(kind.__name__, name, record, hint) for name, hint in fields.items())
            return next(filter(None, faults))
        return None

    return check


COUNT = Annotated[int, msgspec.Meta(ge=0)]


def _fault(kind: str, name: str, record: dict[str, Any], hint: Any) -> str | None:
    """A sentence on the field `name`, if it is missing or not what `hint` says."""
    if name not in record:
        return f"field {name!r} of {kind} is missing"
    value = record[name]
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        if hint is COUNT:
            expected = "0 or more" if type(value) is int else "int"
        else:
            expected = " or ".join(get_args(hint)) or hint.__name__
        shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
        return f"field {name!r} of {kind} must be {expected}, found {type(value).__name__} {shown}"
    return None

"""Rewards of one's own beside math-verify's: functions of TRL's signature, in worker processes, and their weighted sum.

    rewards = read(options)                      # --reward math-verify --reward mine.py:short --reward-weight 1 ...
    check(rewards, prompts, tokenizer)           # before an engine starts: signatures, and a call with a made-up group
    with rewards.grader() as grader:
        grader.grade(problem, prompt, completions, completion_ids).result()

A function is called once for a group, by keyword as TRL does: `f(prompts, completions, completion_ids, **columns)`,
where the columns are the keys of the problem's record. It returns a number for each completion, or None if it does not
apply; None is left out of the sum. The bounds are those of the verifier's algebra for each completion
(`grading.bounds`).

What a function raises, a call out of bounds or a worker that ends is an `error` or `timeout` for the whole group, whose
rewards are 0 then, so that it teaches nothing; `Score.fault` says why.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

from stages.core import provenance
from stages.core.errors import InputError
from stages.core.grading import bounds
from stages.core.grading.scores import Grader, Pending, Score
from stages.core.grading.verifier import Verifier, default_workers
from stages.core.grading.workers import Job, Kind, Loss, Pool
from stages.core.options import PATH, OptionGroup
from stages.core.progress import warn
from stages.core.records import Problem, Verdict

if TYPE_CHECKING:
    from stages.core.drawing.rollouts import Prompt

WORKER = "stages.core.grading.rewards.worker"  # the module that a worker runs
MATH_VERIFY = "math-verify"
PLAIN = [(MATH_VERIFY, 1.0)]  # names and weights where a reward is 1 or 0, as math-verify says
SLACK_S = 30.0  # of wall time, beyond twice the CPU time that a call may take
MAX_TOLD = 10  # different messages that are told as they come


@dataclass(frozen=True, kw_only=True)
class GradingOptions(OptionGroup):
    """What a stage that has math-verify grade completions adds to its options."""

    accept_unevaluated: Annotated[
        bool, "reward what equals the answer but is not worked out, such as 3+4 for 7, or 2x=6 for x=3"
    ] = False


@dataclass(frozen=True, kw_only=True)
class RewardOptions(GradingOptions):
    """What a stage that scores completions adds to its options."""

    reward: Annotated[
        list[str],
        "what scores a completion: math-verify, or your function as FILE.py:function; repeatable, rewards are added",
        PATH,
    ] = field(default_factory=lambda: [MATH_VERIFY])
    reward_weight: Annotated[list[float], "weight of each --reward, in their order; if none is given, 1 each"] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        """Raise InputError for weights that don't match the rewards."""
        super().__post_init__()
        if self.reward_weight and len(self.reward_weight) != len(self.reward):
            raise InputError(
                f"--reward-weight is given {len(self.reward_weight)} times, for {len(self.reward)} --reward: give one "
                "for each, or none"
            )

    @property
    def weights(self) -> list[float]:
        return list(self.reward_weight) or [1.0] * len(self.reward)

    @property
    def has_own_rewards(self) -> bool:
        """Whether rewards are anything but math-verify's 1 or 0."""
        return list(zip(self.reward, self.weights, strict=True)) != PLAIN


class Reward(NamedTuple):
    """One summand; `given` is the option. `path`, `function` and the file's `digest` are "" for math-verify."""

    name: str
    weight: float
    given: str = ""
    path: str = ""
    function: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Rewards:
    """What scores completions."""

    each: tuple[Reward, ...] = (Reward(MATH_VERIFY, 1.0),)
    accept_unevaluated: bool = False  # the Verifier's

    @property
    def are_own(self) -> bool:
        """Whether they are anything but math-verify's 1 or 0."""
        return [(reward.name, reward.weight) for reward in self.each] != PLAIN

    @property
    def digest(self) -> str:
        """What two calls that reward alike share: a digest of files, functions and weights."""
        if not self.are_own:
            return MATH_VERIFY
        parts = [[reward.name, reward.weight, reward.digest] for reward in self.each]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def resolved(self) -> dict[str, Any]:
        """What identities and manifests say of them."""
        names, weights = [reward.name for reward in self.each], [reward.weight for reward in self.each]
        return {"reward": names, "reward_weight": weights, "reward_digest": self.digest}

    @property
    def functions(self) -> list[Reward]:
        """Those that are functions of the user's."""
        return [reward for reward in self.each if reward.path]

    def grader(self, bare: bool = False, has_scored: bool = False) -> "Grader":
        """What scores by them, a context manager; `bare` is the Verifier's."""
        if self.are_own:
            return OwnGrader(self, bare, has_scored)
        return Verifier(bare=bare, accept_unevaluated=self.accept_unevaluated)


def read(options: RewardOptions) -> Rewards:
    """The rewards that are asked for. Raises InputError for a file that is not there, or no Python."""
    named = zip(options.reward, options.weights, strict=True)
    rewards = Rewards(tuple(_read(text, weight) for text, weight in named), options.accept_unevaluated)
    for name, count in Counter(reward.name for reward in rewards.each).items():
        if count > 1:
            raise InputError(f"--reward {name} is given {count} times: name each once, and files of one name apart")
    return rewards


def _read(text: str, weight: float) -> Reward:
    if text == MATH_VERIFY:
        return Reward(text, weight, text)
    file, _, function = text.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise InputError(f"--reward {text}: expected {MATH_VERIFY}, or FILE.py:function")
    if not Path(file).is_file():
        raise InputError(f"--reward {text}: there is no file {file}")
    path = str(Path(file).absolute())
    return Reward(f"{Path(file).name}:{function}", weight, text, path, function, provenance.digest(path))


class Fault(NamedTuple):
    """Why a function gave no rewards for a group; `raised` if it was by an exception of its own."""

    verdict: Verdict
    text: str
    raised: bool = False


Answer = list[float | None] | Fault  # a function's rewards of a group


class OwnGrader:
    """Scores groups by `rewards`; a context manager, since it holds worker processes.

    `has_scored` says that they have worked on other groups before, in a call that goes on now.
    """

    def __init__(
        self, rewards: Rewards, bare: bool = False, has_scored: bool = False, workers: int | None = None
    ) -> None:
        self.rewards = rewards
        self._has_scored = has_scored
        self._names = [reward.name for reward in rewards.functions]
        files = [[reward.name, reward.path, reward.function, reward.digest] for reward in rewards.functions]
        kind = Kind("the rewards", WORKER, (json.dumps(files),), _read_answer, _lost)
        self._pool: Pool[Answer] = Pool(kind, workers or default_workers())
        is_verified = len(self._names) < len(rewards.each)
        self._verifier = Verifier(bare=bare, accept_unevaluated=rewards.accept_unevaluated) if is_verified else None
        self._num_groups = self._num_failed = self._num_unscored = 0
        self._faults: Counter[str] = Counter()

    def __enter__(self) -> "OwnGrader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None and self._faults:
            most = "; ".join(f"{count} x {text}" for text, count in self._faults.most_common(MAX_TOLD))
            warn(f"the rewards failed on {self._num_failed} of {self._num_groups} groups: {most}")

    def close(self) -> None:
        """End the workers; asking for a score that was not ready raises RuntimeError."""
        self._pool.close()
        if self._verifier is not None:
            self._verifier.close()

    def grade(
        self, problem: Problem, prompt: str, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> Pending:
        """Begin to score the completions of one prompt."""
        call = {"problem": problem, "prompt": prompt, "completions": completions, "completion_ids": completion_ids}
        batch = self._verifier.grade(problem, prompt, completions, completion_ids) if self._verifier else None
        answers = self.ask(call, bounds.DEADLINE_S * len(completions))

        def settle() -> list[Score]:
            verified = batch.result() if batch else None
            return self._add_up([each.result() for each in answers], verified, len(completions))

        return Pending([*answers, *(batch.awaited if batch else ())], settle)

    def ask(self, call: Mapping[str, Any], deadline_s: float) -> list[Future[Answer]]:
        """Have a worker put a call to each function."""
        futures: list[Future[Answer]] = [Future() for _ in self._names]
        if futures:
            self._pool.send(Job(call, list(self._names), futures, SLACK_S + 2 * deadline_s))
        return futures

    def refuse_failed(self) -> None:
        """Raise InputError if there are no rewards for any group so far, since a function failed on each."""
        if self._faults and self._num_failed == self._num_groups and not self._has_scored:
            text, _ = self._faults.most_common(1)[0]
            raise InputError(f"the rewards failed on all {self._num_groups} groups: --reward {text}")

    def _add_up(self, answers: list[Answer], verified: list[Score] | None, num: int) -> list[Score]:
        """The scores of a group of `num` completions, from what each function and the verifier gave."""
        self._num_groups += 1
        by_name = dict(zip(self._names, answers, strict=True))
        faults = {name: answer for name, answer in by_name.items() if isinstance(answer, Fault)}
        if faults:
            name, fault = next(iter(faults.items()))
            text = f"{name}: {fault.text}"
            if text not in self._faults and len(self._faults) < MAX_TOLD:
                warn(f"--reward {text}; the verdict on the group is {fault.verdict}")
            self._faults[text] += 1
            self._num_failed += 1
            return [Score(fault.verdict, 0.0, None, {}, text)] * num
        scores = [self._score(by_name, verified[i] if verified else None, i) for i in range(num)]
        unscored = sum(not score.applies for score in scores)
        if unscored and not self._num_unscored:
            warn(
                "no reward applies to some completions (all gave None): they count as 0, and no update learns from them"
            )
        self._num_unscored += unscored
        return scores

    def _score(self, by_name: Mapping[str, Any], verified: Score | None, index: int) -> Score:
        parts: dict[str, float | None] = {
            reward.name: by_name[reward.name][index] if reward.path else verified and verified.reward
            for reward in self.rewards.each
        }
        applied = ((reward.weight, parts[reward.name]) for reward in self.rewards.each)
        total = math.fsum(weight * part for weight, part in applied if part is not None)
        verdict: Verdict = "correct" if total >= 1.0 else "wrong"
        if verified and verdict == "wrong" and verified.verdict != "correct":
            verdict = verified.verdict
        return Score(verdict, total, verified.prediction if verified else None, parts)


def _read_answer(reply: bytes) -> Answer:
    fields = json.loads(reply)
    if "rewards" in fields:
        return cast(list[float | None], fields["rewards"])
    return Fault(fields["verdict"], fields["fault"], fields["raised"])


def _lost(_: Any, loss: Loss) -> Answer:
    return Fault(loss.verdict, loss.how)


def check(rewards: Rewards, prompts: Sequence["Prompt"], tokenizer: Any, is_first: bool = True) -> None:
    """Raise InputError for a function that can't be called, or gives no rewards for made-up groups of two.

    What a function raises for one group but not for another is only told, on the first rank.
    """
    if not rewards.functions:
        return
    with OwnGrader(rewards, workers=1) as grader:
        keys = [set(prompt.problem) for prompt in prompts]
        always = set.intersection(*keys)
        call = {"always": sorted(always), "sometimes": sorted(set.union(*keys) - always)}
        trials = list(_trials(prompts[0], tokenizer))
        answers = [grader.ask(each, 2 * bounds.DEADLINE_S) for each in (call, *trials)]
        for reward, futures in zip(rewards.functions, zip(*answers, strict=True), strict=True):
            takes, *gave = (future.result() for future in futures)
            faults = [answer for answer in (takes, *gave) if isinstance(answer, Fault)]
            serious = [fault for fault in faults if not fault.raised]
            if serious or len(faults) == len(gave) or isinstance(takes, Fault):
                raise InputError(f"--reward {reward.given}: {(serious or faults)[0].text}")
            for fault in faults if is_first else []:
                warn(f"--reward {reward.name}: {fault.text}, for a completion that was made up to try it")


def _trials(prompt: "Prompt", tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Two groups to try a function with: completions that are just the answer, and empty ones."""
    for text in (prompt.problem["answer"], ""):
        completions = [text, text]
        ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
        yield {"problem": prompt.problem, "prompt": prompt.text, "completions": completions, "completion_ids": ids}

"""Completion and answer in, verdict and reward out: the memo and the pool of workers around the comparison.

A completion is untrusted text. What `comparison` can decide on the text alone (rational numbers, words, choices, and
lists, tuples, intervals and matrices of those) is decided here in microseconds; the rest goes to `algebra` in worker
processes (`grading.workers`), under bounds of CPU time and memory (`grading.bounds`). No worker starts before one is
needed.
"""

import importlib.metadata
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

from stages.core.grading.scores import Pending, Score
from stages.core.grading.verifier.comparison import decide
from stages.core.grading.verifier.extraction import extract
from stages.core.grading.verifier.latex import MAX_LENGTH
from stages.core.grading.verifier.quantities import name_units
from stages.core.grading.workers import Job, Kind, Pool
from stages.core.records import Problem, Verdict, accepted

WORKER = "stages.core.grading.verifier.algebra"  # the module that a worker runs
MAX_MEMO_BYTES = 256 * 2**20  # of the texts whose verdicts are kept: about a million short ones
ENTRY_BYTES = 200  # of an entry beside its texts
MAX_JOB = 16  # predictions sent to a worker at once, all for one answer, which is then parsed once

VERSION = {
    "grader": "5",
    **{
        name: importlib.metadata.version(name)
        for name in ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
    },
}


Promise = Verdict | Future[Verdict]
# Of the verdicts beside several answers the first of these counts.
BEST: tuple[Verdict, ...] = ("correct", "unevaluated", "timeout", "error", "wrong", "rejected", "no_answer")


def default_workers() -> int:
    """The cores that this process may use, shared with the other ranks of its node, less one for itself; at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # as torchrun and accelerate set it
    return max(1, min(8, cores // ranks - 1))


class Verifier:
    """Scores completions; a context manager, since it may hold worker processes.

    `workers` bounds the processes (default: see `default_workers`). `bare` lets a completion without box and final
    line count by its bare final expression, for base models that know neither; with `accept_unevaluated` 3+4 is correct
    for 7. `counts` holds how many scores of each verdict were handed out.
    """

    def __init__(self, workers: int | None = None, bare: bool = False, accept_unevaluated: bool = False) -> None:
        self.workers = workers if workers is not None else default_workers()
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        read, lost = (lambda reply: cast(Verdict, reply.decode())), (lambda _, loss: cast(Verdict, loss.verdict))
        self._pool: Pool[Verdict] = Pool(Kind("the verifier", WORKER, (), read, lost), self.workers)
        self.bare = bare
        self.accept_unevaluated = accept_unevaluated
        self.counts: Counter[Verdict] = Counter()
        self._memo: dict[tuple[str, str], Promise] = {}
        self._memo_bytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self, pairs: Sequence[tuple[str, str | Sequence[str]]]) -> list[Score]:
        """Score (completion, answer, or answers of which any is right) pairs, in order."""
        return self.submit(pairs).result()

    def grade(self, problem: Problem, prompt: str, completions: Sequence[str], completion_ids: Any) -> Pending:
        """Begin to score the completions of one prompt, as `grading.rewards` does."""
        answers = accepted(problem)
        return self.submit([(completion, answers) for completion in completions], [prompt] * len(completions))

    def refuse_failed(self) -> None:
        """Nothing: what can't be worked out is a verdict here."""

    def submit(self, pairs: Sequence[tuple[str, str | Sequence[str]]], prompts: Sequence[str] = ()) -> Pending:
        """Begin to score pairs as `verify` takes them; returns without waiting for any algebra.

        The prompts, if they are known, tell which words behind a number are units, and whether a thought began there.
        """
        pending: list[tuple[str | None, list[Promise]]] = []
        jobs: dict[str, Job[Verdict]] = {}
        with self._lock:
            for (completion, right), prompt in zip(pairs, prompts or [""] * len(pairs), strict=True):
                answers = (right,) if isinstance(right, str) else right
                prediction = extract(completion, self.bare, prompt)
                if prediction is None:
                    pending.append((None, ["no_answer"]))
                elif len(prediction) > MAX_LENGTH:  # of which nothing is kept but its beginning
                    pending.append((prediction[:MAX_LENGTH], ["rejected"]))
                else:
                    verdicts = [self._find(answer, prediction, jobs, prompt) for answer in answers]
                    pending.append((prediction, verdicts))
            self._send(jobs.values())
        awaited = [promise for _, verdicts in pending for promise in verdicts if isinstance(promise, Future)]
        return Pending(awaited, partial(self._settle, pending))

    def _settle(self, pending: Sequence[tuple[str | None, list[Promise]]]) -> list[Score]:
        scores = []
        for prediction, verdicts in pending:
            verdict = min((each.result() if isinstance(each, Future) else each for each in verdicts), key=BEST.index)
            if verdict == "unevaluated" and self.accept_unevaluated:
                verdict = "correct"
            scores.append(Score(verdict, 1.0 if verdict == "correct" else 0.0, prediction))
        self.counts.update(score.verdict for score in scores)
        return scores

    def parseable(self, answers: Sequence[str]) -> list[bool]:
        """Whether each answer can be compared with anything at all; one that cannot never rewards a completion."""
        alone = ((answer, extract(answer if "boxed" in answer else f"\\boxed{{{answer}}}")) for answer in answers)
        pairs = [(answer, (inside or "")[: MAX_LENGTH + 1]) for answer, inside in alone]
        return [verdict == "correct" for verdict in self.compare(pairs)]

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdicts on (answer, prediction) pairs, in order, `correct` for all that are equal; none is counted."""
        jobs: dict[str, Job[Verdict]] = {}
        with self._lock:
            verdicts = [self._find(answer, prediction, jobs) for answer, prediction in pairs]
            self._send(jobs.values())
        settled = [verdict.result() if isinstance(verdict, Future) else verdict for verdict in verdicts]
        return ["correct" if verdict == "unevaluated" else verdict for verdict in settled]

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now: none until algebra is needed."""
        return self._pool.pids

    def close(self) -> None:
        """End the workers; asking for a score that was not ready raises RuntimeError."""
        self._pool.close()

    def _find(self, answer: str, prediction: str, jobs: dict[str, Job[Verdict]], prompt: str = "") -> Promise:
        """The verdict from the memo or the text, or the promise of one, which is then in `jobs` or on its way."""
        is_number = prediction[-1:].isdigit() and answer[-1:].isdigit()
        if not is_number and len(answer) <= MAX_LENGTH >= len(prediction):
            answer, prediction = name_units(answer, prediction, prompt)
        key = (answer, prediction)
        if (known := self._memo.get(key)) is not None:
            if isinstance(known, Future) and known.done() and known.exception() is None:
                known = self._memo[key] = known.result()
            return known
        verdict: Promise | None = decide(answer, prediction)
        if verdict is None:
            verdict = Future()
            job = jobs.setdefault(answer, Job(answer, []))
            job.items.append(prediction)
            job.futures.append(verdict)
        self._remember(key, verdict)
        return verdict

    def _remember(self, key: tuple[str, str], verdict: Promise) -> None:
        self._memo[key] = verdict
        self._memo_bytes += _weight(key)
        if self._memo_bytes > MAX_MEMO_BYTES:  # the older half goes; what is asked for again is worked out again
            for old in list(self._memo)[: len(self._memo) // 2]:
                self._memo_bytes -= _weight(old)
                del self._memo[old]

    def _send(self, jobs: Iterable[Job[Verdict]]) -> None:
        self._pool.refuse_closed()
        for job in jobs:
            for start in range(0, len(job.items), MAX_JOB):
                part = slice(start, start + MAX_JOB)
                self._pool.send(Job(job.head, job.items[part], job.futures[part]))


def _weight(key: tuple[str, str]) -> int:
    """Bytes of a memo's entry; its answer is shared by many."""
    return sys.getsizeof(key[1]) + ENTRY_BYTES

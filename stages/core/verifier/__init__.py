"""Completion and answer in, verdict and reward out: the memo and the pool of workers around the comparison.

    with Verifier() as verifier:
        batch = verifier.submit([("So it is \\\\boxed{\\\\frac12}.", "0.5")])    # returns at once
        [Score(verdict="correct", reward=1.0, prediction="\\\\frac12")] = batch.result()

A completion is untrusted text. What `core.verifier.comparison` can decide on the text alone (numbers, words, choices,
and lists, tuples, intervals and matrices of those) is decided here in microseconds; the rest goes to
`core.verifier.algebra` in worker processes, under bounds of CPU time and memory. The bounds count CPU time, not wall
time, so that a reward does not depend on the load of the machine; a worker that hangs in C code is ended by the
kernel and replaced, and its other jobs go on. No worker starts before one is needed. Workers are fresh interpreters,
not forks, so that they hold neither torch nor the caller's threads, nor run the caller's main module again; they die
with the caller.

Verdicts: `no_answer` there is nothing to compare; `rejected` over-long, over-deep, or refused before any algebra;
`timeout` the bound of CPU time was hit; `error` memory ran out, or the algebra failed on our side; `wrong`, `correct`.
Only `correct` is rewarded.
"""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple, cast

from stages.core.errors import InputError
from stages.core.records import Verdict
from stages.core.verifier.comparison import decide
from stages.core.verifier.extraction import extract
from stages.core.verifier.latex import MAX_LENGTH

WORKER = "stages.core.verifier.algebra"  # the module that a worker runs
MAX_MEMO_BYTES = 256 * 2**20  # of the texts whose verdicts are kept: about a million short ones
ENTRY_BYTES = 200  # of an entry beside its texts
MAX_JOB = 16  # predictions sent to a worker at once, all for one answer, which is then parsed once
MAX_WALL_S = 300.0  # a worker silent for so long is neither working nor dying: only then does wall time count
DEADLINE_SIGNALS = (signal.SIGXCPU, signal.SIGPROF)  # what a worker dies of that ran out of CPU time
MAX_ATTEMPTS = 2  # a worker that something else killed takes no verdict along: its job is tried once more

VERSION = {
    "grader": "4",
    **{
        name: importlib.metadata.version(name)
        for name in ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
    },
}


class Score(NamedTuple):
    """A verdict; `reward` is 1.0 for `correct` and 0.0 otherwise; `prediction` is the text that was compared."""

    verdict: Verdict
    reward: float
    prediction: str | None


class _Job(NamedTuple):
    answer: str
    predictions: list[str]
    futures: list[Future[Verdict]]
    attempt: int = 1


class Batch:
    """Scores that are being worked out; `result` waits for them."""

    def __init__(self, verifier: "Verifier", pending: list[tuple[str | None, Verdict | Future[Verdict]]]) -> None:
        self._verifier = verifier
        self._pending = pending
        self._scores: list[Score] | None = None

    def result(self) -> list[Score]:
        """The scores in the order of the pairs."""
        if self._scores is None:
            self._scores = [self._score(*item) for item in self._pending]
            self._verifier.counts.update(score.verdict for score in self._scores)
        return self._scores

    @property
    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return self._scores is not None or all(v.done() for _, v in self._pending if isinstance(v, Future))

    @staticmethod
    def _score(prediction: str | None, verdict: Verdict | Future[Verdict]) -> Score:
        if isinstance(verdict, Future):
            verdict = verdict.result()
        return Score(verdict, 1.0 if verdict == "correct" else 0.0, prediction)


def default_workers() -> int:
    """The cores that this process may use, shared with the other ranks of its node, less one for itself; at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # as torchrun and accelerate set it
    return max(1, min(8, cores // ranks - 1))


class Verifier:
    """Scores completions; a context manager, since it may hold worker processes.

    `workers` bounds the processes (default: see `default_workers`). `bare` lets a completion without box and "Answer:"
    line count by its bare final expression, for base models that know neither. `counts` holds how many scores of each
    verdict were handed out.
    """

    def __init__(self, workers: int | None = None, bare: bool = False) -> None:
        self.workers = workers if workers is not None else default_workers()
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.bare = bare
        self.counts: Counter[Verdict] = Counter()
        self._memo: dict[tuple[str, str], Verdict | Future[Verdict]] = {}
        self._memo_bytes = 0
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._tenders: list[_Tender] = []
        self._closed = False

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Score (completion, answer) pairs, in order."""
        return self.submit(pairs).result()

    def submit(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        """Begin to score (completion, answer) pairs; returns without waiting for any algebra."""
        pending: list[tuple[str | None, Verdict | Future[Verdict]]] = []
        jobs: dict[str, _Job] = {}
        with self._lock:
            for completion, answer in pairs:
                prediction = extract(completion, self.bare)
                if prediction is None:
                    pending.append((None, "no_answer"))
                elif len(prediction) > MAX_LENGTH:  # of which nothing is kept but its beginning
                    pending.append((prediction[:MAX_LENGTH], "rejected"))
                else:
                    pending.append((prediction, self._find(answer, prediction, jobs)))
            self._send(jobs.values())
        return Batch(self, pending)

    def parseable(self, answers: Sequence[str]) -> list[bool]:
        """Whether each answer can be compared with anything at all; one that cannot never rewards a completion."""
        pairs = [(answer, (extract(f"\\boxed{{{answer}}}") or "")[: MAX_LENGTH + 1]) for answer in answers]
        return [verdict == "correct" for verdict in self.compare(pairs)]

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """The verdicts on (answer, prediction) pairs, in order: as `verify`, but nothing is extracted or counted."""
        jobs: dict[str, _Job] = {}
        with self._lock:
            verdicts = [self._find(answer, prediction, jobs) for answer, prediction in pairs]
            self._send(jobs.values())
        return [verdict.result() if isinstance(verdict, Future) else verdict for verdict in verdicts]

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now: none until algebra is needed."""
        return [tender.pid for tender in self._tenders if tender.pid is not None]

    def close(self) -> None:
        """End the workers; asking for a score that was not ready raises RuntimeError."""
        self._closed = True
        for tender in self._tenders:
            tender.end()
        for tender in self._tenders:  # only now: any of them may have taken the word to end that was meant for another
            tender.join()
        self._tenders.clear()
        for verdict in self._memo.values():
            if isinstance(verdict, Future) and not verdict.done():
                verdict.set_exception(RuntimeError("this Verifier was closed before the score was ready"))

    def _find(self, answer: str, prediction: str, jobs: dict[str, _Job]) -> Verdict | Future[Verdict]:
        """The verdict from the memo or the text, or the promise of one, which is then in `jobs` or on its way."""
        key = (answer, prediction)
        if (known := self._memo.get(key)) is not None:
            if isinstance(known, Future) and known.done() and known.exception() is None:
                known = self._memo[key] = known.result()
            return known
        verdict: Verdict | Future[Verdict] | None = decide(answer, prediction)
        if verdict is None:
            verdict = Future()
            job = jobs.setdefault(answer, _Job(answer, [], []))
            job.predictions.append(prediction)
            job.futures.append(verdict)
        self._remember(key, verdict)
        return verdict

    def _remember(self, key: tuple[str, str], verdict: Verdict | Future[Verdict]) -> None:
        self._memo[key] = verdict
        self._memo_bytes += _weight(key)
        if self._memo_bytes > MAX_MEMO_BYTES:  # the older half goes; what is asked for again is worked out again
            for old in list(self._memo)[: len(self._memo) // 2]:
                self._memo_bytes -= _weight(old)
                del self._memo[old]

    def _send(self, jobs: Iterable[_Job]) -> None:
        if self._closed:
            raise RuntimeError("this Verifier was closed")
        for job in jobs:
            for start in range(0, len(job.predictions), MAX_JOB):
                part = slice(start, start + MAX_JOB)
                self._jobs.put(_Job(job.answer, job.predictions[part], job.futures[part]))
                if len(self._tenders) < self.workers:
                    self._tenders.append(_Tender(self._jobs))


def _weight(key: tuple[str, str]) -> int:
    """Bytes of a memo's entry; its answer is shared by many."""
    return sys.getsizeof(key[1]) + ENTRY_BYTES


def _no_worker(cause: str) -> InputError:
    return InputError(
        f"a worker of the verifier could not start: {cause}; "
        "free memory, or raise the limits of memory and processes (ulimit -v, ulimit -u)"
    )


class _Tender:
    """A thread that feeds one worker process, takes its verdicts, and replaces it when it dies."""

    def __init__(self, jobs: "SimpleQueue[_Job | None]") -> None:
        self._jobs = jobs
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stderr: IO[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # "can't start new thread"
            raise _no_worker(str(error)) from None

    @property
    def pid(self) -> int | None:
        """The process id of the worker, if it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def end(self) -> None:
        """Have the thread and its worker end at once."""
        self._ended = True
        self._jobs.put(None)
        if (process := self._process) is not None:
            process.kill()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended and (job := self._jobs.get()) is not None:
                try:
                    self._work(job)
                except Exception as error:
                    for future in job.futures:
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._stop()

    def _work(self, job: _Job) -> None:
        """Have the worker decide the job; what is left of it when the worker dies goes to a new one."""
        while job.predictions and not self._ended:
            done, last = self._converse(job)
            for future, verdict in zip(job.futures, done, strict=False):
                future.set_result(verdict)
            rest = _Job(job.answer, job.predictions[len(done) :], job.futures[len(done) :], 1 if done else job.attempt)
            if rest.predictions and last is None and rest.attempt < MAX_ATTEMPTS:
                rest = rest._replace(attempt=rest.attempt + 1)
            elif rest.predictions:
                rest.futures[0].set_result(last or "error")
                rest = _Job(job.answer, rest.predictions[1:], rest.futures[1:])
            job = rest

    def _converse(self, job: _Job) -> tuple[list[Verdict], Verdict | None]:
        """The verdicts a worker gave, and, where it died, what its death says of the next one (None: nothing)."""
        pipe = self._start()
        done: list[Verdict] = []
        try:
            pipe.send_bytes(json.dumps([job.answer, job.predictions]).encode())
            while len(done) < len(job.predictions) and pipe.poll(MAX_WALL_S):
                done.append(cast(Verdict, pipe.recv_bytes().decode()))
        except (EOFError, OSError):
            pass
        if len(done) == len(job.predictions):
            return done, None
        return done, "timeout" if self._stop() in DEADLINE_SIGNALS else None

    def _start(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None or self._pipe is None:
            root = str(Path(__file__).resolve().parents[3])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._pipe, theirs = Pipe()
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
            with theirs:
                self._process = self._open(theirs, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
            if self._ended:  # `end` may have looked for a process to kill just before there was one
                self._process.kill()
            self._await_ready(self._pipe)
        return self._pipe

    def _open(self, theirs: Connection, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(
                [sys.executable, "-m", WORKER, str(theirs.fileno()), str(os.getpid())],
                env=environment | {"PYTHONHASHSEED": "0"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
            )
        except OSError as error:  # no memory, or no process left to this user
            raise _no_worker(str(error)) from None

    def _await_ready(self, pipe: Connection) -> None:
        try:
            ready = pipe.poll(MAX_WALL_S) and pipe.recv_bytes()
        except (EOFError, OSError):
            ready = b""
        if not ready and not self._ended:
            said, signal_number = self._last_words(), self._stop()
            raise _no_worker(said or f"ended by signal {signal_number}")

    def _last_words(self) -> str:
        """The last line of what the worker wrote to its standard error."""
        if self._stderr is None:
            return ""
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 1000))
        return self._stderr.read().decode(errors="replace").strip().rpartition("\n")[2]

    def _stop(self) -> int:
        """End the worker, if there is one; the signal that ended it, or 0."""
        if self._process is None or self._pipe is None:
            return 0
        self._pipe.close()
        if self._stderr is not None:
            self._stderr.close()
        try:
            code = self._process.wait(timeout=0.5)  # a dying worker: its own cause of death is what counts
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = self._pipe = None
        return max(0, -code)

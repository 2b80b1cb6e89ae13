"""Worker processes for what must not hang or kill a run: each does one job after another, and is replaced if it dies.

    pool = Pool(Kind("the verifier", "stages.core.grading.verifier.algebra", (), bytes.decode, lost), size=3)
    pool.send(job := Job("0.5", ["1/2", "2"]))         # returns at once; job.futures get the replies, item by item

What runs in the worker is a module that serves one end of a pipe, under bounds of its own (`grading.bounds`). Workers
are fresh interpreters, not forks, so that they hold neither torch nor the caller's threads, nor run the caller's main
module again; they die with the caller. No worker starts before one is needed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Generic, Literal, NamedTuple, TypeVar

from stages.core.errors import InputError

MAX_WALL_S = 300.0  # a worker silent for so long is neither working nor dying: only then does wall time count
DEADLINE_SIGNALS = (signal.SIGXCPU, signal.SIGPROF)  # what a worker dies of that ran out of CPU time
MAX_ATTEMPTS = 2  # a worker that something else killed takes no reply along: its job is tried once more

INHERITED = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "CONDA_PREFIX")
PREFIXES = ("LC_", "PYTHON", "LD_", "DYLD_", "OMP_", "MKL_", "OPENBLAS_", "RLOOP_")  # RLOOP_: for rewards of one's own

T = TypeVar("T")


class Loss(NamedTuple):
    """Why an item has no reply; `how` is for messages. If it was `bad_luck`, maybe, the item is tried once more."""

    verdict: Literal["timeout", "error"]
    how: str
    bad_luck: bool = True


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a worker is: the module it runs with its arguments, how its replies are read, what a lost item counts as."""

    name: str
    module: str
    arguments: tuple[str, ...]
    read: Callable[[bytes], T]
    lost: Callable[[Any, Loss], T]


@dataclass(frozen=True)
class Job(Generic[T]):
    """What a worker is asked: `head` holds for all `items`, each of which is answered by one reply."""

    head: Any
    items: list[Any]
    futures: list[Future[T]] = field(default_factory=list)
    max_wall_s: float = MAX_WALL_S
    attempt: int = 1

    def after(self, num_done: int) -> "Job[T]":
        """What is left of it once the first `num_done` items have their replies."""
        attempt = 1 if num_done else self.attempt
        return replace(self, items=self.items[num_done:], futures=self.futures[num_done:], attempt=attempt)


class Pool(Generic[T]):
    """Up to `size` workers of one kind."""

    def __init__(self, kind: Kind[T], size: int) -> None:
        self.size = size
        self._kind = kind
        self._jobs: SimpleQueue[Job[T] | None] = SimpleQueue()
        self._tenders: list[_Tender[T]] = []
        self._closed = False

    def send(self, job: Job[T]) -> None:
        """Have a worker do the job; its futures get the replies, or the exception that kept a worker from starting."""
        self.refuse_closed()
        self._jobs.put(job)
        if len(self._tenders) < self.size:
            self._tenders.append(_Tender(self._kind, self._jobs))

    def refuse_closed(self) -> None:
        """Raise RuntimeError once the pool is closed."""
        if self._closed:
            raise RuntimeError(f"{self._kind.name} was closed")

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [tender.pid for tender in self._tenders if tender.pid is not None]

    def close(self) -> None:
        """End the workers; asking for a reply that was not there raises RuntimeError."""
        self._closed = True
        for tender in self._tenders:
            tender.end()
        for tender in self._tenders:  # once all are told: a tender may take the None that was put for another
            tender.join()
        self._tenders.clear()
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                _fail(job, RuntimeError(f"{self._kind.name} was closed before the reply was there"))


def needed(environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker is given of the environment: no keys and tokens, for it reads what a policy has written."""
    return {name: value for name, value in environment.items() if name in INHERITED or name.startswith(PREFIXES)}


def _fail(job: Job[T], error: Exception) -> None:
    for future in job.futures:
        if not future.done():
            future.set_exception(error)


class _Tender(Generic[T]):
    """A thread that feeds one worker process, takes its replies, and replaces it when it dies."""

    def __init__(self, kind: Kind[T], jobs: "SimpleQueue[Job[T] | None]") -> None:
        self._kind = kind
        self._jobs = jobs
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stderr: IO[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=kind.name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # "can't start new thread"
            raise self._no_worker(str(error)) from None

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
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended and (job := self._jobs.get()) is not None:
                try:
                    self._work(job)
                except Exception as error:
                    _fail(job, error)
                _fail(job, RuntimeError(f"{self._kind.name} was closed before the reply was there"))
        finally:
            self._stop()

    def _work(self, job: Job[T]) -> None:
        """Have the worker do the job; what is left of it when the worker dies goes to a new one."""
        while job.items and not self._ended:
            done, loss = self._converse(job)
            for future, reply in zip(job.futures, done, strict=False):
                future.set_result(reply)
            job = job.after(len(done))
            if not job.items or self._ended:
                continue
            if loss.bad_luck and job.attempt < MAX_ATTEMPTS:
                job = replace(job, attempt=job.attempt + 1)
            else:
                job.futures[0].set_result(self._kind.lost(job.items[0], loss))
                job = job.after(1)

    def _converse(self, job: Job[T]) -> tuple[list[T], Loss]:
        """The replies that a worker gave, and, if it died, how."""
        pipe = self._start()
        done: list[T] = []
        is_silent = False
        try:
            pipe.send_bytes(json.dumps([job.head, job.items]).encode())
            while len(done) < len(job.items) and not is_silent:
                is_silent = not pipe.poll(job.max_wall_s)
                if not is_silent:
                    done.append(self._kind.read(pipe.recv_bytes()))
        except (EOFError, OSError):
            pass
        if len(done) == len(job.items):
            return done, Loss("error", "")
        code = self._stop()
        if -code in DEADLINE_SIGNALS:
            return done, Loss("timeout", "it took too much CPU time", bad_luck=False)
        if is_silent:
            return done, Loss("timeout", f"it gave no reply in {job.max_wall_s:g} s")
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return done, Loss("error", f"its process ended with {ending}")

    def _start(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None or self._pipe is None:
            root = str(Path(__file__).resolve().parents[3])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            self._pipe, theirs = Pipe()
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
            with theirs:
                self._process = self._open(theirs, needed(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)})
            if self._ended:  # `end` may have looked for a process to kill just before there was one
                self._process.kill()
            self._await_ready(self._pipe)
        return self._pipe

    def _open(self, theirs: Connection, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        ends = [str(theirs.fileno()), str(os.getpid())]
        try:
            return subprocess.Popen(
                [sys.executable, "-m", self._kind.module, *ends, *self._kind.arguments],
                env=environment | {"PYTHONHASHSEED": "0"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
            )
        except OSError as error:  # no memory, or no process left to this user
            raise self._no_worker(str(error)) from None

    def _await_ready(self, pipe: Connection) -> None:
        try:
            ready = pipe.poll(MAX_WALL_S) and pipe.recv_bytes()
        except (EOFError, OSError):
            ready = b""
        if not ready and not self._ended:
            said, code = self._last_words(), self._stop()
            raise self._no_worker(said or (f"ended by signal {-code}" if code < 0 else f"exit code {code}"))

    def _no_worker(self, cause: str) -> InputError:
        return InputError(
            f"a worker of {self._kind.name} could not start: {cause}; "
            "free memory, or raise the limits of memory and processes (ulimit -v, ulimit -u)"
        )

    def _last_words(self) -> str:
        """The last line of what the worker wrote to its standard error."""
        if self._stderr is None:
            return ""
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 1000))
        return self._stderr.read().decode(errors="replace").strip().rpartition("\n")[2]

    def _stop(self) -> int:
        """End the worker, if there is one; its exit code, or less the signal that ended it."""
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
        return code

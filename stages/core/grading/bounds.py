"""The worker's side of `grading.workers`: bounds of CPU time and memory on a call, and the loop that serves the parent.

The bounds count CPU time, not wall time, so that a reward does not depend on the load of the machine. A call that an
exception can't end, since it sits in C code, is ended by the kernel, with its process.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

DEADLINE_S = 2.0  # of CPU time: an honest pair takes the verifier 2 to 60 ms, a few times as much if its kind is new
BACKSTOP_S = 2  # after that a process that has not ended the call is ended
MAX_MEMORY = 2**30  # bytes, beyond what the worker holds when it is ready
MAX_GROWTH = 400 * 2**20  # bytes; a worker that holds more than when it was ready leaves, and is replaced

T = TypeVar("T")


class Deadline(BaseException):
    """The bound of CPU time."""


class Bounds:
    """Ends a call at its bound of CPU time: by an exception or, if none gets through, by the end of its process."""

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGPROF, self._expire)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def limit_memory(self) -> None:
        """From now on the process gets MAX_MEMORY and no more."""
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = _pages(0) + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    def __call__(
        self, call: Callable[[], T], failed: Callable[[BaseException], T], deadline_s: float = DEADLINE_S
    ) -> T:
        """What `call` gives, or what `failed` makes of the exception that ended it, a Deadline among others."""
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + deadline_s + BACKSTOP_S), hard))
        try:
            signal.setitimer(signal.ITIMER_PROF, deadline_s)
            self._armed = True
            value = call()
            self._armed = False
        except BaseException as error:  # a SystemExit, too, is the call's and not the worker's
            self._armed = False
            value = failed(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        return value

    def _expire(self, *_: Any) -> None:
        if self._armed:  # at most once, so that nothing can escape from the handling of the first
            self._armed = False
            raise Deadline


def connected() -> Connection:
    """The pipe to the parent: its descriptor is the first argument of the command line, the parent's id the second.

    From now on this process dies with its parent and leaves Ctrl-C to it.
    """
    if sys.platform == "linux":  # the kernel then kills this process, whatever it is doing
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Connection(int(sys.argv[1]))


def serve(pipe: Connection, work: Callable[[Any, list[Any]], Iterable[bytes]]) -> None:
    """Say that the worker is ready, and send what `work` gives for each job, until the parent hangs up.

    A worker that has grown by more than MAX_GROWTH ends after its job.
    """
    most = _pages(1) + MAX_GROWTH
    pipe.send_bytes(b"ready")
    while _pages(1) <= most:
        try:
            head, items = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        for reply in work(head, items):
            pipe.send_bytes(reply)


def _pages(field: int) -> int:
    """Bytes of this process: of address space (0), or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()

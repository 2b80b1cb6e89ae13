"""When to stop: SIGTERM lets the step at hand finish, and a stage does not outlive what started it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TERMINATED = 128 + signal.SIGTERM


class StopSignal:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Within the block SIGTERM only raises a flag; the second one ends the process at once, as usual."""
    stop = StopSignal()

    def receive(*_: object) -> None:
        stop.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent(interval_s: float = 1.0) -> None:
    """Send this process SIGTERM when what started it dies: its parent, or the starter of the shell in between.

    A killed `dvc repro` otherwise leaves its stage running, and the next one starts a second. Under nohup or setsid,
    which say that the process is meant to live on, nothing is watched.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN or os.getsid(0) == os.getpid():
        return
    starters = _starters()
    if starters:
        threading.Thread(target=_watch, args=(starters, interval_s), daemon=True).start()


def _watch(starters: dict[int, int], interval_s: float) -> None:
    parent = os.getppid()
    while os.getppid() == parent and all(_parent_of(child) == starter for child, starter in starters.items()):
        time.sleep(interval_s)
    os.kill(os.getpid(), signal.SIGTERM)


def _starters() -> dict[int, int]:
    """Child to parent, upwards from this process, through shells that run one command (`sh -c`) to their starter."""
    chain, child = {}, os.getpid()
    while (parent := _parent_of(child)) > 1:
        chain[child] = parent
        if not _is_command_shell(parent):
            return chain
        child = parent
    return {}


def _parent_of(pid: int) -> int:
    """The parent's process id from /proc; 0 where the process is gone or there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _is_command_shell(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return Path(os.fsdecode(words[0])).name.lstrip("-") in ("sh", "bash", "dash", "zsh") and b"-c" in words[1:3]

"""When to stop: on SIGTERM, noticed between two steps of the engine, and when the process that started a stage dies.
On Ctrl-C at once, or within `stop_signal` as on SIGTERM; `going_on` then says what is kept.

What sends SIGTERM kills a while later: torchelastic (`accelerate launch`, `torchrun`) after the seconds of
TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30 if that is not set, Slurm after KillWait, 30 by default.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TERMINATED = 128 + signal.SIGTERM
ECHO_S = 5.0  # a SIGTERM so soon after the first is the same one: Slurm signals launcher and workers, who pass it on
LAUNCHER_GRANTS_S = 30  # torchelastic's default
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}


class Stopped(Exception):
    """Work was abandoned because SIGTERM was received."""


class StopSignal:
    """Whether SIGTERM or Ctrl-C was received, and the exit code that says which."""

    def __init__(self) -> None:
        self.received = False
        self.code = TERMINATED

    def is_received(self) -> bool:
        """The same as a function, to pass as `should_stop`."""
        return self.received


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Within the block SIGTERM and Ctrl-C only raise a flag; a second one ends the process at once, as usual.

    A second SIGTERM counts ECHO_S after the first, a second Ctrl-C at once. Where SIGINT is ignored it stays so.
    """
    stop = StopSignal()
    first = 0.0
    usual = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        usual[signal.SIGINT] = signal.default_int_handler

    def receive(number: int, _: object) -> None:
        nonlocal first
        if not stop.received:
            stop.received, stop.code, first = True, 128 + number, time.monotonic()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif time.monotonic() - first > ECHO_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    for number in usual:
        signal.signal(number, receive)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def going_on(where: Callable[[], str]) -> Iterator[None]:
    """Let a Ctrl-C within the block say `where` the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(where()) from None


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Hold back a Ctrl-C until the end of the block: torch's checkpoints make it an error of theirs, or lose it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in the background of a shell
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def granted_s() -> int | None:
    """Seconds that this process has after SIGTERM until its launcher kills it; None if no launcher is known."""
    if not _is_launched():
        return None
    return int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LAUNCHER_GRANTS_S))


def end_with_parent(interval_s: float = 1.0) -> None:
    """Send this process SIGTERM when what started it dies: its parent, or the starter of launcher and shell between.

    A killed `dvc repro` otherwise leaves its stage running, and the next one starts a second. Nothing is watched above
    a process that is meant to live on: one under nohup or setsid. (torchelastic gives each worker a session of its own,
    which says nothing; and it takes SIGHUP back from nohup, which is then known by the variable `_` that bash sets.)
    """
    starters = _starters()
    if starters:
        threading.Thread(target=_watch, args=(starters, interval_s), daemon=True).start()


def _watch(starters: dict[int, int], interval_s: float) -> None:
    while all(_parent_of(child) == starter for child, starter in starters.items()):
        time.sleep(interval_s)
    os.kill(os.getpid(), signal.SIGTERM)


def _starters() -> dict[int, int]:
    """Child to parent, upwards from this process through launcher and `sh -c`, up to what started them."""
    chain: dict[int, int] = {}
    child = os.getpid()
    if _is_launched():
        launcher = os.getppid()
        chain[child], child = launcher, launcher
        if _is_under_nohup(launcher):
            return chain
    while not (_leads_session(child) or _ignores_hangup(child)) and (parent := _parent_of(child)) > 1:
        chain[child] = parent
        if not (_is_command_shell(parent) or _is_launcher(parent)):
            break
        child = parent
    return chain


def _is_launched() -> bool:
    """Whether this is a worker of torchelastic: it says so, and each leads a session of its own."""
    return "TORCHELASTIC_RUN_ID" in os.environ and _leads_session(os.getpid()) and os.getppid() > 1


def _is_under_nohup(launcher: int) -> bool:
    """Whether a process that handles SIGHUP was begun with it ignored: its parent ignores it, or bash ran nohup."""
    starter = _parent_of(launcher)
    return _ignores_hangup(starter) or (_is_from_nohup(launcher) and not _is_from_nohup(starter))


def _is_from_nohup(pid: int) -> bool:
    variables = _proc(pid, "environ").split(b"\0")
    return any(variable.startswith(b"_=") and variable.endswith(b"nohup") for variable in variables)


def _ignores_hangup(pid: int) -> bool:
    ignored = _proc(pid, "status").partition(b"SigIgn:")[2].split()
    return bool(ignored) and bool(int(ignored[0], 16) >> (signal.SIGHUP - 1) & 1)


def _leads_session(pid: int) -> bool:
    return _stat(pid)[3:4] == [str(pid).encode()]


def _parent_of(pid: int) -> int:
    """The parent's process id; 0 if the process is gone or there is no /proc."""
    return int((_stat(pid)[1:2] or [b"0"])[0])


def _stat(pid: int) -> list[bytes]:
    """State, parent, group, session and so on of a process; [] if it is gone."""
    return _proc(pid, "stat").rpartition(b")")[2].split()


def _is_command_shell(pid: int) -> bool:
    words = _words(pid)
    return words[0].lstrip("-") in ("sh", "bash", "dash", "zsh") and "-c" in words[1:3]


def _is_launcher(pid: int) -> bool:
    """Whether a process is accelerate or torchrun, run by name or as a module of Python."""
    return not LAUNCHERS.isdisjoint(_words(pid)[:3])


def _words(pid: int) -> list[str]:
    """The command line of a process, each word without the directories before it."""
    return [Path(os.fsdecode(word)).name for word in _proc(pid, "cmdline").split(b"\0")]


def _proc(pid: int, name: str) -> bytes:
    """A file of /proc; b"" if the process is gone, or there is no /proc."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""

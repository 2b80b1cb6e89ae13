"""Outputs that appear whole or not at all, with a lock for whoever writes them.

Write through `whole_file` or `whole_dir`, within `claimed` for a new output or `locked` for one that grows."""

import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import orjson

from stages.core.errors import InputError
from stages.core.progress import warn

HOST = platform.node().partition(".")[0][-32:] or "host"  # unfinished outputs are named after it, see `_remove_left`
ASIDE = ".before-"  # in the name of an output that another has taken the place of


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError of the block the name of what is written, as that of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it becomes `path` when the block ends well, and is gone otherwise."""
    path = Path(path)
    refuse_no_file(path)
    beside = _beside(path)
    with _writing(path):
        beside.touch()
    try:
        with naming(path):
            yield beside
            _sync(beside)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_dir(path: str | Path, replacing: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`; it becomes `path` when the block ends well, and is gone otherwise.

    Raises InputError if `path` already holds something: a result is never overwritten. With `replacing`, for what
    is only derived, the old directory goes when the new one is whole.
    """
    path = Path(path)
    if not replacing:
        refuse_occupied(path)
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)  # left by a killed process that had the same id
    with _writing(path):
        beside.mkdir()
    try:
        with naming(path):
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    _sync(file)
            if path.exists():
                shutil.rmtree(path) if replacing else path.rmdir()
            beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_occupied(path: str | Path) -> None:
    """Raise InputError if `path` is a file or a directory with anything in it, or can't be written at all."""
    refuse_unwritable(path)
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} already holds something: name another --out, or remove it first")


def refuse_unwritable(path: str | Path) -> None:
    """Raise InputError if nothing can be written at `path`: call it before hours of work.

    A file is made and removed beside it, or in the nearest existing directory above, and within it if it is a
    directory that grows. Permission bits would not tell: root ignores them, and so does a read-only mount.
    """
    path = Path(path)
    _refuse_no_name(path)
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is no directory that you may write to")
    for directory in (above, path) if path.is_dir() else (above,):
        probe = directory / _unfinished_name(path, "probing")
        with _writing(path):
            try:
                probe.write_bytes(b"-")
            finally:
                probe.unlink(missing_ok=True)


def _refuse_no_name(path: Path) -> None:
    """Raise InputError for a path without a file name, or a link that leads nowhere."""
    if path.name in ("", ".."):
        raise InputError(f"{path} is no name to write to: name a new file or directory in it")
    with _writing(path):
        is_lost = path.is_symlink() and not path.exists()
    if is_lost:
        raise InputError(f"{path} is a link to something that is not there: remove it, or name another --out")


def refuse_no_file(path: str | Path) -> None:
    """Raise InputError if `path` is there and is no plain file, so that none can be written in its place."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file to write")
    _refuse_no_name(path)
    if path.exists() and not path.is_file():  # renaming over /dev/null would replace it for the whole machine
        raise InputError(f"{path} is not a plain file: name another --out, or - for stdout where a stage takes it")


@contextmanager
def claimed(path: str | Path, *others: str | Path) -> Iterator[None]:
    """Hold the lock on the new output `path`; `-`, which is stdout, needs none.

    Raises InputError as `refuse_occupied` and `locked` do. `others` are written beside it by the same stage.
    """
    if str(path) == "-":
        yield
        return
    refuse_occupied(path)
    with locked(path, *others):
        refuse_occupied(path)  # another process may just have written it
        yield


@contextmanager
def locked(path: str | Path, *others: str | Path) -> Iterator[None]:
    """Hold the lock on `path`; a second process gets an InputError. The kernel frees it when the process dies.

    What killed processes left unfinished of `path` and of `others`, written under the same lock, is removed.
    """
    path = Path(path)
    _refuse_no_name(path)
    made = [parent for parent in path.parents if not parent.exists()]
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _lock_file(path)
        opened = beside.open("a")
    with opened as file:
        with _writing(path):
            _lock(file, path)
        if not beside.exists() or not os.path.samestat(os.fstat(file.fileno()), beside.stat()):
            raise InputError(f"{path} was just written by another process: look at it, then start again")
        try:
            for output in (path, *map(Path, others)):
                _remove_left(output)
            yield
        finally:
            beside.unlink(missing_ok=True)
            with suppress(OSError):  # of the first that holds something
                for directory in made:
                    directory.rmdir()


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path} is being written by another process: wait for it or name another --out") from None


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock on `path` at this moment."""
    try:
        with _lock_file(Path(path)).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _remove_left(path: Path) -> None:
    """Remove what killed processes left unfinished of `path`; the caller holds its lock.

    Process ids are not checked, since they are reused: the holder of the lock is alone. A lock may not reach other
    machines that share the disk, so what theirs left is only named in a warning.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.([^.]+)-\d+\.(?:partial|probing)")
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if not (match := name.fullmatch(left.name)):
            continue
        if match[1] != HOST:
            warn(f"{left} was left unfinished on {match[1]}: remove it if nothing writes {path} there")
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def aside(path: Path) -> Path:
    """A name beside `path` that is not taken, for what it holds: runs/1/rl.before-20261129-113000."""
    while (name := path.with_name(f"{path.name}{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}")).exists():
        time.sleep(0.1)
    return name


def set_aside(below: Path) -> list[str]:
    """A line for each output in `below`, or in a directory of it, that was moved to what `aside` names: its size."""
    lines = []
    for path in sorted(path for depth in ("", "*/") for path in below.glob(f"{depth}*{ASIDE}*")):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shown = f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
        lines.append(f"{path} takes {shown}: an earlier run that was moved aside; remove it when it is not wanted")
    return lines


def default_mode() -> int:
    """The permissions of a new file: by the umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE, default=str))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of `path`; {} if there is no such file, an InputError if it is no JSON object."""
    if not Path(path).is_file():
        return {}
    try:
        value = orjson.loads(Path(path).read_bytes())
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}): was the file cut?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _beside(path: Path) -> Path:
    """A name for the unfinished `path` in its own directory, which is made if it is missing."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(_unfinished_name(path, "partial"))


def _unfinished_name(path: Path, kind: str) -> str:
    return f".{path.name}.{HOST}-{os.getpid()}.{kind}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}: name another --out") from None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

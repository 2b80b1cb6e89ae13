"""The processes that a stage was launched in: their number, the share of each, and an end that all come to together.

    ranks = Ranks()                         alone, unless accelerate or torchrun launched this process with others
    plan = ranks.together(check)            an InputError on any rank ends all: one line, exit code 2 on each
    out = ranks.on_first(open_output)       only the first rank does it, all get what it gives
    digest = ranks.once(stamp, read)        only the first of those that see the same does it
    draw(ranks.share(prompts))              every engine its share
    drawn = ranks.gather(mine)              what each rank has, on every rank

A process that is alone meets nobody and loads no torch for this. Ranks wait for each other in these calls only, so one
that draws waits for none. A rank that dies is noticed by the launcher, which ends the others.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from stages.core.errors import CollapseError, InputError

if TYPE_CHECKING:
    from accelerate import PartialState

# How long a rank waits for the others: for the slowest share of a round of long completions, or for a checkpoint on a
# slow disk. A round at the paper's scale takes minutes; one of 32,000 tokens at 20 a second, in two waves, about an
# hour. Torch's own 10 minutes would end such runs. A rank that dies is noticed by the launcher at once, not by this.
STEP_LIMIT = timedelta(hours=4)
STORE_LIMIT_S = 10  # for the launcher's store to answer, once a rank has failed
T = TypeVar("T")


def _launched(variable: str, alone: int) -> int:
    """What the launcher says in `variable`; `alone` for a process that was started without one."""
    return int(os.environ[variable]) if "LOCAL_RANK" in os.environ else alone


def process_state() -> "PartialState":
    """This process among all that were launched; the first call joins them, so it comes before any Accelerator."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=STEP_LIMIT)


@dataclass(frozen=True)
class Ranks:
    """This process among all that were launched with it, of which each `tensor_parallel` in a row share an engine.

    What is drawn is shared out by engine: all ranks of an engine draw the same, and the first of them keeps it.
    """

    tensor_parallel: int = 1
    rank: int = field(default_factory=lambda: _launched("RANK", 0))
    num_ranks: int = field(default_factory=lambda: _launched("WORLD_SIZE", 1))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints, locks and writes outputs."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.num_ranks == 1

    @property
    def engine(self) -> int:
        """The number of this rank's engine, from 0."""
        return self.rank // self.tensor_parallel

    @property
    def num_engines(self) -> int:
        return self.num_ranks // self.tensor_parallel

    @property
    def keeps(self) -> bool:
        """Whether this rank is the first of its engine, the one that keeps what the engine draws."""
        return self.rank % self.tensor_parallel == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of `items` that this rank's engine draws: every so many, since neighbours are often of one length."""
        return items[self.engine :: self.num_engines]

    def refuse_uneven(self) -> None:
        """Raise InputError if the ranks cannot be divided into engines."""
        if self.num_ranks % self.tensor_parallel:
            launched = "one process" if self.is_alone else f"{self.num_ranks} processes"
            raise InputError(
                f"--tensor-parallel {self.tensor_parallel}: must divide the number of processes, and this was launched "
                f"as {launched}: see accelerate launch --num_processes"
            )

    def gather(self, mine: T) -> list[T]:
        """What each rank has, by rank, on every rank; waits for all.

        Raises CollapseError if a rank has died.
        """
        if self.is_alone:
            return [mine]
        process_state()
        from accelerate.utils import gather_object

        try:
            return list(gather_object([mine]))
        except RuntimeError as error:  # torch's, when a connection breaks
            lost = f"rank {self.rank} lost another, which has ended or can't be reached"
            raise CollapseError(f"{lost}: see what that one said, then start again") from error

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, once it is done on all; if it fails on one, all end.

        The first rank on which it failed raises the error, the others SystemExit with the code of that. `work` must
        not wait for other ranks.
        """
        if self.is_alone:
            return work()
        error: Exception | None = None
        try:
            value = work()
        except Exception as caught:  # raised again below, once the others know
            error = caught
        codes = self.gather(0 if error is None else 2 if isinstance(error, InputError | OSError) else 1)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            self._leave(codes[failed], error if failed == self.rank else None)
        return value

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, which alone does it; if it fails there, all end as in `together`."""
        return self.once(None, work)

    def once(self, key: object, work: Callable[[], T]) -> T:
        """What `work` gives on the first of the ranks with this `key`, which alone does it for them."""
        doer = self.gather(key).index(key)
        value = self.together(lambda: work() if self.rank == doer else None)
        return self.gather(value)[doer]  # type: ignore[return-value]

    @contextmanager
    def raise_once(self) -> Iterator[None]:
        """Let one rank alone raise a user's error that several meet in the block; the others leave with its code.

        For what can't be done `together`, since ranks wait for each other inside, as when their engines start.
        """
        try:
            yield
        except (InputError, CollapseError) as error:
            if self.is_alone or self._is_first_to_fail():
                raise
            self._leave(2 if isinstance(error, InputError) else 1)

    def _leave(self, code: int, error: Exception | None = None) -> NoReturn:
        """End with `error`, or after the rank that has it: when one ends, the launcher ends all, spoken or not."""
        if error is not None:
            raise error
        with suppress(CollapseError):
            self.gather(None)  # which fails when that rank is gone
        raise SystemExit(code)

    def _is_first_to_fail(self) -> bool:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=STORE_LIMIT_S))
            return bool(store.add("rloop/failed", 1) == 1)
        except RuntimeError:  # it went with rank 0, which failed before
            return False

    def refuse_differences(self, seen: Mapping[str, str]) -> None:
        """Raise InputError, as `together` does, if ranks see different things; `seen` are digests by name."""
        everyone = self.gather((platform.node(), dict(seen)))

        def compare() -> None:
            for rank, (host, theirs) in enumerate(everyone):
                if apart := [name for name, value in everyone[0][1].items() if theirs.get(name) != value]:
                    raise InputError(
                        f"rank {rank} on {host} sees another {', '.join(apart)} than rank 0 on {everyone[0][0]}: "
                        "give all ranks the same, on a disk that they share"
                    )

        self.together(compare)

    def refuse_unseen(self, path: Path) -> None:
        """Raise InputError, as `together` does, if a rank does not see `path`, which the first has made."""

        def look() -> None:
            if not path.exists():
                raise InputError(
                    f"rank {self.rank} on {platform.node()} does not see {path}, which rank 0 has made: name an --out "
                    "on a disk that all ranks share"
                )

        self.together(look)

    def wait(self) -> None:
        """Wait until all ranks have come so far."""
        self.gather(None)


ALONE = Ranks(1, 0, 1)

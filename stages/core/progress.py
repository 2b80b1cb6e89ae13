"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

LINES = 20  # lines of progress over a whole run if stderr is no terminal


def warn(message: str) -> None:
    """Print one line on stderr, for what the user should know but does not end the run."""
    print(f"rloop: {message}", file=sys.stderr, flush=True)


class StepProgress:
    """A bar over steps with a note; `quiet` on all ranks but the main one."""

    def __init__(self, title: str, total: int, done: int = 0, quiet: bool = False):
        from rich.console import Console  # here, since the stages import this module for `warn`
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.title, self.total, self.quiet = title, total, quiet
        self.started = time.monotonic()
        self._done = done
        self.on_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet or not self.on_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "StepProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, note: str) -> None:
        """Show what the current step is doing."""
        self._bar.update(self._task, note=note)

    def step(self, done: int, note: str) -> None:
        """Show that `done` steps are done, with a note."""
        self._bar.update(self._task, completed=done, note=note)
        every = -(-self.total // LINES)
        before, self._done = self._done, done
        if not self.quiet and not self.on_terminal and (done // every > before // every or done == self.total):
            seconds = time.monotonic() - self.started
            print(f"{self.title} {done}/{self.total}  {note}  {seconds:.0f} s", file=sys.stderr, flush=True)

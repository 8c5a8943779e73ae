"""What a run shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_WIDTH = 118  # of tables where there is no terminal to ask
_LINES = 10  # per run, where there is no terminal


def make_console() -> Console:
    """Standard output, wide enough for a table where it is a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


@contextmanager
def progress(console: Console, name: str, steps: int, done: int = 0) -> Iterator[Bar | Lines]:
    """An observer of a run that has `steps` steps, `done` of them taken."""
    if not console.is_terminal:
        yield Lines(console, name, steps)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield Bar(bar, name, steps, done)


class Bar:
    """Loss, held-out loss and tokens per second beside a rich progress bar."""

    def __init__(self, bar: Progress, name: str, steps: int, done: int) -> None:
        self._bar, self._held_out = bar, ""
        self._task = bar.add_task(name, total=steps, completed=done, loss="", speed="")

    def step(self, done: int, loss: float, tokens_per_second: float) -> None:
        self.show(done, f"loss {loss:.3f}", f"{tokens_per_second:,.0f} tokens/s")

    def held_out(self, done: int, loss: float) -> None:
        self.note(done, f"held out {loss:.3f}")

    def show(self, done: int, text: str, speed: str = "") -> None:
        """After a step."""
        self._bar.update(self._task, completed=done, loss=f"{text}{self._held_out}", speed=speed)

    def note(self, done: int, text: str) -> None:
        """What was measured; shown until the next measurement."""
        self._held_out = f", {text}"


class Lines:
    """A line every tenth of a run."""

    def __init__(self, console: Console, name: str, steps: int) -> None:
        self._console, self._name, self._steps = console, name, steps
        self._started = time.perf_counter()

    def step(self, done: int, loss: float, tokens_per_second: float) -> None:
        self.show(done, f"loss {loss:.3f}", f"{tokens_per_second:,.0f} tokens/s")

    def held_out(self, done: int, loss: float) -> None:
        self.note(done, f"held-out loss {loss:.3f}")

    def show(self, done: int, text: str, speed: str = "") -> None:
        """After a step."""
        if done == self._steps or done % max(1, self._steps // _LINES) == 0:
            self._print(f"step {done}/{self._steps}  {text}  {speed}".rstrip())

    def note(self, done: int, text: str) -> None:
        """What was measured."""
        self._print(f"step {done}/{self._steps}  {text}")

    def _print(self, text: str) -> None:
        elapsed = time.perf_counter() - self._started
        self._console.print(f"{self._name}  {text}  ({elapsed:.0f} s)", soft_wrap=True)

"""What a person sees while a run goes on: a progress bar on a terminal, a line now and then
elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 160  # of tables in a log; a terminal knows its own

_SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """Progress of one stage, with its rate and the time left. Only the first rank shows it."""

    def __init__(
        self, label: str, total: int, done: int = 0, unit: str = "tok", show: bool = True
    ) -> None:
        self.label, self.total, self.unit, self.show = label, max(total, 1), unit, show
        self.done = self._started_at = done
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if show and console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description:<22}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(label, total=self.total, completed=done, note="")

    def __enter__(self) -> "Bar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self.show and kind is None:
            self._line("done in")

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._started_at) / max(time.monotonic() - self._start, 1e-9)

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` units (tokens, bytes)."""
        self.done = done
        note = f"{short(self.rate)} {self.unit}/s  {note}"
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif self.show and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = f"{_clock((self.total - done) / self.rate)} left, " if self.rate > 0 else ""
            self._line(f"{done / self.total:4.0%}  {note}  {left}after")

    def _line(self, text: str) -> None:
        print(
            f"{self.label:<22} {text} {_clock(time.monotonic() - self._start)}",
            file=sys.stdout,
            flush=True,
        )


class Part(Bar):
    """A run's share of a bar over many runs: it moves that one on, and shows nothing itself."""

    def __init__(self, whole: Bar, label: str) -> None:
        super().__init__(label, whole.total, show=False)
        self.whole, self.before = whole, whole.done

    def update(self, done: int, note: str = "") -> None:
        self.done = done  # where a part of this part begins
        self.whole.update(self.before + done, f"{self.label}  {note}")


def short(value: float) -> str:
    """1234567 → 1.23M."""
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

"""What a person sees while a run goes on: lines, tables, and a progress bar on a terminal.

All that is printed, and all that pages show, passes `shown`: names, texts, paths and messages come
from data and from others, and are text whatever stands in them.
"""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from doremi_train.redaction import redact

# What steers a terminal or a reader's eye: control characters, ends of lines, marks of direction;
# and halves of surrogate pairs, which no encoding has.
_STEERING = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str, kept: str = "") -> str:
    r"""A text as it may be shown: without secrets, and with what is no character to read but steers
    who shows it written as Python would. The characters in `kept` stay.

    >>> shown("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in kept else ascii(found[0])[1:-1]

    return _STEERING.sub(escaped, redact(text))


class _Plain(Console):
    """A console that takes every string, of tables too, as text: no markup, no names of emoji."""

    def render_str(self, text: str, **how: Any) -> Text:
        # What the terminal cannot write (Latin-1, ASCII) is no reason to end a run.
        writable = shown(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(writable, **how | {"markup": False, "emoji": False})

    def on_broken_pipe(self) -> None:
        """Nobody reads any more, as after `| head`, or it cannot be written: a run of days goes on,
        and its files tell what becomes of it."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())  # what is in its buffer still has to go somewhere
            os.close(nowhere)


_out = _Plain(highlight=False, soft_wrap=True)
_err = _Plain(highlight=False, soft_wrap=True, stderr=True)
if not _out.is_terminal:
    _out.width = 160  # of tables in a log; a terminal knows its own


class Sheet(NamedTuple):
    """A table as plain values, which can be kept and shown again."""

    title: str | None
    columns: list[str]
    rows: list[list[str]]
    bold: Sequence[int] = ()  # numbers of rows


def say(*lines: str | Table | Sheet, error: bool = False) -> None:
    """Print lines and tables. A line is one line: an end of a line within it is shown, not
    obeyed."""
    console = _err if error else _out
    for line in lines:
        try:
            console.print(_table(line) if isinstance(line, Sheet) else line)
        except OSError:
            console.on_broken_pipe()


def _table(sheet: Sheet) -> Table:
    table = Table(*sheet.columns, title=sheet.title)
    for number, row in enumerate(sheet.rows):
        table.add_row(*row, style="bold" if number in sheet.bold else None)
    return table


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
        if show and _out.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<22}", style="bold", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}", markup=False),
                TimeRemainingColumn(),
                console=_out,
            )
            self._task = self._bar.add_task(shown(label), total=self.total, completed=done, note="")

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
            self._bar.update(self._task, completed=done, note=shown(note))
        elif self.show and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = f"{_clock((self.total - done) / self.rate)} left, " if self.rate > 0 else ""
            self._line(f"{done / self.total:4.0%}  {note}  {left}after")

    def _line(self, text: str) -> None:
        say(f"{self.label:<22} {text} {_clock(time.monotonic() - self._start)}")


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

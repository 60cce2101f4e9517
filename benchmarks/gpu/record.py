"""File of what was found: a JSON object a line, appended as it is found.

Three kinds of line: the start of a run (`hardware`), a figure (`part`, `figure`), and how a part
ended (`part`, `state`).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import common


class Goal(NamedTuple):
    """A figure is to be no larger than `number`, or no smaller."""

    relation: str  # ≤ or ≥
    number: float

    def __str__(self) -> str:
        return f"{self.relation} {self.number:g}"

    def met(self, value: float) -> bool:
        return value <= self.number if self.relation == "≤" else value >= self.number


def at_most(number: float) -> Goal:
    return Goal("≤", number)


def at_least(number: float) -> Goal:
    return Goal("≥", number)


class Record:
    """What a part knows of its run: where figures go, how long it may take, and at which size."""

    def __init__(self, part: str, file: Path, seconds: float, rehearse: bool) -> None:
        """`rehearse`: on the CPU, at a reduced size."""
        self.part, self.file, self.rehearse = part, file, rehearse
        self._ends = time.monotonic() + seconds
        self.device = torch.device("cpu" if rehearse else "cuda")

    def left(self) -> float:
        """Seconds until this part is stopped."""
        return self._ends - time.monotonic()

    def figure(
        self,
        name: str,
        value: float | bool | common.Ratio,
        unit: str = "",
        goal: Goal | None = None,
    ) -> None:
        """Write what was found. A rehearsal is held to no goal."""
        number = value.median if isinstance(value, common.Ratio) else value
        interval = [value.low, value.high] if isinstance(value, common.Ratio) else None
        met = goal.met(number) if goal is not None and not self.rehearse else None
        line = {"value": number, "interval": interval, "unit": unit}
        self._write(name, line | {"goal": str(goal) if goal else None, "met": met})

    def not_measured(self, name: str, why: str, goal: Goal | None = None) -> None:
        """Say so, where this machine cannot give a figure."""
        line = {"value": None, "why": why, "goal": str(goal) if goal else None, "met": None}
        self._write(name, line)

    def known(self, part: str, name: str) -> Any:
        """Value that another part of this run has found; None if it has not."""
        found = [
            line["value"]
            for line in read(self.file)
            if line.get("part") == part and line.get("figure") == name
        ]
        return found[-1] if found else None

    def _write(self, name: str, line: dict[str, Any]) -> None:
        write(self.file, {"part": self.part, "figure": name, **line})


def write(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Lines of the last run in the file, but for one that a killed part did not finish."""
    found: list[dict[str, Any]] = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found = [line] if "hardware" in line else [*found, line]
    return found


def main(part: str, measure: Callable[[Record], None]) -> None:
    """The process of a part."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{part}")
    parser.add_argument("--file", type=Path, required=True, help="where its figures go")
    parser.add_argument("--seconds", type=float, required=True, help="after which it is stopped")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    measure(Record(part, given.file, given.seconds, given.rehearse))

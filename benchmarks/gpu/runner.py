"""Parts one after another, each in a process of its own with a time limit, and the table at the
end."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.gpu import record

ROOT = Path(__file__).parents[2]
LEAST = 20.0  # seconds left for which a part is started: what it imports takes some of them
_WIDEST = 50  # letters of a value


class Part(NamedTuple):
    name: str
    seconds: float  # after which it is stopped
    module: str  # of its process

    @classmethod
    def here(cls, name: str, seconds: float) -> "Part":
        return cls(name, seconds, f"{__package__}.{name}")


def run(parts: Sequence[Part], seconds: float, file: Path, rehearse: bool) -> list[str]:
    """Parts in their order, as long as `seconds` last; returns the names of those that did not come
    to their end. What they print goes beside the file, into its .log."""
    ends = time.monotonic() + seconds
    failed = []
    for part in parts:
        left = ends - time.monotonic()
        began = time.monotonic()
        if left < min(LEAST, part.seconds):
            state, message = "not started", f"{max(left, 0):.0f} s were left"
        else:
            state, message = _run(part, min(part.seconds, left), file, rehearse)
        took = time.monotonic() - began
        line = {"part": part.name, "state": state, "message": message, "seconds": round(took, 1)}
        record.write(file, line)
        print(f"{part.name:<12} {state:<12} {took:5.0f} s  {message}", flush=True)
        if state != "done":
            failed.append(part.name)
    return failed


def _run(part: Part, seconds: float, file: Path, rehearse: bool) -> tuple[str, str]:
    """How a part ended, and what its last words were where it did not come to its end."""
    command = [sys.executable, "-m", part.module, "--file", str(file), "--seconds", str(seconds)]
    log = file.with_suffix(".log")
    with tempfile.TemporaryDirectory() as scratch, log.open("ab") as output:
        output.write(f"── {part.name}\n".encode())
        output.flush()
        start = output.tell()
        # A group of its own: what a part has started ends with it. The same session: whoever ends
        # this command ends them all.
        process = subprocess.Popen(
            [*command, *["--rehearse"] * rehearse],
            cwd=ROOT, env=os.environ | {"TMPDIR": scratch}, process_group=0,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "timed out", f"its {seconds:.0f} s were over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return "done", ""
    if code < 0:
        return "killed", signal.Signals(-code).name
    said = log.read_bytes()[start:].decode(errors="replace").split("\n")
    return "failed", next((line[:300] for line in reversed(said) if line.strip()), f"exit {code}")


def tables(file: Path) -> None:
    """Print what was found in the last run, a table a part, and which parts found no more."""
    head, *lines = record.read(file)
    for name in dict.fromkeys(line["part"] for line in lines):
        mine = [line for line in lines if line["part"] == name]
        ends = [f"{line['state']} after {line['seconds']} s" for line in mine if "state" in line]
        rows = [_row(line) for line in mine if "state" not in line]
        title = f"{name}: {' '.join(ends) or 'no end'}"
        common.table(title, ("figure", "value", "goal", "met"), rows)
    print(f"{head['hardware']}, {head['date']}, commit {head['commit']}, torch {head['torch']}")
    if head["rehearsal"]:
        print("A rehearsal at a reduced size: nothing here says anything of a GPU.")


def _row(line: dict[str, Any]) -> tuple[object, ...]:
    value = line["value"]
    if value is None:
        shown = f"not measured: {line['why']}"[:_WIDEST]
    elif isinstance(value, bool):
        shown = "yes" if value else "no"
    elif line["interval"]:
        shown = str(common.Ratio(value, *line["interval"]))
    else:
        shown = f"{value:.4g} {line['unit']}".strip()
    met = {None: "", True: "yes", False: "no"}[line["met"]]
    return line["figure"], shown, line["goal"] or "", met

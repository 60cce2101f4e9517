"""A benchmark run at its smallest size."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.command import ROOT, environment


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The JSON of one benchmark."""
    file = folder / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(file), *options],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {
        "benchmark",
        "hardware",
        "date",
        "commit",
        "torch",
        "ratios",
        "intervals",
        "figures",
    } <= found.keys()
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in found["ratios"].values()), found[
        "ratios"
    ]
    for key, (low, high) in found["intervals"].items():
        assert low <= found["ratios"][key] <= high and key in done.stdout, key
    return found

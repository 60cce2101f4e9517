"""Runs a folder of cases and prints a line each: `python tests/helpers/cases.py FOLDER [NAME …]`.

A case is a folder with `cmd.sh`, which calls the command as `$D` and writes to `$OUT`, and
`expected.txt`, which says in words what should happen. The line has the exit code, whether there
was a traceback, and the end of what was said; whether that is what was expected is for a reader.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 600  # of one case


def command(folder: Path) -> Path:
    """A program that runs this checkout's command."""
    path = folder / "doremi-train"
    python = f'PYTHONPATH="{ROOT}" exec "{sys.executable}" -m doremi_train "$@"'
    path.write_text(f"#!/bin/sh\n{python}\n")
    path.chmod(0o755)
    return path


def run(case: Path) -> str:
    """One case: its line."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        given = {"D": str(command(Path(folder))), "OUT": str(Path(folder) / "out"), "PATH": path}
        begun = time.monotonic()
        done = subprocess.run(
            ["bash", str(case / "cmd.sh")],
            env=os.environ | given | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    said = (done.stdout + done.stderr).strip()
    last = said.splitlines()[-1] if said else ""
    trace = "TRACEBACK" if "Traceback" in said else "ok"
    return (
        f"{case.name:<30} {done.returncode:>3} {trace:<9} {time.monotonic() - begun:4.0f} s  {last}"
    )


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for case in sorted(Path(folder).iterdir()):
        if (case / "cmd.sh").exists() and (not names or case.name in names):
            print(run(case), flush=True)

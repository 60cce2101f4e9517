"""All benchmarks at a reduced size, one after another, each in a process of its own: `python -m
benchmarks`.

Studies train models for many minutes to see what a method is worth; they are started by their
names. So is `benchmarks.gpu`, which asks a GPU everything.
"""

import argparse
import subprocess
import sys
from pathlib import Path

STUDIES = ("less_study", "policies", "selection", "token_weighting", "worth")
_OTHERS = ("__init__", "__main__", "common", "page_tasks", "planted_tasks", *STUDIES)


def main() -> None:
    here = Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.py") if path.stem not in _OTHERS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=f"{__doc__} Benchmarks: {', '.join(names)}."
    )
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write NAME.json of each there")
    folder = parser.parse_args().json
    codes = []
    for name in names:
        kept = ["--json", str(folder.resolve() / f"{name}.json")] if folder else []
        command = [sys.executable, "-m", f"{here.name}.{name}", "--quick", *kept]
        codes.append(subprocess.run(command, cwd=here.parent, check=False).returncode)
    failed = [name for name, code in zip(names, codes, strict=True) if code]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

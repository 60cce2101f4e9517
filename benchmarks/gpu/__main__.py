"""Command line: `python -m benchmarks.gpu --minutes 8`, or `--rehearse` on a CPU."""

import argparse
import datetime
import importlib.metadata
import signal
import sys
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.gpu import record, runner
from benchmarks.gpu.runner import Part

# In the order of worth. Together their limits are more than a run may last: most end earlier.
PARTS = (
    Part.here("alpha", 90),
    Part.here("steps", 120),
    Part.here("compiled", 120),
    Part.here("projection", 60),
    Part.here("picks", 75),
    Part.here("influence", 75),
    Part.here("proxies", 60),
    Part.here("saving", 75),
)


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="of the whole; default: 8")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("outputs/gpu.jsonl"),
        help="lines are appended there, and what parts print to its .log; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART",
        help=f"some parts: {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at a reduced size")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --rehearse runs everything on the CPU")
    file = given.json.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    record.write(
        file,
        {
            "hardware": common.hardware(),
            "date": datetime.date.today().isoformat(),
            "commit": common.commit(),
            "torch": importlib.metadata.version("torch"),
            "transformers": importlib.metadata.version("transformers"),
            "cuda": torch.version.cuda,
            "minutes": given.minutes,
            "rehearsal": given.rehearse,
        },
    )
    # Told to stop, it ends its part and shows what there is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        chosen = [part for part in PARTS if part.name in given.only]
        if given.rehearse:  # compiling for a CPU takes long, and others may use it
            chosen = [part._replace(seconds=4 * part.seconds) for part in chosen]
        failed = runner.run(chosen, 60 * given.minutes, file, given.rehearse)
    finally:
        runner.tables(file)
    if failed:
        sys.exit(f"not to their end: {', '.join(failed)}; see {file.with_suffix('.log')}")


if __name__ == "__main__":
    main()

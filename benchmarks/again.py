"""What a finished command costs when it is given again, in CPU seconds of its process: of this
checkout, of it where nothing was kept of what it said (`anew`), and of another one (`--other`), in
turn on one small finished run."""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import common
from doremi_train.storage import finished

HERE = Path(__file__).parents[1]
SIZES = ("training.steps=40", "training.threads=1")
QUICK = (
    *("data=planted", "model=nano", "mixture=natural", "main.comparisons=[]"),
    *("training.steps=4", "training.threads=1"),
)


def seconds(checkout: Path, *overrides: str) -> float:
    """CPU seconds of the command of a checkout."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "doremi_train", *overrides],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def anew(run_dir: Path, *overrides: str) -> float:
    """The same of this checkout, without what was kept."""
    (run_dir / finished.NAME).unlink()
    return seconds(HERE, *overrides)


def measure(given: argparse.Namespace) -> common.Result:
    sizes = QUICK if given.quick else SIZES
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder.resolve() if given.folder else temporary
        at = {name: Path(folder, name) for name in ("again", "anew", "other")}
        asked = {
            name: [*sizes, f"run_dir={path}", f"store={folder}/store"] for name, path in at.items()
        }
        for name in at if given.other else ("again", "anew"):
            seconds(given.other if name == "other" else HERE, *asked[name])
        ratios, figures = {}, {}
        for stage in ("report",) if given.quick else ("pipeline", "report"):
            sides: dict[str, Callable[[], object]] = {
                "again": partial(seconds, HERE, *asked["again"], f"stage={stage}"),
                "anew": partial(anew, at["anew"], *asked["anew"], f"stage={stage}"),
            }
            if given.other:
                sides["other"] = partial(seconds, given.other, *asked["other"], f"stage={stage}")
            times = common.alternate(sides, 1 if given.quick else given.rounds, warm_up=0)
            for side in times.keys() - {"again"}:
                ratios[f"{stage}: {side} over again"] = common.ratio(times[side], times["again"])
            figures[stage] = times
    return common.Result(ratios, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--other", type=Path, metavar="CHECKOUT", help="another checkout, whose command takes turns"
    )
    parser.add_argument("--folder", type=Path, help="where runs are, or will be; else they go")
    parser.add_argument("--rounds", type=int, default=7)


if __name__ == "__main__":
    common.main("again", __doc__ or "", measure, options)

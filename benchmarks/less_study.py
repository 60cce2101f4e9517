"""What fine-tuning on 5 % of a pool gives a target, by who chose them, beside all of it: held-out loss on the planted
tasks (`benchmarks.planted_tasks`), over several seeds of warm-up, draws and training, at equal steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import common, planted_tasks
from benchmarks.planted_tasks import TASKS

METHODS = ("less", "random", "bm25", "ngram", "rds", "rds_plus", "all")


def command(*overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "doremi_train", *overrides],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done


def measure(given: argparse.Namespace) -> common.Result:
    """No ratios: losses by target, method and seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = planted_tasks.pretrained(_coded, folder / "base", 64)
        found = {target: _target(target, folder, base, given) for target in given.targets}
    for target, methods in found.items():
        rows: list[tuple[object, ...]] = [
            (
                method,
                statistics.mean(losses),
                statistics.stdev(losses) if len(losses) > 1 else 0.0,
                statistics.mean(a - b for a, b in zip(methods["all"], losses, strict=True)),
            )
            for method, losses in methods.items()
        ]
        common.table(f"{target}: nats per token", ("trained on", "mean", "deviation", "better than all"), rows)
    return common.Result({}, {"steps": given.steps, "seeds": given.seeds, "held_out_loss": found})


class _Coded:
    code = 0


def _coded(*overrides: str) -> Any:
    command(*overrides)
    return _Coded


def _target(target: str, folder: Path, base: Path, given: argparse.Namespace) -> dict[str, list[float]]:
    sweep = folder / target
    command(
        *("-m", "stage=finetune", *planted_tasks.selecting(folder, base), f"run_dir={sweep}", f"store={folder}/store"),
        *(f"training.steps={given.steps}", f"selection.train={target}"),
        f"selection.less.test=[{folder}/test/{target}.jsonl]",
        f"selection.less.train_on={','.join(METHODS)}",
        f"seed={','.join(map(str, range(given.seeds)))}",
    )
    found: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    for result in sweep.glob("*/finetune/result.json"):
        given_ = yaml.safe_load((result.parents[1] / "config.yaml").read_text())
        loss = json.loads(result.read_text())["evaluation"]["mean_loss"]
        found[given_["selection"]["less"]["train_on"]][given_["seed"]] = loss
    return {method: [losses[seed] for seed in sorted(losses)] for method, losses in found.items()}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)


if __name__ == "__main__":
    common.main("less_study", __doc__, measure, options)

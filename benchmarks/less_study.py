"""What fine-tuning on 5 % of a pool gives a target, by who chose them, beside all of it: held-out
loss on the planted tasks (`benchmarks.planted_tasks`), or with `--corpus` on real text
(`benchmarks.page_tasks`), over several seeds of warm-up, draws and training, at equal steps.
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

from benchmarks import common, page_tasks, planted_tasks
from benchmarks.growth import drawn
from benchmarks.planted_tasks import TASKS
from doremi_train.reports import charts

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
    if given.quick:
        given.seeds, given.steps, given.pretraining, given.pool = 1, 5, 20, 40
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets, overrides = _pages(folder, given) if given.corpus else _planted(folder, given)
        held_out = {target: _target(target, folder, overrides, given) for target in targets}
        right = {} if given.corpus else {target: _right(target, folder) for target in targets}
    for target, methods in held_out.items():
        rows: list[tuple[object, ...]] = [
            (
                method,
                statistics.mean(losses),
                statistics.stdev(losses) if len(losses) > 1 else 0.0,
                statistics.mean(_gains(methods, method)),
            )
            for method, losses in methods.items()
        ]
        common.table(
            f"{target}: nats per token",
            ("trained on", "mean", "deviation", "better than all"),
            rows,
        )
    for target, methods in right.items():
        every: list[tuple[object, ...]] = [
            (m, statistics.mean(parts), min(parts)) for m, parts in methods.items()
        ]
        common.table(
            f"{target}: right answers of its task among the choice", ("by", "mean", "least"), every
        )
    if given.picture:
        given.picture.write_text(drawn(_picture(held_out, given.seeds)))
    figures = {
        "steps": given.steps,
        "seeds": given.seeds,
        "held_out_loss": held_out,
        "precision": right,
    }
    return common.Result({}, figures)


def _planted(folder: Path, given: argparse.Namespace) -> tuple[list[str], list[str]]:
    steps = given.pretraining or 700
    base = planted_tasks.pretrained(_coded, folder / "base", 64, steps)
    targets = given.targets or (TASKS[:1] if given.quick else TASKS)
    return list(targets), planted_tasks.selecting(folder, base, given.pool or 200)


def _pages(folder: Path, given: argparse.Namespace) -> tuple[list[str], list[str]]:
    (target,) = given.targets or ["man_en"]
    made, base = page_tasks.pretraining(folder, given.corpus, given.pretraining or 300)
    command(*made)
    return [target], page_tasks.selecting(folder, base, given.corpus, target, given.pool or 100)


def _gains(methods: dict[str, list[float]], method: str) -> list[float]:
    """Nats that a method is better by than all the data, seed by seed."""
    return [a - b for a, b in zip(methods["all"], methods[method], strict=True)]


def _picture(held_out: dict[str, dict[str, list[float]]], seeds: int) -> str:
    names = [method for method in METHODS if method != "all"]
    points = {}
    for target, methods in held_out.items():
        gains = [_gains(methods, name) for name in names]
        points[target] = [
            charts.Point(statistics.mean(gain), min(gain), max(gain)) for gain in gains
        ]
    title = f"Better than training on all data, over {seeds} seeds"
    return charts.rows(title, "nats per token of the target", names, points, zero=True)


class _Coded:
    code = 0


def _coded(*overrides: str) -> Any:
    command(*overrides)
    return _Coded


def _target(
    target: str, folder: Path, overrides: list[str], given: argparse.Namespace
) -> dict[str, list[float]]:
    sweep = folder / "runs" / target
    command(
        *("-m", "stage=finetune", *overrides, f"run_dir={sweep}", f"store={folder}/store"),
        *(f"training.steps={given.steps}", f"selection.train={target}"),
        f"selection.less.test=[{folder}/test/{target}.jsonl]",
        f"selection.less.train_on={','.join(METHODS)}",
        f"seed={','.join(map(str, range(given.seeds)))}",
    )
    by_seed: dict[str, dict[int, float]] = {method: {} for method in METHODS}
    for result in sweep.glob("*/finetune/result.json"):
        config = yaml.safe_load((result.parents[1] / "config.yaml").read_text())
        loss = json.loads(result.read_text())["evaluation"]["mean_loss"]
        by_seed[config["selection"]["less"]["train_on"]][config["seed"]] = loss
    return {method: [losses[seed] for seed in sorted(losses)] for method, losses in by_seed.items()}


def _right(target: str, folder: Path) -> dict[str, list[float]]:
    """What part of each method's choice is right and of the target's task, once for every seed."""
    by_seed: dict[str, dict[int, float]] = {}
    for choices in (folder / "runs" / target).glob(f"*/select/{target}"):
        seed = yaml.safe_load((choices.parents[1] / "config.yaml").read_text())["seed"]
        for method, part in planted_tasks.precision(choices, target).items():
            by_seed.setdefault(method, {})[seed] = part
    return {method: [parts[seed] for seed in sorted(parts)] for method, parts in by_seed.items()}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        type=Path,
        help="a folder of domains with train* and validation* files: real text",
    )
    parser.add_argument(
        "--targets", nargs="+", help="default: all planted tasks, or of a corpus the domain man_en"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pretraining", type=int, help="steps of the model that is fine-tuned")
    parser.add_argument(
        "--pool", type=int, help="examples of each planted task, or of each domain at most"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write what each is better by there, as SVG"
    )


if __name__ == "__main__":
    common.main("less_study", __doc__, measure, options)

"""Headroom of a table of runs, without data: held against what made the table, said in one
sentence, and refused."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
from helpers import regmix
from helpers.command import Outcome, run_here

from doremi_train.methods.box import Floats
from doremi_train.methods.headroom import Gain
from doremi_train.stages.tables.headroom import worth

DOMAINS = ["web", "code", "books"]


def loss(weights: Floats, lean: float) -> Floats:
    """(N, K) → (N,), the lower the more even it is, or the more code where it leans so."""
    pull = np.array([1.0, 1.0 + lean, 1.0])
    return 2 + (np.exp(-3 * np.maximum(weights, 0)) * pull).sum(1) / 3


def table(path: Path, lean: float, noise: float = 0.003, count: int = 10) -> Path:
    random = np.random.default_rng(3)
    weights = random.dirichlet(np.ones(3), count)
    weights[-3:] = weights[0]  # replicates
    losses = loss(weights, lean) + random.normal(0, noise, count)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *DOMAINS, "loss", "code_acc"])
        for n, (weight, value) in enumerate(zip(weights, losses, strict=True)):
            writer.writerow([n, *weight, value, "" if n == 1 else 3 - value])
    return path


def headroom(path: Path, run_dir: Path, *more: str) -> Outcome:
    return run_here("stage=headroom", f"fit.runs={path}", f"run_dir={run_dir}", *more)


def read(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "headroom" / "headroom.json").read_text())
    return content


LOSS = "objective.metrics={loss: 1}"


@pytest.mark.slow
def test_the_interval_holds_what_the_law_of_the_table_allows(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv", lean=4)
    outcome = headroom(path, tmp_path / "run", LOSS)
    assert outcome.code == 0, outcome
    content = read(tmp_path / "run")
    with path.open() as file:
        weights = np.array([[float(row[name]) for name in DOMAINS] for row in csv.DictReader(file)])
    best = scipy.optimize.minimize(
        lambda w: float(loss(w[None], 4)[0]), np.full(3, 1 / 3),
        bounds=[(0, most) for most in weights.max(0)],
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    anchors = {"natural": weights.mean(0), "uniform": np.full(3, 1 / 3)}
    for name, anchor in anchors.items():
        gain = content["gains"][name]
        true = float(loss(anchor[None], 4)[0]) - best.fun
        assert gain["low"] <= true <= gain["high"], name
        assert gain["mean"] == pytest.approx(true, abs=0.3 * true), name
    assert content["worth"] is True and content["runs"] == 10 and content["speed_up"] is None
    assert content["best"]["mixture"]["code"] == pytest.approx(best.x[1], abs=0.1)
    for said in content["said"]:
        assert f"headroom: {said}" in outcome.out
    assert "over the mean mixture of the runs, and" in content["said"][0]
    assert content["said"][1].startswith("what that is worth in tokens is not known: a table has")
    assert content["said"][2].startswith("worth a swarm: the gain over ")
    assert {one.name for one in (tmp_path / "run").iterdir()} == {"config.yaml", "headroom"}


@pytest.mark.slow
def test_where_even_is_best_it_is_not_worth_it(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv", lean=0, noise=0.01)
    outcome = headroom(path, tmp_path / "run", LOSS, "fit.tokens={web: 9, code: 9, books: 9}")
    assert outcome.code == 0, outcome
    content = read(tmp_path / "run")
    assert content["worth"] is False
    assert content["gains"]["natural"] == pytest.approx(content["gains"]["uniform"])
    last = content["said"][-1]
    assert last.startswith("not worth one: over natural, which costs nothing, it gains 0.0")
    assert f"two runs on one mixture differ by up to {content['apart']:.4f}" in last


@pytest.mark.slow
def test_of_three_mixtures_nothing_is_told(tmp_path: Path) -> None:
    """Of an accuracy no more than of its loss; the row that has none of it is left out."""
    path = table(tmp_path / "runs.csv", lean=4, count=6)
    outcome = headroom(path, tmp_path / "run", LOSS)
    assert outcome.code == 0, outcome
    content = read(tmp_path / "run")
    assert content["worth"] is None and content["gains"]["natural"]["high"] is None
    assert "too few runs for an interval" in content["said"][0]
    assert content["said"][-1].startswith("cannot tell: over ")
    outcome = headroom(path, tmp_path / "acc", "objective.metrics={code_acc: -1}")
    assert outcome.code == 0 and read(tmp_path / "acc")["left_out"] == 1
    assert read(tmp_path / "acc")["gains"]["natural"]["mean"] > 0


@pytest.mark.parametrize(
    ("gain", "apart", "expected"),
    [
        (Gain(0.1, 0.05, 0.2), 0.01, True),
        (Gain(0.1, 0.0, 0.2), 0.01, None),
        (Gain(0.005, 0.002, 0.009), 0.01, False),  # real, and less than what a seed does
        (Gain(0.005, 0.002, 0.009), None, True),
        (Gain(-0.2, -0.3, -0.1), None, False),
        (Gain(0.1, 0.05, math.inf), 0.01, None),
    ],
)
def test_what_is_worth_it(gain: Gain, apart: float | None, expected: bool | None) -> None:
    assert worth(gain, apart) is expected


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv", lean=4, count=5)
    for number, (wrong, said) in enumerate(
        {
            "fit.runs=none.csv": "fit.runs=none.csv: cannot be read",
            "objective.metrics={code_acc: -1}": "unknown metric 'code_acc'; the runs have loss "
            "(code_acc: measured on one mixture alone, so left out)",
            "objective.metrics={moon: 1}": "unknown metric 'moon'; the runs have loss\n",
            "fit.tokens={web: 1}": "fit.tokens: no number for 'code'",
        }.items()
    ):
        outcome = headroom(path, tmp_path / str(number), wrong)
        assert outcome.code == 2 and said in outcome.err, outcome
        assert not (tmp_path / str(number) / "headroom" / "headroom.json").exists()


@pytest.mark.acceptance
@regmix.needed
def test_of_regmix_s_runs_on_their_mean(tmp_path: Path) -> None:
    """A fit to all 768 runs puts what can be gained over uniform at 0.03 nats."""
    mixtures, losses = (regmix.FOLDER / f"train_{of}_1m.csv" for of in ("mixture", "pile_loss"))
    outcome = run_here("stage=headroom", f"fit.runs=[{mixtures},{losses}]", f"run_dir={tmp_path}")
    assert outcome.code == 0, outcome
    gain = read(tmp_path)["gains"]["uniform"]
    assert 0 < gain["low"] < 0.03 < gain["high"] < 0.25

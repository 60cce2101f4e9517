"""Methods against what the same FLOPs buy without them: the figures by hand, and a whole comparison
of tiny runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.command import Command, run_here
from helpers.processes import lines, read

from doremi_train.evaluation import statistics
from doremi_train.evaluation.statistics import student_t


def test_paired_intervals_by_hand() -> None:
    found = statistics.paired([1.3, 1.1, 1.2], [1.0, 1.0, 1.0])
    assert (found.mean, found.half) == pytest.approx(student_t([0.3, 0.1, 0.2]))
    assert found.low == pytest.approx(0.1, abs=0.035) and found.high == pytest.approx(
        0.3, abs=0.035
    )
    # What seeds have in common does not count.
    shifted = statistics.paired([2.3, 3.1, 4.2], [2.0, 3.0, 4.0])
    assert shifted == pytest.approx(found, abs=1e-12)
    assert statistics.paired([1.5], [1.0]).half is None


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([1.31, 1.30, 1.29], "m is better than natural (+0.3000"),
        ([0.71, 0.70, 0.69], "m is worse than natural (-0.3000"),
        ([1.3, 0.9, 1.1], "m is not distinguishable from natural (+0.1000"),
        (
            [1.3, 1.2, 1.1],
            "m is not distinguishable from natural",
        ),  # the bootstrap alone would call it better
    ],
)
def test_what_is_said_of_a_gain(others: list[float], said: str) -> None:
    assert statistics.judged("m", "natural", statistics.paired(others, [1.0] * 3), 3).startswith(
        said
    )


def test_one_seed_decides_nothing() -> None:
    assert "decides nothing" in statistics.judged(
        "m", "natural", statistics.paired([2.0], [1.0]), 1
    )


COMPARE = (
    "stage=compare", "training.steps=6", "evaluation.every=6", "seed=66", "compare.methods=[doge]",
    "compare.baselines=[natural,uniform]",
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("compare") / "run"
    outcome = command(*tiny, *COMPARE, f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    assert outcome.out.count("compare                done in") == 1  # one bar over all
    assert outcome.out.count("done in") == 2, outcome.out  # and that of the preparation
    return run_dir


@pytest.mark.slow
def test_every_seed_derives_its_weights_and_total_flops_are_equal(compared: Path) -> None:
    content = read(compared / "compare/compare.json")
    assert content["seeds"] == 3 and content["failures"] == []
    # A proxy of 6 steps is 6 steps of the final run, or a run.
    names = [
        "doge",
        "natural-12",
        "uniform-12",
        "search-1",
    ]
    as_long = ["natural-6", "uniform-6"]
    assert list(content["contenders"]) == names + as_long
    flops = [content["contenders"][name]["flops"] for name in names]
    assert [content["contenders"][name]["flops"] for name in as_long] == pytest.approx(
        [flops[1] / 2] * 2, rel=0.05
    )
    # Of so short runs evaluations are a part that can be seen.
    assert max(flops) < 1.05 * min(flops)
    child = yaml.safe_load((compared / "compare/doge/seed-0/config.yaml").read_text())
    assert not child["swarm"]["reuse"]  # none is to learn from runs that it has not paid for
    drawn = content["contenders"]["doge"]["weights"]
    assert len({tuple(weights.values()) for weights in drawn}) == 3
    for name in names + as_long:
        folders = [compared / "compare" / name / f"seed-{seed}" for seed in range(3)]
        reached = [
            read(folder / "main/result.json")["evaluation"]["mean_loss"] for folder in folders
        ]
        assert content["contenders"][name]["losses"] == reached
        assert [read(folder / "main/recipe.json")["seed"] for folder in folders] == [66, 67, 68]
        assert read(folders[0] / "main/result.json")["steps"] == (12 if name[-2:] == "12" else 6)
    best = [
        min(content["contenders"][name]["losses"][seed] for name in names + as_long)
        for seed in range(3)
    ]
    gaps = [
        loss - low for loss, low in zip(content["contenders"]["doge"]["losses"], best, strict=True)
    ]
    assert content["contenders"]["doge"]["regret"] == pytest.approx(sum(gaps) / 3)
    search = read(compared / "compare/search-1/seed-0/weights.json")
    run = read(compared / "compare/search-1/seed-0/search/run-0/result.json")
    assert search["provenance"]["realised"] == pytest.approx(run["evaluation"]["mean_loss"])


@pytest.mark.slow
def test_the_page_answers_with_a_table_and_a_picture(compared: Path) -> None:
    content, page = read(compared / "compare/compare.json"), (compared / "compare.html").read_text()
    flops, steps = content["questions"]
    assert list(flops["against"]) == ["natural-12", "uniform-12", "search-1"]
    assert list(steps["against"]) == ["natural-6", "uniform-6"]
    gain = np.subtract(
        *(content["contenders"][name]["losses"] for name in ("natural-6", "doge"))
    ).mean()
    assert steps["against"]["natural-6"]["mean"] == pytest.approx(gain)
    assert page.count("<svg") == page.count("<table>") == 2
    for sentence in (*flops["said"], *steps["said"]):
        assert sentence.replace("'", "&#39;") in page


@pytest.mark.slow
def test_nothing_is_trained_twice(
    compared: Path, tiny: list[str], store: Path, command: Command, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime for path in store.glob("runs/*/result.json")}
    outcome = command(*tiny, *COMPARE, "compare.seeds=1", f"run_dir={tmp_path / 'other'}")
    assert outcome.code == 0 and "decides nothing" in outcome.out, outcome
    assert {path: path.stat().st_mtime for path in store.glob("runs/*/result.json")} == before
    assert not lines(compared / "compare/doge/seed-0/proxy/metrics.jsonl")[6:]


@pytest.mark.slow
def test_a_mixture_of_yours_takes_part(
    compared: Path, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    mine = {"plain": 0.5, "rich": 0.5, "digits": 0.0}
    (tmp_path / "mine.json").write_text(json.dumps({"weights": mine}))
    own = (f"compare.files={{mine: {tmp_path / 'mine.json'}}}", "compare.baselines=[]")
    run_dir = tmp_path / "run"
    outcome = command(*tiny, *COMPARE, "compare.seeds=1", *own, f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    found = read(run_dir / "compare/compare.json")
    assert {"doge", "mine-12", "mine-6"} <= set(found["contenders"])
    assert found["contenders"]["mine-12"]["weights"] == [mine]
    trained = read(run_dir / "compare/mine-12/seed-0/main/recipe.json")
    assert trained["mixture"] == mine
    kept = read(compared / "compare/compare.json")["contenders"]["doge"]
    assert found["contenders"]["doge"]["losses"] == kept["losses"][:1]


def test_what_cannot_be_compared_is_named(
    tiny: list[str], command: Command, tmp_path: Path
) -> None:
    for overrides, said in (
        (["compare.methods=[magic]"], "compare.methods=magic"),
        (["compare.baselines=[doremi]"], "compare.baselines=doremi"),
        (["compare.files={natural: w.json}"], "compare.files: 'natural' is not a name"),
        (["compare.files={../x: w.json}"], "compare.files: '../x' is not a name"),
    ):
        outcome = command(*tiny, "stage=compare", *overrides, f"run_dir={tmp_path / 'run'}")
        assert outcome.code == 2 and said in outcome.err, outcome


def test_the_recipe_composes(corpus: Path, tmp_path: Path) -> None:
    outcome = run_here(
        "experiment=compare", f"data.root={corpus}", "stage=plan", f"run_dir={tmp_path}"
    )
    assert outcome.code == 0, outcome
    assert read(tmp_path / "plan.json")["stages"]["main"]["tokens"] == 200 * 16 * 128
    asked = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (
        asked["compare"]["methods"] == ["doremi", "swarm"]
        and asked["reference"]["mixture"] == "uniform"
    )

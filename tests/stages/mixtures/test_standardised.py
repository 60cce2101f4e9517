"""Standardised metrics wherever the one objective is used: their figures by hand, and what is said
where there is nothing to standardise by."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import run_here
from helpers.processes import lines, read
from helpers.sessions import opened

from doremi_train.evaluation.results import NATS, Result, settings, verdict
from doremi_train.methods.box import Floats
from doremi_train.methods.saturating import saturating
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import swarm_problem, swarm_proposals
from doremi_train.stages.mixtures.swarm_problem import Row
from doremi_train.stages.runs import metrics

WEIGHTS = {"rich": 1.0, "digits": 2.0}
STANDARDISED = ("objective.standardise=true", "objective.metrics={rich: 1, digits: 2}")
SHORT = ("training.steps=6", "main.comparisons=[]", "seed=97")


def losses(folder: Path) -> Floats:
    domains = read(folder / "result.json")["evaluation"]["domains"]
    return np.array([domains[name]["loss"] for name in WEIGHTS])


def score(values: Floats, natural: Floats, scale: Floats) -> float:
    """The naive way."""
    apart = np.clip((values - natural) / scale, -10, 10)
    return float((apart * list(WEIGHTS.values())).sum() / 3)


@pytest.mark.slow
def test_a_search_trains_natural_twice_to_standardise_by(tiny: list[str], tmp_path: Path) -> None:
    given = (*tiny, *SHORT, *STANDARDISED, "mixture=search", "swarm.runs=2", f"run_dir={tmp_path}")
    for stage in ("main", "plan"):  # by which all is there
        outcome = run_here(*given, f"stage={stage}")
        assert outcome.code == 0, outcome
    runs = {path.parent.name: losses(path.parent) for path in tmp_path.glob("search/*/result.json")}
    assert set(runs) == {"run-0", "run-1", "natural", "natural-again"}
    pair = np.stack([runs["natural"], runs["natural-again"]])
    scores = {name: score(of, pair.mean(0), pair.std(0, ddof=1)) for name, of in runs.items()}
    provenance = read(tmp_path / "weights.json")["provenance"]
    assert provenance["chosen"] == f"search/{min(scores, key=lambda name: scores[name])}"
    assert provenance["realised"] == pytest.approx(min(scores.values()), rel=1e-9)


@pytest.mark.acceptance
def test_a_swarm_is_judged_in_standard_deviations(tiny: list[str], tmp_path: Path) -> None:
    given = (*tiny, *SHORT, *STANDARDISED, "mixture=swarm", "swarm.runs=3", "swarm.candidates=1")
    outcome = run_here(*given, "stage=swarm", f"run_dir={tmp_path}", "swarm.reuse=false")
    assert outcome.code == 0, outcome
    rows = lines(tmp_path / "swarm/runs.jsonl")
    again = [row for row in rows if row["run"].endswith("-again")]
    assert len(again) == 2 and again[0]["run"] == "swarm/round-1/natural-again"
    of = {row["run"]: np.array([row["losses"][name] for name in WEIGHTS]) for row in rows}
    pairs = [np.stack([of[row["run"].removesuffix("-again")], of[row["run"]]]) for row in again]
    pooled = np.sqrt(np.mean([pair.var(0, ddof=1) for pair in pairs], axis=0))
    scale = np.maximum(pooled, pairs[0].std(0, ddof=1))
    for row in rows:
        expected = score(of[row["run"]], pairs[0].mean(0), scale)
        assert row["loss"] == pytest.approx(expected, rel=1e-9), row["run"]
    for line in read(tmp_path / "swarm/fit.json")["confirmed"]:
        values = losses(tmp_path / "swarm/confirm" / line["name"])
        assert line["realised"] == pytest.approx(score(values, pairs[0].mean(0), scale), rel=1e-9)


@pytest.mark.slow
def test_headroom_and_its_curve_are_in_standard_deviations(tiny: list[str], tmp_path: Path) -> None:
    given = (*tiny, *SHORT, *STANDARDISED, "headroom.runs=1", "swarm.reuse=false")
    outcome = run_here(*given, "stage=headroom", f"run_dir={tmp_path}")
    assert outcome.code == 0, outcome
    found = read(tmp_path / "headroom/headroom.json")
    runs = {name: losses(tmp_path / name) for name in found["scores"]}
    pair = np.stack([runs["headroom/natural"], runs["headroom/natural-again"]])
    natural, scale = pair.mean(0), pair.std(0, ddof=1)
    for name, reached in found["scores"].items():
        if name.startswith("headroom/natural-") and not name.endswith("again"):
            # Shorter runs are far from natural, and their curve would be flat.
            apart = (runs[name] - natural) / scale
            assert reached == pytest.approx((apart @ [1, 2]) / 3, rel=1e-9)
        else:
            assert reached == pytest.approx(score(runs[name], natural, scale), abs=1e-9)
    assert found["unit"] == "standard deviations"
    assert "standard deviations" in found["said"][0]


@pytest.mark.acceptance
def test_a_comparison_is_standardised_by_the_seeds_of_natural(
    tiny: list[str], tmp_path: Path
) -> None:
    given = (*tiny, *SHORT, *STANDARDISED, "stage=compare", "compare.methods=[odm]")
    outcome = run_here(*given, f"run_dir={tmp_path / 'none'}", "compare.baselines=[uniform]")
    assert outcome.code == 2 and "standardised by the seeds of natural" in outcome.err
    assert not (tmp_path / "none/compare/uniform-6").exists()
    outcome = run_here(*given, f"run_dir={tmp_path / 'one'}", "compare.seeds=1")
    assert outcome.code == 2 and "compare.seeds=2 or more" in outcome.err
    baselines = "compare.baselines=[natural,uniform]"
    outcome = run_here(*given, f"run_dir={tmp_path / 'run'}", "compare.seeds=2", baselines)
    assert outcome.code == 0, outcome
    found = read(tmp_path / "run/compare/compare.json")
    assert found["unit"] == "standard deviations"
    runs = {
        name: np.stack([losses(tmp_path / f"run/compare/{name}/seed-{n}/main") for n in (0, 1)])
        for name in found["contenders"]
    }
    assert set(runs) == {"odm", "natural-6", "uniform-6"}
    natural = runs["natural-6"]
    pooled = np.sqrt((natural.var(0, ddof=1) + runs["uniform-6"].var(0, ddof=1)) / 2)
    scale = np.maximum(natural.std(0, ddof=1), pooled)
    for name, seeds in runs.items():
        expected = [score(seed, natural.mean(0), scale) for seed in seeds]
        assert found["contenders"][name]["losses"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_a_swarm_fits_an_accuracy_as_well_as_a_loss(tiny: list[str], tmp_path: Path) -> None:
    given = ("mixture=swarm", "swarm.regressor=saturating", "objective=custom", "swarm.kl=0")
    scored = ("objective.metrics={arc/acc: -1}", f"objective.scores=[{tmp_path}]")
    with opened(*tiny, *given, *scored, f"run_dir={tmp_path / 'run'}") as session:
        store = prepare.run(session)
        problem, random = swarm_problem.problem_of(session, store), np.random.default_rng(0)
        points = np.vstack([problem.natural, random.dirichlet(np.ones(3), 9)])
        lost = 2 + np.exp(-4 * points[:, :1])  # less, the more of the first domain
        rows = [
            Row(str(n), point.tolist(), [loss, loss, loss, 3 - loss])
            for n, (point, (loss,)) in enumerate(zip(points, lost.tolist(), strict=True))
        ]
        wanted = swarm_problem.wanted(session, store, problem, rows)
        assert metrics.names(session, store)[-1] == "arc/acc" and wanted.more.tolist()[-1]
        fit = swarm_problem.fitted(session, problem, rows, wanted)
        law = saturating(points, lost, swarm_problem.known(problem))
        assert fit.predict(points) == pytest.approx(law.predict(points) - 3, abs=1e-6)
        proposed = swarm_proposals.propose(session, problem, rows, wanted)
    assert proposed.diagnostics.spearman > 0.95
    assert proposed.proposals[0].mixed[0] > 0.9 * problem.within.high[0]


# ── The verdict ─────────────────────────────────────────────────────────────────────


def finished(seed: int, main: list[float], natural: list[float]) -> Result:
    figures: dict[str, Any] = {
        name: {
            "mean_loss": sum(values) / 2,
            "worst_loss": max(values),
            "domains": {d: {"loss": v} for d, v in zip(("rich", "digits"), values, strict=True)},
        }
        for name, values in (("main", main), ("natural", natural))
    }
    config = {"reference.mixture": "uniform", "seed": seed, "objective.standardise": True}
    config |= {f"objective.metrics.{name}": weight for name, weight in WEIGHTS.items()}
    mixture = {"method": "swarm", "weights": {"rich": 0.5, "digits": 0.5}}
    return Result(Path(), config, mixture, figures, {}, [], [], [], [], [], {}, 0, {}, {}, None)


def test_a_verdict_over_seeds_is_in_standard_deviations() -> None:
    naturals = np.array([[3.0, 2.0], [3.2, 2.1], [3.1, 2.6]])
    mains = np.array([[2.9, 2.1], [3.0, 2.2], [3.1, 1.0]])
    pairs = enumerate(zip(mains.tolist(), naturals.tolist(), strict=True))
    (one,) = settings([finished(seed, *pair) for seed, pair in pairs])
    mean, scale = naturals.mean(0), naturals.std(0, ddof=1)
    assert one.losses("main") == pytest.approx([score(main, mean, scale) for main in mains])
    assert one.losses("natural") == pytest.approx([score(n, mean, scale) for n in naturals])
    assert "standard deviations" in verdict(one) and one.measure.what == "the objective"


def test_one_seed_has_nothing_to_standardise_by_and_says_so() -> None:
    (one,) = settings([finished(0, [2.0, 3.0], [2.5, 3.5])])
    assert one.losses("main") == [2.5] and one.measure.unit == NATS.unit
    assert "since objective.standardise wants two seeds of natural" in verdict(one)

"""Swarm regression: planted surfaces of known optimum, caps to 1e-12, what is refused; and the
stage on real runs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.command import Command, run_here, start
from helpers.processes import ended, lines, read, reaped, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from scipy.optimize import minimize
from scipy.stats import spearmanr

from doremi_train.methods import box, guards, objective, regressors, swarm
from doremi_train.methods import box as limits
from doremi_train.methods.box import Box, Floats, distance, divergence, inside, on_grid, project
from doremi_train.methods.regressors import LogLinear
from doremi_train.methods.swarm import Options
from doremi_train.stages.mixtures import swarm as ways
from doremi_train.stages.mixtures import swarm_proposals
from doremi_train.stages.options import Swarm

NOISE = 0.01  # nats, of real runs at different seeds


def surface(domains: int, seed: int) -> LogLinear:
    """Losses as mixtures make them: each falls mostly with its own domain, and a little with the
    others."""
    random = np.random.default_rng(seed)
    slope = random.uniform(0, 0.7, (domains, 1)) - random.uniform(0.2, 0.6, (domains, domains))
    slope -= np.diag(random.uniform(1, 3, domains))
    return LogLinear(random.uniform(1.5, 3, domains), slope)


def planted(
    domains: int, per_domain: int, noise: float, seed: int
) -> tuple[LogLinear, Floats, Box, Floats, Floats]:
    """The true surface, prior (K,), box, and runs: points (N, K), losses (N, K)."""
    random = np.random.default_rng(seed)
    true, prior = surface(domains, seed), random.dirichlet(np.full(domains, 3.0))
    box = limits.box(prior * 1e6, 1e6, 4.0, 0.0)
    anchors = np.stack([prior, np.full(domains, 1 / domains)])
    points = np.vstack([anchors, swarm.design(prior, box, per_domain * domains, random)])
    return (
        true,
        prior,
        box,
        points,
        true.predict(points) + noise * random.standard_normal((len(points), domains)),
    )


def random() -> np.random.Generator:
    return np.random.default_rng(0)


# ── Caps, floors, the design ────────────────────────────────────────────────────────


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Floats, Box]:
    """A point with entries from 1 down to nothing, and a box that holds a mixture."""
    count = draw(st.integers(2, 7))
    point = np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    inside = np.array(draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count)))
    inside /= inside.sum()
    spread = np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    return point + 1e-9, Box(inside * (1 - spread), np.minimum(inside * (1 + 3 * spread), 1))


@settings(deadline=None, max_examples=200)
@given(boxes())
def test_a_projection_keeps_every_cap_and_floor(case: tuple[Floats, Box]) -> None:
    point, box = case
    found = project(point, box)
    assert abs(found.sum() - 1) < 1e-12
    assert (found >= box.low).all() and (found <= box.high).all()
    free = (found > box.low * (1 + 1e-9)) & (found < box.high * (1 - 1e-9))
    if free.sum() > 1:  # what is between its ends keeps its proportions
        assert_allclose(
            np.ptp(found[free] / point[free] / (found[free] / point[free]).mean()), 0, atol=1e-9
        )


@settings(deadline=None, max_examples=200)
@given(boxes())
def test_on_the_grid_a_mixture_sums_to_exactly_1_and_reads_back(case: tuple[Floats, Box]) -> None:
    point, box = case
    found = on_grid(project(point, box), box)
    assert found.sum() == 1 and inside(found, box)
    assert np.array_equal(on_grid(found, box), found)
    assert json.loads(json.dumps(found.tolist())) == found.tolist()


def test_a_projection_is_the_nearest_in_divergence() -> None:
    box, point = (
        Box(np.array([0.0, 0.1, 0.0, 0.0]), np.array([0.4, 1.0, 1.0, 0.2])),
        np.array([0.7, 0.02, 0.2, 0.08]),
    )
    naive = minimize(
        lambda p: divergence(p, point), np.full(4, 0.25), bounds=list(zip(*box, strict=True)),
        tol=1e-14, method="SLSQP", constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
    )  # fmt: skip
    assert_allclose(project(point, box), naive.x, atol=1e-6)


def test_the_design_is_within_caps_from_sparse_to_even_and_the_same_again() -> None:
    prior = np.array([0.6, 0.3, 0.08, 0.02])
    box = limits.box(prior * 1e6, 2e6, 4.0, 0.01)
    assert_allclose(box.high, [1.0, 0.6, 0.16, 0.04])
    points = swarm.design(prior, box, 400, random())
    assert np.abs(points.sum(1) - 1).max() < 1e-12 and all(inside(point, box) for point in points)
    assert np.array_equal(points, swarm.design(prior, box, 400, random()))
    free = swarm.design(prior, Box(np.zeros(4), np.ones(4)), 2000, random())
    assert free[:200].max(1).mean() > 0.9 > 0.75 > free[-200:].max(1).mean()
    # Dirichlet(√prior · s).
    assert_allclose(free.mean(0), np.sqrt(prior) / np.sqrt(prior).sum(), atol=0.03)


def test_caps_and_floors_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"than max_epochs=4 epochs"):
        box.box(np.array([1.0, 1.0]), 9.0, 4.0, 0.0)
    with pytest.raises(ValueError, match=r"^floor=0\.6 for 2 domains"):
        box.box(np.array([1.0, 1.0]), 1.0, 4.0, 0.6)
    tiny = box.box(np.array([0.01, 1.0]), 1.0, 4.0, 0.1)
    assert tiny.low.tolist() == [0.04, 0.1]  # a cap is stronger than a floor


# ── Fits and optimum ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_without_noise_the_exponential_form_is_recovered_with_its_optimum(seed: int) -> None:
    true, prior, box, points, losses = planted(5, 3, 0.0, seed)
    fit = regressors.log_linear(points, losses)
    test = swarm.design(prior, box, 100, np.random.default_rng(9))
    assert_allclose(fit.predict(test), true.predict(test), atol=1e-4)
    found, best = (swarm.solve(one, prior, box, 0.05, random()) for one in (fit, true))
    assert_allclose(found, best, atol=1e-4)


@pytest.mark.parametrize("per_domain", [2, 3])
def test_two_or_three_noisy_runs_per_domain_rank_mixtures(per_domain: int) -> None:
    for seed in range(3):
        true, prior, box, points, losses = planted(6, per_domain, NOISE, seed)
        fit, test = (
            regressors.log_linear(points, losses),
            swarm.design(prior, box, 200, np.random.default_rng(9)),
        )
        assert spearmanr(fit.predict(test).mean(1), true.predict(test).mean(1)).statistic > 0.9


def test_a_run_that_went_wrong_does_not_bend_the_others() -> None:
    true, prior, box, points, losses = planted(5, 3, 0.0, 0)
    losses[7] += 1.0
    test = swarm.design(prior, box, 100, np.random.default_rng(9))
    assert (
        np.abs(regressors.log_linear(points, losses).predict(test) - true.predict(test)).mean()
        < 0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian_process", "lightgbm", "saturating", "corrected"])
def test_other_regressors_rank_mixtures_and_propose_within_caps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    monkeypatch.setattr(swarm, "SIMULATED", 5000)
    true, prior, box, points, losses = planted(4, 8, NOISE, 0)
    fit = regressors.REGRESSORS[name](points, losses)
    test = swarm.design(prior, box, 200, np.random.default_rng(9))
    assert spearmanr(fit.predict(test).mean(1), true.predict(test).mean(1)).statistic > 0.8
    found = swarm.solve(fit, prior, box, 0.05, random())
    assert abs(found.sum() - 1) < 1e-12 and inside(found, box)
    assert true.predict(found[None]).mean() < true.predict(prior[None]).mean() - 0.01


def test_the_gaussian_process_goes_through_runs_without_noise() -> None:
    _, _, _, points, losses = planted(3, 6, 0.0, 1)
    assert_allclose(regressors.gaussian_process(points, losses).predict(points), losses, atol=1e-3)


@pytest.mark.parametrize("kl", [0.001, 0.05, 1.0])
def test_the_optimum_is_that_of_a_naive_solver_and_keeps_caps(kl: float) -> None:
    true, prior = surface(4, 2), np.array([0.5, 0.3, 0.15, 0.05])
    box = limits.box(prior, 3.0, 4.0, 0.08)
    found = swarm.solve(true, prior, box, kl, random())
    naive = minimize(
        lambda p: true.predict(p[None]).mean() + kl * divergence(p, prior), project(prior, box),
        bounds=list(zip(*box, strict=True)),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        method="SLSQP", tol=1e-14,
    )  # fmt: skip
    assert_allclose(found, naive.x, atol=1e-5)
    assert abs(found.sum() - 1) < 1e-12 and inside(found, box)


def test_much_regularisation_gives_the_prior_and_none_a_corner_or_a_cap() -> None:
    true = LogLinear(np.ones(1), np.array([[0.0, -1.0, -2.0]]))  # the third domain alone is best
    prior, free = np.array([0.5, 0.3, 0.2]), Box(np.zeros(3), np.ones(3))
    assert_allclose(swarm.solve(true, prior, free, 1e9, random()), prior, atol=1e-8)
    assert swarm.solve(true, prior, free, 0.0, random())[2] > 1 - 1e-6
    capped = swarm.solve(true, prior, Box(np.full(3, 0.1), np.array([1, 1, 0.6])), 0.0, random())
    assert_allclose(capped, [0.1, 0.3, 0.6], atol=1e-12)


def test_a_further_round_draws_where_losses_are_low() -> None:
    true, prior, box, _, _ = planted(4, 3, 0.0, 0)
    first, later = (
        swarm.design(prior, box, 20, random()),
        swarm.explore(true, prior, box, 0.05, 20, random()),
    )
    assert later.shape == (20, 4) and len(np.unique(later, axis=0)) == 20
    assert true.predict(later).mean() < true.predict(first).mean(1).min() + 0.01


# ── Trust ───────────────────────────────────────────────────────────────────────────


def test_out_of_fold_a_run_is_predicted_by_the_others_only() -> None:
    _, _, _, points, losses = planted(2, 3, NOISE, 0)
    before = swarm.out_of_fold(points, losses, "log_linear", random())
    changed = losses.copy()
    changed[5] += 0.3
    after = swarm.out_of_fold(points, changed, "log_linear", random())
    assert np.array_equal(before[5], after[5]) and not np.array_equal(before, after)


def test_diagnostics_by_hand() -> None:
    found = swarm.diagnose(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 1.2, 3.0, 4.1]))
    assert_allclose(found, [0.8, 0.3, 1.25, 0.5])
    assert swarm.diagnose(np.ones(3), np.arange(3.0)).spearman == 0


def test_the_interval_covers_new_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm, "FOLDS", 5)
    held = []
    for seed in range(5):
        true, prior, box, points, losses = planted(2, 4, NOISE, seed)
        errors = losses.mean(1) - swarm.out_of_fold(points, losses, "log_linear", random()).mean(1)
        fit, noise = (
            regressors.log_linear(points, losses),
            np.random.default_rng(seed).standard_normal(2) * NOISE,
        )
        point = swarm.solve(fit, prior, box, 0.05, random())
        predicted = float(fit.predict(point[None]).mean())
        low, high = swarm.interval(predicted, distance(points, point), errors)
        held.append(low <= float(true.predict(point[None]).mean() + noise.mean()) <= high)
        assert high - low < 0.2
    assert sum(held) >= 4


def test_what_cannot_rank_or_goes_where_no_run_is_is_refused() -> None:
    points = np.random.default_rng(0).dirichlet(np.full(3, 20.0), 12)
    good = swarm.Diagnostics(0.9, 0.0, 0.1, 0.0)
    assert swarm.gates(good, points.mean(0), points) == []
    assert "farther from every run" in swarm.gates(good, np.array([1.0, 0, 0]), points)[0]
    reasons = swarm.gates(swarm.Diagnostics(0.2, 0.2, 0.1, 0.0), points[0], points)
    assert (
        "Spearman correlation of 0.20" in reasons[0] and "an average run only 0.1000" in reasons[1]
    )


def test_a_loss_above_its_interval_is_refused() -> None:
    """As with 18 runs, no anchors and no regularisation: 3.622 predicted, 3.728 found, 3.627 with
    uniform."""
    (reason,) = swarm.confirm(3.728, (3.60, 3.65))
    assert "3.7280" in reason and "3.6000 to 3.6500" in reason
    assert swarm.confirm(3.65, (3.60, 3.65)) == swarm.confirm(3.5, (3.60, 3.65)) == []


# ── Virtual domains ─────────────────────────────────────────────────────────────────


def test_frozen_domains_keep_their_proportions_and_every_cap() -> None:
    space = box.space(np.array([0.3, 0.0, 0.1, 0.0]))
    assert_allclose(space.spread, [[0.75, 0, 0.25, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    point = np.array([0.4, 0.5, 0.1])
    whole = space.expand(point)
    assert_allclose(whole, [0.3, 0.5, 0.1, 0.1])
    assert_allclose(space.reduce(whole), point)
    assert space.holds(whole) and not space.holds(np.full(4, 0.25))
    within = Box(np.full(4, 0.02), np.array([1.0, 1.0, 0.1, 0.4]))
    inside = space.box(within)
    assert_allclose(inside.high, [0.4, 1, 0.4])
    drawn = space.expand(swarm.design(np.full(3, 1 / 3), inside, 50, random()))
    assert all(box.inside(mixed, within) for mixed in drawn)
    with pytest.raises(ValueError, match="frozen keeps together does not fit"):
        space.box(Box(np.array([0.5, 0.0, 0.4, 0.0]), np.ones(4)))
    identity = box.space(np.zeros(4))
    assert np.array_equal(identity.expand(whole), whole) and np.array_equal(
        identity.reduce(whole), whole
    )


def test_options_are_strict() -> None:
    with pytest.raises(ValueError, match="regressor"):
        Options(regressor="magic")  # type: ignore[arg-type]


# ── The stage ───────────────────────────────────────────────────────────────────────

SWARM = (
    "mixture=swarm",
    "swarm.runs=4",
    "swarm.candidates=1",
    "training.steps=6",
    "main.comparisons=[]",
    "seed=81",
)


def made(store: Path) -> dict[str, float]:
    """When every finished run of the store ended."""
    return {path.parent.name: path.stat().st_mtime for path in store.glob("runs/*/result.json")}


@pytest.fixture(scope="module")
def swarmed(tiny: list[str], store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole job. Its final model is of the proxies' size and length: the very run that confirmed
    the mixture."""
    run_dir = tmp_path_factory.mktemp("swarm") / "run"
    outcome = run_here(*tiny, *SWARM, f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    # Prepare, swarm, evaluate.
    assert "swarm: the proposal" in outcome.out and outcome.out.count("done in") == 3
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saturating", "corrected"])
def test_the_law_fits_a_swarm_of_six_runs(
    name: str, swarmed: Path, tiny: list[str], tmp_path: Path
) -> None:
    """The runs of the draw are those of `swarmed`."""
    given = (*SWARM, f"swarm.regressor={name}", "swarm.reuse=false", "stage=swarm")
    outcome = run_here(*tiny, *given, f"run_dir={tmp_path}")
    assert outcome.code == 0, outcome
    assert len(lines(tmp_path / "swarm/runs.jsonl")) == 6
    proposal = read(tmp_path / "swarm/fit.json")["confirmed"][0]
    assert abs(proposal["predicted"] - proposal["realised"]) < 0.5


@pytest.mark.slow
def test_a_swarm_is_run_fitted_and_confirmed(swarmed: Path) -> None:
    runs, fit, mixture = (
        lines(swarmed / "swarm/runs.jsonl"),
        read(swarmed / "swarm/fit.json"),
        read(swarmed / "weights.json"),
    )
    names = [
        f"swarm/round-1/{name}"
        for name in ("natural", "uniform", "run-0", "run-1", "run-2", "run-3")
    ]
    assert [run["run"] for run in runs] == names
    for run in runs:  # what is fitted is what the run, an ordinary one, measured
        result = read(swarmed / run["run"] / "result.json")["evaluation"]
        assert run["losses"] == {name: entry["loss"] for name, entry in result["domains"].items()}
        assert run["loss"] == pytest.approx(result["mean_loss"])
    assert [line["name"] for line in fit["confirmed"]] == [
        "proposal-1",
        "natural",
        "uniform",
        "unimax",
    ]
    best = min(
        (line for line in fit["confirmed"] if not line["refused"]),
        key=lambda line: line["realised"],
    )
    assert (
        fit["chosen"] == best["name"]
        and mixture["weights"] == best["weights"]
        and mixture["method"] == "swarm"
    )
    assert mixture["provenance"]["runs"] == 6 and -1 <= mixture["provenance"]["spearman"] <= 1
    assert (swarmed / "main").resolve() == (swarmed / "swarm/confirm" / best["name"]).resolve()


@pytest.mark.slow
def test_the_plan_counts_the_runs_of_a_swarm(swarmed: Path) -> None:
    before = read(swarmed / "plan.json")  # written before anything ran
    new = [
        name
        for name, run in before["stages"].items()
        if run["kind"] == "swarm" and run["state"] == "new"
    ]
    assert new == [run["run"] for run in lines(swarmed / "swarm/runs.jsonl")] + [
        "swarm/confirm/proposal-1"
    ]
    assert len({before["stages"][name]["flops"] for name in [*new, "main"]}) == 1
    assert before["stages"]["swarm/confirm/natural"]["same_as"] == "swarm/round-1/natural"
    assert before["total_flops"] > len(new) * before["stages"]["main"]["flops"] > 0


@pytest.mark.slow
def test_the_report_shows_fitted_against_realised(swarmed: Path) -> None:
    page = (swarmed / "report.html").read_text()
    assert "The proposal" in page and "regret at 1" in page and "refused, because" in page
    for run in lines(swarmed / "swarm/runs.jsonl"):
        cells = "".join(f"<td>{run[key]:.4f}</td>" for key in ("loss", "fitted", "out_of_fold"))
        assert f"<td>{run['run'].removeprefix('swarm/')}</td>{cells}" in page


def steered(page: Path) -> Any:
    """What the script of a page to steer by reads."""
    found = re.search(r'id="steering">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.slow
def test_a_swarm_has_a_page_to_steer_by(
    swarmed: Path, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    """Of its runs, from its mixture, within its caps; the report links it."""
    page, report = ((swarmed / name).read_text() for name in ("steer.html", "report.html"))
    assert '<a href="steer.html">' in report and '<a href="report.html">' in page
    assert "6 small runs of 3 domains and 3 metrics · fitted by saturating" in page
    assert page.count("data-value=") == 9
    data, runs = steered(swarmed / "steer.html"), lines(swarmed / "swarm/runs.jsonl")
    chosen = read(swarmed / "weights.json")["weights"]
    assert data["names"] == ["chosen", "natural"] and data["domains"] == [*chosen]
    assert data["starts"]["chosen"] == pytest.approx([*chosen.values()])
    assert data["starts"]["natural"] == pytest.approx([*runs[0]["weights"].values()])
    measured = [[*run["losses"].values()] for run in runs]
    assert np.array(data["runs"]) == pytest.approx(np.array(measured), rel=1e-5)
    # Also of a swarm that was done before, for another run_dir; and domains kept together are one.
    again = run_here(*tiny, *SWARM, f"run_dir={tmp_path / 'same'}", "stage=swarm")
    assert again.code == 0 and "steer.html is a page to steer by" in again.out
    (tmp_path / "old.json").write_text('{"weights": {"plain": 0.9, "rich": 0.1}}')
    frozen = (*SWARM, f"swarm.frozen={tmp_path / 'old.json'}", "stage=swarm")
    outcome = run_here(*tiny, *frozen, f"run_dir={tmp_path / 'frozen'}")
    assert outcome.code == 0, outcome
    data = steered(tmp_path / "frozen/steer.html")
    assert data["domains"] == ["plain + rich", "digits"]
    assert data["parts"] == [[["plain", 0.9], ["rich", 0.1]], [["digits", 1.0]]]
    chosen = read(tmp_path / "frozen/weights.json")["weights"]
    together = data["starts"]["chosen"]
    assert together == pytest.approx([chosen["plain"] + chosen["rich"], chosen["digits"]])


@pytest.mark.slow
def test_nothing_of_a_swarm_is_done_twice(
    swarmed: Path, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    before = made(store)
    assert run_here(*tiny, *SWARM, f"run_dir={swarmed}", "stage=swarm").code == 0
    other = run_here(*tiny, *SWARM, f"run_dir={tmp_path / 'same'}", "stage=swarm")
    assert other.code == 0 and "is in the store already" in other.out
    assert made(store) == before
    assert (tmp_path / "same/weights.json").read_bytes() == (swarmed / "weights.json").read_bytes()
    # Another fit of the same runs: all that is new is its proposal, and what it drew itself.
    fresh = (*SWARM, "swarm.runs=1", "swarm.kl=0.2", f"run_dir={tmp_path / 'other'}", "stage=swarm")
    outcome = run_here(*tiny, *fresh)
    assert outcome.code == 0 and "runs in the store are used too" in outcome.out, outcome
    known = {tuple(run["weights"].values()) for run in lines(swarmed / "swarm/runs.jsonl")}
    assert known <= {
        tuple(run["weights"].values()) for run in lines(tmp_path / "other/swarm/runs.jsonl")
    }
    assert len(made(store)) - len(before) <= 3  # a drawn run, a proposal, and the swarm itself


@pytest.mark.slow
def test_a_swarm_serves_its_objective(
    swarmed: Path, tiny: list[str], store: Path, tmp_path: Path
) -> None:
    """The same runs, judged by the text of a target; another objective is another search."""
    target = (
        "objective=target", "target.domains=[rich]", "target.sequences=4",
        "main.comparisons=[uniform]", "stage=swarm",
    )  # fmt: skip
    before = made(store)
    outcome = run_here(*tiny, *SWARM, *target, f"run_dir={tmp_path / 'target'}")
    assert outcome.code == 0, outcome
    runs = lines(tmp_path / "target/swarm/runs.jsonl")
    known = {line["run"]: line["losses"] for line in lines(swarmed / "swarm/runs.jsonl")[:2]}
    assert list(known) == ["swarm/round-1/natural", "swarm/round-1/uniform"]
    for run in runs:
        assert run["loss"] == run["losses"].pop("target") > 0
        if run["run"] in known:  # half of the others is of the target
            assert run["losses"] == known[run["run"]]
    assert len({run["loss"] for run in runs}) > 1
    fit, mixture = (read(tmp_path / "target" / name) for name in ("swarm/fit.json", "weights.json"))
    allowed = [line["realised"] for line in fit["confirmed"] if not line["refused"]]
    (chosen,) = (line for line in fit["confirmed"] if line["name"] == fit["chosen"])
    assert chosen["realised"] == min(allowed) and mixture["weights"] == chosen["weights"]
    # What it is for alone is among the runs.
    (alone,) = (line for line in fit["confirmed"] if line["name"] == "target")
    (first,) = (run for run in runs if run["run"] == "swarm/round-1/target")
    assert alone["realised"] == first["loss"] and alone["weights"] == first["weights"]
    assert len(made(store)) - len(before) <= 7  # runs, a proposal, the search
    # The final models, which are runs of the search, are judged by it too.
    outcome = run_here(*tiny, *SWARM, *target[:-1], f"run_dir={tmp_path / 'target'}")
    assert outcome.code == 0, outcome
    domains = read(tmp_path / "target/plan.json")["domains"]
    passes = len(domains) * domains["rich"]["final_epochs"]["uniform"]  # on it alone
    assert alone["weights"]["rich"] == pytest.approx(min(4 / passes, 1))
    figures = read(tmp_path / "target/evaluation.json")
    known_losses = {run["run"].rpartition("/")[2]: run["loss"] for run in runs}
    assert figures["uniform"]["target_loss"] == known_losses["uniform"]
    assert figures["main"]["target_loss"] == chosen["realised"]
    said = " ".join(outcome.out.split())
    assert f"reaches {chosen['realised']:.4f} nats per token on the objective: " in said
    measured = list((store / "metrics").iterdir())
    again = run_here(*tiny, *SWARM, *target, f"run_dir={tmp_path / 'again'}", "swarm.kl=0.1")
    assert again.code == 0 and set(measured) <= set((store / "metrics").iterdir())


@pytest.mark.slow
def test_an_optimal_design_is_planned_run_by_run(tiny: list[str], tmp_path: Path) -> None:
    """Others than at random, within caps, all different, and the same again; and a design is no
    part of the address where it is the old one."""
    drawn = {}
    for number, how in enumerate(("random", "optimal", "optimal")):
        place = (f"run_dir={tmp_path / str(number)}", "stage=plan", f"swarm.design={how}")
        outcome = run_here(*tiny, *SWARM, *place, "swarm.regressor=saturating", "swarm.runs=6")
        assert outcome.code == 0, outcome
        stages = read(tmp_path / str(number) / "plan.json")["stages"]
        drawn[number] = {name for name in stages if name.startswith("swarm/round-1")}
        again = {name for name in drawn[number] if name.endswith("-again")}
        assert len(again) == (0 if how == "random" else 2)
        assert len(drawn[number]) == 8 + len(again)
        assert not any(stages[n]["same_as"] for n in drawn[number])
    plain, optimal = (ways._decisive(Swarm(design=how)) for how in ("random", "optimal"))  # type: ignore[arg-type]
    assert "design" not in plain and optimal["design"] == "optimal"


@pytest.mark.slow
def test_a_designed_swarm_knows_its_noise_and_what_repetition_costs(
    tiny: list[str], tmp_path: Path
) -> None:
    """Natural and what is farthest from it are trained twice. Small runs that repeat as the final
    run will make mixture.max_epochs a warning under a law, and only there."""
    sizes = {"plain": 0.57, "rich": 0.28, "digits": 0.15}
    given = (*SWARM, "swarm.design=optimal", "stage=main", "main.comparisons=[]")
    final = ("main.tokens=60000", "mixture.max_epochs=1", "objective.metrics={digits: 1}")
    run = (*given, *final, "swarm.kl=0", "main.steps=2")
    law = run_here(*tiny, *run, f"run_dir={tmp_path / 'law'}", "swarm.regressor=saturating")
    assert law.code == 0, law
    found = lines(tmp_path / "law/swarm/runs.jsonl")
    again = [row for row in found if row["run"].endswith("-again")]
    assert len(again) == 2 and again[0]["run"] == "swarm/round-1/natural-again"
    for row in again:
        first = next(one for one in found if one["run"] + "-again" == row["run"])
        assert first["weights"] == row["weights"] and first["loss"] != row["loss"]
        recipes = [read(tmp_path / "law" / one["run"] / "recipe.json") for one in (first, row)]
        assert recipes[1]["seed"] == recipes[0]["seed"] + 1_000_000
        assert "subsample" in recipes[0]
    corner = max(found, key=lambda row: abs(row["weights"]["digits"] - sizes["digits"]))
    assert corner["weights"]["digits"] > 0.8  # half of it is what one pass allows
    weights = read(tmp_path / "law/weights.json")
    above = {name: epochs for name, epochs in weights["epochs"].items() if epochs > 1}
    for name, epochs in above.items():
        assert f"{name} {epochs:.1f}" in law.out
    assert ("knows the harm of it" in law.out) == bool(above)
    # A fit that knows nothing of it keeps the cap.
    plain = run_here(*tiny, *run, f"run_dir={tmp_path / 'plain'}", "swarm.regressor=log_linear")
    assert plain.code == 0, plain
    assert max(read(tmp_path / "plain/weights.json")["epochs"].values()) <= 1 + 1e-9
    assert "knows the harm of it" not in plain.out


def test_runs_on_one_mixture_are_left_out_together() -> None:
    points = np.repeat(np.random.default_rng(0).dirichlet(np.ones(3), 8), 2, axis=0)
    losses = points @ np.array([[1.0], [2.0], [3.0]])
    losses[1::2] += 5  # whoever sees the first of a pair does not expect the second
    unseen = swarm.out_of_fold(points, losses, "gaussian_process", random())
    assert_allclose(unseen[::2], unseen[1::2], rtol=1e-9)


def test_the_recipe_of_a_target_is_a_swarm_for_it(tiny: list[str], tmp_path: Path) -> None:
    place = ("stage=plan", f"run_dir={tmp_path}", "training.steps=6", "target.sequences=4")
    of_the_recipe = [override for override in tiny if not override.startswith("mixture=")]
    outcome = run_here(*of_the_recipe, "experiment=target", "target.domains=[rich]", *place)
    assert outcome.code == 0, outcome
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["mixture"]["method"] == "swarm" and config["swarm"]["design"] == "optimal"
    assert config["objective"]["metrics"] == {"target": 1.0}


@pytest.mark.slow
def test_a_guard_is_checked_on_the_confirmation_run(
    swarmed: Path, tiny: list[str], tmp_path: Path
) -> None:
    """Whatever loses anything of any domain against natural is refused, with the figure."""
    guard = ("objective.metrics={rich: 1}", "objective.guard={plain: 0, rich: 0, digits: 0}")
    outcome = run_here(*tiny, *SWARM, *guard, f"run_dir={tmp_path}", "stage=swarm")
    assert outcome.code == 0, outcome
    fit = read(tmp_path / "swarm/fit.json")
    natural = read(tmp_path / "swarm/confirm/natural/result.json")["evaluation"]["domains"]
    for line in fit["confirmed"]:
        reached = read(tmp_path / "swarm/confirm" / line["name"] / "result.json")["evaluation"]
        lost = {
            name: entry["loss"] / natural[name]["loss"] - 1
            for name, entry in reached["domains"].items()
        }
        for name, part in lost.items():
            said = f"it loses {part:.2%} of {name} against natural ("
            assert any(why.startswith(said) for why in line["refused"]) == (part > 0), line
            if part > 0:
                assert any("), more than objective.guard=0.00%" in why for why in line["refused"])
        assert line["realised"] == reached["domains"]["rich"]["loss"]
    assert fit["chosen"] == "natural" or not any(
        line["refused"] for line in fit["confirmed"] if line["name"] == fit["chosen"]
    )


def test_a_guard_is_kept_but_not_beyond_doubt() -> None:
    """The figure decides; where the interval reaches beyond the guard, that is said."""
    options = objective.Options(guard={"code": 0.02, "web": 0.02})
    wanted = objective.objective(options, ["code", "web"], np.array([2.0, 2.0]))
    noise = guards.Noise(np.array([0.01, 0.01]), 30)
    held = guards.held(wanted, np.array([2.03, 2.06]), noise, 1)
    (refused,) = swarm_proposals.beyond(wanted, held, ["code", "web"])
    (doubt,) = swarm_proposals.in_doubt(wanted, held, ["code", "web"])
    half = stats.t.ppf(0.975, 30) * 0.01 * np.sqrt(2) / 2
    assert refused == (
        f"it loses 3.00% of web against natural ({0.03 - half:.2%} to {0.03 + half:.2%}), more "
        "than objective.guard=2.00%"
    )
    assert doubt == (
        f"it loses 1.50% of code against natural ({0.015 - half:.2%} to {0.015 + half:.2%}), so "
        "that it keeps objective.guard=2.00% is not beyond doubt"
    )
    sure = guards.held(wanted, np.array([2.0, 2.0]), noise, 1)
    assert swarm_proposals.in_doubt(wanted, sure, ["code", "web"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.acceptance)])
def test_a_search_keeps_guards_against_natural(
    processes: int, tiny: list[str], doremi: Command, tmp_path: Path
) -> None:
    """Natural is trained too, and what loses more than the guard is not taken; nor is it when the
    same command is given again, and everything is there."""
    given = (
        *tiny, "mixture=search", "swarm.runs=3", "training.steps=6", "main.comparisons=[]",
        "seed=86", "objective.metrics={rich: 1}", "objective.guard={plain: 0, digits: 0}",
        f"run_dir={tmp_path}",
    )  # fmt: skip
    for _ in range(2):
        outcome = doremi(*given, processes=2) if processes == 2 else run_here(*given)
        assert outcome.code == 0, outcome
    measured = {
        path.parent.name: read(path)["evaluation"]["domains"]
        for path in (tmp_path / "search").glob("*/result.json")
    }
    assert len(measured) == 4
    kept = {
        name: found["rich"]["loss"]
        for name, found in measured.items()
        if all(found[d]["loss"] <= measured["natural"][d]["loss"] for d in ("plain", "digits"))
    }
    provenance = read(tmp_path / "weights.json")["provenance"]
    assert provenance["chosen"] == f"search/{min(kept, key=lambda name: kept[name])}"


def test_a_swarm_that_cannot_be_is_refused(tiny: list[str], tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (["stage=swarm"], "write mixture=swarm too"),
        (
            # Under a law that has not seen repetition.
            [
                "mixture=swarm",
                "stage=plan",
                "main.tokens=1000000000000",
                "swarm.regressor=log_linear",
            ],
            "mixture.max_epochs=4",
        ),
        (["mixture=swarm", "stage=plan", f"swarm.frozen={tmp_path}/none.json"], "swarm.frozen="),
        (["reference.mixture=file"], "reference.mixture=file"),
        (
            ["mixture=swarm", "stage=plan", "objective=target"],
            "objective: counts target, and there is none",
        ),
        (
            ["mixture=swarm", "stage=plan", "objective.metrics={moon: 1}"],
            "objective: unknown metric 'moon'",
        ),
        (
            ["mixture=swarm", "stage=plan", "swarm.floor=0.5"],
            "swarm: swarm.floor=0.5 for 3 domains",
        ),
        (
            ["mixture=swarm", "stage=plan", "swarm.floor=0.2", f"swarm.frozen={tmp_path}/old.json"],
            "what swarm.frozen keeps together does not fit within mixture.max_epochs and "
            "swarm.floor",
        ),
    ]
    (tmp_path / "old.json").write_text('{"weights": {"plain": 0.9, "rich": 0.1}}')
    for number, (overrides, named) in enumerate(cases):
        outcome = run_here(*tiny, f"run_dir={tmp_path}/{number}", *overrides)
        assert outcome.code == 2 and named in outcome.err, outcome


@pytest.mark.acceptance
def test_a_killed_swarm_goes_on_to_the_same_bits(
    swarmed: Path, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    overrides = [*fresh, *SWARM, f"run_dir={tmp_path / 'run'}", "stage=swarm"]
    for after in ("round-1/run-1", "confirm/proposal-1"):
        process = start(*overrides)
        with reaped(process):
            wait_for((tmp_path / "run/swarm" / after).exists, process)
            process.kill()
    done = made(tmp_path / "store")
    assert len(done) >= 6
    outcome = doremi(*overrides)
    assert outcome.code == 0, outcome
    assert made(tmp_path / "store").items() >= done.items()
    for name in ("fit.json", "runs.jsonl"):
        assert (tmp_path / "run/swarm" / name).read_bytes() == (
            swarmed / "swarm" / name
        ).read_bytes()


@pytest.mark.acceptance
def test_a_told_swarm_stops_and_says_so(fresh: list[str], tmp_path: Path) -> None:
    process = start(
        *fresh, *SWARM, "training.steps=400", f"run_dir={tmp_path / 'run'}", "stage=swarm"
    )
    with reaped(process):
        wait_for((tmp_path / "run/swarm/round-1/natural/metrics.jsonl").exists, process)
        process.terminate()
        outcome = ended(process)
    assert outcome.code == 75, outcome
    assert read(tmp_path / "run/swarm/status.json")["state"] == "preempted"


@pytest.mark.acceptance
def test_a_swarm_of_jobs_is_that_of_one_process(
    swarmed: Path, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    overrides = [
        *fresh,
        *SWARM,
        f"run_dir={tmp_path / 'run'}",
        "stage=swarm",
        "submit.cluster=local",
    ]
    outcome = doremi(*overrides, "submit.parallel=2", timeout=560)
    assert outcome.code == 0, outcome
    assert outcome.out.count("is job") == 7
    assert (tmp_path / "run/weights.json").read_bytes() == (swarmed / "weights.json").read_bytes()


@pytest.mark.acceptance
def test_rounds_frozen_domains_and_matched_repetition(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"weights": {"plain": 0.2, "rich": 0.6, "gone": 0.2}}')
    overrides = (
        *SWARM,
        "swarm.rounds=2",
        f"swarm.frozen={tmp_path / 'old.json'}",
        "proxy.match_repetition=true",
    )
    run_dir = tmp_path / "run"
    outcome = run_here(*tiny, *overrides, "main.tokens=60000", f"run_dir={run_dir}", "stage=swarm")
    assert outcome.code == 0, outcome
    runs = lines(run_dir / "swarm/runs.jsonl")
    assert {run["run"].split("/")[1] for run in runs} == {"round-1", "round-2"}
    for mixed in [run["weights"] for run in runs]:
        assert mixed["rich"] == pytest.approx(3 * mixed["plain"], rel=1e-6)
    assert "subsample" in read(run_dir / "swarm/round-2/run-0/recipe.json")

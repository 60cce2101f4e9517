"""A mixture from a table of runs, without data: proposed, judged, predicted, exported, refused."""

import csv
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import scipy
from helpers.command import Outcome, run_here, start

from doremi_train.methods.box import Floats

REGMIX = Path(__file__).parents[3] / "shared" / "regmix"
DOMAINS = ["web", "code", "books (old)"]


def losses(weights: Floats) -> Floats:
    """(N, K) → (N, 2) of code and of prose, which fall with what serves them."""
    web, code, books = np.maximum(weights, 0).T
    return np.stack(
        [1 + np.exp(-3 * code**0.6 - web), 2 + np.exp(-2 * (books + web) ** 0.6)], axis=1
    )


def table(path: Path, count: int = 24, more: str = "") -> Path:
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(3), count)
    figures = losses(weights) + random.normal(0, 1e-4, (count, 2))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *DOMAINS, "code_loss" + more, "prose_loss"])
        writer.writerows(
            [f"r{n}", *w, *f] for n, (w, f) in enumerate(zip(weights, figures, strict=True))
        )
    return path


LAW = "fit.regressor=saturating"  # the default's trees take longer


def fit(path: Path, run_dir: Path, *more: str) -> Outcome:
    return run_here("stage=fit", f"fit.runs={path}", f"run_dir={run_dir}", LAW, *more)


def read(run_dir: Path) -> dict:
    return json.loads((run_dir / "fit" / "fit.json").read_text())


@pytest.mark.slow
def test_from_a_table_to_weights_and_to_a_trainer(tmp_path: Path) -> None:
    path, run_dir = table(tmp_path / "runs.csv"), tmp_path / "run"
    outcome = fit(path, run_dir, f"fit.predict={path}")
    assert outcome.code == 0, outcome
    content = read(run_dir)
    assert content["runs"] == 24 and content["objective"]["spearman"] > 0.95
    weights = json.loads((run_dir / "weights.json").read_text())["weights"]
    assert list(weights) == DOMAINS and sum(weights.values()) == pytest.approx(1)
    best = scipy.optimize.minimize(  # what the law that made the table asks for
        lambda w: losses(w[None]).mean(), np.full(3, 1 / 3), bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    reached = losses(np.array([list(weights.values())])).mean()
    uniform = losses(np.full((1, 3), 1 / 3)).mean()
    assert reached - best.fun < 0.2 * (uniform - best.fun)
    assert "prepare" not in {entry.name for entry in run_dir.iterdir()}
    paths = "export.paths={web: /d/web, code: /d/code, books \\(old\\): /d/books}"
    exported = run_here(
        "stage=export", f"fit.runs={path}", f"run_dir={run_dir}", f"fit.predict={path}",
        "export.to=megatron", LAW, paths,
    )  # fmt: skip
    assert exported.code == 0, exported
    written = (run_dir / "export" / "mixture_megatron.txt").read_text().split()
    assert sum(map(float, written[::2])) == pytest.approx(1)


@pytest.mark.slow
def test_predictions_are_named_as_the_input_is(tmp_path: Path) -> None:
    path, run_dir = table(tmp_path / "runs.csv"), tmp_path / "run"
    assert fit(path, run_dir, f"fit.predict={path}").code == 0
    with (run_dir / "fit" / "predictions.csv").open() as file:
        first, *rows = csv.reader(file)
    assert first == [
        "run", "code_loss", "code_loss_low", "code_loss_high",
        "prose_loss", "prose_loss_low", "prose_loss_high",
    ]  # fmt: skip
    assert [row[0] for row in rows] == [f"r{n}" for n in range(24)]
    values = np.array([row[1:] for row in rows], float).reshape(24, 2, 3)
    with path.open() as file:
        true = np.array([row[4:] for row in list(csv.reader(file))[1:]], float)
    assert ((values[..., 1] <= true) & (true <= values[..., 2])).mean() > 0.9


@pytest.mark.slow
def test_the_objective_decides_and_guards_hold(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv")
    shares = {}
    for name, objective in {
        "code": ["objective.metrics={code_loss: 1}"],
        "prose": ["objective.metrics={prose_loss: 1}"],
        "guarded": ["objective.metrics={code_loss: 1}", "objective.guard={prose_loss: 0.005}"],
        "worst": ["objective=worst"],
    }.items():
        outcome = fit(path, tmp_path / name, *objective)
        assert outcome.code == 0, outcome
        shares[name] = read(tmp_path / name)["domains"]["code"]["proposed"]
    assert shares["code"] > 0.5 > 0.2 > shares["prose"]
    assert shares["prose"] < shares["guarded"] < shares["code"]
    prose = read(tmp_path / "guarded")["metrics"]["prose_loss"]
    assert prose["proposed"] < prose["natural"] * 1.0051 and prose["guard"] == 0.005


@pytest.mark.slow
def test_caps_follow_from_tokens_and_budget(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv")
    tokens = "fit.tokens={web: 1000, code: 100, books \\(old\\): 100}"
    assert fit(path, tmp_path / "run", tokens, "main.tokens=2000").code == 0
    weights = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert weights["weights"]["code"] <= 0.2 + 1e-9  # four passes over 100 of 2000
    assert weights["epochs"]["code"] == pytest.approx(20 * weights["weights"]["code"])
    assert read(tmp_path / "run")["domains"]["web"]["natural"] == pytest.approx(1000 / 1200)


def mixed(path: Path, unit: float = 1.0, replicates: int = 4) -> Path:
    """Runs with bits per byte, nats and an accuracy in parts or percent (`unit`), each noisy, and
    the first mixture so many times."""
    random = np.random.default_rng(1)
    weights = random.dirichlet(np.ones(3), 24)
    weights[:replicates] = weights[0]
    code, prose = losses(weights).T
    noise = random.normal(0, 1, (24, 3)) * [0.002, 0.02, 0.01]
    figures = np.stack([code / 3, 4 + prose, 0.8 - (prose - 2) / 3], axis=1) + noise
    figures[:, 2] *= unit
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *DOMAINS, "code_bpb", "prose_loss", "arc/acc"])
        writer.writerows(
            [f"r{n}", *w, *f] for n, (w, f) in enumerate(zip(weights, figures, strict=True))
        )
    return path


@pytest.mark.slow
def test_metrics_of_different_scales_are_one_objective(tmp_path: Path) -> None:
    """Of an accuracy more is better, and whether it is a part or a percentage does not count."""
    found = {}
    for name, unit in {"part": 1.0, "percent": 100.0}.items():
        path, run_dir = mixed(tmp_path / f"{name}.csv", unit), tmp_path / name
        outcome = fit(path, run_dir, "objective.standardise=true")
        assert outcome.code == 0, outcome
        assert "arc/acc: more is better, by its name, so it counts with weight -1" in outcome.out
        content = found[name] = read(run_dir)
        assert [of["weight"] for of in content["metrics"].values()] == [1, 1, -1]
        assert "of the standardised metrics that count" in content["verdict"]
        assert content["objective"]["natural"] == pytest.approx(0, abs=1e-9)
    part, percent = (
        [domain["proposed"] for domain in content["domains"].values()] for content in found.values()
    )
    assert part == pytest.approx(percent, abs=2e-3)
    # As they are, a percentage is nearly all that counts.
    outcome = fit(tmp_path / "percent.csv", tmp_path / "bare")
    assert outcome.code == 0 and "of the metrics that count" in outcome.out
    bare = [domain["proposed"] for domain in read(tmp_path / "bare")["domains"].values()]
    assert np.abs(np.array(bare) - percent).sum() > 0.1


def test_without_replicates_nothing_is_standardised(tmp_path: Path) -> None:
    outcome = fit(
        mixed(tmp_path / "x.csv", replicates=1), tmp_path / "x", "objective.standardise=true"
    )
    said = " ".join(outcome.err.split())
    assert outcome.code == 2 and "objective.standardise=true: code_bpb is not known of two" in said
    assert "give more runs on the same mixture" in said
    assert not (tmp_path / "x" / "weights.json").exists()


@pytest.mark.slow
def test_less_of_an_accuracy_is_not_asked_for(tmp_path: Path) -> None:
    path = mixed(tmp_path / "x.csv")
    outcome = fit(path, tmp_path / "x", "objective.metrics={arc/acc: 1}")
    assert outcome.code == 2 and "arc/acc is something of which more is better" in outcome.err
    outcome = fit(path, tmp_path / "z", "objective.metrics={arc/acc: -1}")
    gained = read(tmp_path / "z")["metrics"]["arc/acc"]
    assert gained["proposed"] > gained["natural"] + 0.005
    outcome = fit(path, tmp_path / "y", "objective.metrics={code_bpb: 1}")
    assert outcome.code == 0 and "more is better, by its name" not in outcome.out
    page = (tmp_path / "y" / "fit" / "report.html").read_text()
    assert "arc/acc (more is better)" in page  # which is so also where it does not count


def test_of_few_runs_nothing_is_proposed_but_they_are_ranked(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv", 5)
    outcome = fit(path, tmp_path / "run", f"fit.predict={path}")
    assert outcome.code == 0, outcome
    assert "No mixture is proposed: 5 runs are fewer than 2 for each of 3" in outcome.out
    assert (tmp_path / "run" / "fit" / "predictions.csv").exists()
    assert not (tmp_path / "run" / "weights.json").exists()
    export = [
        "stage=export",
        f"fit.runs={path}",
        f"run_dir={tmp_path / '2'}",
        LAW,
        "export.to=doremi",
    ]
    refused = run_here(*export)
    assert refused.code == 2 and "no mixture is proposed" in refused.err


MISTAKES = [
    (["fit.runs=null"], "fit.runs: names the table of the runs"),
    (["fit.runs=none.csv"], "fit.runs=none.csv: cannot be read"),
    (["objective.metrics={moon: 1}"], "objective: unknown metric 'moon'; the runs have code_loss"),
    (["objective.metrics={code_loss: 0}"], "objective.metrics: every weight is 0"),
    (["objective.guard={code_loss: 2}"], "objective.guard.code_loss"),
    (["fit.tokens={web: 1}"], "fit.tokens: no number for 'code'"),
    (["fit.tokens={moon: 1}"], "fit.tokens: unknown domain 'moon'"),
    (
        ["fit.tokens={web: 9, code: 9, books \\(old\\): 9}", "main.tokens=999"],
        "main.tokens=999: more than mixture.max_epochs=4 passes over all of fit.tokens",
    ),
    (["fit.regressor=magic"], "fit.regressor"),
    (["fit.predict=none.csv"], "fit.predict=none.csv: cannot be read"),
]


@pytest.mark.parametrize(("more", "said"), MISTAKES, ids=[said[:30] for _, said in MISTAKES])
def test_a_mistake_is_one_message(tmp_path: Path, more: list[str], said: str) -> None:
    outcome = fit(table(tmp_path / "runs.csv"), tmp_path / "run", *more)
    assert outcome.code == 2 and said in outcome.err, outcome
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run" / "weights.json").exists()


@pytest.mark.slow
def test_documents_need_the_data(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv")
    export = ["stage=export", f"fit.runs={path}", f"run_dir={tmp_path / 'run'}"]
    outcome = run_here(*export, LAW, "export.to=datasets", "export.paths={web: a, code: b}")
    assert outcome.code == 2 and "give export.unit=sequences" in outcome.err, outcome


@pytest.mark.slow
def test_names_are_text_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv", more="<script>alert(1)</script>[bold]")
    outcome = fit(path, tmp_path / "run")
    assert outcome.code == 0, outcome
    page = (tmp_path / "run" / "fit" / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


@pytest.mark.acceptance
@pytest.mark.skipif(not REGMIX.exists(), reason="RegMix's public runs are not here")
def test_regmix_s_runs_rank_unseen_mixtures(tmp_path: Path) -> None:
    pair = ",".join(str(REGMIX / f"train_{what}_1m.csv") for what in ("mixture", "pile_loss"))
    asked = [f"fit.runs=[{pair}]", f"fit.predict={REGMIX / 'test_mixture_1m.csv'}"]
    assert run_here("stage=fit", *asked, f"run_dir={tmp_path}").code == 0
    with (tmp_path / "fit" / "predictions.csv").open() as file:
        predicted = list(csv.DictReader(file))
    with (REGMIX / "test_pile_loss_1m.csv").open() as file:
        true = {row["index"]: row for row in csv.DictReader(file)}
    names = [name for name in next(iter(true.values())) if name != "index"]

    def of(rows: list[dict], end: str = "") -> Floats:
        return np.array([[float(row[name + end]) for name in names] for row in rows])

    measured = of([true[row["index"]] for row in predicted])
    assert scipy.stats.spearmanr(of(predicted).mean(1), measured.mean(1)).statistic > 0.985
    within = (of(predicted, "_low") <= measured) & (measured <= of(predicted, "_high"))
    assert 0.90 < within.mean() < 0.985


@pytest.mark.slow
def test_a_long_fit_hears_that_it_is_told_to_stop(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(100), 220)
    with (tmp_path / "wide.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *(f"d{k}" for k in range(100)), *(f"m{m}_loss" for m in range(9))])
        figures = 2 + np.exp(-3 * weights @ random.random((100, 9)))
        writer.writerows([f"r{n}", *w, *figures[n]] for n, w in enumerate(weights))
    process = start("stage=fit", f"fit.runs={tmp_path / 'wide.csv'}", f"run_dir={tmp_path / 'run'}")
    while not (tmp_path / "run" / "config.yaml").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "fit: told to stop" in process.communicate()[1] and process.returncode == 75
    assert not (tmp_path / "run" / "weights.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("regressor", ["saturating", "gaussian_process"])
def test_what_more_is_better_of_is_fitted_as_well_as_a_loss(tmp_path: Path, regressor: str) -> None:
    """A law of losses knows nothing of what rises; the figures on the page are as they were
    given."""
    random = np.random.default_rng(2)
    weights = random.dirichlet(np.ones(3), 24)
    lost = losses(weights)[:, 0]
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *DOMAINS, "code_loss", "code_acc"])
        writer.writerows([n, *weights[n], loss, 2 - loss] for n, loss in enumerate(lost))
    asked = (f"fit.predict={tmp_path / 'runs.csv'}", f"fit.regressor={regressor}")
    outcome = fit(tmp_path / "runs.csv", tmp_path / "run", *asked)
    assert outcome.code == 0, outcome
    found = read(tmp_path / "run")["metrics"]
    assert found["code_acc"]["spearman"] == pytest.approx(found["code_loss"]["spearman"], abs=0.02)
    assert found["code_acc"]["spearman"] > 0.95
    with (tmp_path / "run/fit/predictions.csv").open() as file:
        for row in csv.DictReader(file):
            low, value, high = (float(row[f"code_acc{end}"]) for end in ("_low", "", "_high"))
            assert low < value < high
            assert value == pytest.approx(2 - float(row["code_loss"]), abs=0.05)

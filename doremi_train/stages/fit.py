"""A mixture from other people's runs: a table of weights and metrics is read, fitted, judged by
folds, and the best mixture proposed; without a corpus, a tokeniser or training.

    run_dir/weights.json            what is proposed, for mixture=file and stage=export
    run_dir/fit/fit.json            figures of the fit, and of the proposal
    run_dir/fit/predictions.csv     of fit.predict
    run_dir/fit/report.html

N runs, K domains, M metrics, R mixtures.
"""

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch

from doremi_train import files, mixture
from doremi_train.config import UserError
from doremi_train.evaluation import runs_table
from doremi_train.evaluation.runs_table import Runs
from doremi_train.methods import box, steering, swarm
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.fits import Known
from doremi_train.methods.forecast import Forecast, forecast
from doremi_train.methods.objective import Objective
from doremi_train.methods.optimum import optimum
from doremi_train.mixture import Mixture
from doremi_train.parallel import comm
from doremi_train.parallel.threads import fitting
from doremi_train.reports import fit_page, steer_page
from doremi_train.reports.steer_page import Given
from doremi_train.stages.options import FitOptions
from doremi_train.stages.session import Session, once
from doremi_train.stages.tables import asked
from doremi_train.stages.tables.asked import many
from doremi_train.stages.tables.content import translated

RUNS_PER_DOMAIN = 2  # of fewer nothing is proposed


class Problem(NamedTuple):
    """What is known, and what is wanted."""

    runs: Runs
    natural: Floats  # (K,)
    passes: Floats | None  # (K,) over each domain by the final run on it alone
    within: Box
    wanted: Objective
    fitted: Forecast


class Proposal(NamedTuple):
    """A mixture, and what is to be expected of it."""

    weights: Floats  # (K,)
    predicted: Floats  # (M,)
    low: Floats  # (M,) of the 95 % interval
    high: Floats  # (M,)
    refused: list[str]  # why it is not to be believed


@once
def run(session: Session) -> Mixture | None:
    """Fit, judge, propose and predict; the mixture, where one is proposed. Raises UserError for
    tables that cannot be used."""
    chosen: Mixture | None = comm.on_first(lambda: _run(session))
    return chosen


def require(session: Session) -> Mixture:
    """The proposal. Raises UserError where there is none."""
    chosen = run(session)
    if chosen is None:
        raise UserError(
            f"fit.runs={session.config.fit.runs}: no mixture is proposed (see above); give more "
            "runs, or take mixture=file"
        )
    return chosen


@fitting("fit")
def _run(session: Session) -> Mixture | None:
    folder = session.run_dir / "fit"
    problem = _problem(session)
    proposal = _propose(session, problem)
    if session.config.fit.predict is not None:
        _predict(folder / "predictions.csv", session.config.fit, problem)
    content = _content(session, problem, proposal)
    steer = None if proposal is None else _steer(problem, proposal)
    if steer is not None:
        content["effects"] = steer_page.effects(steer)
    files.write_json(folder / "fit.json", content)
    fit_page.write(folder / "report.html", content, steer)
    for line in (*content["notes"], content["verdict"], str(folder / "report.html")):
        session.say(f"fit: {line}")
    if proposal is None or proposal.refused:
        return None
    chosen = Mixture(
        "fit",
        {name: domain["proposed"] for name, domain in content["domains"].items()},
        epochs={} if problem.passes is None else _named(problem, proposal.weights * problem.passes),
        provenance={key: content[key] for key in ("runs", "regressor", "verdict")},
    )
    mixture.save(session.run_dir / "weights.json", chosen)
    return chosen


def _problem(session: Session) -> Problem:
    table = asked.table(session)
    known, regressor = Known(table.passes, table.natural), session.config.fit.regressor
    fitted = forecast(table.runs.weights, table.runs.values, known, regressor, table.wanted.turn)
    natural = fitted.predict(table.natural[None])[0]
    return Problem(*table._replace(wanted=table.wanted._replace(natural=natural)), fitted)


# ── What is proposed ────────────────────────────────────────────────────────────────


def _propose(session: Session, problem: Problem) -> Proposal | None:
    """The best mixture of the fits; None where the runs are too few for one."""
    runs, fitted, wanted = problem.runs, problem.fitted, problem.wanted
    if len(runs.ids) < RUNS_PER_DOMAIN * _used(runs):
        return None
    random, pull = np.random.default_rng(session.config.seed), session.config.fit.kl
    prior = np.maximum(problem.natural, 1e-6)
    prior /= prior.sum()
    if fitted.smooth:
        point = optimum(fitted, wanted.penalised, problem.within, prior, pull, random)
    else:
        point = swarm.solve(swarm.Judged(fitted, wanted), prior, problem.within, pull, random)
    point = box.on_grid(point, problem.within)
    predicted, low, high = (part[0] for part in fitted.between(point[None]))
    return Proposal(point, predicted, low, high, _refused(problem, predicted))


def _used(runs: Runs) -> int:
    """Domains that any run has tokens of."""
    return int((runs.weights.max(0) > 0).sum())


def _refused(problem: Problem, predicted: Floats) -> list[str]:
    trust, wanted = _spearman(*_scored(problem)), problem.wanted
    refused = []
    if trust < swarm.LEAST_SPEARMAN:
        refused.append(
            f"out of fold the fit ranks runs with a Spearman correlation of {trust:.2f} only"
        )
    lost = wanted.beyond(torch.from_numpy(predicted[None]))[0].numpy()
    refused += [
        f"no mixture keeps objective.guard: this one loses {lost[m] + wanted.guard[m]:.2%} of "
        f"{problem.runs.metrics[m]}"
        for m in np.flatnonzero(lost > 1e-6).tolist()
    ]
    return refused


def _scored(problem: Problem) -> tuple[Floats, Floats]:
    """Objective out of fold and realised, of the runs that have all metrics that count."""
    there = np.isfinite(problem.runs.values[:, problem.wanted.weights != 0]).all(1)
    both = (problem.fitted.unseen[there], problem.runs.values[there])
    unseen, realised = (problem.wanted.scores(np.nan_to_num(values)) for values in both)
    return unseen, realised


def _spearman(a: Floats, b: Floats) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(a, b).statistic)


def _steer(problem: Problem, proposal: Proposal) -> Given:
    """What the page steers, from the proposal or from natural."""
    runs, more = problem.runs, problem.wanted.more
    known = Known(problem.passes, problem.natural)
    return Given(
        runs.domains,
        runs.metrics,
        more,
        steering.steerable(runs.weights, runs.values, more, known),
        problem.within,
        {"proposed": proposal.weights, "natural": problem.natural},
        {"proposed": proposal.predicted, "natural": problem.wanted.natural},
        runs.values,
        [{name: 1.0} for name in runs.domains],
    )


# ── What is written ─────────────────────────────────────────────────────────────────


def _predict(path: Path, options: FitOptions, problem: Problem) -> None:
    """The first column as given; a column a metric, with the ends of its interval; with fit.content
    the part of each mixture that is outside all that the runs had."""
    table, folders = str(options.predict), many(options.content)
    if folders:
        unseen, outside = translated(table, folders, problem.runs)
    else:
        unseen = runs_table.read_mixtures(table, problem.runs.domains, "fit.predict")
    columns = np.stack(problem.fitted.between(unseen.weights), axis=2)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name + end for name in problem.runs.metrics for end in ("", "_low", "_high")]
    rows = columns.reshape(len(unseen.ids), -1)
    if folders:
        names, rows = [*names, "outside"], np.column_stack([rows, outside])
    writer.writerow([unseen.first, *names])
    for identifier, row in zip(unseen.ids, rows, strict=True):
        writer.writerow([identifier, *map(repr, row.tolist())])
    files.write_bytes(path, text.getvalue().encode())


def _content(session: Session, problem: Problem, proposal: Proposal | None) -> dict[str, Any]:
    runs, fitted, wanted = problem.runs, problem.fitted, problem.wanted
    natural, spearman = wanted.natural, _spearman(*_scored(problem))
    goal = {
        "reduce": wanted.reduce,
        "over": asked.natural_of(session),
        "natural": float(wanted.scores(natural[None])[0]),
        "proposed": None if proposal is None else float(wanted.scores(proposal.predicted[None])[0]),
        "spearman": spearman,
    }
    domains = {
        "natural": problem.natural,
        "most": runs.weights.max(0),
        **({} if proposal is None else {"proposed": proposal.weights}),
    }
    metrics = {}
    for m, name in enumerate(runs.metrics):
        there = np.isfinite(runs.values[:, m])
        errors = runs.values[there, m] - fitted.unseen[there, m]
        metrics[name] = {
            "weight": float(wanted.weights[m]),
            "guard": float(wanted.guard[m]) if np.isfinite(wanted.guard[m]) else None,
            "natural": float(natural[m]),
            "runs": int(there.sum()),
            "spearman": _spearman(fitted.unseen[there, m], runs.values[there, m]),
            "error": float(np.sqrt((errors**2).mean())),
        }
        if proposal is not None:
            ends = (proposal.predicted, proposal.low, proposal.high)
            metrics[name] |= {
                kind: float(values[m])
                for kind, values in zip(("proposed", "low", "high"), ends, strict=True)
            }
    return {
        "verdict": _verdict(problem, proposal, goal),
        "notes": runs.notes,
        "runs": len(runs.ids),
        "regressor": session.config.fit.regressor,
        "objective": goal,
        "proposed": proposal is not None,
        "refused": [] if proposal is None else proposal.refused,
        "domains": {
            name: {kind: float(values[k]) for kind, values in domains.items()}
            for k, name in enumerate(runs.domains)
        },
        "metrics": metrics,
    }


def _verdict(problem: Problem, proposal: Proposal | None, goal: dict[str, Any]) -> str:
    runs = problem.runs
    trust = f"out of fold the objective of runs is ranked with a Spearman of {goal['spearman']:.3f}"
    if proposal is None:
        return (
            f"No mixture is proposed: {len(runs.ids)} runs are fewer than {RUNS_PER_DOMAIN} for "
            f"each of {_used(runs)} domains; {trust}."
        )
    what = "mean" if goal["reduce"] == "mean" else "largest"
    of = "metrics" if problem.wanted.scale is None else "standardised metrics"
    said = (
        f"The fit expects {goal['proposed']:.4f} of the proposed mixture, and "
        f"{goal['natural']:.4f} of {goal['over']} (the {what} of the {of} that count; {trust})."
    )
    if proposal.refused:
        return f"{said} It is refused: {'; '.join(proposal.refused)}."
    return f"{said} Train it before you believe it: optima lie where no run is."


def _named(problem: Problem, values: Floats) -> dict[str, float]:
    return dict(zip(problem.runs.domains, values.tolist(), strict=True))

"""What is known of other people's runs, and what is wanted of a mixture: `fit.runs` and the keys
beside it.

K domains, M metrics, N runs.
"""

from typing import NamedTuple

import numpy as np

from doremi_train.config import UserError
from doremi_train.evaluation import runs_table
from doremi_train.evaluation.runs_table import Runs
from doremi_train.evaluation.statistics import listed
from doremi_train.methods import objective as objectives
from doremi_train.methods import replicates, trees
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.objective import Objective
from doremi_train.stages.runs.metrics import standardised
from doremi_train.stages.session import Session


class Table(NamedTuple):
    """What is known of runs, and what is wanted."""

    runs: Runs
    natural: Floats  # (K,)
    passes: Floats | None  # (K,) over each domain by the final run on it alone
    within: Box
    wanted: Objective  # without the metrics of natural, which are still to be fitted


def table(session: Session) -> Table:
    """The runs of fit.runs, and what is asked of them. Raises UserError for tables that cannot be
    used, and an objective that cannot be."""
    asked = session.config.fit
    if not asked.runs:
        raise UserError(
            "fit.runs: names the table of the runs, a row a run with a column of weights a domain "
            "and a column a metric, as in fit.runs=runs.csv or "
            "'fit.runs=[mixtures.csv,losses.csv]', or the run_dir of a finished swarm"
        )
    if asked.regressor == "lightgbm" and not trees.installed():
        raise UserError(
            "fit.regressor=lightgbm: needs the package lightgbm; install doremi-train[swarm], or "
            "take corrected, saturating or gaussian_process"
        )
    runs = runs_table.read(many(asked.runs), many(asked.weights), many(asked.metrics))
    natural, passes = _sizes(session, runs)
    wanted = _objective(session, runs, natural)
    runs.notes.extend(_directions(session, wanted, runs))
    return Table(runs, natural, passes, _within(session, runs, passes), wanted)


def many(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else given


def _sizes(session: Session, runs: Runs) -> tuple[Floats, Floats | None]:
    """Natural weights (K,), and passes (K,) where the tokens of the domains and the budget are
    given."""
    tokens, budget = session.config.fit.tokens, session.config.main.tokens
    if tokens is None:
        return runs.weights.mean(0), None
    for name in (*tokens, *runs.domains):
        if name not in tokens or name not in runs.domains:
            what = "no number for" if name in runs.domains else "unknown domain"
            raise UserError(f"fit.tokens: {what} {name!r}; the runs have {listed(runs.domains)}")
    sizes = np.array([tokens[name] for name in runs.domains], np.float64)
    return sizes / sizes.sum(), None if budget is None else budget / sizes


def _within(session: Session, runs: Runs, passes: Floats | None) -> Box:
    """Mixtures that keep mixture.max_epochs, where it is known what that is, and else those in
    which no domain has more than in any run: a fit says nothing beyond."""
    most = runs.weights.max(0)
    if passes is not None:
        most = session.config.mixture.max_epochs / passes
        if np.minimum(most, 1).sum() < 1:
            raise UserError(
                f"main.tokens={session.config.main.tokens}: more than mixture.max_epochs="
                f"{session.config.mixture.max_epochs:g} passes over all of fit.tokens; raise it, "
                "or lower main.tokens"
            )
    return Box(np.zeros(len(most)), np.minimum(most, 1))


def _objective(session: Session, runs: Runs, natural: Floats) -> Objective:
    """The objective, without the metrics of natural (K,), which are still to be fitted."""
    if session.config.objective.over != "domains" or session.config.objective.scores is not None:
        raise UserError(
            "objective=tasks and objective.scores: are of runs that are trained here, and in "
            "stage=fit every column is a metric; name columns in objective.metrics"
        )
    try:
        asked, unknown = session.config.objective, np.full(len(runs.metrics), np.nan)
        found = objectives.objective(asked, runs.metrics, unknown, scores=runs.metrics)
    except KeyError as error:
        raise UserError(
            f"objective: unknown metric {error.args[0]!r}; the runs have {listed(runs.metrics)}"
            + "".join(f" ({note})" for note in runs.notes if str(error.args[0]) in note)
        ) from None
    except ValueError as error:
        raise UserError(f"objective.metrics: {error}") from None
    if not session.config.objective.standardise:
        return found
    scale = replicates.scale(runs.weights, runs.values, natural)
    return standardised(found, runs.metrics, scale)


def _directions(session: Session, wanted: Objective, runs: Runs) -> list[str]:
    """What is to be known where names alone say that more is better."""
    if session.config.objective.metrics is not None:
        return []
    upwards = [name for name, more in zip(runs.metrics, wanted.more, strict=True) if more]
    return [f"{name}: more is better, by its name, so it counts with weight -1" for name in upwards]


def natural_of(session: Session) -> str:
    """What natural is, in words."""
    return "natural" if session.config.fit.tokens else "the mean mixture of the runs"

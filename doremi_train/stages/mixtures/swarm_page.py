"""The page to steer a mixture by, of the runs that a swarm fitted: `run_dir/steer.html`.

K domains, M metrics, N runs, V virtual domains: those that are frozen together are one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import regressors, steering
from doremi_train.methods.box import Floats
from doremi_train.parallel.threads import fitting
from doremi_train.reports import steer_page
from doremi_train.reports.steer_page import Given
from doremi_train.stages.mixtures import swarm_problem
from doremi_train.stages.mixtures.swarm_problem import Problem, Row
from doremi_train.stages.runs import metrics
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run

PAGE = "steer.html"  # which a report links where it is there
STAGES = ("pipeline", "swarm", "report")  # whose reader looks at one mixture
_NAMED = 4  # of the domains that are frozen together, at most
RUNS_PER_DOMAIN = 2  # of fewer the law's effects say nothing


@fitting("swarm")
def write(session: Session, store: TokenStore, problem: Problem, search: Run) -> None:
    """Write the page of a finished search, once. None where runs are too few. Domains that are
    frozen together have one slider."""
    path, result = session.run_dir / PAGE, search.result()
    rows = [
        Row(line["run"], list(line["weights"].values()), list(line["losses"].values()))
        for line in files.read_lines(search.folder / "runs.jsonl")
    ]
    if path.exists() or len(rows) < RUNS_PER_DOMAIN * len(problem.prior):
        return
    steer_page.write(
        path,
        _given(session, store, problem, rows, result["weights"]),
        title=str(session.run_dir),
        verdict=result["provenance"]["verdict"],
        regressor=session.config.swarm.regressor,
    )
    session.say(f"swarm: {path} is a page to steer by")


def _given(
    session: Session,
    store: TokenStore,
    problem: Problem,
    rows: list[Row],
    chosen: Mapping[str, Any],
) -> Given:
    points, values = swarm_problem.table_of(problem, rows)
    wanted = swarm_problem.wanted(session, store, problem, rows)
    known, regressor = swarm_problem.known(problem), session.config.swarm.regressor
    fit = regressors.REGRESSORS[regressor](points, values * wanted.turn, known)
    mixed = {"chosen": swarm_problem.row_of(problem, chosen), "natural": problem.natural}
    starts = {name: problem.space.reduce(mixture) for name, mixture in mixed.items()}
    parts = [_of(problem, row) for row in problem.space.spread]
    expected = fit.predict(np.stack([*starts.values()])) * wanted.turn
    return Given(
        [_name(part) for part in parts],
        metrics.names(session, store),
        wanted.more,
        steering.steerable(points, values, wanted.more, known),
        problem.inside,
        starts,
        dict(zip(starts, expected, strict=True)),
        values,
        parts,
    )


def _of(problem: Problem, row: Floats) -> dict[str, float]:
    """{domain: part} of a virtual domain, a row of the problem's space."""
    return {name: float(part) for name, part in zip(problem.names, row, strict=True) if part}


def _name(part: Mapping[str, float]) -> str:
    """The domains that are kept together, the largest first."""
    names = sorted(part, key=lambda name: -part[name])
    more = len(names) - _NAMED
    return " + ".join([*names[:_NAMED], *([f"{more} more"] if more > 0 else [])])

"""The page to steer a mixture by, of the runs that a swarm fitted: `run_dir/steer.html`.

K domains, M metrics, N runs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import regressors, steering
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
RUNS_PER_DOMAIN = 2  # of fewer the law's effects say nothing


@fitting("swarm")
def write(session: Session, store: TokenStore, problem: Problem, search: Run) -> None:
    """Write the page of a finished search, once. None where domains are frozen together, which
    sliders would take apart, or where runs are too few."""
    path, result = session.run_dir / PAGE, search.result()
    rows = [
        Row(line["run"], list(line["weights"].values()), list(line["losses"].values()))
        for line in files.read_lines(search.folder / "runs.jsonl")
    ]
    frozen = len(problem.prior) < len(problem.names)
    if path.exists() or frozen or len(rows) < RUNS_PER_DOMAIN * len(problem.names):
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
    starts = {"chosen": swarm_problem.row_of(problem, chosen), "natural": problem.natural}
    expected = fit.predict(np.stack([*starts.values()])) * wanted.turn
    return Given(
        problem.names,
        metrics.names(session, store),
        wanted.more,
        steering.steerable(points, values, wanted.more, known),
        problem.within,
        starts,
        dict(zip(starts, expected, strict=True)),
        values,
    )

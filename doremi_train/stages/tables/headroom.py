"""Headroom of other people's runs: how much any mixture can gain on the objective, from a table
alone.

The saturating law is fitted to the runs of `fit.runs` that have all metrics that count, whatever
`fit.regressor` is. It says what natural and uniform have, and its lowest score within caps; the
interval is that of their difference (a jackknife over mixtures). `run_dir/headroom/headroom.json`
has every figure.

K domains, M metrics, N runs.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import say
from doremi_train.methods import headroom, replicates, swarm
from doremi_train.methods.fits import Known
from doremi_train.methods.headroom import Gain, Runs
from doremi_train.methods.objective import Objective
from doremi_train.methods.saturating import saturating
from doremi_train.parallel import comm
from doremi_train.parallel.threads import fitting
from doremi_train.reports import headroom_text
from doremi_train.stages.session import Session
from doremi_train.stages.tables import asked
from doremi_train.stages.tables.asked import Table

APART = 1.959964 * math.sqrt(2)  # standard deviations that two runs differ by, at most, in 95 %


class Counted(NamedTuple):
    """The runs that have all metrics that count or are guarded, and these metrics alone."""

    runs: Runs
    known: Known
    wanted: Objective


def run(session: Session) -> dict[str, Any]:
    """Fit, judge and say it; the content of headroom.json. Raises UserError for tables that cannot
    be used."""
    with session.alone("headroom"):
        content: dict[str, Any] = comm.on_first(lambda: _run(session))
    return content


@fitting("headroom")
def _run(session: Session) -> dict[str, Any]:
    table, random = asked.table(session), np.random.default_rng(session.config.seed)
    runs, known, wanted = _counted(table)
    scores = wanted.scores(runs.metrics)
    repeated = replicates.pooled(runs.points, scores[:, None]).deviation[0]
    apart = float(APART * repeated) if np.isfinite(repeated) else None
    noise = _left(runs, known, wanted, random)
    anchors = np.stack([table.natural, np.full(len(table.natural), 1 / len(table.natural))])
    best, gains = headroom.expected(runs, known, table.within, wanted, anchors, noise, random)
    content: dict[str, Any] = {
        "runs": len(runs.points),
        "left_out": len(table.runs.ids) - len(runs.points),
        "objective": wanted.reduce,
        "unit": wanted.unit if wanted.scale is not None else None,  # else that of the columns
        "natural": asked.natural_of(session),
        "noise": noise,
        "apart": apart,
        "best": {
            "score": best.score,
            "mixture": dict(zip(table.runs.domains, best.mixture.tolist(), strict=True)),
        },
        "gains": {
            name: headroom_text.ends(gain)
            for name, gain in zip(("natural", "uniform"), gains, strict=True)
        },
        "speed_up": None,
        "worth": worth(min(gains, key=lambda gain: gain.mean), apart),
        "notes": table.runs.notes,
    }
    content["said"] = headroom_text.of_table(content)
    path = session.run_dir / "headroom" / "headroom.json"
    files.write_json(path, content)
    for line in (*table.runs.notes, *content["said"], str(path)):
        say(f"headroom: {line}")
    return content


def worth(gain: Gain, apart: float | None) -> bool | None:
    """Whether a gain over what costs nothing is worth anything: not where it is within what two
    runs differ by, `apart`, or below 0; None where its interval leaves that open."""
    if math.isfinite(gain.high) and gain.high <= (apart or 0.0):
        return False
    return True if gain.low > 0 and math.isfinite(gain.high) else None


def _counted(table: Table) -> Counted:
    wanted = table.wanted
    columns = np.flatnonzero((wanted.weights != 0) | np.isfinite(wanted.guard))
    values = table.runs.values[:, columns]
    there = np.isfinite(values).all(1)
    if len(np.unique(table.runs.weights[there], axis=0)) < 2:
        raise UserError(
            "objective.metrics: fewer than two mixtures of fit.runs have all metrics that count; "
            "leave out what is missing in most rows, or give more runs"
        )
    wanted = wanted._replace(
        weights=wanted.weights[columns],
        natural=wanted.natural[columns],
        guard=wanted.guard[columns],
        more=wanted.more[columns],
        scale=None if wanted.scale is None else wanted.scale[columns],
    )
    runs, known = Runs(table.runs.weights[there], values[there]), Known(table.passes, table.natural)
    law = saturating(runs.points, runs.metrics * wanted.turn, known)
    natural = law.predict(table.natural[None])[0] * wanted.turn
    return Counted(runs, known, wanted._replace(natural=natural))


def _left(runs: Runs, known: Known, wanted: Objective, random: np.random.Generator) -> float:
    """What the law of other runs leaves of each run's score, root mean square: its noise, and what
    the law errs, so that it is rather too large."""
    turned = runs.metrics * wanted.turn
    unseen = swarm.out_of_fold(runs.points, turned, "saturating", random, known)
    left = wanted.turned().scores(unseen) - wanted.scores(runs.metrics)
    return float(np.sqrt((left**2).mean()))

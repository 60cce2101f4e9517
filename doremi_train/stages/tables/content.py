"""Mixtures of domains by other names than the runs': what they hold is compared, as stage=regroup
counted it.

R mixtures, K domains of the runs.
"""

from collections.abc import Sequence

import numpy as np

from doremi_train.config import UserError
from doremi_train.evaluation import contents, runs_table, tables
from doremi_train.evaluation.runs_table import Runs
from doremi_train.evaluation.statistics import listed
from doremi_train.methods import content
from doremi_train.methods.content import Floats

FAR = 0.1  # of a mixture outside all that the runs had, from which on it is said


def translated(table: str, folders: Sequence[str], runs: Runs) -> tuple[Runs, Floats]:
    """(the mixtures of the table as nearest ones of the runs' domains, (R,) the part of each that
    is outside these); what is far is a note of the runs. Raises UserError where a content is not
    known."""
    known = contents.read(folders, "fit.content")
    absent = [name for name in runs.domains if name not in known]
    if absent:
        raise UserError(
            f"fit.content={','.join(folders)}: counted no domain {listed(absent[:5])} of fit.runs; "
            "give the folder of stage=regroup on the data of the runs, by the same names"
        )
    columns = [name for name in tables.read(table, "fit.predict").columns if name in known]
    if not columns:
        raise UserError(
            f"fit.predict={table}: no column is a domain of fit.content, which has "
            f"{listed(sorted(known)[:20])}"
        )
    unseen = runs_table.read_mixtures(table, columns, "fit.predict")
    others, own = (np.stack([known[name] for name in names]) for names in (columns, runs.domains))
    weights, outside = content.translated(unseen.weights, others, own)
    runs.notes.extend(
        f"fit.predict: {unseen.ids[row]} is too far from all that the runs had: {outside[row]:.0%} "
        "of it is like nothing in them, and no interval is right for that"
        for row in np.flatnonzero(outside > FAR).tolist()
    )
    return unseen._replace(domains=runs.domains, weights=weights), outside

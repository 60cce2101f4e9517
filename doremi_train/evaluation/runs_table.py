"""Other people's runs: a table, or a pair that is joined by its first column, with a column of
weights a domain and a column of figures a metric.

Read are CSV (also with tabs or semicolons), parquet, and the runs of a swarm of ours. Which columns
are weights and which are metrics is found where the two files or the names do not say: weights are
columns beside each other that sum to 1 in nearly every row.

N runs, K domains, M metrics.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from doremi_train.config import UserError
from doremi_train.evaluation import swarm_runs, tables
from doremi_train.evaluation.statistics import listed
from doremi_train.evaluation.tables import Floats, Table

NEAR = 0.02  # of 1, that rounded weights sum to
# What runs are described by beside weights and metrics, in the tables of public projects.
ABOUT = {
    "index", "id", "run", "run_id", "name", "seed", "step", "steps", "tokens", "flops",
    "parameters", "params", "size", "family", "group", "unnamed: 0",
}  # fmt: skip


class Runs(NamedTuple):
    """What was read, and what there is to say of it."""

    first: str  # name of the first column
    ids: list[str]  # (N,) and what is in it
    domains: list[str]  # (K,) columns of weights
    metrics: list[str]  # (M,) columns of figures
    weights: Floats  # (N, K), rows sum to 1
    values: Floats  # (N, M), nan where there is none
    notes: list[str]  # what was left out, mended or is to be known


# ── Reading ─────────────────────────────────────────────────────────────────────────


def read(
    paths: Sequence[str],
    weights: Sequence[str] = (),
    metrics: Sequence[str] = (),
    key: str = "fit.runs",
) -> Runs:
    """The runs of one table, of two, or of a swarm; `weights` and `metrics` are patterns of column
    names, found by themselves where there are none.

    Raises UserError naming the file, line and column of what cannot be used.
    """
    if len(paths) > 2:
        raise UserError(
            f"{key}: {len(paths)} files; give one table, or two that are joined by their first "
            f"column, as in '{key}=[mixtures.csv,losses.csv]'"
        )
    notes = list[str]()
    if len(paths) == 1 and swarm_runs.is_one(paths[0]):
        table, mixed, measured = swarm_runs.read(paths[0], key)
        mixed = _matching(table, weights, key, "fit.weights") if weights else mixed
        measured = _matching(table, metrics, key, "fit.metrics") if metrics else measured
    elif len(given := [tables.read(path, key) for path in paths]) == 1:
        table = given[0]
        mixed, measured = _columns(table, weights, metrics, key)
    else:
        table, mixed, measured = _joined(given, weights, metrics, key, notes)
    points = _mixtures(table, mixed, key, notes)
    ids = [row[0] for row in table.rows]
    runs = Runs(table.columns[0], ids, mixed, measured, points, np.empty(0), notes)
    return _told(runs._replace(values=table.numbers(measured, key, missing=True)), key)


def read_mixtures(path: str, domains: Sequence[str], key: str) -> Runs:
    """Mixtures of the same domains, by the same names, without metrics."""
    table, notes = tables.read(path, key), list[str]()
    absent = [name for name in domains if name not in table.columns]
    if absent:
        raise UserError(
            f"{key}={path}: no column {listed(absent[:5])}; a column a domain is needed, named as "
            "in fit.runs"
        )
    points = _mixtures(table, list(domains), key, notes)
    ids = [row[0] for row in table.rows]
    nothing = np.empty((len(ids), 0))
    return Runs(table.columns[0], ids, list(domains), [], points, nothing, notes)


def _joined(
    pair: list[Table],
    weights: Sequence[str],
    metrics: Sequence[str],
    key: str,
    notes: list[str],
) -> tuple[Table, list[str], list[str]]:
    """Both pair side by side, in the order of the mixtures; what is in both describes runs."""
    shared = set(pair[0].columns[1:]) & set(pair[1].columns[1:])
    free = [
        [name for name in table.numeric() if name != table.columns[0] and name not in shared]
        for table in pair
    ]
    if not weights and not _sums_to_one(pair[0], free[0]) and _sums_to_one(pair[1], free[1]):
        pair, free = pair[::-1], free[::-1]
    mixed = _matching(pair[0], weights, key, "fit.weights") if weights else free[0]
    measured = (
        _matching(pair[1], metrics, key, "fit.metrics")
        if metrics
        else [name for name in free[1] if name.lower() not in ABOUT]
    )
    places: list[dict[str, int]] = []
    for table in pair:
        by_id = {row[0].strip(): index for index, row in enumerate(table.rows)}
        if len(by_id) < len(table.rows):
            ids = [row[0].strip() for row in table.rows]
            twice = next(one for one in ids if ids.count(one) > 1)
            raise UserError(
                f"{key}={table.path}: {table.columns[0]}={twice} is there twice, so the two files "
                "cannot be joined by their first column"
            )
        places.append(by_id)
    both = [one for one in places[0] if one in places[1]]
    if not both:
        raise UserError(
            f"{key}=[{pair[0].path}, {pair[1].path}]: no value of the first column is in both "
            f"({pair[0].columns[0]}={pair[0].rows[0][0]} here, "
            f"{pair[1].columns[0]}={pair[1].rows[0][0]} there), so they cannot be joined"
        )
    for table, known in zip(pair, places, strict=True):
        if len(known) > len(both):
            notes.append(f"{len(known) - len(both)} rows of {table.path} have no row in the other")
    added = [
        index for index, name in enumerate(pair[1].columns) if index and name not in pair[0].columns
    ]
    table = Table(
        f"[{pair[0].path}, {pair[1].path}]",
        pair[0].columns + [pair[1].columns[index] for index in added],
        [
            pair[0].rows[places[0][one]] + [pair[1].rows[places[1][one]][index] for index in added]
            for one in both
        ],
        [pair[0].lines[places[0][one]] for one in both],
    )
    return table, mixed, measured


# ── Which columns ───────────────────────────────────────────────────────────────────


def _columns(
    table: Table, weights: Sequence[str], metrics: Sequence[str], key: str
) -> tuple[list[str], list[str]]:
    numeric = [name for name in table.numeric() if name != table.columns[0]]
    mixed = (
        _matching(table, weights, key, "fit.weights")
        if weights
        else _neighbours(table, [n for n in numeric if not _any(n, metrics)])
    )
    if not mixed:
        raise UserError(
            f"{key}={table.path}: which columns are weights cannot be seen, since no columns "
            "beside each other sum to 1; name them, as in 'fit.weights=[train_*]'"
        )
    measured = (
        _matching(table, metrics, key, "fit.metrics")
        if metrics
        else [name for name in numeric if name not in mixed and name.lower() not in ABOUT]
    )
    both = [name for name in mixed if name in measured]
    if both:
        raise UserError(
            f"fit.weights={list(weights)}, fit.metrics={list(metrics)}: both name {both[0]!r}"
        )
    if not measured:
        raise UserError(
            f"{key}={table.path}: no column of numbers beside the weights "
            f"({listed(mixed[:3])}, …), so there is no metric; name some with fit.metrics"
        )
    return mixed, measured


def _matching(table: Table, patterns: Sequence[str], key: str, named: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table.columns):
            raise UserError(
                f"{named}: {pattern} names no column of {key}={table.path}; there are "
                f"{listed(table.columns[:8])}{', …' * (len(table.columns) > 8)}"
            )
    return [name for name in table.columns if _any(name, patterns)]


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _plain(table: Table, names: Sequence[str]) -> Floats:
    """(N, C) as far as they are numbers."""
    columns = [table.columns.index(name) for name in names]
    cells = [[tables.number(row[column]) for column in columns] for row in table.rows]
    return np.array([[np.nan if c is None else c for c in row] for row in cells]).reshape(
        len(cells), len(columns)
    )


def _sums_to_one(table: Table, names: Sequence[str]) -> bool:
    values = _plain(table, names)
    return bool(len(names) and (np.abs(np.nansum(values, axis=1) - 1) < NEAR).mean() > 0.5)


def _neighbours(table: Table, names: list[str]) -> list[str]:
    """The longest run of columns beside each other that sum to 1 in most rows."""
    values = np.nan_to_num(_plain(table, names), nan=0.0)
    sums = np.concatenate([np.zeros((len(values), 1)), values.cumsum(1)], axis=1)
    bad = np.concatenate([[0], ((values < 0) | (values > 1 + NEAR)).any(0).cumsum()])
    for length in range(len(names), 1, -1):
        for start in range(len(names) - length + 1):
            if bad[start + length] == bad[start]:
                whole = sums[:, start + length] - sums[:, start]
                if (np.abs(whole - 1) < NEAR).mean() > 0.5:
                    return names[start : start + length]
    return []


# ── What is in them ─────────────────────────────────────────────────────────────────


def _mixtures(table: Table, names: list[str], key: str, notes: list[str]) -> Floats:
    """(N, K) normalised weights."""
    points = table.numbers(names, key, missing=False)
    if (points < 0).any():
        index, place = np.argwhere(points < 0)[0]
        raise UserError(
            f"{key}={table.path}: line {table.lines[index]}, column {names[place]!r} is "
            f"{points[index, place]:g}: no weight is below 0"
        )
    sums = points.sum(1)
    if (sums <= 0).any():
        line = table.lines[int(sums.argmin())]
        raise UserError(f"{key}={table.path}: the weights of line {line} are all 0")
    usual = float(np.median(sums))
    if abs(usual - 1) > NEAR:
        _refuse_stranger(table, names, points, key)
        notes.append(f"weights sum to {usual:.6g} in most rows, and were normalised")
    odd = np.flatnonzero(np.abs(sums / usual - 1) > NEAR)
    if len(odd):
        notes.append(
            f"line {table.lines[odd[0]]} of {table.path}"
            + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
            + f": weights sum to {sums[odd[0]]:.4g}, not {usual:.4g}; normalised, but look at them"
        )
    return points / sums[:, None]


def _refuse_stranger(table: Table, names: list[str], points: Floats, key: str) -> None:
    """Raise UserError for a column without which all rows sum to 1."""
    for place, name in enumerate(names):
        rest = np.delete(points, place, axis=1).sum(1)
        if (np.abs(rest - 1) < NEAR).mean() > 0.9:
            raise UserError(
                f"{key}={table.path}: column {name!r} is no weight: rows sum to 1 without it; "
                "leave it out of fit.weights"
            )


def _told(runs: Runs, key: str) -> Runs:
    """The runs without what says nothing, and notes on the rest."""
    rows = np.concatenate([runs.weights, np.nan_to_num(runs.values, nan=-1e300)], axis=1)
    _, kept = np.unique(rows, axis=0, return_index=True)
    kept = np.sort(kept)
    notes = list(runs.notes)
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} rows repeat another in all figures: counted once")
    weights, values = runs.weights[kept], runs.values[kept]
    replicates = len(weights) - len(np.unique(weights, axis=0))
    if replicates:
        notes.append(f"{replicates} runs repeat the mixture of another: replicates, for the noise")
    said = np.isfinite(values)
    constant = [
        name
        for name, column, there in zip(runs.metrics, values.T, said.T, strict=True)
        if there.sum() < 2 or np.ptp(column[there]) == 0
    ]
    if constant:
        notes.append(f"{listed(constant)}: the same in all rows, so left out")
    alone = [
        name
        for name, there in zip(runs.metrics, said.T, strict=True)
        if name not in constant and len(np.unique(weights[there], axis=0)) < 2
    ]
    if alone:
        notes.append(f"{listed(alone)}: measured on one mixture alone, so left out")
    taken = [index for index, name in enumerate(runs.metrics) if name not in (*constant, *alone)]
    if not taken:
        raise UserError(
            f"{key}: no metric differs between rows of several mixtures, so there is nothing to fit"
        )
    for index in taken:
        absent = int((~said[:, index]).sum())
        if absent:
            notes.append(f"{runs.metrics[index]}: missing in {absent} rows, fitted without them")
    return runs._replace(
        ids=[runs.ids[index] for index in kept],
        metrics=[runs.metrics[index] for index in taken],
        weights=weights,
        values=values[:, taken],
        notes=notes,
    )

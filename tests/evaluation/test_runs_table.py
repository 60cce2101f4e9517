"""Tables of other people's runs: which columns are what, and what is said of bad ones."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.config import UserError
from doremi_train.evaluation import runs_table
from doremi_train.evaluation.runs_table import Runs
from doremi_train.evaluation.tables import Table

REGMIX = Path(__file__).parents[3] / "shared" / "regmix"
ROWS = [
    (1, "a", 0.5, 0.3, 0.2, 3.0, 2.0),
    (2, "b", 0.2, 0.3, 0.5, 2.5, 2.2),
    (3, "c", 0.0, 1.0, 0.0, 2.8, 2.1),
]
NAMES = ["run", "family", "web", "code", "books", "web_loss", "code_loss"]


def table(path: Path, rows: object = ROWS, names: list[str] = NAMES, separator: str = ",") -> str:
    lines = [names, *rows]  # type: ignore[misc]
    path.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))
    return str(path)


def check(runs: Runs) -> None:
    assert runs.first == "run" and runs.ids == ["1", "2", "3"]
    assert runs.domains == ["web", "code", "books"]
    assert runs.metrics == ["web_loss", "code_loss"]
    np.testing.assert_allclose(runs.weights, [row[2:5] for row in ROWS])
    np.testing.assert_allclose(runs.values, [row[5:] for row in ROWS])


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_one_table_says_by_its_sums_what_weights_are(tmp_path: Path, separator: str) -> None:
    runs = runs_table.read([table(tmp_path / "runs.csv", separator=separator)])
    check(runs)
    assert runs.notes == []


def test_parquet_is_the_same(tmp_path: Path) -> None:
    columns = dict(zip(NAMES, zip(*ROWS, strict=True), strict=True))
    pyarrow.parquet.write_table(
        pyarrow.table({name: list(column) for name, column in columns.items()}),
        tmp_path / "runs.parquet",
    )
    check(runs_table.read([str(tmp_path / "runs.parquet")]))


@pytest.mark.parametrize("swapped", [False, True])
def test_two_tables_are_joined_by_their_first_column(tmp_path: Path, swapped: bool) -> None:
    """In Olmix's layout both files name the runs in several columns."""
    about = ["run", "name", "index"]
    ratios = [(f"r{n}", f"mix-{n}", n, *row[2:5]) for n, row in enumerate(ROWS)]
    metrics = [(f"r{n}", f"mix-{n}", n, *row[5:]) for n, row in enumerate(ROWS)]
    paths = [
        table(tmp_path / "ratios.csv", [*ratios, ("r9", "mix-9", 9, 1, 0, 0)], about + NAMES[2:5]),
        table(tmp_path / "metrics.csv", metrics[::-1], about + NAMES[5:]),
    ]
    runs = runs_table.read(paths[::-1] if swapped else paths)
    check(runs._replace(ids=[one.replace("r", "") for one in map(_next, runs.ids)]))
    assert len(runs.notes) == 1 and "1 rows of " in runs.notes[0] and "ratios" in runs.notes[0]


def _next(name: str) -> str:
    return f"r{int(name[1:]) + 1}"


def test_patterns_choose(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv")
    runs = runs_table.read([path], ["web", "code", "books"], ["code_*"])
    assert runs.metrics == ["code_loss"]
    shuffled = ["run", "web", "web_loss", "code", "books"]
    rows = [(row[0], row[2], row[5], row[3], row[4]) for row in ROWS]
    apart = table(tmp_path / "apart.csv", rows, shuffled)
    with pytest.raises(UserError, match=r"name them, as in 'fit.weights=\[train_\*\]'"):
        runs_table.read([apart])
    assert runs_table.read([apart], ["web", "code", "books"]).metrics == ["web_loss"]


def test_what_is_odd_is_said_and_used(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        (4, "d", 0.5, 0.3, 0.1, 3.1, ""),  # sums to 0.9, and lacks a metric
        ROWS[0],  # twice
        (5, "e", 0.5, 0.3, 0.2, 3.01, 2.01),  # a replicate of the first
    ]
    runs = runs_table.read(
        [table(tmp_path / "runs.csv", [(*row, 7) for row in rows], [*NAMES, "flat"])]
    )
    assert runs.ids == ["1", "2", "3", "4", "5"] and runs.metrics == ["web_loss", "code_loss"]
    np.testing.assert_allclose(runs.weights[3], np.array([5, 3, 1]) / 9)
    assert np.isnan(runs.values[3, 1]) and np.isfinite(runs.values).sum() == 9
    said = "\n".join(runs.notes)
    for part in (
        "line 5 of ", "weights sum to 0.9, not 1", "1 rows repeat another in all figures",
        "1 runs repeat the mixture of another", "flat: the same in all rows",
        "code_loss: missing in 1 rows",
    ):  # fmt: skip
        assert part in said


def test_a_metric_of_one_mixture_is_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, (4, "d", 0.5, 0.3, 0.2, 3.1, 1.9)]
    rows = [row if row[2] == 0.5 else (*row[:6], "") for row in rows]  # type: ignore[misc]
    runs = runs_table.read([table(tmp_path / "runs.csv", rows)])
    assert runs.metrics == ["web_loss"]
    assert "code_loss: measured on one mixture alone, so left out" in runs.notes


def test_weights_in_percent_are_normalised(tmp_path: Path) -> None:
    rows = [(*row[:2], *(100 * w for w in row[2:5]), *row[5:]) for row in ROWS]
    runs = runs_table.read([table(tmp_path / "runs.csv", rows)], NAMES[2:5])
    np.testing.assert_allclose(runs.weights, [row[2:5] for row in ROWS])
    assert runs.notes == ["weights sum to 100 in most rows, and were normalised"]


BAD = [
    ({"rows": []}, {}, "has no row of a run"),
    ({"rows": [(1, "a", 0.5, 0.5)]}, {}, "line 2 has 4 cells, and the first line names 7"),
    ({"names": [*NAMES[:6], "web"]}, {}, "two columns are named 'web'"),
    ({"rows": [*ROWS, (4, "d", 0.5, 0.3, 0.2, "high", 2)]}, {}, "line 5, column 'web_loss' is 'hi"),
    ({"rows": [*ROWS, (4, "d", 0.5, "x", 0.5, 3, 2)]}, {}, "line 5, column 'code' is 'x'"),
    ({"rows": [*ROWS, (4, "d", 0.5, "", 0.5, 3, 2)]}, {}, "line 5, column 'code' is ''"),
    ({"rows": [*ROWS, (4, "d", 1.5, -0.7, 0.2, 3, 2)]}, {"weights": NAMES[2:5]}, "is -0.7: no wei"),
    ({"rows": [*ROWS, (4, "d", 0, 0, 0, 3, 2)]}, {}, "the weights of line 5 are all 0"),
    ({}, {"weights": ["w_*"]}, r"fit.weights: w_\* names no column of fit.runs="),
    ({}, {"metrics": ["bpb"]}, "fit.metrics: bpb names no column"),
    ({}, {"weights": NAMES[2:5], "metrics": ["code*"]}, "both name 'code'"),
    ({}, {"weights": [*NAMES[2:5], "web_loss"]}, "column 'web_loss' is no weight: rows sum to 1"),
    ({"rows": [(*row[:5], 3, 2) for row in ROWS]}, {}, "no metric differs between rows"),
    (
        {"rows": [(*row[:2], *ROWS[0][2:5], *row[5:]) for row in ROWS]},
        {},
        "no metric differs between rows of several mixtures",
    ),
    ({"rows": [row[:5] for row in ROWS], "names": NAMES[:5]}, {}, "so there is no metric"),
]


@pytest.mark.parametrize(("how", "asked", "said"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_table_that_cannot_be_used_is_named(
    tmp_path: Path, how: dict, asked: dict, said: str
) -> None:
    path = table(tmp_path / "runs.csv", **how)
    with pytest.raises(UserError, match=said) as error:
        runs_table.read([path], **asked)
    assert "fit." in str(error.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    for content, said in (
        (b"", "is empty"), (b"\xff\xfe1,2", "not UTF-8"), (b"PAR1 torn", "not a parquet file"),
    ):  # fmt: skip
        (tmp_path / "runs.csv").write_bytes(content)
        with pytest.raises(UserError, match=said):
            runs_table.read([str(tmp_path / "runs.csv")])
    with pytest.raises(UserError, match="cannot be read"):
        runs_table.read([str(tmp_path / "none.csv")])
    with pytest.raises(UserError, match="3 files; give one table, or two"):
        runs_table.read(["a", "b", "c"])


def test_tables_that_cannot_be_joined(tmp_path: Path) -> None:
    mixtures = table(tmp_path / "a.csv", [(1, 0.5, 0.5), (2, 0.1, 0.9)], ["run", "x", "y"])
    other = table(tmp_path / "b.csv", [(8, 3.0), (9, 4.0)], ["run", "loss"])
    with pytest.raises(UserError, match=r"no value of the first column is in both \(run=1 here"):
        runs_table.read([mixtures, other])
    twice = table(tmp_path / "c.csv", [(1, 3.0), (1, 4.0)], ["run", "loss"])
    with pytest.raises(UserError, match="run=1 is there twice"):
        runs_table.read([mixtures, twice])


def test_mixtures_to_predict_have_the_same_domains(tmp_path: Path) -> None:
    path = table(tmp_path / "unseen.csv", [("u", 0.5, 0.25, 0.25)], ["id", "books", "web", "code"])
    runs = runs_table.read_mixtures(path, ["web", "code", "books"], "fit.predict")
    assert runs.weights.tolist() == [[0.25, 0.25, 0.5]] and runs.ids == ["u"]
    with pytest.raises(UserError, match="fit.predict=.*no column law"):
        runs_table.read_mixtures(path, ["web", "law"], "fit.predict")


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(2, 30), st.integers(0, 10_000))
def test_weights_are_found_whatever_stands_beside_them(
    domains: int, metrics: int, runs: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.full(domains, 0.5), runs).round(4)
    losses = 2 + random.random((runs, metrics))
    names = [f"d{k}" for k in range(domains)]
    given_ = np.concatenate([np.arange(runs)[:, None], weights, losses], axis=1)
    rows = [[str(cell) for cell in row] for row in given_]
    one = Table("t", ["index", *names, *(f"m{m}" for m in range(metrics))], rows, list(range(runs)))
    mixed, measured = runs_table._columns(one, (), (), "fit.runs")
    assert mixed == names and measured == [f"m{m}" for m in range(metrics)]


@pytest.mark.skipif(not REGMIX.exists(), reason="RegMix's public runs are not here")
def test_regmix_s_pair_of_files() -> None:
    pair = [str(REGMIX / f"train_{what}_1m.csv") for what in ("mixture", "pile_loss")]
    runs = runs_table.read(pair)
    assert runs.weights.shape == (512, 17) and runs.values.shape == (512, 13)
    assert all(name.startswith("metric/the_pile_") for name in runs.metrics)
    unseen = runs_table.read_mixtures(
        str(REGMIX / "test_mixture_60m.csv"), runs.domains, "fit.predict"
    )
    assert unseen.weights.shape == (256, 17)


# ── A swarm of ours ─────────────────────────────────────────────────────────────────


def swarm(folder: Path, lines: list[str]) -> str:
    (folder / "swarm").mkdir()
    (folder / "swarm" / "runs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def line(run: int, web: float, loss: float) -> str:
    return (
        f'{{"run": "r{run}", "weights": {{"web": {web}, "code": {1 - web}}}, "losses": '
        f'{{"web": {loss}, "code": 2.0, "target": {loss + 1}}}, "loss": 9, "fitted": 9}}'
    )


def test_runs_of_a_swarm_are_a_table(tmp_path: Path) -> None:
    run_dir = swarm(tmp_path, [line(0, 0.2, 3.0), line(1, 0.5, 2.5), line(2, 0.9, 2.0)])
    for path in (run_dir, f"{run_dir}/swarm", f"{run_dir}/swarm/runs.jsonl"):
        runs = runs_table.read([path])
        assert (runs.first, runs.ids, runs.domains) == ("run", ["r0", "r1", "r2"], ["web", "code"])
        assert runs.metrics == ["web_loss", "target_loss"]  # of code it is the same in all
        np.testing.assert_allclose(runs.weights[:, 0], [0.2, 0.5, 0.9])
        np.testing.assert_allclose(runs.values, [[3, 4], [2.5, 3.5], [2, 3]])
    assert runs_table.read([run_dir], metrics=["target_loss"]).metrics == ["target_loss"]


@pytest.mark.parametrize("lines", [[], ["{}"], ["[1"], ['{"run": 1, "weights": [1]}']])
def test_what_holds_no_runs_of_a_swarm_is_refused(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run_dir of a finished mixture=swarm"):
        runs_table.read([swarm(tmp_path, lines)])
    with pytest.raises(UserError, match="has no runs of a swarm"):
        runs_table.read([str(tmp_path.parent)])

"""The runs of a swarm of ours, as a table: `run_dir/swarm/runs.jsonl`, a line a run."""

from pathlib import Path

from doremi_train.config import UserError, judged
from doremi_train.evaluation.tables import Table
from doremi_train.files import read_lines

FILE = "runs.jsonl"
REMEDY = "give the run_dir of a finished mixture=swarm, or its swarm/runs.jsonl"


def is_one(path: str) -> bool:
    """Whether a path names such runs, and no table."""
    return Path(path).is_dir() or Path(path).name == FILE


def read(path: str, key: str) -> tuple[Table, list[str], list[str]]:
    """(a column a domain, and LOSS_loss of every metric LOSS; the domains; the metrics). Raises
    UserError for what holds no run of a swarm."""
    file = Path(path)
    if file.is_dir():
        file = next((f for f in (file / "swarm" / FILE, file / FILE) if f.exists()), file / FILE)
    if not file.exists():
        raise UserError(f"{key}={path}: has no runs of a swarm; {REMEDY}")
    with judged(f"{key}={path}", REMEDY, "the reader"):
        lines = list(read_lines(file))
        domains, losses = list(lines[0]["weights"]), list(lines[0]["losses"])
        rows = [
            [
                str(line["run"]),
                *(str(line["weights"][name]) for name in domains),
                *(str(line["losses"][name]) for name in losses),
            ]
            for line in lines
        ]
    metrics = [f"{name}_loss" for name in losses]
    columns = ["run", *domains, *metrics]
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{key}={path}: a domain and a metric are both named {twice!r}; {REMEDY}")
    return Table(path, columns, rows, list(range(1, len(rows) + 1))), domains, metrics

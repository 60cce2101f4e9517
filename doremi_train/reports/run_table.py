"""The result of a run or a sweep as a table in the terminal."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from doremi_train.evaluation.results import Setting
from doremi_train.reports import run_charts, run_page


def domains_table(setting: Setting) -> Table:
    """Weights and losses per domain, means over the seeds."""
    points, models = run_charts.mixture_points(setting), setting.models
    table = Table("domain", "weight", *models.values())
    table.title = "The mixture, and validation loss in nats per token"
    for row in run_page.loss_rows(setting):
        losses = (
            f"{cell['value']:.4f}" if cell["value"] is not None else "" for cell in row["cells"]
        )
        table.add_row(row["name"], f"{points[row['name']].value:.4f}", *losses)
    for name, key in (("mean", "mean_loss"), ("worst", "worst_loss")):
        losses = (
            f"{fmean(run.figures[model][key] for run in setting.results):.4f}" for model in models
        )
        table.add_row(name, "", *losses, style="bold" if name == "mean" else None)
    return table


def settings_table(settings: Sequence[Setting]) -> Table:
    summary = run_page.summary(settings)
    table = Table(*summary["columns"])
    for row in summary["rows"]:
        table.add_row(*row)
    return table

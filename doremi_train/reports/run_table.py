"""The result of a run or a sweep as a table in the terminal."""

from collections.abc import Sequence
from statistics import fmean

from doremi_train.console import Sheet
from doremi_train.evaluation.results import Setting
from doremi_train.reports import run_charts, run_page


def domains_table(setting: Setting) -> Sheet:
    """Weights and losses per domain, means over the seeds."""
    points, models = run_charts.mixture_points(setting), setting.models
    rows = []
    for row in run_page.loss_rows(setting):
        losses = (
            f"{cell['value']:.4f}" if cell["value"] is not None else "" for cell in row["cells"]
        )
        rows.append([row["name"], f"{points[row['name']].value:.4f}", *losses])
    mean = len(rows)
    for name, key in (("mean", "mean_loss"), ("worst", "worst_loss")):
        losses = (
            f"{fmean(run.figures[model][key] for run in setting.results):.4f}" for model in models
        )
        rows.append([name, "", *losses])
    title = "The mixture, and validation loss in nats per token"
    return Sheet(title, ["domain", "weight", *models.values()], rows, [mean])


def settings_table(settings: Sequence[Setting]) -> Sheet:
    summary = run_page.summary(settings)
    return Sheet(None, [*summary["columns"]], [[*row] for row in summary["rows"]])

"""report.html: the mixture, how it came about, and what it gained; one self-contained page. And the same in a terminal.

A run, its seeds and a sweep are one thing: settings, each with the runs that differ in their seed only. Over the folder
of a sweep the page first compares the settings, then shows each of them as it shows a single run.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from doremi_train.console import console
from doremi_train.evaluation import results
from doremi_train.evaluation.results import Setting
from doremi_train.parallel import comm
from doremi_train.reports import run_page, run_table, sweep_charts
from doremi_train.reports.page import write_page
from doremi_train.stages import Session, diagnose, evaluate, sweep
from doremi_train.stages.options import identity


def run(session: Session) -> Path:
    """Write the page and print the summary; returns the page's path."""
    page = session.run_dir / "report.html"
    folders = sweep(session.run_dir)
    if not folders:
        evaluate.run(session)
        diagnose.run(session)
        folders = [session.run_dir]
    comm.on_first(lambda: _report(page, _read(folders)))
    session.tracking.report(page)
    return page


def _read(folders: Sequence[Path]) -> list[Setting]:
    configs = [identity(yaml.safe_load((folder / "config.yaml").read_text())) for folder in folders]
    return results.settings([results.read(*pair) for pair in zip(folders, configs, strict=True)])


def _report(page: Path, settings: Sequence[Setting]) -> None:
    verdict = run_page.overall(settings)
    write_page(
        page,
        title=str(page.parent),
        verdict=verdict,
        columns=run_page.COLUMNS,
        charts=sweep_charts.compare(settings) if len(settings) > 1 else [],
        summary=run_page.summary(settings) if len(settings) > 1 else None,
        sections=[run_page.section(setting, number) for number, setting in enumerate(settings)],
        selection=run_page.selection_of(settings[0].results[0]),
    )
    console.print(run_table.settings_table(settings) if len(settings) > 1 else run_table.domains_table(settings[0]))
    for finding in {warning: None for setting in settings for warning in run_page.warnings_of(setting)}:
        console.print(f"[yellow]warning:[/yellow] {run_table.plain(finding)}")
    console.print(run_table.plain(verdict))
    console.print(f"report: {run_table.plain(str(page))}")

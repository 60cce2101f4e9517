"""report.html: the mixture, how it came about, and what it gained; one self-contained page. And the
same in a terminal.

A run, its seeds and a sweep are one thing: settings, each with the runs that differ in their seed
only. Over the folder of a sweep the page first compares the settings, then shows each of them as it
shows a single run.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.console import Sheet, say
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import detectors, results, text
from doremi_train.evaluation.detectors import Finding
from doremi_train.evaluation.results import Setting
from doremi_train.evaluation.text import Floats, Tokens
from doremi_train.parallel import comm
from doremi_train.reports import run_page, run_table, sweep_charts
from doremi_train.reports.page import write_page
from doremi_train.stages import evaluate, prepare
from doremi_train.stages.mixtures import WAYS
from doremi_train.stages.options import identity
from doremi_train.stages.runs import budget
from doremi_train.stages.session import Session, once, sweep
from doremi_train.storage import finished


def run(session: Session) -> Path:
    """Write the page and print the summary; returns the page's path."""
    page = session.run_dir / "report.html"
    several = sweep(session.run_dir)
    if not several:
        evaluate.run(session)
        diagnose(session)
    folders = several or [session.run_dir]
    comm.on_first(lambda: _report(session, page, _read(folders)))
    session.tracking.report(page)
    return page


def _read(folders: Sequence[Path]) -> list[Setting]:
    configs = [identity(yaml.safe_load((folder / "config.yaml").read_text())) for folder in folders]
    return results.settings([results.read(*pair) for pair in zip(folders, configs, strict=True)])


def _report(session: Session, page: Path, settings: Sequence[Setting]) -> None:
    verdict, how = run_page.overall(settings), {name: way.HOW for name, way in WAYS.items()}
    first = run_page.headline_of(settings)
    runs = [run for setting in settings for run in setting.results]
    compared = len(settings) > 1 and not results.incomparable(runs)
    write_page(
        page,
        title=str(page.parent),
        headline=first,
        verdict=verdict,
        columns=run_page.COLUMNS,
        charts=sweep_charts.compare(settings) if compared else [],
        summary=run_page.summary(settings) if compared else None,
        sections=[
            run_page.section(setting, number, how, page.parent)
            for number, setting in enumerate(settings)
        ],
        selection=run_page.selection_of(settings[0].results[0]),
    )
    tables = (
        [run_table.settings_table(settings)]
        if compared
        else [run_table.domains_table(setting) for setting in settings]
    )
    warnings = {found: None for setting in settings for found in run_page.warnings_of(setting)}
    said: list[str | Sheet] = [*[first] * bool(first), *tables]
    said += [*(f"warning: {found}" for found in warnings), verdict, f"report: {page}"]
    say(*said)
    if page.parent == settings[0].results[0].folder and prepare.kept(session) is None:
        finished.keep(session.plain, said)


@once
def diagnose(session: Session) -> list[Finding]:
    """Every finding of every detector that the stages of this run give numbers for, written to
    findings.json."""
    store = prepare.run(session)
    figures = evaluate.run(session)
    findings: list[Finding] = comm.on_first(lambda: _diagnose(session, store, figures))
    return findings


def _diagnose(session: Session, store: TokenStore, figures: dict[str, Any]) -> list[Finding]:
    samples = text.sample(store, session.config.training.sequence_length)
    findings = [
        *_of_the_proxies(session, store),
        *_of_the_models(session, store.domains, figures, samples),
        *text.of_the_text(store.domains, samples),
    ]
    files.write_json(session.run_dir / "findings.json", [finding._asdict() for finding in findings])
    return findings


def _of_the_proxies(session: Session, store: TokenStore) -> list[Finding]:
    """How the weights came about; nothing, where they were not learned."""
    names, folders = store.domains, proxies(session.run_dir)
    if not folders:
        return []
    mixed = files.read_json(session.run_dir / "weights.json")
    results = [files.read_json(folder / "result.json") for folder in folders]  # of S seeds
    epochs = np.mean([_row(names, result["epochs"]) for result in results], axis=0)
    alphas = [_trace(names, folder, "weights") for folder in folders]
    tokens = [_trace(names, folder, "tokens") for folder in folders]
    others = {}
    for name in ("uniform", "natural", "unimax"):
        # Unimax, where the final run needs more text than it allows.
        with contextlib.suppress(UserError):
            others[name] = budget.heuristic(
                session, store, name, budget.main_steps(session)
            ).numpy()
    return [
        *detectors.one_hot(names, _row(names, mixed["weights"]), alphas),
        *detectors.absent(names, detectors.missing_by_trace(np.concatenate(tokens))),
        *detectors.repeated(names, epochs),
        *detectors.mismatched(names, epochs, _row(names, mixed["epochs"])),
        *detectors.seed_spread(
            names, [_row(names, result["weights"]) for result in results], others
        ),
    ]


def _of_the_models(
    session: Session, names: Sequence[str], figures: dict[str, Any], samples: list[Tokens]
) -> list[Finding]:
    """What reference and proxy make of each domain."""
    folders = [session.run_dir / "reference", *proxies(session.run_dir)]
    evaluations = [list(files.read_lines(folder / "evaluations.jsonl")) for folder in folders]
    curves = [
        _columns(names, (line["domains"] for line in lines)) for lines in evaluations if lines
    ]
    findings = []
    if curves:  # an existing reference has none
        entropies = [detectors.unigram_entropy(np.bincount(tokens.ravel())) for tokens in samples]
        findings += detectors.noise(names, entropies, curves)
        findings += detectors.trivial(names, [curve[-1] for curve in curves])
    if "reference" in figures:
        seen, unseen = figures["reference"]["training_loss"], figures["reference"]["domains"]
        result = session.run_dir / "reference" / "result.json"  # not of an existing reference
        epochs = _row(names, files.read_json(result)["epochs"]) if result.exists() else None
        losses = [unseen[name]["loss"] for name in names]
        findings += detectors.overfit(names, _row(names, seen), losses, epochs)
    if "start" in figures:
        before, after = (
            [figures[model]["domains"][name]["loss"] for name in names]
            for model in ("start", "main")
        )
        findings += detectors.forgotten(names, before, after)
    return findings


def proxies(run_dir: Path) -> list[Path]:
    """Folders of the proxies that the weights come from: the seeds of the last round, or the one
    there is."""
    rounds = sorted(
        run_dir.glob("proxy/round-*"), key=lambda folder: int(folder.name.removeprefix("round-"))
    )
    folders = sorted(rounds[-1].glob("seed-*")) if rounds else [run_dir / "proxy"]
    return [folder for folder in folders if (folder / "result.json").exists()]


def _trace(names: Sequence[str], folder: Path, key: str) -> Floats:
    """(T, K) of the steps of a proxy."""
    return _columns(
        names, (line[key] for line in files.read_lines(folder / "domain_weights.jsonl"))
    )


def _columns(names: Sequence[str], rows: Iterable[Mapping[str, float]]) -> Floats:
    """(T, K) of T rows by domain, read one by one: a long run has many."""
    return np.fromiter((row[name] for row in rows for name in names), np.float64).reshape(
        -1, len(names)
    )


def _row(names: Sequence[str], values: Mapping[str, float]) -> Floats:
    return np.array([values[name] for name in names], dtype=np.float64)

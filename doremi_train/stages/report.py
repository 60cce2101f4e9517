"""report.html: the mixture, how it came about, and what it gained; one self-contained page. And the same in a terminal.

A run, its seeds and a sweep are one thing: settings, each with the runs that differ in their seed only. Over the folder
of a sweep the page first compares the settings, then shows each of them as it shows a single run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.table import Table

from doremi_train import comm, files, results
from doremi_train.charts import COLORS, Curve, Mark, Point, lines, rows, smooth
from doremi_train.data.shards import TokenStore
from doremi_train.detectors import effective_number
from doremi_train.methods import HEURISTICS, heuristics
from doremi_train.results import Result, Setting, spread
from doremi_train.stages import Session, diagnose, evaluate, identity, sweep
from doremi_train.track import console
from doremi_train.weights import student_t

Place = Callable[[Setting], float]

_CHOSEN = 10  # domains that get a colour and a name in a chart over steps
_MOST_ROWS = 40  # of a chart with a row a domain: those that moved most
_MOST_SAMPLES = 60  # domains of which text is shown
_SAMPLE_WINDOW, _SAMPLE_TOKENS, _SAMPLE_CHARACTERS = 2000, 160, 320
_MODEL_COLORS = dict(zip(("main", "uniform", "natural", "unimax", "temperature"), COLORS[:5], strict=True))
_MODEL_COLORS["baseline"] = "#8b919c"


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
    verdict = overall(settings)
    write_page(
        page,
        title=str(page.parent),
        verdict=verdict,
        columns=_COLUMNS,
        charts=_compare_charts(settings) if len(settings) > 1 else [],
        summary=_summary(settings) if len(settings) > 1 else None,
        sections=[_section(setting, number) for number, setting in enumerate(settings)],
    )
    console.print(_settings_table(settings) if len(settings) > 1 else _domains_table(settings[0]))
    for finding in {warning: None for setting in settings for warning in _warnings(setting)}:
        console.print(f"[yellow]warning:[/yellow] {_plain(finding)}")
    console.print(_plain(verdict))
    console.print(f"report: {_plain(str(page))}")


def overall(settings: Sequence[Setting]) -> str:
    """The sentence on top: the verdict of the one setting, or which of several did best."""
    if len(settings) == 1:
        return results.verdict(settings[0])
    best = min(settings, key=lambda setting: fmean(setting.losses("main")))
    runs = sum(len(setting.results) for setting in settings)
    return (
        f"{runs} runs of {len(settings)} settings; the lowest mean loss is that of {best.label} "
        f"({spread(best.losses('main'))} nats per token). There: {results.verdict(best)}"
    )


def write_page(path: Path, **content: Any) -> None:
    """Render the template; every value is escaped, only our own charts are markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files.write_bytes(path, environment.get_template("report.html.jinja").render(**content).encode())


# ── One setting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _section(setting: Setting, number: int) -> dict[str, Any]:
    """Everything the page shows of one setting."""
    first = setting.results[0]
    store = TokenStore.open(first.folder / "prepare") if (first.folder / "prepare").exists() else None
    prefix = f"{setting.label}: " if setting.label else ""
    free = _free_mixtures(first, store)
    charts = {
        "mixture": [_mixture_chart(setting, free, prefix)],
        "proxy": _proxy_charts(setting, prefix),
        "gain": [*_learning_charts(setting, prefix), *_domain_charts(setting, prefix)],
    }
    return {
        "label": setting.label or ("over seeds" if len(setting.results) > 1 else ""),
        "verdict": results.verdict(setting),
        "cards": _cards(setting),
        "warnings": _warnings(setting),
        "charts": charts,
        "free": list(free),
        "domains": _domain_rows(setting, free, store),
        "method": first.mixture["method"],
        "models": list(setting.models.values()),
        "losses": _loss_rows(setting),
        "table": _model_rows(setting),
        "samples": _samples(store) if store and number == 0 else [],
        "provenance": first.mixture.get("provenance", {}) | {"runs": len(setting.results)},
    }


def _weights(setting: Setting) -> dict[str, Point]:
    """The mixture with its interval: over the runs, or over the proxies of the one run."""
    first = setting.results[0]
    if len(setting.results) == 1:
        given = first.mixture.get("interval") or {}
        return {name: Point(weight, *given.get(name, ())) for name, weight in first.weights.items()}
    found = {}
    for name in first.weights:
        mean, half = student_t([run.weights[name] for run in setting.results])
        found[name] = Point(mean, max(0.0, mean - half), min(1.0, mean + half))
    return found


def _free_mixtures(run: Result, store: TokenStore | None) -> dict[str, dict[str, float]]:
    """The mixtures that cost nothing, which a learned one has to beat: {name: {domain: weight}}."""
    if store is None:
        return {}
    config = run.config
    steps = config.get("main.steps") or config["training.steps"]
    budget = config.get("main.tokens") or steps * config["training.batch_size"] * config["training.sequence_length"]
    sizes = torch.from_numpy(store.sizes("train").astype(np.float64))
    options = heuristics.Options(max_epochs=config["mixture.max_epochs"])
    found = {}
    for name in ("natural", "uniform", "unimax"):
        try:
            weights = HEURISTICS[name](sizes, budget, options).tolist()
        except ValueError:  # UniMax where the budget is more than its epochs of all data
            continue
        found[name] = dict(zip(store.domains, weights, strict=True))
    return found


def _cards(setting: Setting) -> list[tuple[str, str]]:
    """Numbers for the top of the page, each with what it is."""
    seeds, models = setting.results, setting.candidates
    cards = [(spread(setting.losses("main")), f"nats per token, {models['main']} mixture")]
    for name, label in models.items():
        if name != "main":
            gain, half = setting.gain(name)
            interval = f" ± {half:.4f}" if len(seeds) > 1 else ""
            cards.append((f"{gain:+.4f}{interval}", f"gained over {label}"))
    figures = [run.figures["main"] for run in seeds]
    if "domains_better_than_baseline" in figures[0] and "baseline" in models:
        better = spread([f["domains_better_than_baseline"] for f in figures], 1).replace(".0", "")
        cards.append((f"{better} of {len(seeds[0].weights)}", f"domains better than {models['baseline']}"))
    if "steps_to_baseline" in figures[0] and "baseline" in models:
        steps = spread([f["steps_to_baseline"] for f in figures], 0)
        cards.append((f"{steps} of {figures[0]['steps']}", f"steps to the final loss of {models['baseline']}"))
    effective = [float(effective_number(np.array(list(run.weights.values())))) for run in seeds]
    cards.append((f"{spread(effective, 2)} of {len(seeds[0].weights)}", "effective number of domains, exp(H(α))"))
    return cards


def _warnings(setting: Setting) -> list[str]:
    """What the detectors and the plan said, each once, with the part of the runs that it holds for."""
    said: dict[tuple[str, ...], list[str]] = {}
    for run in setting.results:
        for finding in run.findings:
            said.setdefault((finding["kind"], *finding["domains"]), []).append(finding["message"])
        for warning in run.warnings:
            if warning not in (finding["message"] for finding in run.findings):
                said.setdefault((warning,), []).append(warning)
    total = len(setting.results)
    return [messages[0] + (f" (in {len(messages)} of {total} runs)" if total > 1 else "") for messages in said.values()]


def _domain_rows(setting: Setting, free: dict[str, dict[str, float]], store: TokenStore | None) -> list[dict[str, Any]]:
    points = _weights(setting)
    sizes = dict(zip(store.domains, store.sizes("train").tolist(), strict=True)) if store else {}
    largest = max(point.value for point in points.values()) or 1.0
    found = []
    for name, point in points.items():
        epochs = [run.mixture["epochs"][name] for run in setting.results if name in run.mixture.get("epochs", {})]
        found.append(
            {
                "name": name,
                "tokens": f"{sizes[name]:,}" if name in sizes else "",
                "free": [f"{weights[name]:.4f}" for weights in free.values()],
                "weight": f"{point.value:.4f}",
                "width": f"{100 * point.value / largest:.1f}",
                "interval": f"{point.low:.4f} – {point.high:.4f}" if point.low is not None else "one seed",
                "epochs": spread(epochs, 2) if epochs else "",
            }
        )
    return found


def _loss_rows(setting: Setting) -> list[dict[str, Any]]:
    """Per domain, every model's loss, with bits per byte; the best of a row is marked."""
    found = []
    for domain in setting.results[0].weights:
        cells: list[dict[str, Any]] = []
        for name in setting.models:
            figures = [run.figures[name]["domains"].get(domain, {}) for run in setting.results]
            values = [figure["loss"] for figure in figures if figure]
            bits = [figure["bits_per_byte"] for figure in figures if figure.get("bits_per_byte")]
            cells.append({"value": fmean(values) if values else None, "text": spread(values), "bits": bits})
        known = [cell["value"] for cell in cells if cell["value"] is not None]
        for cell in cells:
            cell["best"] = bool(known) and cell["value"] == min(known)
            cell["bits"] = f"{fmean(cell['bits']):.3f}" if cell["bits"] else ""
        found.append({"name": domain, "cells": cells})
    return found


_COLUMNS = ("model", "mean loss", "worst domain", "domains better than baseline", "steps to baseline's loss",
            "mean loss − learned, paired")  # fmt: skip


def _model_rows(setting: Setting) -> list[list[str]]:
    found = []
    for name, label in setting.models.items():
        figures = [run.figures[name] for run in setting.results]
        row = [label, spread([f["mean_loss"] for f in figures]), spread([f["worst_loss"] for f in figures])]
        for key, digits in (("domains_better_than_baseline", 1), ("steps_to_baseline", 0)):
            row.append(spread([f[key] for f in figures], digits) if key in figures[0] else "")
        pairs = zip(setting.losses(name), setting.losses("main"), strict=True)
        row.append("" if name == "main" else spread([other - main for other, main in pairs]))
        found.append(row)
    return found


def _samples(store: TokenStore) -> list[dict[str, Any]]:
    """Two pieces of training text of each domain, from the beginning of a document where one is near."""
    tokenizer, found = store.tokenizer(), []
    for k, name in enumerate(store.domains[:_MOST_SAMPLES]):
        length = int(min(_SAMPLE_WINDOW, store.sizes("train")[k] // 4))
        available = store.sequences("train", length)[k] if length > 1 else 0
        if not available:
            continue
        places = np.unique(np.array([0.25, 0.75]) * available).astype(np.int64)
        texts = []
        for tokens in store.gather("train", np.full(len(places), k), places, length):
            ends = np.flatnonzero(tokens[:-_SAMPLE_TOKENS] == store.end_of_document)
            start = int(ends[0]) + 1 if len(ends) else 0
            text = tokenizer.decode(tokens[start : start + _SAMPLE_TOKENS].tolist())
            texts.append(text.replace("\ufffd", "").strip()[:_SAMPLE_CHARACTERS])
        found.append({"name": name, "texts": texts})
    return found


# ── Charts of one setting ────────────────────────────────────────────────────────────────────────────────────────────


def _mixture_chart(setting: Setting, free: dict[str, dict[str, float]], prefix: str) -> str:
    """The mixture before and after: the free mixtures, and the learned one with its interval."""
    points = _weights(setting)
    start = free.get("natural") or {name: 1 / len(points) for name in points}
    moved = sorted(points, key=lambda name: abs(points[name].value - start[name]), reverse=True)[:_MOST_ROWS]
    names = sorted(moved, key=lambda name: start[name] - points[name].value)
    kinds = {name: [Point(weights[domain]) for domain in names] for name, weights in free.items() if name != "unimax"}
    learned = setting.models["main"]
    title = "Weights before and after" + (f": the {len(names)} that moved most" if len(moved) < len(points) else "")
    shown = {**kinds, learned: [points[name] for name in names]}
    colors = {"natural": _MODEL_COLORS["natural"], "uniform": _MODEL_COLORS["uniform"], learned: _MODEL_COLORS["main"]}
    return rows(f"{prefix}{title}", "part of the tokens", names, shown, colors)


def _proxy_charts(setting: Setting, prefix: str) -> list[str]:
    """How the weights came about: α, its effective number of domains, and the excess loss, over the proxy's steps."""
    traces = [trace for run in setting.results for trace in run.traces]
    if not traces:
        return []
    steps = min(len(trace) for trace in traces)
    names = list(traces[0][0]["weights"])
    weights, excess = (_column(traces, key, names, steps) for key in ("weights", "excess_loss"))  # (S, T, K)
    kept = np.unique(np.linspace(0, steps - 1, results.TRACE_POINTS).astype(np.int64))
    x = kept + 1
    mean = weights.mean(0)
    order = np.argsort(-np.abs(mean[-1] - mean[0]) - np.abs(mean.mean(0) - mean[0]))
    chosen = set(order[:_CHOSEN].tolist()) if len(names) > _CHOSEN else set(range(len(names)))

    def by_domain(values: NDArray[np.float64]) -> dict[str, Curve]:
        colors = iter(COLORS)
        return {
            name: Curve(x, values[:, kept, k], next(colors) if k in chosen else "grey") for k, name in enumerate(names)
        }

    band = f"mean of {len(traces)} proxies, band from lowest to highest" if len(traces) > 1 else "one proxy"
    effective = np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum(-1))  # (S, T)
    charts = [
        lines(f"{prefix}Domain weights α ({band})", "proxy step", "weight", by_domain(weights)),
        lines(
            f"{prefix}Effective number of domains, exp(H(α))",
            "proxy step",
            "domains",
            {"α": Curve(x, effective[:, kept], COLORS[0])},
            [Mark(f"all {len(names)}, uniform", y=float(len(names))), Mark("one", y=1.0)],
        ),
        lines(
            f"{prefix}Excess loss over the reference (running mean)",
            "proxy step",
            "nats per token",
            by_domain(smooth(excess, steps // 40)),
        ),
    ]
    rounds = [run.rounds for run in setting.results if run.rounds]
    if rounds:
        count = min(len(found) for found in rounds)
        charts.append(
            lines(
                f"{prefix}Weights after each round",
                "round",
                "weight",
                {
                    name: Curve(np.arange(1, count + 1), [[r[name] for r in found[:count]] for found in rounds])
                    for k, name in enumerate(names)
                    if k in chosen
                },
                settings=True,
            )
        )
    return charts


def _column(traces: Sequence[list[dict[str, Any]]], key: str, names: Sequence[str], steps: int) -> NDArray[np.float64]:
    """(S, T, K); a skipped step has no excess, and counts as 0."""
    rows_ = [[[line[key][name] or 0.0 for name in names] for line in trace[:steps]] for trace in traces]
    return np.array(rows_, dtype=np.float64)


def _learning_charts(setting: Setting, prefix: str) -> list[str]:
    """Validation loss over steps of everything trained at the final size, and where the baseline's end is reached."""
    curves = {}
    for name in setting.candidates:
        found = [run.curves.get(name, []) for run in setting.results]
        points = min(len(curve) for curve in found)
        if points:
            x = np.array([line["step"] for line in found[0][:points]])
            y = np.array([[line["mean_loss"] for line in curve[:points]] for curve in found])  # (S, N)
            curves[name] = Curve(x, y, _MODEL_COLORS.get(name))
    if not curves:
        return []
    band = f" (band: lowest to highest of {len(setting.results)} seeds)" if len(setting.results) > 1 else ""
    labels, x_label, y_label = setting.candidates, "step of the final run", "nats per token"
    named = {labels[name]: curve for name, curve in curves.items()}
    title = f"{prefix}Learning curves: mean validation loss{band}"
    charts = [lines(title, x_label, y_label, named, _goal_marks(setting))]
    goal = _goal(setting)
    if goal in curves and len(curves) > 1:
        # Seed by seed, because the spread of the curves themselves hides how they differ.
        ahead = {
            labels[name]: Curve(curve.x, np.asarray(curves[goal].y) - np.asarray(curve.y), curve.color)
            for name, curve in curves.items()
            if name != goal and np.shape(curve.y) == np.shape(curves[goal].y)
        }
        title = f"{prefix}How far ahead of {labels[goal]}{band}"
        charts.append(lines(title, x_label, y_label, ahead, [Mark(f"{labels[goal]}", y=0.0)]))
    return charts


def _goal(setting: Setting) -> str:
    """The model that others are measured against, or nothing."""
    return next((name for name in ("baseline", "natural", "uniform") if name in setting.candidates), "")


def _goal_marks(setting: Setting) -> list[Mark]:
    """The baseline's final loss, and the step at which the learned mixture reaches it."""
    if "baseline" not in setting.candidates:
        return []
    label = setting.candidates["baseline"]
    marks = [Mark(f"final loss of {label}", y=fmean(setting.losses("baseline")))]
    reached = [run.figures["main"].get("steps_to_baseline") for run in setting.results]
    known = [step for step in reached if step is not None]
    if known:
        never = f", {len(reached) - len(known)} of {len(reached)} runs never" if len(known) < len(reached) else ""
        marks.append(Mark(f"reached at step {fmean(known):.0f}{never}", x=fmean(known)))
    return marks


def _domain_charts(setting: Setting, prefix: str) -> list[str]:
    """Per domain, how far each mixture is from the baseline, or from the reference where there is no baseline."""
    labels = setting.candidates
    goal = _goal(setting)
    domains = list(setting.results[0].figures["main"]["domains"])
    if not goal or not domains:
        return []
    points: dict[str, list[Point]] = {}
    for name, label in labels.items():
        if name == goal:
            continue
        points[label] = []
        for domain in domains:
            found = [
                run.figures[name]["domains"][domain]["loss"] - run.figures[goal]["domains"][domain]["loss"]
                for run in setting.results
            ]
            mean, half = student_t(found)
            ends = (mean - half, mean + half) if len(found) > 1 else ()
            points[label].append(Point(mean, *ends))
    learned = points[labels["main"]]
    order = sorted(range(len(domains)), key=lambda k: learned[k].value)
    if len(order) > _MOST_ROWS:
        order = order[: _MOST_ROWS // 2] + order[-_MOST_ROWS // 2 :]
    return [
        rows(
            f"{prefix}Loss per domain against {labels[goal]}: left of the line is better",
            "difference in nats per token",
            [domains[k] for k in order],
            {label: [found[k] for k in order] for label, found in points.items()},
            {label: _MODEL_COLORS[name] for name, label in labels.items() if name in _MODEL_COLORS},
            zero=True,
        )
    ]


# ── Several settings ─────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(settings: Sequence[Setting]) -> dict[str, Any]:
    """A row for each setting: the loss of every model, and what the learned mixture gained over each."""
    labels = {name: label for name, label in _labels(settings).items() if name != "proxy"}
    names, others = list(labels), [name for name in labels if name != "main"]
    found = []
    for setting in settings:
        gains = []
        for name in others:
            mean, half = setting.gain(name)
            gains.append(f"{mean:+.4f}" + (f" ± {half:.4f}" if len(setting.results) > 1 else ""))
        row = [setting.label, str(len(setting.results)), *(spread(setting.losses(name)) for name in names), *gains]
        found.append(row)
    gained = [f"gained over {labels[name]}" for name in others]
    return {"columns": ["setting", "seeds", *(labels[name] for name in names), *gained], "rows": found}


def _compare_charts(settings: Sequence[Setting]) -> list[str]:
    """Result and weights against what varies: along an axis where it is numbers, else a row for each setting."""
    axis = _axis(settings)
    return _setting_rows(settings) if axis is None else _setting_curves(settings, *axis)


def _setting_rows(settings: Sequence[Setting]) -> list[str]:
    labels = _labels(settings)
    colors = {label: _MODEL_COLORS[name] for name, label in labels.items() if name in _MODEL_COLORS}
    losses = {label: [_interval(setting.losses(name)) for setting in settings] for name, label in labels.items()}
    domains = list(settings[0].results[0].weights)[:_CHOSEN]
    weights = {d: [_interval([run.weights[d] for run in setting.results]) for setting in settings] for d in domains}
    names = [setting.label for setting in settings]
    return [
        rows("Mean validation loss of each setting", "nats per token", names, losses, colors),
        rows("Weights of each setting", "weight", names, weights),
    ]


def _setting_curves(settings: Sequence[Setting], key: str, place: Place, x: str) -> list[str]:
    labels = _labels(settings)
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        rest = ", ".join(f"{name}={value}" for name, value in setting.varying.items() if name != key)
        groups.setdefault(rest, []).append(setting)
    seeds = min(len(setting.results) for setting in settings)
    losses, weights = dict[str, Curve](), dict[str, Curve]()
    found: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in labels}  # by model and group: (S, N)
    for rest, group in groups.items():
        after = f" ({rest})" if rest else ""
        places = [place(setting) for setting in group]
        for name, label in labels.items():
            values = np.array([setting.losses(name)[:seeds] for setting in group]).T
            if any(np.array_equal(values, other) for other in found[name].values()):
                continue  # what does not depend on the keys of the groups is drawn once
            found[name][rest] = values
            color = _MODEL_COLORS.get(name) if len(groups) == 1 or name != "main" else None
            losses[label + (after if name == "main" else "")] = Curve(places, values, color, dashed=name != "main")
        for domain in list(settings[0].results[0].weights)[:_CHOSEN]:
            values = np.array([[run.weights[domain] for run in setting.results[:seeds]] for setting in group]).T
            weights[domain + after] = Curve(places, values)
    band = f" (band: lowest to highest of {seeds} seeds)" if seeds > 1 else ""
    ticks = [place(setting) for setting in settings]
    wide = min(ticks) > 0 and max(ticks) / min(ticks) > 5
    return [
        lines(f"Mean validation loss{band}", x, "nats per token", losses, settings=True, logarithmic=wide),
        lines(f"Weights{band}", x, "weight", weights, settings=True, logarithmic=wide),
    ]


def _labels(settings: Sequence[Setting]) -> dict[str, str]:
    """The models that every setting has, and how they are called."""
    known = {name: label for name, label in settings[0].models.items() if name != "reference"}
    runs = [run for setting in settings for run in setting.results]
    shared = [name for name in known if all(name in run.figures for run in runs)]
    return {name: "proxy itself" if name == "proxy" else known[name] for name in shared}


def _axis(settings: Sequence[Setting]) -> tuple[str, Place, str] | None:
    """What to draw along x: (key, place of a setting, name of the axis); None where nothing that varies is a number."""
    if len({setting.size for setting in settings}) > 1:
        return "proxy", lambda setting: setting.size, "parameters of the proxy, without embeddings"
    if len({setting.main_size for setting in settings}) > 1:
        return "main.model", lambda setting: setting.main_size, "parameters of the final model, without embeddings"
    counts = {
        key: len({setting.varying[key] for setting in settings})
        for key in settings[0].varying
        if all(isinstance(s.varying[key], int | float) and not isinstance(s.varying[key], bool) for s in settings)
    }
    if not counts:
        return None
    key = max(counts, key=lambda name: (counts[name], name == "proxy.step_size"))
    return key, lambda setting: setting.varying[key], key


def _interval(values: Sequence[float]) -> Point:
    mean, half = student_t(values)
    return Point(mean, mean - half, mean + half) if len(values) > 1 else Point(mean)


# ── The terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _domains_table(setting: Setting) -> Table:
    """Weights and losses per domain, means over the seeds."""
    points, models = _weights(setting), setting.models
    table = Table("domain", "weight", *models.values())
    table.title = "The mixture, and validation loss in nats per token"
    for row in _loss_rows(setting):
        losses = (f"{cell['value']:.4f}" if cell["value"] is not None else "" for cell in row["cells"])
        table.add_row(_plain(row["name"]), f"{points[row['name']].value:.4f}", *losses)
    for name, key in (("mean", "mean_loss"), ("worst", "worst_loss")):
        losses = (f"{fmean(run.figures[model][key] for run in setting.results):.4f}" for model in models)
        table.add_row(name, "", *losses, style="bold" if name == "mean" else None)
    return table


def _settings_table(settings: Sequence[Setting]) -> Table:
    summary = _summary(settings)
    table = Table(*summary["columns"])
    for row in summary["rows"]:
        table.add_row(*(_plain(cell) for cell in row))
    return table


def _plain(text: str) -> str:
    """Text that is no markup of the terminal's."""
    return text.replace("[", r"\[")

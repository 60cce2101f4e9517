"""report.html: the mixture, how it came about, and what it gained; one self-contained page. And the same in a terminal.

Over the folder of a sweep (`-m model=70m,150m seed=0,1,2`) it is a table of means and 95 % Student-t intervals for each
setting, and where the size of the proxy varies, what becomes of the result and of the weights with it.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
import yaml
from rich.table import Table

from doremi_train import comm, files, model
from doremi_train.data.shards import TokenStore
from doremi_train.stages import Session, evaluate, identity, prepare
from doremi_train.track import console, short
from doremi_train.weights import student_t

Curve = tuple[Sequence[float], ...]  # x, y, and perhaps the ends of a band around y
NAMES = {"main": "learned", "baseline": "baseline", "uniform": "uniform", "reference": "reference", "proxy": "proxy"}


def run(session: Session) -> Path:
    """Write the page and print the summary; returns the page's path."""
    page = session.run_dir / "report.html"
    sweep = sorted(session.run_dir.glob("*/evaluation.json"))
    if sweep:
        comm.on_first(lambda: _sweep(session, page, _settings([path.parent for path in sweep])))
        return page
    figures = evaluate.run(session)
    store = prepare.run(session)
    comm.on_first(lambda: _single(session, store, page, figures))
    return page


def _single(session: Session, store: TokenStore, page: Path, figures: dict[str, Any]) -> None:
    artefact = files.read_json(session.run_dir / "weights.json")
    natural = store.sizes("train") / store.sizes("train").sum()
    verdict = verdict_of(figures)
    names = [name for name in figures if name != "proxy" or len(figures) < 6]
    write_page(
        page,
        title=str(session.run_dir),
        verdict=verdict,
        method=artefact["method"],
        mixture=[
            {
                "domain": name,
                "natural": natural[k],
                "weight": artefact["weights"][name],
                "interval": (artefact["interval"] or {}).get(name),
                "epochs": artefact["epochs"][name],
                "tokens": int(store.sizes("train")[k]),
            }
            for k, name in enumerate(store.domains)
        ],
        models=names,
        figures=figures,
        charts=[chart for chart in (_weights_chart(session), _learning_chart(session, names)) if chart],
        provenance=artefact["provenance"],
    )
    table = Table("domain", "natural", "weight", *(NAMES.get(n, n) for n in names))
    table.title = "The mixture, and validation loss in nats per token"
    for k, name in enumerate(store.domains):
        losses = [f"{figures[n]['domains'][name]['loss']:.4f}" for n in names]
        table.add_row(name, f"{natural[k]:.4f}", f"{artefact['weights'][name]:.4f}", *losses)
    table.add_row("mean", "", "", *(f"{figures[n]['mean_loss']:.4f}" for n in names), style="bold")
    table.add_row("worst", "", "", *(f"{figures[n]['worst_loss']:.4f}" for n in names))
    console.print(table)
    console.print(f"{verdict}\nreport: {page}")


def verdict_of(figures: Mapping[str, Any]) -> str:
    """One plain sentence about the learned mixture against each mixture trained beside it."""
    main = figures["main"]["mean_loss"]
    parts = []
    for name in figures:
        if name in ("main", "reference", "proxy"):
            continue
        gain = figures[name]["mean_loss"] - main
        better = "better" if gain > 0 else "worse"
        parts.append(f"{abs(gain):.4f} nats per token {better} than {name}")
    compared = " and ".join(parts) if parts else "not compared with any other mixture"
    return (
        f"On the mean over domains the learned mixture ({main:.4f}) is {compared}. One seed, no interval: "
        "differences of the size of the seed-to-seed spread decide nothing."
    )


class Setting(NamedTuple):
    """Runs of a sweep that differ in their seed only."""

    label: str
    size: int  # parameters of the proxy, without embeddings
    rest: str  # what varies over the sweep beside seed and model
    figures: list[dict[str, Any]]  # evaluation.json of each run
    weights: list[dict[str, float]]  # weights.json of each run


def _settings(folders: Sequence[Path]) -> list[Setting]:
    """The runs by everything that varies over them but the seed, smallest proxy first."""
    configs = [identity(yaml.safe_load((folder / "config.yaml").read_text())) for folder in folders]
    varying = [
        key
        for key in sorted(set().union(*configs) - {"seed"})
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    settings: dict[str, Setting] = {}
    for folder, config in zip(folders, configs, strict=True):
        size = model.parameters(_proxy_config(folder))[1]
        rest = ", ".join(f"{key}={config.get(key)}" for key in varying if not key.startswith("model."))
        sized = f"proxy of {size:,} parameters" if any(key.startswith("model.") for key in varying) else ""
        key = repr([config.get(key) for key in varying])
        setting = settings.setdefault(key, Setting(", ".join(filter(None, [sized, rest])), size, rest, [], []))
        setting.figures.append(files.read_json(folder / "evaluation.json"))
        setting.weights.append(files.read_json(folder / "weights.json")["weights"])
    return sorted(settings.values(), key=lambda setting: (setting.size, setting.rest))


def _proxy_config(folder: Path) -> dict[str, Any]:
    places = [*folder.glob("proxy/model"), *folder.glob("proxy/round-*/seed-*/model"), folder / "reference" / "model"]
    return files.read_json(places[0] / "config.json")


def _sweep(session: Session, page: Path, settings: Sequence[Setting]) -> None:
    """For each setting, mean and interval over its seeds, and paired differences to what the mixture must beat."""
    groups = []
    for setting in settings:
        rows, verdict = sweep_rows(setting.figures), sweep_verdict(setting.figures)
        groups.append({"label": setting.label, "rows": rows, "verdict": verdict})
        table = Table("model", "mean loss", "worst loss", "better domains", "steps to baseline", "mean loss − learned")
        table.title = setting.label
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(verdict)
    total = sum(len(setting.figures) for setting in settings)
    write_page(
        page,
        title=f"{session.run_dir}: {total} runs",
        verdict=groups[0]["verdict"] if len(groups) == 1 else f"{total} runs of {len(groups)} settings.",
        sweep=groups,
        charts=_size_charts(settings) if len({setting.size for setting in settings}) > 1 else [],
    )
    console.print(f"report: {page}")


def _size_charts(settings: Sequence[Setting]) -> list[str]:
    """Result and weights against the size of the proxy, with the spread from the lowest to the highest seed."""
    losses: dict[str, list[tuple[int, list[float]]]] = {}
    weights: dict[str, list[tuple[int, list[float]]]] = {}
    for setting in settings:
        after = f" ({setting.rest})" if setting.rest else ""
        for name in setting.figures[0]:
            if name not in ("reference", "proxy"):
                values = [run[name]["mean_loss"] for run in setting.figures if name in run]
                losses.setdefault(NAMES.get(name, name) + after, []).append((setting.size, values))
        for name in setting.weights[0]:
            values = [run[name] for run in setting.weights]
            weights.setdefault(name + after, []).append((setting.size, values))
    size = "parameters of the proxy, without embeddings"
    return [
        chart("Validation loss of the final model, mean over domains", size, "nats per token", _banded(losses), True),
        chart("Domain weights", size, "weight", _banded(weights), True),
    ]


def _banded(points: Mapping[str, Sequence[tuple[int, Sequence[float]]]]) -> dict[str, Curve]:
    """Curves of means over seeds, each with its lowest and highest seed."""
    return {
        name: ([x for x, _ in found], *([f(values) for _, values in found] for f in (fmean, min, max)))
        for name, found in points.items()
    }


def sweep_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a model: means ± half-widths of 95 % Student-t intervals over runs."""
    rows = []
    for name in runs[0]:
        entries = [run[name] for run in runs if name in run]
        row = [
            NAMES.get(name, name),
            _spread([e["mean_loss"] for e in entries]),
            _spread([e["worst_loss"] for e in entries]),
        ]
        for key, digits in (("domains_better_than_baseline", 1), ("steps_to_baseline", 0)):
            values = [entry.get(key) for entry in entries]
            known = [value for value in values if value is not None]
            never = f" ({len(values) - len(known)} never)" if known and len(known) < len(values) else ""
            row.append(_spread(known, digits) + never if known else "–")
        paired = [run[name]["mean_loss"] - run["main"]["mean_loss"] for run in runs if "main" in run and name in run]
        row.append(_spread(paired) if name != "main" else "")
        rows.append(row)
    return rows


def sweep_verdict(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which differences between the learned mixture and the others exceed their paired interval."""
    if len(runs) == 1:
        return verdict_of(runs[0])
    parts = []
    for name in runs[0]:
        if name in ("main", "reference", "proxy"):
            continue
        mean, half = student_t([run[name]["mean_loss"] - run["main"]["mean_loss"] for run in runs])
        word = "not distinguishable from" if abs(mean) <= half else "better than" if mean > 0 else "worse than"
        parts.append(f"{word} {name} (difference {mean:+.4f} ± {half:.4f} nats per token)")
    return f"Over {len(runs)} runs the learned mixture is {'; '.join(parts)}. Paired 95 % Student-t intervals."


def _spread(values: Sequence[float], digits: int = 4) -> str:
    mean, half = student_t(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def write_page(path: Path, **content: Any) -> None:
    """Render the template; every value is escaped, only our own charts are markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.ChainableUndefined
    )
    text = environment.get_template("report.html.jinja").render(names=NAMES, **content)
    files.write_bytes(path, text.encode())


def _weights_chart(session: Session) -> str | None:
    """Domain weights over steps, of the first seed of the last round."""
    several = sorted(session.run_dir.glob("proxy/round-*/seed-0/domain_weights.jsonl"))
    traces = several or list(session.run_dir.glob("proxy/domain_weights.jsonl"))
    lines = list(files.read_lines(traces[-1])) if traces else []
    if not lines:
        return None
    lines = lines[:: max(1, len(lines) // 400)]
    steps = [line["step"] for line in lines]
    curves: dict[str, Curve] = {
        name: (steps, [line["weights"][name] for line in lines]) for name in lines[0]["weights"]
    }
    return chart("Domain weights α while the proxy trains", "proxy step", "weight", curves)


def _learning_chart(session: Session, names: Sequence[str]) -> str | None:
    curves: dict[str, Curve] = {}
    for name in names:
        lines = list(files.read_lines(session.run_dir / name / "evaluations.jsonl"))
        if lines and name not in ("reference", "proxy"):
            curves[NAMES.get(name, name)] = ([li["step"] for li in lines], [li["mean_loss"] for li in lines])
    return chart("Validation loss, mean over domains", "step", "nats per token", curves) if curves else None


def chart(title: str, x: str, y: str, curves: Mapping[str, Curve], sizes: bool = False) -> str:
    """A line chart as SVG markup, the same bytes for the same data; `sizes`: points on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Names of domains are text: no mathtext between dollar signs, no glyph outlines.
    settings: Any = {"svg.hashsalt": "doremi", "svg.fonttype": "none", "text.parse_math": False}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        styles = ["-", "--", ":", "-."]
        for number, (name, (xs, ys, *band)) in enumerate(curves.items()):
            color, style = f"C{number % 10}", styles[number // 10 % 4] + ("o" if sizes else "")
            # A leading underscore would hide the name from the legend.
            axes.plot(xs, ys, style, label=f" {name}", linewidth=1.6, markersize=4, color=color)
            if band:
                axes.fill_between(xs, band[0], band[1], color=color, alpha=0.15, linewidth=0)
        if sizes:
            axes.set_xscale("log")
            ticks = sorted({number for xs, *_ in curves.values() for number in xs})
            axes.set_xticks(ticks, [short(number) for number in ticks])
            axes.minorticks_off()
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]

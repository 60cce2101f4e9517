"""Every trained model on the same validation sequences, and what the learned mixture gained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.config import fingerprint
from doremi_train.console import Bar
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import downstream
from doremi_train.parallel import comm
from doremi_train.stages import main, prepare
from doremi_train.stages.runs import evaluated, metrics, start, tasks
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run, lock, stop


@once
def run(session: Session) -> dict[str, Any]:
    """evaluation.json: {model: figures}, with steps to the baseline's loss and domains better than
    it."""
    store = prepare.run(session)
    defined = comm.on_first(lambda: define_tasks(session))  # wrong before training
    trained = main.run(session)
    folders = {
        "reference": Path(session.config.reference.path or session.run_dir / "reference" / "model"),
        "proxy": session.run_dir / "proxy" / "model",  # several seeds or rounds have no one proxy
    }
    begun = start.folder(session.config, "main")
    if begun is not None:
        folders["start"] = Path(begun)
    folders = {name: folder for name, folder in folders.items() if folder.exists()}
    folders |= {name: run.folder / "model" for name, run in trained.items()}
    figures: dict[str, Any] = {}
    beyond = metrics.beyond(session, store, folders)
    same: dict[Path, str] = {}  # a model that is there under several names is measured once
    with Bar("evaluate", len(folders), unit="model", show=comm.world().first) as bar:
        for done, (name, folder) in enumerate(folders.items()):
            stop.check("evaluate")
            known = same.setdefault(folder.resolve(), name)
            if known == name:
                figures[name] = evaluated.figures(session, store, folder, name == "reference")
            else:
                shared = ("domains", "mean_loss", "worst_loss")
                figures[name] = {key: figures[known][key] for key in shared}
            figures[name] |= beyond[name]
            bar.update(done + 1, name)
    compare(
        figures,
        {
            name: list(files.read_lines(run.folder / "evaluations.jsonl"))
            for name, run in trained.items()
        },
        _while_training(session, store),
    )
    if defined:
        comm.on_first(lambda: _run_tasks(session, trained, defined))
    comm.on_first(lambda: files.write_json(session.run_dir / "evaluation.json", figures))
    return figures


Line = Mapping[str, Any]  # of evaluations.jsonl


def _while_training(session: Session, store: TokenStore) -> Callable[[Line], float] | None:
    """The objective of a line of evaluations.jsonl, which has the losses of domains and their
    mean; None for one that counts what is measured at the end alone, or is standardised, for which
    one run is too few."""
    if session.config.objective.standardise:
        return None
    wanted = metrics.objective(session, store, np.ones(len(metrics.names(session, store))))
    if wanted.weights[len(store.domains) :].any():
        return None
    if wanted.plain:
        return lambda line: float(line["mean_loss"])
    more = np.zeros(len(wanted.weights) - len(store.domains))  # these count nothing

    def score(line: Line) -> float:
        losses = np.append([line["domains"][name] for name in store.domains], more)
        return float(wanted.scores(losses[None])[0])

    return score


def compare(
    figures: dict[str, Any],
    curves: Mapping[str, list[dict[str, Any]]],
    score: Callable[[Line], float] | None,
) -> None:
    """Add to each model of the main size: its steps, and those to what every other reaches at its
    end, by the objective (`steps_to`), without these where it is not known of steps; and beside
    the baseline in how many domains it is better (and steps_to_baseline once more by itself)."""
    for name, curve in curves.items():
        figures[name]["steps"] = curve[-1]["step"]
        if score is not None:
            scored = [(line["step"], score(line)) for line in curve]
            figures[name]["steps_to"] = {
                other: next((step for step, mine in scored if mine <= score(theirs[-1])), None)
                for other, theirs in curves.items()
                if other != name
            }
    if "baseline" not in figures:
        return
    baseline = figures["baseline"]["domains"]
    for name, curve in curves.items():
        mine = figures[name]["domains"]
        figures[name]["domains_better_than_baseline"] = sum(
            mine[d]["loss"] < baseline[d]["loss"] for d in baseline
        )
        if score is not None:
            goal = score(curves["baseline"][-1])
            figures[name]["steps_to_baseline"] = next(
                (line["step"] for line in curve if score(line) <= goal), None
            )


def define_tasks(session: Session) -> dict[str, Any]:
    """Write the definition of every task that is asked for; what it is made of, by its name."""
    asked, folder = session.config.downstream, session.run_dir / "downstream"
    described = {}
    gone = [place for place in (asked.files or {}).values() if not Path(place).exists()]
    if gone and (session.run_dir / "downstream.json").exists():
        session.say(f"downstream             done before; {', '.join(gone)} are gone by now")
        return {}
    for name in set(asked.tasks) - {"cloze"}:
        downstream.check(name, Path((asked.files or {})[name]))
    for name in asked.tasks:
        place = (
            tasks.write_cloze(session, prepare.run(session), folder / "cloze")
            if name == "cloze"
            else Path((asked.files or {})[name])
        )
        downstream.define(name, place, folder / "tasks" / f"{name}.yaml")
        described[name] = [
            *(fingerprint((place / f"{part}.jsonl").read_text()) for part in downstream.PARTS),
            *["trimmed"] * downstream.padded(name, place),
        ]
    return described


def _run_tasks(session: Session, trained: Mapping[str, Run], described: Mapping[str, Any]) -> None:
    """downstream.json: {model: {task: [{step, accuracy, standard_error, examples}, …]}}."""
    folder = session.run_dir / "downstream"
    runs = {one.folder: one for one in trained.values()}
    with Bar("downstream", len(runs), unit="model") as bar:
        for done, one in enumerate(runs.values()):
            _measure_tasks(session, one, described, folder / "tasks")
            bar.update(done + 1)
    content = {
        name: _state_of_tasks(session, one, described).result() for name, one in trained.items()
    }
    files.write_json(session.run_dir / "downstream.json", content)


def _state_of_tasks(session: Session, run: Run, described: Mapping[str, Any]) -> Run:
    limit = session.config.downstream.examples
    recipe = {
        "model": run.folder.name,
        "tasks": described,
        "examples": limit,
        "steps": sorted(_models(run)),
    }
    return Run(session.store, "downstream", recipe)


def _models(run: Run) -> dict[int, Path]:
    """Models of a run by step: those kept on the way and the final one."""
    kept = {
        int(path.name.removeprefix("step-")): path
        for path in run.folder.glob("snapshots/step-*[0-9]")
    }
    return kept | {int(run.result()["steps"]): run.folder / "model"}


def _measure_tasks(
    session: Session, run: Run, described: Mapping[str, Any], definitions: Path
) -> None:
    state = _state_of_tasks(session, run, described)
    with lock(state.folder, str(session.run_dir.resolve())):
        if state.finished:
            return
        state.begin()
        lines: dict[str, list[dict[str, Any]]] = {name: [] for name in described}
        for step, model in sorted(_models(run).items()):
            stop.check("downstream")
            limit, device = session.config.downstream.examples, session.place.device
            for name, accuracy in downstream.measure(
                model, definitions, list(described), device, limit
            ).items():
                line = {"step": step, "accuracy": accuracy.value, "standard_error": accuracy.error}
                lines[name].append(line | {"examples": accuracy.examples})
        state.finish(lines)

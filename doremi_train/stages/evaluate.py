"""Every trained model on the same validation sequences, and what the learned mixture gained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doremi_train import comm, evaluation, files, model
from doremi_train.data.shards import TokenStore
from doremi_train.runs import stop
from doremi_train.stages import Session, main, once, prepare
from doremi_train.track import Bar


@once
def run(session: Session) -> dict[str, Any]:
    """evaluation.json: {model: figures}, with steps to the baseline's loss and domains better than it."""
    store = prepare.run(session)
    trained = main.run(session)
    folders = {
        "reference": Path(session.config.reference.path or session.run_dir / "reference" / "model"),
        "proxy": session.run_dir / "proxy" / "model",  # several seeds or rounds have no one proxy
    }
    folders = {name: folder for name, folder in folders.items() if folder.exists()}
    folders |= {name: run.folder / "model" for name, run in trained.items()}
    figures: dict[str, Any] = {}
    with Bar("evaluate", len(folders), unit="model", show=comm.world().first) as bar:
        for done, (name, folder) in enumerate(folders.items()):
            stop.check("evaluate")
            loaded = _load(session, store, folder)
            figures[name] = _measure(session, store, loaded)
            if name == "reference":  # far below the validation loss: it knows the domain by heart
                trained_on = _measure(session, store, loaded, "train")["domains"]
                figures[name]["training_loss"] = {domain: entry["loss"] for domain, entry in trained_on.items()}
            bar.update(done + 1, name)
    compare(figures, {name: list(files.read_lines(run.folder / "evaluations.jsonl")) for name, run in trained.items()})
    comm.on_first(lambda: files.write_json(session.run_dir / "evaluation.json", figures))
    return figures


def _load(session: Session, store: TokenStore, folder: Path) -> model.LanguageModel:
    loaded = model.load(folder, store.vocabulary_size, "model").to(session.place.device)
    loaded.precision = session.config.training.precision
    return loaded


def _measure(
    session: Session, store: TokenStore, loaded: model.LanguageModel, split: str = "validation"
) -> dict[str, Any]:
    training, options, device = session.config.training, session.config.evaluation, session.place.device
    batch = comm.world().largest(training.batch_size, training.micro_batch_size)
    return evaluation.measure(loaded, store, training.sequence_length, batch, options, device, split)


def compare(figures: dict[str, Any], curves: Mapping[str, list[dict[str, Any]]]) -> None:
    """Add to each model of the main size: domains better than the baseline, and steps to the baseline's final loss."""
    if "baseline" not in figures:
        return
    baseline = figures["baseline"]["domains"]
    goal = curves["baseline"][-1]["mean_loss"]
    for name, curve in curves.items():
        mine = figures[name]["domains"]
        figures[name]["domains_better_than_baseline"] = sum(mine[d]["loss"] < baseline[d]["loss"] for d in baseline)
        figures[name]["steps"] = curve[-1]["step"]
        figures[name]["steps_to_baseline"] = next((line["step"] for line in curve if line["mean_loss"] <= goal), None)

"""Every trained model on the same validation sequences, and what the learned mixture gained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.console import Bar
from doremi_train.data.sampler import Ints, Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.methods import simplex
from doremi_train.model import folders
from doremi_train.parallel import comm
from doremi_train.stages import Session, language_model, main, once, prepare, tasks
from doremi_train.storage.runs import stop


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
    same: dict[Path, str] = {}  # a model that is there under several names is measured once
    with Bar("evaluate", len(folders), unit="model", show=comm.world().first) as bar:
        for done, (name, folder) in enumerate(folders.items()):
            stop.check("evaluate")
            known = same.setdefault(folder.resolve(), name)
            if known == name:
                figures[name] = _measure(session, store, folder, training_too=name == "reference")
            else:
                figures[name] = {key: figures[known][key] for key in ("domains", "mean_loss", "worst_loss")}
            bar.update(done + 1, name)
    compare(figures, {name: list(files.read_lines(run.folder / "evaluations.jsonl")) for name, run in trained.items()})
    tasks.run(session, trained)
    comm.on_first(lambda: files.write_json(session.run_dir / "evaluation.json", figures))
    return figures


def _measure(session: Session, store: TokenStore, folder: Path, training_too: bool) -> dict[str, Any]:
    """`training_too`: also the loss on training sequences, which is far below where a domain is known by heart."""
    training, options, device = session.config.training, session.config.evaluation, session.place.device
    loaded = folders.load(folder, store.vocabulary_size, "model").to(device)
    loaded.precision = training.precision
    batch = comm.world().largest(training.batch_size, training.micro_batch_size)
    figures = losses.measure(loaded, store, training.sequence_length, batch, options, device)
    if training_too:
        drawn = _trained_on(session, store)
        seen = losses.measure(loaded, store, training.sequence_length, batch, options, device, drawn)["domains"]
        figures["training_loss"] = {domain: entry["loss"] for domain, entry in seen.items()}
    return figures


def _trained_on(session: Session, store: TokenStore) -> tuple[Ints, Ints]:
    """Domain (N,) and sequence (N,): those of every domain that the reference drew first, as many as are evaluated."""
    whole = store.sequences("train", session.config.training.sequence_length)
    batch = len(whole) * session.config.evaluation.sequences
    sampler = Sampler(whole, store.domains, batch, session.config.seed, language_model.subsample(session))
    first = sampler.draw(0, simplex.uniform(len(whole)).numpy(), np.zeros_like(whole))
    return first.domain, first.sequence


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

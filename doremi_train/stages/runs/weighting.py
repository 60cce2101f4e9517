"""Weighting of the main runs' tokens (`training.loss_weighting`): against the reference, and with
imp also against a model of the data itself, which is trained as a reference would be.
"""

from dataclasses import asdict
from pathlib import Path

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import importance
from doremi_train.model.folders import folder_fingerprint
from doremi_train.stages.runs import language_model, reference, reference_losses
from doremi_train.stages.runs.language_model import Weighting
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run
from doremi_train.training.frozen import LogRatio, Reference

DATA_MODEL = "data_model"  # under run_dir


def models(session: Session) -> int:
    """Frozen ones beside a main run."""
    return {"none": 0, "imp": 2}.get(session.config.training.loss_weighting, 1)


def of(session: Session, store: TokenStore) -> Weighting | None:
    """The weighting of this command's main runs, its frozen models being trained first; None: every
    token counts 1."""
    if session.config.training.loss_weighting == "none":
        return None
    before = reference.mixture(session, store)
    folders = [reference.folder(session, store, before, "reference")]
    if session.config.training.loss_weighting == "imp":
        ingredients = reference.ingredients(session, store, before)
        folders.append(
            language_model.train(session, store, DATA_MODEL, *ingredients).folder / "model"
        )
    return against(session, store, folders)


def against(session: Session, store: TokenStore, folders: list[Path]) -> Weighting:
    """The weighting against the models of these folders: the reference and, with imp, the model of
    the data."""
    config = session.config
    options = importance.Options(**asdict(config.weighting), policy=config.training.loss_weighting)
    fingerprints = [folder_fingerprint(folder) for folder in folders]
    described = asdict(config.weighting) | {"policy": options.policy, "models": fingerprints}
    if config.reference.losses == "cached":
        described["losses"] = "cached"  # rounded

    def frozen(run: Run) -> Reference:
        columns = [
            reference_losses.frozen(session, store, run, folder, fingerprint)
            for folder, fingerprint in zip(folders, fingerprints, strict=True)
        ]
        return LogRatio(*columns) if len(columns) == 2 else columns[0]

    return Weighting(options, {"weighting": described}, frozen)

"""Weights that runs begin with: those of a folder (`start.*`), as continued pretraining and
mid-training do, or none, and then a seed makes them.

A run is known by the model's config and, in it, the fingerprint of the weights.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from doremi_train.config import UserError
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import configs, folders
from doremi_train.model.configs import STARTED, ModelOptions
from doremi_train.model.language_model import LanguageModel
from doremi_train.stages.options import Config
from doremi_train.stages.session import Session
from doremi_train.training.task import TrainingOptions

Role = Literal["model", "reference", "main"]  # of a key of `start`; model: of all others


def folder(config: Config, role: Role) -> str | None:
    """The folder that such runs begin with; None where a seed makes their weights."""
    own: str | None = getattr(config.start, role)
    return config.start.model if own is None else own


def shape(session: Session, store: TokenStore, role: Role) -> dict[str, Any]:
    """The config of the folder's model, by which a run is known. Raises UserError where it cannot
    be read, or has another tokeniser than the data."""
    given, length = folder(session.config, role), session.config.training.sequence_length
    assert given is not None
    place, key = Path(given), f"start.{role}"
    folders.refuse_adapter(place, f"{key}={given}")
    _require_tokenizer(place, store, key)
    entries = configs.of_text(configs.read(place, key), f"{key}={given}", folders.REMEDY)[1].get(
        "vocab_size", store.vocabulary_size
    )
    if entries < store.vocabulary_size:
        raise UserError(
            f"{key}={given}: its vocabulary has {entries} entries, the data's tokeniser "
            f"{store.vocabulary_size}; give the model that goes with data.tokenizer"
        )
    found = configs.resolve(ModelOptions(path=given), entries, store.end_of_document, length, key)
    return found | {STARTED: _fingerprint(place)}


def model(session: Session, config: dict[str, Any], training: TrainingOptions) -> LanguageModel:
    """The model of a folder, as these options train it."""
    for role in ("main", "reference", "model"):
        given = folder(session.config, role)
        if given is not None and _fingerprint(Path(given)) == config[STARTED]:
            how = training.activation_checkpointing, training.precision
            begun = folders.to_train(Path(given), f"start.{role}", *how)
            begun.inner.config.update({STARTED: config[STARTED]})
            return begun
    raise UserError(
        f"start.*: no folder has the weights {config[STARTED]} any more, which this command began "
        "with; leave the folders alone while it runs"
    )


@lru_cache(8)
def _fingerprint(place: Path) -> str:
    return folders.folder_fingerprint(place)


@lru_cache(8)
def _require_tokenizer(place: Path, store: TokenStore, key: str) -> None:
    if not (place / "tokenizer.json").exists():
        return  # the vocabulary's size has to do
    own = tokenizers.fingerprint(tokenizers.load(str(place)))
    if own != store.manifest["tokenizer"]["fingerprint"]:
        raise UserError(
            f"{key}={place}: has another tokeniser than the data; give data.tokenizer={place}, so "
            "that its text is read as the model knows it"
        )

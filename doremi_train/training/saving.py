"""A trained model, saved file by file while it is divided among the processes."""

import contextlib
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import folders, weights
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm
from doremi_train.parallel.engine import Engine


def save(
    engine: Engine,
    model: LanguageModel,
    folder: Path,
    store: TokenStore,
    length: int,
    tried: bool = False,
) -> None:
    """Write the folder, as `folders.save` does; the first process holds one file of it at a time,
    the others one tensor. `tried`: on held-out text too, whether AutoTokenizer gives the same ids.
    A collective."""
    with contextlib.ExitStack() as stack:
        aside = comm.on_first(lambda: stack.enter_context(files.replacing_folder(folder)))
        plan = weights.planned(model)
        parts = [
            _write(engine, model, aside, names, number, len(plan))
            for number, names in enumerate(plan, 1)
        ]
        comm.on_first(lambda: _complete(model, parts, aside, store, length, tried))
        comm.on_first(stack.close)


def _write(
    engine: Engine, model: LanguageModel, folder: Path, names: list[str], number: int, count: int
) -> dict[str, Any]:
    tensors = engine.whole(names)
    return comm.on_first(lambda: weights.write(model, tensors, folder, number, count))


def _complete(
    model: LanguageModel,
    parts: list[dict[str, Any]],
    folder: Path,
    store: TokenStore,
    length: int,
    tried: bool,
) -> None:
    sample = store.sample("validation") if tried else ()
    folders.complete(model, parts, folder, store.tokenizer(), store.end_of_document, length, sample)

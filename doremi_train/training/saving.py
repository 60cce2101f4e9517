"""A trained model, saved file by file while it is divided among the processes."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import folders, weights
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import comm
from doremi_train.parallel.engine import Engine

Parts = list[dict[str, Any]]  # of the index


def save(
    engine: Engine,
    model: LanguageModel,
    folder: Path,
    store: TokenStore,
    length: int,
    tried: bool = False,
) -> None:
    """Write the folder, as `folders.save` does. `tried`: on held-out text too, whether
    AutoTokenizer gives the same ids. A collective."""

    def complete(parts: Parts, aside: Path) -> None:
        sample = store.sample("validation") if tried else ()
        tokenizer, end = store.tokenizer(), store.end_of_document
        folders.complete(model, parts, aside, tokenizer, end, length, sample)

    write(engine, model, folder, complete)


def write(
    engine: Engine, model: LanguageModel, folder: Path, complete: Callable[[Parts, Path], None]
) -> None:
    """Write the weights into a folder, which `complete` is then given, with what the index is made
    from. The first process holds one file at a time, the others one tensor. A collective."""
    with contextlib.ExitStack() as stack:
        aside = comm.on_first(lambda: stack.enter_context(files.replacing_folder(folder)))
        plan = weights.planned(model)
        parts = [
            _write(engine, model, aside, names, number, len(plan))
            for number, names in enumerate(plan, 1)
        ]
        comm.on_first(lambda: complete(parts, aside))
        comm.on_first(stack.close)


def _write(
    engine: Engine, model: LanguageModel, folder: Path, names: list[str], number: int, count: int
) -> dict[str, Any]:
    tensors = engine.whole(names)
    return comm.on_first(lambda: weights.write(model, tensors, folder, number, count))

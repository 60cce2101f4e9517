"""Weights of a model folder: safetensors in files of bounded size with an index, as transformers
writes and reads them. No more than a file of them is held at a time."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from doremi_train.files import write_json
from doremi_train.model.language_model import INNER, LanguageModel, tensors_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE = 1 << 30  # bytes of a file, but for a tensor that has more


def planned(model: LanguageModel) -> list[list[str]]:
    """Names of the tensors that each file is made from, in order; of the LanguageModel."""
    shapes = {
        name.removeprefix(INNER): torch.empty(
            getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta"
        )  # which is what ZeRO 3 calls it
        for name, tensor in tensors_of(model)
    }
    planned: list[list[str]] = []
    room = 0
    for group in _together(model.inner, shapes):
        size = sum(shapes[name].nbytes for name in group)
        if size > room:
            planned.append([])
            room = max(FILE, size)
        planned[-1] += [INNER + name for name in group]
        room -= size
    return planned


def write(
    model: LanguageModel, tensors: Mapping[str, Tensor], folder: Path, number: int, files: int
) -> dict[str, Any]:
    """Write file number `number`, from 1, of so many; returns its part of the index."""
    name = SINGLE if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
    theirs = _theirs(model.inner, of_inner(tensors))
    contiguous = {key: tensor.contiguous() for key, tensor in theirs.items()}
    with naming_the_disk(folder):
        save_file(contiguous, folder / name, metadata={"format": "pt"})
    return {
        "total_parameters": sum(tensor.numel() for tensor in theirs.values()),
        "total_size": sum(tensor.nbytes for tensor in theirs.values()),
        "weight_map": dict.fromkeys(theirs, name),
    }


def write_index(folder: Path, parts: Sequence[Mapping[str, Any]]) -> None:
    """The index of these files; a single one has none."""
    if len(parts) == 1:
        return
    totals = {key: sum(part[key] for part in parts) for key in ("total_parameters", "total_size")}
    where = {key: name for part in parts for key, name in part["weight_map"].items()}
    write_json(folder / INDEX, {"metadata": totals, "weight_map": dict(sorted(where.items()))})


def of_inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a LanguageModel by their names in the transformers model."""
    return {name.removeprefix(INNER): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def naming_the_disk(folder: Path) -> Iterator[None]:
    """What safetensors says of a full disk, as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(cause[1]), str(error), str(folder)) if cause else error) from None


def _theirs(inner: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names and in the shapes of files, which of some kinds (experts) are others
    than those in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(inner, dict(tensors)))


def _together(inner: Any, shapes: Mapping[str, Tensor]) -> list[Collection[str]]:
    """Tensors that have to be at hand together for those of a file: each is by itself, or, in a
    kind that makes one of several, all are."""
    alone = [_theirs(inner, {name: shape}) for name, shape in shapes.items()]
    whole = _theirs(inner, shapes)
    found = {key: shape.shape for one in alone for key, shape in one.items()}
    if found == {key: shape.shape for key, shape in whole.items()}:
        return [[name] for name in shapes]
    return [list(shapes)]

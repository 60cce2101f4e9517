"""Weights of a model folder: safetensors in files of bounded size with an index, as transformers
writes and reads them. No more than a file is held of what is written, and nothing is read but what
is asked for."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from doremi_train.config import UserError, judged, read_object
from doremi_train.files import naming_the_disk, write_json
from doremi_train.model.language_model import INNER, LanguageModel, Source, tensors_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE = 1 << 30  # bytes of a file, but for a tensor that has more


def planned(model: LanguageModel) -> list[list[str]]:
    """Names of the tensors that each file is made from, in order; of the LanguageModel."""
    shapes = {
        name.removeprefix(INNER): torch.empty(_shape(tensor), dtype=tensor.dtype, device="meta")
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


def _shape(tensor: Tensor) -> torch.Size:
    """Shape of the whole, which a parameter that ZeRO 3 has divided keeps beside it."""
    return getattr(tensor, "ds_shape", tensor.shape)


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


# ── Reading ─────────────────────────────────────────────────────────────────────────


class Made(NamedTuple):
    """How a tensor in memory is made of those in files."""

    sources: list[tuple[str, str]]  # names in files, and what of the conversion each is
    conversion: Any  # transformers'; None: it is the one source

    def __call__(self, name: str, inner: Any, read: Callable[[str], Tensor]) -> Tensor:
        if self.conversion is None:
            return read(self.sources[0][0])
        conversion = copy.deepcopy(self.conversion)  # it keeps what it is given
        for source, pattern in self.sources:
            conversion.add_tensor(name, source, pattern, read(source))
        made: dict[str, Any] = conversion.convert(name, model=inner, config=inner.config)
        value = made[name]
        return value[0] if isinstance(value, list) else value


class Stored(NamedTuple):
    """Tensors in files, of which only what is asked for is read. One that is made of several, such
    as the experts of a layer, is made whole."""

    inner: Any
    where: Mapping[str, Path]
    made: Mapping[str, Made]
    others: Source  # of what no file has

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self.made:
            return self.others(name, rows)
        made = self.made[name]
        if made.conversion is None:
            return self._read(made.sources[0][0], rows)
        value = made(name, self.inner, self._read)
        return value if rows is None else value[rows].clone()

    def _read(self, source: str, rows: slice | None = None) -> Tensor:
        with safe_open(self.where[source], "pt") as file:
            value = file.get_tensor(source) if rows is None else file.get_slice(source)[rows]
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            return value.to(dtype, copy=True)  # what is read is the file, mapped


def stored(inner: Any, where: Mapping[str, Path], others: Source) -> Stored | None:
    """The source of a model's tensors, where each parameter is made of what files have; what else
    it has, such as rotary frequencies, comes from `others`."""
    by_file: dict[Path, list[str]] = {}
    for name, path in where.items():
        by_file.setdefault(path, []).append(name)
    found: dict[str, Tensor] = {}
    for path, names in by_file.items():
        with safe_open(path, "pt") as file:
            for name in names:
                found[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
    made = _made(inner, where)
    for name, parameter in inner.named_parameters():
        if name not in made or made[name](name, inner, found.__getitem__).shape != parameter.shape:
            return None
    return Stored(inner, where, made, others)


def _made(inner: Any, names: Iterable[str]) -> dict[str, Made]:
    """How transformers makes each tensor of a model of those in files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(inner)
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    renamings: list[Any] = [one for one in conversions if not isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, known = inner.base_model_prefix, dict(inner.state_dict())
    made: dict[str, Made] = {}
    for source in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if source in known and name not in known:
            name, pattern = source, None
        conversion = None if pattern is None else by_pattern[pattern]
        if name in known:
            made.setdefault(name, Made([], conversion)).sources.append((source, pattern or source))
    return made


_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def located(folder: Path, given: str) -> dict[str, Path]:
    """The file of every tensor in a model folder. Raises UserError that names a file of its index
    that is missing, torn or of another model."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return dict.fromkeys(_names(folder / SINGLE, given), folder / SINGLE)
    remedy = "copy the folder again, or save the model again"
    index = read_object(folder / INDEX, f"{given}: {INDEX}", remedy).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in index.values()
    ):
        raise UserError(f"{given}: {INDEX} has no weight_map of files in the folder; {remedy}")
    expected: dict[str, set[str]] = {}
    for tensor, name in index.items():
        expected.setdefault(name, set()).add(tensor)
    strange = [path.name for path in folder.iterdir() if _PART.fullmatch(path.name)]
    for name in sorted({*expected, *strange}):
        if name not in expected:
            raise UserError(f"{given}: {name} is not in its index; take it out, or {remedy}")
        if not (folder / name).is_file():
            raise UserError(f"{given}: {name} is missing, which its index names; {remedy}")
        there = _names(folder / name, given)
        if other := sorted(expected[name] ^ there):
            what = "lacks" if other[0] in expected[name] else "has"
            raise UserError(
                f"{given}: {name} is not the file of its index: it {what} {other[0]}; {remedy}"
            )
    return {tensor: folder / name for tensor, name in index.items()}


def _names(path: Path, given: str) -> set[str]:
    """Tensors of a file."""
    if not path.is_file():
        return set()  # transformers says which ones it looks for
    remedy = "copy the folder again, or save the model again"
    with judged(f"{given}: {path.name}", remedy, "safetensors"), safe_open(path, "pt") as file:
        return set(file.keys())


# ── Names ───────────────────────────────────────────────────────────────────────────


def of_inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a LanguageModel by their names in the transformers model."""
    return {name.removeprefix(INNER): tensor for name, tensor in tensors.items()}


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

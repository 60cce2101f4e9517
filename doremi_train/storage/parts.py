"""Tensors that many processes save, each its part, and read again divided otherwise.

A tensor counts as its numbers in one row. A process writes the piece of it that it has into a
safetensors file of its own, and a manifest says which numbers lie where. So neither side needs to
know how the other one divides a tensor.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from doremi_train import __version__, files
from doremi_train.config import STRICT, UserError

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
_OPEN = 16  # files that a reader holds open

Count = Annotated[int, Ge(0)]
# No name of a manifest leads out of its folder.
Name = Annotated[str, StringConstraints(pattern=r"^part-\d{5}-of-\d{5}\.safetensors$")]
Number = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]


class Unsound(Exception):
    """Something of a checkpoint is missing, torn, or not its own."""


class Piece(NamedTuple):
    """Numbers of a tensor that one process saves."""

    name: str
    shape: tuple[int, ...]  # of the whole
    start: int  # the first of them, counted in the whole
    values: Tensor  # (…,)


@dataclass(frozen=True, config=STRICT)
class Part:
    """File of one process."""

    name: Name
    size: Count  # bytes
    sha256: str


@dataclass(frozen=True, config=STRICT)
class Divided:
    """Tensor in pieces."""

    dtype: Number
    shape: tuple[Count, ...]
    pieces: tuple[tuple[Count, Count, Count], ...]  # number of the part, start, stop


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """All that a reader must know before it opens a part."""

    format: int
    version: str  # of doremi_train
    step: Count
    values: dict[str, Any]  # plain, and the names of small tensors
    parts: tuple[Part, ...]
    tensors: dict[str, Divided]


_MANIFEST = TypeAdapter(Manifest)


def part_name(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def share(name: str, tensor: Tensor, rank: int, size: int) -> Piece:
    """What process `rank` of `size` saves of a tensor that all of them have."""
    count = tensor.numel()
    start, stop = rank * count // size, (rank + 1) * count // size
    return Piece(name, tuple(tensor.shape), start, tensor.detach().reshape(-1)[start:stop])


def write(path: Path, pieces: list[Piece]) -> dict[str, Any]:
    """Write a part whole or not at all; returns what `manifest` needs to know of it. The list is
    empty as soon as its numbers are the system's to bring to disk, which takes as long again.

    An empty piece is written only of a tensor that is empty. Raises OSError.
    """
    kept = [piece for piece in pieces if len(piece.values) or 0 in piece.shape]
    described = {
        piece.name: [
            str(piece.values.dtype).removeprefix("torch."),
            list(piece.shape),
            piece.start,
            piece.start + len(piece.values),
        ]
        for piece in kept
    }
    with files.replacing(path) as aside:
        with files.naming_the_disk(path):
            save_file({piece.name: piece.values for piece in kept}, aside)
        pieces.clear()
        kept.clear()
        size, sha256 = aside.stat().st_size, digest(aside)
    return {"part": {"name": path.name, "size": size, "sha256": sha256}, "pieces": described}


def manifest(step: int, values: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> bytes:
    """The text of a manifest of what `write` said of every part. Raises Unsound where they do not
    make up every tensor."""
    parts, tensors = [], dict[str, dict[str, Any]]()
    for number, record in enumerate(records):
        parts.append(record["part"])
        for name, (dtype, shape, start, stop) in record["pieces"].items():
            tensor = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "pieces": []})
            if [tensor["dtype"], tensor["shape"]] != [dtype, shape]:
                raise Unsound(f"{name} has another type or shape in {record['part']['name']}")
            tensor["pieces"].append([number, start, stop])
    for tensor in tensors.values():
        tensor["pieces"].sort(key=lambda piece: piece[1:])
    content = {"format": FORMAT, "version": __version__, "step": step, "values": values}
    content |= {"parts": parts, "tensors": tensors}
    text = json.dumps({"manifest": content, "sha256": _digest(content)}, sort_keys=True)
    parse(text.encode())
    return text.encode()


def parse(text: bytes) -> Manifest:
    """A manifest. Raises Unsound where it is not as it was written, and UserError for one of
    another version."""
    try:
        given = json.loads(text)
        content = given["manifest"]
        if given["sha256"] != _digest(content):
            raise Unsound(f"{MANIFEST} has another checksum than what was written")
        if content["format"] != FORMAT:
            raise UserError(
                f"written by doremi_train {content['version']!r:.40} in format "
                f"{content['format']!r:.40}, and this one reads format {FORMAT}"
            )
        found = _MANIFEST.validate_json(json.dumps(content))
    except (ValueError, KeyError, TypeError, ValidationError):
        raise Unsound(f"{MANIFEST} is not one") from None
    for name, tensor in found.tensors.items():
        end = 0
        for part, start, stop in tensor.pieces:
            if start != end or part >= len(found.parts):
                break
            end = stop
        if end != math.prod(tensor.shape) or not tensor.pieces:
            raise Unsound(f"the parts do not make up {name}")
    return found


class Saved:
    """Tensors of a folder that has a manifest, read in any parts."""

    def __init__(self, folder: Path) -> None:
        """Raises Unsound as `parse` does, and UserError for another version."""
        self.folder = folder
        try:
            self._manifest = parse((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise Unsound(f"{MANIFEST} is missing") from None
        except UserError as error:
            raise UserError(
                f"{folder}: {error}; continue with that version, or delete {folder.parent}"
            ) from None
        self._open: OrderedDict[int, Any] = OrderedDict()

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def values(self) -> dict[str, Any]:
        """Plain values, with the small tensors among them whole."""
        return {name: self._joined(value) for name, value in self._manifest.values.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor."""
        return {name: (of.shape, of.dtype) for name, of in self._manifest.tensors.items()}

    def keys_of(self, group: str) -> list[str]:
        """The K of all tensors `group`/K."""
        return [
            name.removeprefix(f"{group}/")
            for name in self._manifest.tensors
            if name.rpartition("/")[0] == group
        ]

    def verify(self, rank: int = 0, size: int = 1, contents: bool = True) -> None:
        """Look at the files that fall to process `rank` of `size`, and read them unless their sizes
        are enough. Raises Unsound for the first that is not as it was written."""
        for part in self._manifest.parts[rank::size]:
            path = self.folder / part.name
            if not path.is_file():
                raise Unsound(f"{part.name} is missing")
            if (found := path.stat().st_size) != part.size:
                raise Unsound(f"{part.name} has {found} bytes where {part.size} were written")
            if contents and digest(path) != part.sha256:
                raise Unsound(f"{part.name} has another checksum than what was written")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop − start,) numbers of a tensor in one row; to be copied before the file goes."""
        tensor = self._manifest.tensors[name]
        pieces = []
        for part, begin, end in tensor.pieces:
            low, high = max(begin, start), min(end, stop)
            if low < high:
                pieces.append(self._file(part).get_slice(name)[low - begin : high - begin])
        if not pieces:
            return torch.empty(0, dtype=getattr(torch, tensor.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def whole(self, name: str) -> Tensor:
        shape = self._manifest.tensors[name].shape
        # A copy: what was read may still be a map of the file.
        return self.read(name, 0, math.prod(shape)).view(shape).clone()

    def close(self) -> None:
        self._open.clear()

    def _file(self, number: int) -> Any:
        if number not in self._open:
            while len(self._open) >= _OPEN:
                self._open.popitem(last=False)
            self._open[number] = safe_open(self.folder / self._manifest.parts[number].name, "pt")
        self._open.move_to_end(number)
        return self._open[number]

    def _joined(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._joined(item) for item in value]
        if isinstance(value, dict):
            if value.keys() == {_TENSOR}:
                return self.whole(value[_TENSOR])
            return {key: self._joined(item) for key, item in value.items()}
        return value


_TENSOR = "tensor at"  # the only key of what stands for a tensor among plain values


def divide(value: Any, name: str = "values") -> tuple[Any, dict[str, Tensor]]:
    """Values of lists, dicts and numbers without the tensors in them, and those by name."""
    tensors: dict[str, Tensor] = {}

    def without(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {_TENSOR: name}
        if isinstance(value, list | tuple):
            return [without(item, f"{name}/{number}") for number, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: without(item, f"{name}/{key}") for key, item in value.items()}
        return value

    return without(value, name), tensors


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

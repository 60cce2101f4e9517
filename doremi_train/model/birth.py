"""Parameters from nothing: a model is made of shapes alone, and each of its tensors is then filled
by itself, with values that follow from the seed and its name.

They are the same for any number of processes and any engine, and whoever keeps a part of a tensor
holds no other one whole. What is drawn, and how wide, is what `_init_weights` of the model in
transformers says: of the module that has the tensor, and then of all around it, for GPT-2's
attention narrows what its layers have drawn. A few kinds leave some of their tensors to Python's
constructors (apertus, data2vec-text and openai-gpt, of transformers 5.23): those are made whole.
"""

import contextlib
import hashlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from doremi_train.model import configs
from doremi_train.model.language_model import INNER, LanguageModel


class Seeded:
    """Initial values of a model of this config, and of `vocabulary` where that is another."""

    def __init__(self, config: dict[str, Any], seed: int, vocabulary: int | None = None) -> None:
        self._config, self._seed, self._vocabulary = config, seed, vocabulary
        self._skeleton = configs.skeleton(config, vocabulary).float()
        self._constructed: dict[str, Tensor] = {}  # of a kind that has to be made whole

    @torch.no_grad()
    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        room = _room if rows is None else _passing_room
        try:
            value = self._made(name, room, alone=True)
        except NotImplementedError:  # it is made from its neighbours, which have no memory
            value = self._made(name, room, alone=False)
        if not _touched(value):
            value = self._by_constructor(name)
        return value if rows is None else value[rows].clone()

    def _by_constructor(self, name: str) -> Tensor:
        if not self._constructed:
            with _drawing(self._seed):
                whole = configs.constructed(self._config, self._vocabulary).float()
            self._constructed = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        return self._constructed[name].detach().clone()

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        return self._skeleton.get_submodule(path), key

    def _made(self, name: str, room: Callable[[Tensor], Tensor], alone: bool) -> Tensor:
        """A tensor, while it, or what its module has beside it too, has memory and nothing else of
        the model."""
        from transformers import initialization

        owner, key = self._owner(name)
        parameters, buffers = dict(owner._parameters), dict(owner._buffers)
        try:
            places: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for held in places:
                for one, shape in held.items():
                    if shape is not None and (one == key or not alone):
                        held[one] = like(shape, _untouched(room(shape)))
            with _drawing(_number(self._seed, name)), initialization.guard_torch_init_functions():
                for module, initialise in self._around(name):
                    initialise(module)
            return (owner._parameters if key in parameters else owner._buffers)[key].detach()  # type: ignore[union-attr]
        finally:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)

    def _around(self, name: str) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
        """The module that has a tensor, and then all around it, as each may have a word on it; and
        whose `_init_weights` says it."""
        from transformers import PreTrainedModel

        module, speaker, path = self._skeleton, self._skeleton, list[Any]()
        for part in (None, *name.split(".")[:-1]):
            module = module if part is None else getattr(module, part)
            speaker = module if isinstance(module, PreTrainedModel) else speaker
            path.append((module, speaker._init_weights))
        return reversed(path)


@contextlib.contextmanager
def _drawing(number: int) -> Iterator[None]:
    """Draw from torch's generator as it begins at this number; then put it back."""
    # Not torch.manual_seed: without a GPU it formats a traceback each time, and keeps it.
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def _number(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


_FEW = 64  # tokens of a vocabulary


def small(config: dict[str, Any], seed: int) -> Any:
    """A transformers model to try what holds for all of this config: with all of its layers, but
    those that are alike have their values in common, and with few tokens. It takes the memory of
    one layer."""
    values = Seeded(config, seed, min(_FEW, config["vocab_size"]))
    model = configs.skeleton(config, min(_FEW, config["vocab_size"])).float()
    layers = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__ in (model._no_split_modules or ())
    }
    known: dict[Any, Tensor] = {}

    def make(name: str, shape: Tensor) -> Tensor:
        layer = next((one for one in layers if name.startswith(f"{one}.")), "")
        alike = (layers.get(layer), name.removeprefix(layer), shape.shape)
        if alike not in known:
            known[alike] = like(shape, values(name))
        return known[alike]

    materialise(model, make)
    model.config.use_cache = False  # which not all layers have
    return model


def fill(model: LanguageModel, device: torch.device) -> None:
    """Give a model of shapes alone all of its values, one by one."""
    source, model.source = model.source, None
    if source is not None:
        materialise(
            model, lambda name, shape: like(shape, source(name.removeprefix(INNER)).to(device))
        )


def materialise(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put what `make` gives for its name and shape in the place of every tensor of a model; of one
    that several modules have in common, once. The largest come first, for beside it least else is
    then held."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    tensors: dict[int, tuple[str, Tensor]] = {}
    for prefix, owner in model.named_modules():
        for held in (owner._parameters, owner._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    tensors.setdefault(id(tensor), (f"{prefix}.{key}".lstrip("."), tensor))
                    places.setdefault(id(tensor), []).append((held, key))
    for number, (name, tensor) in sorted(tensors.items(), key=lambda item: -item[1][1].numel()):
        made = make(name, tensor)
        for held, key in places[number]:
            held[key] = made


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value as what a tensor of a module is: a parameter, or not."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _room(shape: Tensor) -> Tensor:
    return torch.empty_like(shape, device="cpu")


def _passing_room(shape: Tensor) -> Tensor:
    """Memory of the system's own, which takes it back at once: among what is kept, malloc would
    keep as much again in holes."""
    if not shape.nbytes:
        return _room(shape)
    return torch.frombuffer(mmap.mmap(-1, shape.nbytes), dtype=shape.dtype).view(shape.shape)


def _untouched(value: Tensor) -> Tensor:
    """The memory of a tensor so that one sees whether it was written to. Of booleans one does not:
    they are masks, made of nothing but the config."""
    if value.is_floating_point():
        return value.fill_(torch.nan)
    return value.zero_() if value.dtype == torch.bool else value.fill_(torch.iinfo(value.dtype).min)


def _touched(value: Tensor) -> bool:
    if value.is_floating_point():
        return not bool(value.sum().isnan())
    return value.dtype == torch.bool or not bool((value == torch.iinfo(value.dtype).min).any())

"""torch's own engines: one process, DDP and FSDP2."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from doremi_train.model import birth, language_model, optim
from doremi_train.model.language_model import INNER, LanguageModel
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import comm
from doremi_train.parallel.place import Place
from doremi_train.storage import parts
from doremi_train.storage.parts import Piece, Saved


class Native:
    """torch's own: one process, DDP, or FSDP2, which shards every block and the rest."""

    def __init__(
        self,
        place: Place,
        model: LanguageModel,
        training: OptimizerOptions,
        saved: Saved | None,
    ) -> None:
        self._bare, self._training, self._strategy = model, training, place.strategy
        self.model: nn.Module = model
        complete = model.source is None  # otherwise that knows what was saved
        if saved is not None and complete and place.strategy != "fsdp2":
            self._fill(saved)  # before DDP gives all the first one's
        if place.strategy == "fsdp2":
            if place.compile:
                for block in model.blocks():
                    block.compile()
            comm.shard(model, model.groups(), place.device)  # which brings them there one by one
            fill(model, place.device)
            if saved is not None and complete:
                self._fill(saved)
        else:
            birth.fill(model, place.device)
            model.to(place.device)
            if place.compile:
                model.compile()
            if place.strategy == "ddp":
                self.model = nn.parallel.DistributedDataParallel(
                    model, forward_sync_buffers=False, gradient_as_bucket_view=True
                )
        self._parameters = list(model.parameters())
        self.optimizer = optim.build(model, training)
        if saved is not None:
            self._continue(saved)
        self.wrapper = f"{type(self.model).__name__}, {type(self.optimizer).__name__}"

    def warm_up(self, tokens: Tensor) -> None:
        # DDP lays out its buckets anew after its first backward, and over more than two processes
        # the last bits of a sum depend on the layout.
        if self._strategy == "ddp":
            self.model(tokens).sum().backward()
            self.discard()

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        # FSDP2 would keep whole gradients on every process until the last micro-batch.
        wrapped: Any = self.model
        alone = self._strategy == "ddp" and not last
        with wrapped.no_sync() if alone else contextlib.nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._training.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._training.gradient_clip)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def parts(self) -> list[Tensor]:
        return [comm.part(parameter) for parameter in self._parameters]

    def whole(self, names: Collection[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in language_model.tensors_of(self._bare):
            if name in names:
                whole = comm.whole(tensor)
                found |= {name: whole.cpu()} if comm.world().first else {}
        return found

    def pieces(self) -> Iterator[Piece]:
        world = comm.world()

        def of(name: str, tensor: Tensor) -> Piece:
            if not comm.in_parts(tensor):
                return parts.share(name, tensor, *world)
            own = comm.part(tensor).reshape(-1)
            return Piece(name, tuple(tensor.shape), comm.span(tensor)[0], own)

        for name, tensor in language_model.trained_of(self._bare):
            yield of(f"model/{name}", tensor)
            for key, value in self.optimizer.state.get(tensor, {}).items():
                yield of(f"optimizer/{name}/{key}", value)

    def _fill(self, saved: Saved) -> None:
        """Take over what this process has of the model."""
        for name, tensor in language_model.trained_of(self._bare):
            own = comm.part(tensor)
            own.copy_(saved.read(f"model/{name}", *comm.span(tensor)).view(own.shape))

    def _continue(self, saved: Saved) -> None:
        """Take over what this process has of the optimiser's state."""
        for name, tensor in self._bare.named_parameters():
            for key in saved.keys_of(f"optimizer/{name}"):
                path = f"optimizer/{name}/{key}"
                if key in optim.MOMENTS:
                    value = torch.zeros_like(tensor)
                    own = comm.part(value)
                    own.copy_(saved.read(path, *comm.span(tensor)).view(own.shape))
                else:
                    # Fused AdamW keeps its count of steps beside the parameter, Adafactor not.
                    value = saved.whole(path)
                    if value.ndim or self._training.optimizer == "adamw":
                        value = value.to(tensor.device)
                self.optimizer.state[tensor][key] = value

    def state(self) -> dict[str, Any]:
        keep = comm.world().first
        model, optimizer = {}, {}
        for name, tensor in language_model.tensors_of(self._bare):
            whole = comm.whole(tensor)
            states = {
                key: comm.whole(value)
                for key, value in self.optimizer.state.get(tensor, {}).items()
            }
            if keep:
                model[name] = whole.cpu()
                optimizer[name] = {key: value.cpu() for key, value in states.items()}
        return {
            "model": model,
            "optimizer": {name: states for name, states in optimizer.items() if states},
        }

    def close(self) -> None:
        self.discard()


def fill(model: LanguageModel, device: torch.device) -> None:
    """Give a divided model of shapes alone this process's part of its values, tensor by tensor."""
    source, model.source = model.source, None
    if source is None:
        return

    def make(name: str, shape: Tensor) -> Tensor:
        name = name.removeprefix(INNER)
        if not isinstance(shape, nn.Parameter):  # buffers are whole everywhere
            return source(name).to(device)
        own = source(name, comm.rows(shape)).to(device)
        return birth.like(shape, comm.placed(own, shape))

    birth.materialise(model, make)

"""DeepSpeed's ZeRO, stages 1 to 3."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from doremi_train.config import UserError, judged
from doremi_train.model import birth, language_model, optim
from doremi_train.model.language_model import INNER, LanguageModel
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import comm
from doremi_train.parallel.place import Place
from doremi_train.storage import parts
from doremi_train.storage.parts import Piece, Saved

_BUCKET = 500_000_000  # numbers that DeepSpeed sums at once, unless its file says otherwise


class Zero:
    """DeepSpeed's ZeRO: optimiser states (1), and gradients (2), and parameters (3) are divided
    among the processes."""

    def __init__(
        self,
        place: Place,
        model: LanguageModel,
        training: OptimizerOptions,
        saved: Saved | None,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", place.device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        # Its sums through shared memory on CPUs are compiled at the first start, behind a lock file
        # that a killed start leaves for ever: every later one would wait for it. The processes' own
        # backend sums just as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._bare, self._stage = model, int(place.strategy[-1])
        if saved is not None and model.source is None:
            # Before it is in parts: ZeRO 3 reads the old ones for a step.
            for name, tensor in language_model.tensors_of(model):
                tensor.data.copy_(saved.whole(f"model/{name}"))
        if place.compile and self._stage < 3:
            model.compile()
        elif place.compile:
            raise UserError(
                "engine.compile=true: not with zero3, which gathers parameters by hooks; use "
                "engine=fsdp2"
            )
        settings = place.deepspeed | {
            "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's own counts
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a step is what the trainer says it is
            "gradient_clipping": training.gradient_clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 62,
        }
        with judged("engine.deepspeed", "mend its file, or do without", "DeepSpeed"):
            deepspeed.DeepSpeedConfig(dict(settings))
        # It takes room for a whole bucket, two where sums overlap with the backward, at every step.
        zero = settings["zero_optimization"]
        size = sum(parameter.numel() for parameter in model.parameters())
        zero = {"reduce_bucket_size": min(size, _BUCKET)} | zero
        settings |= {"zero_optimization": zero}
        if self._stage < 3:
            birth.fill(model, place.device)
        else:
            _fill(model, place.device, settings)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optim.build(model, training),
            config=settings,
            dist_init_required=False,
        )
        self.model: nn.Module = self._engine
        if saved is not None:
            self._continue(saved)
        self.wrapper = f"{type(self._engine).__name__}, {type(self.optimizer).__name__}"

    def warm_up(self, tokens: Tensor) -> None:
        pass

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        yield  # from stage 2 on gradients are divided after every backward

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    def discard(self) -> None:
        pass  # the trainer refuses the one case in which there would be any

    def parts(self) -> list[Tensor]:
        if self._stage < 3:
            return [parameter.detach() for parameter in self._bare.parameters()]
        return [_own(parameter) for parameter in self._bare.parameters()]

    def whole(self, names: Collection[str]) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        for name, tensor in language_model.tensors_of(self._bare):
            if name in names:
                parameter = isinstance(tensor, nn.Parameter)
                whole = safe_get_full_fp32_param(tensor) if parameter else tensor
                found |= {name: whole.cpu().clone()} if comm.world().first else {}
        return found

    def pieces(self) -> Iterator[Piece]:
        world = comm.world()
        steps = self._link()
        keys = optim.MOMENTS if steps else ()
        for name, tensor in language_model.tensors_of(self._bare):
            if not isinstance(tensor, nn.Parameter):
                yield parts.share(f"model/{name}", tensor, *world)
                continue
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            if steps:
                count = torch.tensor(float(steps))
                yield parts.share(f"optimizer/{name}/step", count, *world)
            for key in (None, *keys):
                path = f"model/{name}" if key is None else f"optimizer/{name}/{key}"
                start, own = self._held(tensor, key)
                yield Piece(path, shape, start, own)

    def _held(self, parameter: Any, key: str | None) -> tuple[int, Tensor]:
        """What this process updates of a parameter (`key`: or of its optimiser's state): where it
        begins in the whole in one row, and the numbers."""
        if self._stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, torch.empty(0)
            return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)
        # DeepSpeed's own setter fails where a parameter does not divide by the processes: its last
        # part is padded.
        part, _ = self.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        start = min(comm.world().rank * part.numel(), parameter.ds_numel)
        return start, part[: parameter.ds_numel - start]

    def state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        keep = comm.world().first
        steps = self._link()
        model, optimizer = {}, {}
        for name, tensor in language_model.tensors_of(self._bare):
            if not isinstance(tensor, nn.Parameter):
                if keep:
                    model[name] = tensor.cpu()
                continue
            whole = safe_get_full_fp32_param(tensor)
            moments = (
                {key: safe_get_full_optimizer_state(tensor, key) for key in optim.MOMENTS}
                if steps
                else {}
            )
            if keep:
                model[name] = whole.cpu().clone()
                moments = {key: value.cpu().clone() for key, value in moments.items()}
                optimizer[name] = moments | {"step": torch.tensor(float(steps))}
        return {"model": model, "optimizer": optimizer if steps else {}}

    def close(self) -> None:
        self._engine.destroy()

    def _continue(self, saved: Saved) -> None:
        """Take over what this process has of the optimiser's state."""
        counts = [
            name
            for name in saved.shapes
            if name.startswith("optimizer/") and name.endswith("/step")
        ]
        if not counts:
            return
        step = saved.whole(counts[0])
        for flat in self._flat():  # the states that torch would make at the first step
            zeros = {key: torch.zeros_like(flat) for key in optim.MOMENTS}
            self.optimizer.optimizer.state[flat] = zeros | {"step": step.to(flat.device, copy=True)}
        self._link()
        for name, tensor in self._bare.named_parameters():
            for key in saved.keys_of(f"optimizer/{name}"):
                if key in optim.MOMENTS:
                    start, own = self._held(tensor, key)
                    own.copy_(saved.read(f"optimizer/{name}/{key}", start, start + len(own)))

    def _flat(self) -> list[Tensor]:
        """The flat parts of this process that the optimiser really updates."""
        optimizer = self.optimizer
        return (
            optimizer.single_partition_of_fp32_groups
            if self._stage < 3
            else optimizer.fp32_partitioned_groups_flat
        )

    def _link(self) -> int:
        """Updates done so far, after making every parameter's optimiser state findable by name."""
        if self._stage < 3:
            states = [self.optimizer.optimizer.state.get(flat) for flat in self._flat()]
            if all(states):
                # DeepSpeed links all groups after its first group's first step, when the others
                # have no state yet.
                self.optimizer._hp_optimizer_states_linked = False
                self.optimizer._lazy_init_hp_params_optimizer_state()
        states = [self.optimizer.optimizer.state.get(flat) for flat in self._flat()]
        return int(states[0]["step"]) if states and states[0] else 0


def _fill(model: LanguageModel, device: torch.device, settings: dict[str, Any]) -> None:
    """Give a model of shapes alone its values, one tensor after another, each of which DeepSpeed
    divides before the next is made."""
    import deepspeed

    source, model.source = model.source, None
    if source is None:
        return
    divide: Any = None

    def make(name: str, shape: Tensor) -> Tensor:
        nonlocal divide
        made: Any = birth.like(shape, source(name.removeprefix(INNER)).to(device))
        if divide is not None and isinstance(shape, nn.Parameter):
            divide([made])
        elif isinstance(shape, nn.Parameter):
            deepspeed.zero.Init(nn.ParameterList([made]), config_dict_or_path=settings)
            divide = made.convert_to_zero_parameters  # as the first was, the others are
        return made

    birth.materialise(model, make)


def _own(parameter: Any) -> Tensor:
    """What this process has of a parameter under ZeRO 3. The last part is padded with whatever was
    in the memory."""
    part = parameter.ds_tensor
    own = parameter.ds_numel - comm.world().rank * part.ds_numel
    return part.detach()[: max(own, 0)]

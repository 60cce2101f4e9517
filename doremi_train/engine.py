"""How a model is spread over processes: replicated (DDP), sharded (FSDP2), or by DeepSpeed's ZeRO 1, 2 and 3.

accelerate (or torchrun, or Slurm) starts the processes; `start` joins them and says what was really got. The wrapping
is torch's and DeepSpeed's own on every device, so that what is tested on CPUs is what runs on GPUs. All engines average
gradients over processes and keep parameters in float32. Their state is saved whole, by parameter name: a run continues
on another number of processes, or with another engine.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from doremi_train import comm, launcher
from doremi_train.config import UserError
from doremi_train.launcher import Options
from doremi_train.model import language_model, optim
from doremi_train.model.language_model import LanguageModel


class Place(NamedTuple):
    """Where this process stands, as it really came out."""

    strategy: str  # single, ddp, fsdp2, zero1, zero2, zero3
    device: torch.device
    compile: bool
    deepspeed: dict[str, Any]  # settings of the JSON file

    def __str__(self) -> str:
        size, backend = comm.world().size, comm.backend()
        compiled = ", compiled" if self.compile else ""
        return f"{self.strategy}, {size} process{'es' * (size > 1)} on {self.device.type} ({backend}){compiled}"


def start(options: Options, precision: str, timeout: float) -> Place:
    """Join the processes that the launcher started. `timeout` in seconds is how long one may wait for another.

    Raises UserError where what was asked for, here or by accelerate's configuration, is not what would run.
    """
    asked, file = launcher.asked(options, precision)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    device = comm.join(options.device == "cpu", timeout) if started == 1 or not absent else None
    size = comm.world().size
    if device is None or size != started:
        because = f"{', '.join(absent)} are not set" if absent else f"only {size} work together"
        raise UserError(
            f"WORLD_SIZE={started}: {started} processes were asked for, but {because}; "
            "start them with torchrun, accelerate launch --config_file launch/accelerate/…, or srun"
        )
    if options.processes not in (None, size):
        raise UserError(
            f"engine.processes={options.processes}: but {size} work together; start them with "
            f"torchrun --nproc_per_node {options.processes} -m doremi_train …, or change the key"
        )
    if asked != "auto" and comm.backend() == "none":
        raise UserError(
            f"engine.strategy={asked}: needs processes that know of each other, and this one was started alone; "
            "start it with torchrun or accelerate launch (one process is enough), or take engine=auto"
        )
    if asked == "auto":
        asked = "ddp" if size > 1 else "single"
    return Place(asked, device, options.compile, launcher.read_deepspeed(file, asked))


class Engine(Protocol):
    """A model and its optimiser, spread over the processes."""

    model: nn.Module  # to be called for losses; a collective, under sharding
    wrapper: str  # the classes that really hold the model and its optimiser

    def warm_up(self, tokens: Tensor) -> None:
        """Whatever the first step does otherwise than the later ones, done now: a run that continues begins there."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-batch's forward and backward; gradients may be exchanged in the `last` one only."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar."""

    def step(self, rate: float) -> None:
        """Clip, update with this learning rate, and drop the gradients."""

    def discard(self) -> None:
        """Drop the gradients."""

    def state(self) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": {name: {key: tensor}}}, whole, on the first process's host memory;
        empty dicts on the others. A collective."""

    def close(self) -> None:
        """Let go of the memory."""


def build(
    place: Place, model: LanguageModel, training: optim.Options, state: Mapping[str, Any] | None = None
) -> Engine:
    """Spread a model that is complete on every process, after taking over what `state` of any engine on any number of
    processes gave. Raises UserError for what the strategy cannot do exactly."""
    if training.optimizer == "adafactor" and place.strategy not in ("single", "ddp"):
        raise UserError(
            f"training.optimizer=adafactor: factors whole matrices, which {place.strategy} cuts; "
            "use adamw, or engine=ddp"
        )
    if place.strategy.startswith("zero") and not all(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"engine={place.strategy}: divides what is trained, and here most of the model is frozen (LoRA); "
            "use engine=ddp or fsdp2"
        )
    if state is not None:  # before the model is in parts
        for name, tensor in language_model.tensors_of(model):
            if name in state["model"]:  # frozen parameters are as they were
                tensor.data.copy_(state["model"][name])
    moments = state["optimizer"] if state is not None else {}
    if place.strategy.startswith("zero"):
        return Zero(place, model, training, moments)
    return Native(place, model, training, moments)


class Native:
    """torch's own: one process, DDP, or FSDP2, which shards every block and the rest."""

    def __init__(self, place: Place, model: LanguageModel, training: optim.Options, moments: Mapping[str, Any]) -> None:
        self._bare, self._training, self._strategy = model, training, place.strategy
        self.model: nn.Module = model
        if place.strategy == "fsdp2":
            if place.compile:
                for block in model.blocks():
                    block.compile()
            comm.shard(model, model.blocks(), place.device)  # which brings them there one by one
        else:
            model.to(place.device)
            if place.compile:
                model.compile()
            if place.strategy == "ddp":
                self.model = nn.parallel.DistributedDataParallel(
                    model, forward_sync_buffers=False, gradient_as_bucket_view=True
                )
        self._parameters = list(model.parameters())
        self.optimizer = optim.build(model, training)
        for name, tensor in model.named_parameters():
            if name in moments:  # scalars are torch's count of steps: fused AdamW keeps it beside the parameter
                home = tensor.device if training.optimizer == "adamw" else "cpu"
                self.optimizer.state[tensor] = {
                    key: comm.share(value, tensor) if value.ndim else value.to(home, copy=True)
                    for key, value in moments[name].items()
                }
        self.wrapper = f"{type(self.model).__name__}, {type(self.optimizer).__name__}"

    def warm_up(self, tokens: Tensor) -> None:
        # DDP lays out its buckets anew after its first backward, and over more than two processes the last bits of a
        # sum depend on the layout.
        if self._strategy == "ddp":
            self.model(tokens).sum().backward()
            self.discard()

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        if self._strategy == "fsdp2":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with self.model.no_sync() if self._strategy == "ddp" and not last else contextlib.nullcontext():  # type: ignore[operator]
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

    def state(self) -> dict[str, Any]:
        keep = comm.world().first
        model, optimizer = {}, {}
        for name, tensor in language_model.tensors_of(self._bare):
            whole = comm.whole(tensor)
            states = {key: comm.whole(value) for key, value in self.optimizer.state.get(tensor, {}).items()}
            if keep:
                model[name] = whole.cpu()
                optimizer[name] = {key: value.cpu() for key, value in states.items()}
        return {"model": model, "optimizer": {name: states for name, states in optimizer.items() if states}}

    def close(self) -> None:
        self.discard()


class Zero:
    """DeepSpeed's ZeRO: optimiser states (1), and gradients (2), and parameters (3) are divided among the processes."""

    def __init__(self, place: Place, model: LanguageModel, training: optim.Options, moments: Mapping[str, Any]) -> None:
        os.environ.setdefault("DS_ACCELERATOR", place.device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        # Its sums through shared memory on CPUs are compiled at the first start, behind a lock file that a killed start
        # leaves for ever: every later one would wait for it. The processes' own backend sums just as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._bare, self._stage = model, int(place.strategy[-1])
        if place.compile and self._stage < 3:
            model.compile()
        elif place.compile:
            raise UserError("engine.compile=true: not with zero3, which gathers parameters by hooks; use engine=fsdp2")
        settings = place.deepspeed | {
            "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's own counts
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a step is what the trainer says it is
            "gradient_clipping": training.gradient_clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 62,
        }
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optim.build(model, training), config=settings, dist_init_required=False
        )
        self.model: nn.Module = self._engine
        if moments:
            self._load(moments)
        self.wrapper = f"{type(self._engine).__name__}, {type(self._optimizer).__name__}"

    def warm_up(self, tokens: Tensor) -> None:
        pass

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        yield  # from stage 2 on gradients are divided after every backward

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()

    def discard(self) -> None:
        pass  # the trainer refuses the one case in which there would be any

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
            moments = {key: safe_get_full_optimizer_state(tensor, key) for key in _MOMENTS} if steps else {}
            if keep:
                model[name] = whole.cpu().clone()
                moments = {key: value.cpu().clone() for key, value in moments.items()}
                optimizer[name] = moments | {"step": torch.tensor(float(steps))}
        return {"model": model, "optimizer": optimizer if steps else {}}

    def close(self) -> None:
        self._engine.destroy()

    def _load(self, moments: Mapping[str, Any]) -> None:
        step = next(iter(moments.values()))["step"]
        for flat in self._flat():  # the states that torch would make at the first step
            zeros = {key: torch.zeros_like(flat) for key in _MOMENTS}
            self._optimizer.optimizer.state[flat] = zeros | {"step": step.to(flat.device, copy=True)}
        self._link()
        for name, tensor in self._bare.named_parameters():
            for key in _MOMENTS:
                self._set(tensor, key, moments[name][key].to(self._engine.device))

    def _set(self, tensor: Tensor, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if self._stage < 3:
            safe_set_full_optimizer_state(tensor, value, key)
            return
        # DeepSpeed's own setter fails where a parameter does not divide by the processes: its last part is padded.
        part, _ = self._optimizer._get_fp32_opt_state_partition(tensor, False, optim_state_key=key)
        world = comm.world()
        padded = nn.functional.pad(value.flatten(), (0, part.numel() * world.size - value.numel()))
        part.copy_(padded.narrow(0, part.numel() * world.rank, part.numel()))

    def _flat(self) -> list[Tensor]:
        """The flat parts of this process that the optimiser really updates."""
        optimizer = self._optimizer
        return optimizer.single_partition_of_fp32_groups if self._stage < 3 else optimizer.fp32_partitioned_groups_flat

    def _link(self) -> int:
        """Updates done so far, after making every parameter's optimiser state findable by name."""
        if self._stage < 3:
            states = [self._optimizer.optimizer.state.get(flat) for flat in self._flat()]
            if all(states):
                # DeepSpeed links all groups after its first group's first step, when the others have no state yet.
                self._optimizer._hp_optimizer_states_linked = False
                self._optimizer._lazy_init_hp_params_optimizer_state()
        found = [self._optimizer.optimizer.state.get(flat) for flat in self._flat()]
        return int(found[0]["step"]) if found and found[0] else 0


_MOMENTS = ("exp_avg", "exp_avg_sq")

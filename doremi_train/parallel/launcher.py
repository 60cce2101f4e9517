"""Launch that was asked for, by our keys and by `accelerate launch`, which speaks through the
environment.

Some launches exit 0 and train something else: one process for two, DDP for FSDP2 or DeepSpeed. Here
they are refused.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Positive, PositiveFloat, UserError, read_object

Strategy = Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, config=STRICT)
class EngineOptions:
    strategy: Strategy = "auto"
    """What processes share out; auto: what accelerate's configuration asks for, else ddp."""

    processes: Positive | None = None
    """Processes that there must be; null: as many as were started. With stage=plan, started as one
    process, those that are planned for."""

    device: Literal["auto", "cpu"] = "auto"
    """Where tensors live; auto: a GPU where there is one."""

    compile: bool = False
    """Whether torch.compile compiles the model."""

    write_speed: PositiveFloat = 1e9
    """Bytes a second at which a process writes a checkpoint, for the plan."""

    memory: PositiveFloat | None = None
    """Bytes that a process has where it computes, for the plan; null: what this machine has for
    each, and not known of processes that are not here."""

    deepspeed: str | None = None
    """A JSON file with more of DeepSpeed's own settings, such as launch/deepspeed/zero2.json; null:
    none."""


def asked(options: EngineOptions, precision: str) -> tuple[str, str | None]:
    """Strategy and DeepSpeed's file, from our key and from what `accelerate launch` put into the
    environment."""
    environment = os.environ
    # accelerate would start this very command as one process, or as several that never meet, and
    # exit 0.
    if (
        "ACCELERATE_MIXED_PRECISION" in environment
        and "MASTER_ADDR" in environment
        and "WORLD_SIZE" not in environment
    ):
        raise UserError(
            "accelerate launch: was asked for several processes and started one, as it does with "
            "--cpu and with distributed_type MULTI_CPU; use --config_file "
            "launch/accelerate/cpu.yaml, or torchrun"
        )
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", {"bf16": "bf16", "fp32": "no"}[precision]):
        raise UserError(
            f"accelerate launch: mixed_precision {mixed} is asked for, but "
            f"training.precision={precision}; leave it at no there, and set "
            "training.precision=bf16 for bf16"
        )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO" and not options.compile:
        raise UserError(
            "accelerate launch: a dynamo backend is asked for; leave it at no there, set "
            "engine.compile=true"
        )
    wanted, file = "auto", options.deepspeed
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        for name, (default, ours, remedy) in _FSDP_OURS.items():
            given = environment.get(name, default).lower()
            if given != ours:
                raise UserError(
                    f"accelerate launch: {name.lower()}: {given} is asked for, but only {ours} "
                    f"{remedy}"
                )
        wanted = "fsdp2"
    elif environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = file or environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if file is not None and file != "none":
            zero = _read_json(file).get("zero_optimization")
            stage = zero.get("stage", stage) if isinstance(zero, dict) else stage
        wanted = f"zero{stage}"
        if wanted not in ("zero1", "zero2", "zero3"):
            raise UserError(
                f"accelerate launch: DeepSpeed with ZeRO stage {stage}; allowed: 1, 2, 3 (or DDP "
                "without it)"
            )
    if "auto" not in (wanted, options.strategy) and wanted != options.strategy:
        raise UserError(
            f"engine.strategy={options.strategy}: but accelerate's configuration asks for "
            f"{wanted}; drop one of them"
        )
    strategy = options.strategy if options.strategy != "auto" else wanted
    if options.deepspeed is not None and not strategy.startswith("zero"):
        raise UserError(
            f"engine.deepspeed={options.deepspeed}: goes with engine=zero1, zero2 or zero3, not "
            f"{strategy}"
        )
    return strategy, file


# Settings of accelerate's FSDP configuration that would go unheard: absent they mean `default`.
_FSDP_OURS = {
    "FSDP_VERSION": ("1", "2", "is here; set fsdp_version: 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "false", "is here; take more processes, or a smaller model"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "true",
        "true",
        "is here; with room for whole parameters take engine=ddp",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "false",
        "goes there; set training.activation_checkpointing=true",
    ),
}

# What the trainer decides; the same key in DeepSpeed's file would be a second word on it.
_DEEPSPEED_OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.gradient_clip",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
}


_OFFLOADS = ("offload_optimizer", "offload_param")


def read_deepspeed(file: str | None, strategy: str) -> dict[str, Any]:
    if not strategy.startswith("zero"):
        return {}
    stage = int(strategy[-1])
    settings = _read_json(file) if file is not None and file != "none" else {}
    for name, key in _DEEPSPEED_OURS.items():
        given = settings.pop(name, "auto")
        if given != "auto":
            raise UserError(
                f"engine.deepspeed={file}: {name}={given!r} is decided by {key}; leave it out, or "
                "at auto"
            )
    zero = settings.pop("zero_optimization", {})
    parts = [zero, *(zero.get(name) or {} for name in _OFFLOADS)] if isinstance(zero, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"engine.deepspeed={file}: zero_optimization={zero!r:.200} must be a JSON object, and "
            "so must what is offloaded in it; mend it, or leave it out"
        )
    if zero.get("stage", stage) != stage:
        raise UserError(
            f"engine.deepspeed={file}: stage {zero['stage']}, but {strategy} is asked for; make "
            "them agree"
        )
    for name in _OFFLOADS:
        if (zero.get(name) or {}).get("device", "none") not in ("none", None):
            raise UserError(
                f"engine.deepspeed={file}: {name} is not supported; leave it out, or take more "
                "processes"
            )
    # With free accumulation only stage 2 has it.
    if stage != 2 and zero.setdefault("overlap_comm", False):
        raise UserError(
            f"engine.deepspeed={file}: overlap_comm goes with stage 2 only; set it to false"
        )
    return settings | {"zero_optimization": zero | {"stage": stage}}


def _read_json(file: str) -> dict[str, Any]:
    remedy = "give one of DeepSpeed's, such as launch/deepspeed/zero2.json"
    return read_object(Path(file), f"engine.deepspeed={file}", remedy)

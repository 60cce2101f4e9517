"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) by peft: small matrices beside frozen
ones are trained."""

import warnings
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Fraction, Positive, PositiveFloat, UserError, judged


@dataclass(frozen=True, config=STRICT)
class LoraOptions:
    rank: Positive | None = 16
    """Rank r of the small matrices; null: no LoRA, all parameters are trained."""

    alpha: PositiveFloat = 32.0
    """Number α: what LoRA adds is scaled by alpha / rank."""

    dropout: Fraction = 0.0
    """Part of LoRA's inputs that is dropped."""

    targets: tuple[str, ...] | None = None
    """Ends of module names, such as [q_proj, v_proj]; null: every linear layer but the head."""


def add(inner: Any, options: LoraOptions, seed: int, key: str) -> Any:
    """Put adapters into a transformers model, in place: it begins as it was. Returns peft's view of
    it, which saves and merges them. The same for the same seed. Raises UserError where `options`,
    given as `key`, do not fit the model."""
    try:
        import peft
    except ImportError:
        raise UserError(
            f"{key}.rank={options.rank}: LoRA needs peft, which is not installed; pip install "
            f"'doremi-train[lora]', or train all parameters with {key}.rank=null"
        ) from None
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=options.rank or 0,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=options.dropout,
        target_modules=list(options.targets) if options.targets else "all-linear",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in inner.modules()),
        task_type="CAUSAL_LM",
    )
    layers = (
        name
        for name, module in inner.named_modules()
        if getattr(module, "weight", None) is not None
    )
    names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    given = f"{key}.targets={list(options.targets or ())}"
    with (
        judged(given, f"this model's layers end in {names}", "peft"),
        warnings.catch_warnings(),
    ):
        # peft asks transformers for what transformers has renamed: nothing that a user can mend.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(inner, config)
    _refuse_tied(inner, given, key)
    return adapted


def _refuse_tied(inner: Any, given: str, key: str) -> None:
    """Refuse adapters on a weight that other modules have too: merged, they would change those as
    well, and the saved model would be another than the one that was trained."""
    owners: dict[int, list[str]] = {}
    for name, weight in inner.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.replace(".base_layer", ""))
    for name, module in inner.named_modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        others = [owner for owner in owners.get(id(weight), ()) if owner != f"{name}.weight"]
        if others:
            raise UserError(
                f"{given}: {name} has its weight in common with "
                f"{', '.join(other.removesuffix('.weight') for other in others)}, which a merged "
                f"adapter would change too; leave it out of {key}.targets, or train all parameters "
                f"with {key}.rank=null"
            )

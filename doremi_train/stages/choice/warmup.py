"""The warm-up of LESS: a few epochs on a random part of the pool, each of which leaves parameters
and AdamW's state.

Or what transformers' own Trainer left in its folders (`selection.less.checkpoints`), if that was a
warm-up.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from doremi_train import files
from doremi_train.config import UserError, fingerprint, judged
from doremi_train.data.instructions import Instructions
from doremi_train.data.sampler import Subsample
from doremi_train.gradients import capture
from doremi_train.methods import cross_entropy
from doremi_train.methods.less import Moments
from doremi_train.model import folders, language_model, optim
from doremi_train.model.language_model import CompletionModel
from doremi_train.parallel import comm, engine
from doremi_train.selection.examples.influence import Checkpoint
from doremi_train.stages.choice.tuning import build
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs.language_model import Begun, task_of, train_once
from doremi_train.stages.session import Session
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Run
from doremi_train.training.trainer import Trainer


class Warm(NamedTuple):
    address: str
    rates: list[float]  # the mean learning rate of every epoch: what its checkpoint weighs
    load: Callable[[int], Checkpoint]  # of an epoch, from 1


def run(session: Session, data: Instructions) -> Warm:
    """Train, or take what was trained. Raises UserError where that cannot be."""
    folders = session.config.selection.less.checkpoints
    return (
        _trained(session, data)
        if folders is None
        else _given(session, [Path(folder) for folder in folders])
    )


# ── Trained here ────────────────────────────────────────────────────────────────────


def _trained(session: Session, data: Instructions) -> Warm:
    options, config = session.config.selection.less, session.config
    part = Subsample(Fraction(options.warmup).limit_denominator(10**6), config.seed)
    sizes = part.sizes(data.sequences("train", config.training.sequence_length))
    batch = min(config.training.batch_size, int(sizes.sum()))
    epoch = -(-int(sizes.sum()) // batch)
    training = replace(
        config.training,
        batch_size=batch,
        steps=epoch * options.epochs,
        checkpoint_every=epoch,
        keep_checkpoints=10**6,
    )
    lora = config.finetune.lora
    recipe = {
        "data": data.fingerprint,
        "model": folders.folder_fingerprint(Path(str(config.finetune.model))),
        "lora": None if lora.rank is None else asdict(lora),
        "training": training_identity(training),
        "part": [part.part.numerator, part.part.denominator],
        "epoch": epoch,
        "seed": config.seed,
    }
    warm = Run(session.store, "warmup", recipe)

    def begin() -> Begun:
        task = task_of(
            session,
            warm,
            "warm-up",
            data,
            objective=cross_entropy,
            objective_options=cross_entropy.Options(weights=tuple((sizes / sizes.sum()).tolist())),
            training=training,
            evaluation=replace(config.evaluation, every=training.steps),
            subsample=part,
            bar=None,
        )
        tuning = language_model.CompletionModel(
            build(session).inner, training.activation_checkpointing, training.precision
        )
        taken = [
            optim.learning_rate(step, training.steps, training)
            for step in range(1, training.steps + 1)
        ]
        rates = np.array(taken).reshape(options.epochs, epoch).mean(1).tolist()
        said = {"examples": int(sizes.sum()), "learning_rates": rates}
        return Begun(task, tuning, partial(_keep, warm), said)

    train_once(session, warm, "warmup", begin, quiet=True)
    return Warm(warm.address, warm.result()["learning_rates"], partial(_checkpoint, session, warm))


def _keep(warm: Run, trainer: Trainer) -> None:
    """The checkpoints at the ends of epochs stay when the run is done."""
    comm.on_first(lambda: _link(warm))


def _link(warm: Run) -> None:
    for path in checkpoint.paths(warm.folder / checkpoint.FOLDER):
        if checkpoint.step_of(path) % warm.recipe["epoch"] == 0:
            with files.replacing_folder(warm.folder / "epochs" / path.name) as aside:
                for one in path.iterdir():
                    os.link(one, aside / one.name)


def _checkpoint(session: Session, warm: Run, epoch: int) -> Checkpoint:
    """An epoch's end. The optimiser's state is whole and by name, whatever engine trained it."""
    saved = checkpoint.read(
        checkpoint.of_step(warm.folder / "epochs", epoch * warm.recipe["epoch"])
    )
    tuning = language_model.CompletionModel(
        build(session).inner, precision=session.config.training.precision
    )
    training, moments = warm.recipe["training"], {}
    group = {"betas": training["adam_betas"], "eps": training["adam_epsilon"]}
    engine.require_same_model(tuning, saved)
    for name, tensor in language_model.trained_of(tuning):
        tensor.data.copy_(saved.whole(f"model/{name}"))
        keys = saved.keys_of(f"optimizer/{name}")
        if keys:
            state = {key: saved.whole(f"optimizer/{name}/{key}") for key in keys}
            moments[name] = _moments(state, group)
    return _opened(session, tuning, moments)


def _moments(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moments:
    first, second = group["betas"]
    return Moments(
        state["exp_avg"], state["exp_avg_sq"], int(state["step"]), (first, second), group["eps"]
    )


def _opened(
    session: Session, tuning: CompletionModel, moments: Mapping[str, Moments]
) -> Checkpoint:
    try:
        capture.require_factored(tuning)
    except capture.NotFactored as error:
        raise UserError(
            f"finetune.model={session.config.finetune.model}: {error}; train only layers that can "
            "be, as with 'finetune.lora.targets=[q_proj, v_proj]'"
        ) from None
    device = session.place.device
    moved = {
        name: m._replace(first=m.first.to(device), second=m.second.to(device))
        for name, m in moments.items()
    }
    return Checkpoint(tuning.to(device).eval(), moved)


# ── Trained by transformers ─────────────────────────────────────────────────────────


def _given(session: Session, folders: list[Path]) -> Warm:
    """Folders checkpoint-N of one training, in the order of their steps; rates are those of its
    log."""
    rates, before, prints = [], 0, []
    for folder in folders:
        given = f"selection.less.checkpoints: {folder}"
        with judged(given, "give folders checkpoint-N of transformers' Trainer", "the reader"):
            state = files.read_json(folder / "trainer_state.json")
            logged = [line for line in state["log_history"] if "learning_rate" in line]
            with (folder / "optimizer.pt").open("rb") as file:
                prints.append(
                    [hashlib.file_digest(file, "sha256").hexdigest(), state["global_step"]]
                )
            own = [
                float(line["learning_rate"])
                for line in logged
                if before < line["step"] <= state["global_step"]
            ]
        if not own:
            raise UserError(
                f"selection.less.checkpoints: {folder} logged no learning rate since step "
                f"{before}; give the folders in the order of their steps, of a training with "
                "logging_steps=1"
            )
        rates.append(float(np.mean(own)))
        before = state["global_step"]
    return Warm(fingerprint(prints), rates, lambda epoch: _of_trainer(session, folders[epoch - 1]))


def _of_trainer(session: Session, folder: Path) -> Checkpoint:
    """The optimiser's state is by number: those that decay come first, as the Trainer divides
    them."""
    from transformers import Trainer as Theirs

    key = f"selection.less.checkpoints: {folder}"
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        inner = folders.read(Path(str(session.config.finetune.model)), "finetune.model")
        with judged(key, "give a checkpoint of LoRA on finetune.model", "peft"):
            outer: Any = PeftModel.from_pretrained(inner, str(folder), is_trainable=True)
    else:
        inner = outer = folders.read(folder, "selection.less.checkpoints")
    tuning = language_model.CompletionModel(inner, precision=session.config.training.precision)
    names = {id(parameter): name for name, parameter in tuning.named_parameters()}
    decays = set(Theirs.get_decay_parameter_names(None, outer))  # type: ignore[arg-type]
    trained = [(name, p) for name, p in outer.named_parameters() if p.requires_grad]
    ordered = [p for decay in (True, False) for name, p in trained if (name in decays) == decay]
    remedy = "give checkpoints of transformers' Trainer with AdamW"
    with judged(key, remedy, "the reader of its optimizer.pt"):
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        groups = {number: group for group in saved["param_groups"] for number in group["params"]}
        moments = {
            names[id(p)]: _moments(saved["state"][number], groups[number])
            for number, p in enumerate(ordered)
        }
        if len(groups) != len(ordered) or any(
            m.first.shape != p.shape for m, p in zip(moments.values(), ordered, strict=True)
        ):
            raise ValueError("it is of other parameters")
    return _opened(session, tuning, moments)

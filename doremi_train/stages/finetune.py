"""Supervised fine-tuning of a local model, whole or by LoRA, on prompts and completions or on
messages.

`finetune.model` is a transformers folder (safetensors) with its tokeniser, or a model folder that a
run wrote. The examples are the lines of data.root, data.domains or data.files (see
`data.instructions`); their mixture is that of their numbers, so each comes once an epoch. It is the
one training loop: an example is a sequence, tokens that carry no loss are marked, and the loss is
the mean over those of the global batch that do. So batches may be selected
(`batch_selection=greats`), runs resume, and any number of processes gives the same.

It writes `finetune/model`, complete and with the adapters merged, and with LoRA `finetune/adapter`,
which peft loads on top of `finetune.model`.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.data import chat, instructions, options
from doremi_train.data.batches import read
from doremi_train.data.chat import Encoder
from doremi_train.data.corpus import opening, sources
from doremi_train.data.instructions import Instructions
from doremi_train.data.options import DataOptions
from doremi_train.evaluation import losses
from doremi_train.methods import cross_entropy
from doremi_train.model import folders, language_model, weights
from doremi_train.model.language_model import CompletionModel, LanguageModel
from doremi_train.parallel import comm, engine
from doremi_train.stages.choice import chosen, tuning
from doremi_train.stages.choice.tuning import build, model_folder, prepared
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import targets
from doremi_train.stages.runs.language_model import Begun, task_of, train_once
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run
from doremi_train.training import batch_selection, saving
from doremi_train.training.trainer import Trainer


@once
def run(session: Session) -> Run:
    session, picked = chosen.examples(session)
    encoder = Encoder(model_folder(session), "finetune.model")
    data = prepared(session, encoder, picked=picked)
    selection = targets.chosen(session, data, lambda: _given(session, data, encoder))
    tuned = recipe(session, data, selection)
    before: dict[str, Any] = {}

    def begin() -> Begun:
        training = session.config.training
        sizes = data.sequences("train", training.sequence_length)
        task = task_of(
            session,
            tuned,
            "finetune",
            data,
            objective=cross_entropy,
            objective_options=cross_entropy.Options(weights=tuple((sizes / sizes.sum()).tolist())),
            selection=selection,
        )
        model = _model(session)
        _require_room(model.inner, encoder, training.sequence_length)
        said = {
            "before": before,
            "data": {key: data.manifest[key] for key in _REPORTED if key in data.manifest},
        }
        save = partial(_save, session, tuned, encoder)
        first = lambda trainer: before.update(_before(session, trainer, data))  # noqa: E731
        return Begun(task, model, save, said, first)

    if train_once(session, tuned, "finetune", begin):
        after = tuned.result()["evaluation"]["mean_loss"]
        session.say(
            f"finetune               held-out loss {before['mean_loss']:.4f} → {after:.4f} nats "
            "per token"
        )
    return tuned


_REPORTED = ("examples", "cut", "also_in_validation", "without_loss", "told", "bad_lines")


def recipe(session: Session, data: Instructions, selection: batch_selection.Setting | None) -> Run:
    """The run: everything that decides the result."""
    options = session.config.finetune.lora
    return Run(
        session.store,
        "finetune",
        {
            "data": data.fingerprint,
            "model": folders.folder_fingerprint(Path(tuning.model_folder(session))),
            "lora": None if options.rank is None else asdict(options),
            "training": training_identity(session.config.training),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed,
        }
        | batch_selection.described(selection),
    )


def _require_room(inner: Any, encoder: Encoder, length: int) -> None:
    positions = getattr(inner.config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise UserError(
            f"training.sequence_length={length}: the model has only {positions} positions; shorten "
            "it, or raise max_position_embeddings in the model's config.json"
        )
    tokens, entries = len(encoder.tokenizer), inner.config.vocab_size
    if tokens > entries:
        raise UserError(
            f"finetune.model: its tokeniser has {tokens} tokens, its vocabulary only {entries} "
            "entries; give the tokeniser it was trained with"
        )


def _model(session: Session) -> LanguageModel:
    """The model before its first step: of shapes alone, where all of it is trained, for the engine
    to read what each process keeps."""
    training = session.config.training
    how = training.activation_checkpointing, training.precision
    if session.config.finetune.lora.rank is not None:
        return CompletionModel(build(session).inner, *how)
    folder = Path(tuning.model_folder(session))
    return folders.to_train(folder, "finetune.model", *how, CompletionModel)


def _before(session: Session, trainer: Trainer, data: Instructions) -> dict[str, Any]:
    """The held-out loss of the model before it is trained; of a run that goes on it is known. A
    collective."""
    file = trainer.task.run.folder / "before.json"
    training, device = session.config.training, session.place.device
    model: Any = trainer.engine.model
    if trainer.begins_at:
        if comm.on_first(file.exists):
            return dict(comm.on_first(lambda: files.read_json(file)))
        # Begun by an older version, or on another machine.
        model = engine.frozen(session.place, _model(session))
    batch = comm.world().largest(training.batch_size, training.micro_batch_size)
    measured = losses.measure(
        model, data, training.sequence_length, batch, session.config.evaluation, device
    )
    comm.on_first(lambda: files.write_json(file, measured))
    return measured


def _save(session: Session, tuned: Run, encoder: Encoder, trainer: Trainer) -> None:
    """Save as a model folder; with LoRA merged, and the adapters by themselves. A collective."""
    model = trainer.bare
    if session.config.finetune.lora.rank is not None:
        trained = [name for name, _ in language_model.trained_of(model)]
        tensors = trainer.engine.whole(trained)
        comm.on_first(lambda: _merge(session, tuned, encoder, tensors))
        return

    def complete(parts: saving.Parts, folder: Path) -> None:
        folders.describe(model, parts, folder)
        with files.naming_the_disk(folder):
            encoder.tokenizer.save_pretrained(folder)
        files.follow_umask(folder)

    saving.write(trainer.engine, model, tuned.folder / "model", complete)


def _merge(session: Session, tuned: Run, encoder: Encoder, tensors: dict[str, Tensor]) -> None:
    """Put trained adapters into a model as it was at the beginning, since the trained one may be in
    parts on many processes."""
    inner, adapters = tuning.build(session)
    inner.load_state_dict(weights.of_inner(tensors), strict=False)
    with files.replacing_folder(tuned.folder / "adapter") as folder:
        with files.naming_the_disk(folder):
            adapters.save_pretrained(folder)
        files.follow_umask(folder)
    inner = adapters.merge_and_unload()
    with files.replacing_folder(tuned.folder / "model") as folder:
        with files.naming_the_disk(folder):
            inner.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
        files.follow_umask(folder)


def _given(session: Session, data: Instructions, encoder: Encoder) -> Tensor:
    """(M, n) the first examples of the files in batch_selection.validation."""
    asked, length = session.config.batch_selection, session.config.training.sequence_length
    assert asked.validation is not None
    where = DataOptions(
        embedded=None,
        domains={"target": options.Split(train=asked.validation)},
        allow_pipe=session.config.data.allow_pipe,
    )
    examples, wanted = [], asked.validation_sequences
    given = sources.resolve_one(where, "batch_selection.validation")
    for example in instructions.examples(given, where, encoder, length, opening.BadLines(where)):
        examples += [example.tokens] if (example.tokens >= 0).any() else []
        if len(examples) == wanted:
            break
    if len(examples) < wanted:
        raise UserError(
            f"batch_selection.validation: {len(examples)} examples, but "
            f"batch_selection.validation_sequences={wanted}; give more, or lower it"
        )
    reported = read(data, "validation", *targets.evaluated(session, data), length).tokens.numpy()
    known = {row[row != -1].tobytes() for row in reported}
    if any(row.astype(np.int64)[row != -1].tobytes() in known for row in examples):
        raise UserError(
            "batch_selection.validation: shares examples with the reported evaluation, towards "
            "which would then be trained; give others"
        )
    return torch.from_numpy(chat.padded(examples))

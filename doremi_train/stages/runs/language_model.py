"""A language model trained on a fixed mixture: reference, baseline, uniform and main are all this
run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from doremi_train.console import Bar
from doremi_train.data.sampler import Subsample
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import cross_entropy, importance
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import comm
from doremi_train.stages.options import training_identity
from doremi_train.stages.runs import budget
from doremi_train.stages.session import Session
from doremi_train.storage import checkpoint
from doremi_train.storage.runs import Run, set_status
from doremi_train.training import batch_selection, frozen
from doremi_train.training.task import Position, Task, TrainingOptions
from doremi_train.training.trainer import Trainer


class Weighting(NamedTuple):
    """How a run weighs its tokens (see `stages.weighting`)."""

    options: importance.Options  # but for the mixture, which is the run's
    recipe: dict[str, Any]  # what it adds to that of the run
    reference: Callable[[Run], frozen.Reference]


def recipe(
    session: Session,
    store: TokenStore,
    config: dict[str, Any],
    weights: Tensor,
    training: TrainingOptions,
    part: Subsample | None = None,
    weighting: Weighting | None = None,
    selection: batch_selection.Setting | None = None,
) -> Run:
    """The run that trains `config` on `weights` (K,): whoever asks for the same one gets the same
    folder."""
    return Run(
        session.store,
        "language_model",
        {
            "data": store.fingerprint,
            "model": config,
            "mixture": dict(zip(store.domains, weights.tolist(), strict=True)),
            "training": training_identity(training),
            "evaluation": session.plain["evaluation"],
            "seed": session.config.seed,
        }
        | budget.described(part)
        | (weighting.recipe if weighting else {})
        | batch_selection.described(selection),
    )


def train(
    session: Session,
    store: TokenStore,
    name: str,
    config: dict[str, Any],
    weights: Tensor,
    training: TrainingOptions,
    part: Subsample | None = None,
    weighting: Weighting | None = None,
    selection: batch_selection.Setting | None = None,
    bar: Bar | None = None,
) -> Run:
    """Train it, unless it is in the store already; link it as `run_dir/name`. `bar`: of many runs,
    for whom it is moved on in silence."""
    run = recipe(session, store, config, weights, training, part, weighting, selection)
    bar = bar or session.part(name)
    with session.computing(run, name) as todo:
        if not todo and bar is None:
            session.say(f"{name:<22} is in the store already: {run.folder.name}")
        if not todo:
            return run
        task = Task(
            label=name,
            run=run,
            objective=cross_entropy,
            objective_options=cross_entropy.Options(weights=tuple(weights.tolist())),
            store=store,
            seed=session.config.seed,
            training=training,
            evaluation=session.config.evaluation,
            subsample=part,
            selection=selection,
            bar=bar,
        )
        if weighting is not None:
            options = replace(weighting.options, weights=tuple(weights.tolist()))
            task = task._replace(
                objective=importance,
                objective_options=options,
                accumulation="exact" if options.of_the_batch else "lagged",
                reference=weighting.reference(run),
            )
        built = folders.build(config, session.config.seed, training.activation_checkpointing)
        finish(session, task, Trainer(task, built, session.place))
    return run


Save = Callable[
    [dict[str, Tensor]], None
]  # of the model's whole tensors by name, into the run's folder


def finish(
    session: Session,
    task: Task,
    trainer: Trainer,
    save: Save | None = None,
    said: Mapping[str, Any] | None = None,
) -> None:
    """Train to the end, save the model, and write the result: the run is done. `save`: otherwise
    than as a model of the token store; `said`: what the result says more."""
    with session.tracking.run(task.label, task.run.folder.name, trainer.begins_at) as tracked:
        position = trainer.fit(tracked.line)
        measured = trainer.evaluate()
        tensors = trainer.engine.state()["model"]
        more = {"evaluation": measured, **(said or {})}
        write = save or (lambda tensors: _save(task, trainer, tensors))
        comm.on_first(
            lambda: tracked.summary(_write(task, trainer, position, more, lambda: write(tensors)))
        )
    trainer.engine.close()


def _save(task: Task, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    assert isinstance(task.store, TokenStore)
    folders.save(
        trainer.bare,
        tensors,
        task.run.folder / "model",
        task.store.tokenizer(),
        task.store.end_of_document,
    )


def _write(
    task: Task, trainer: Trainer, position: Position, more: dict[str, Any], save: Callable[[], None]
) -> dict[str, float]:
    """Returns the headline."""
    save()
    epochs = dict(
        zip(task.store.domains, (position.counts / trainer.batches.sizes).tolist(), strict=True)
    )
    result: dict[str, Any] = {"steps": position.step, "skipped": position.skipped, "epochs": epochs}
    result |= {"engine": trainer.engine_used, **more}
    if hasattr(task.objective, "result"):
        average = task.objective.result(position.state).tolist()
        result["weights"] = dict(zip(task.store.domains, average, strict=True))
    task.run.finish(result)
    set_status(task.run.folder, "running", position.step)
    checkpoint.remove(task.run.folder / "checkpoints")
    learned = {
        f"learned_weights/{name}": weight for name, weight in result.get("weights", {}).items()
    }
    measured = more["evaluation"]
    return {"mean_loss": measured["mean_loss"], "worst_loss": measured["worst_loss"], **learned}


def resolved_model(session: Session, store: TokenStore, name: str | None = None) -> dict[str, Any]:
    """The proxy's transformers config, or that of the preset `name`."""
    options = (
        session.config.model if name is None else ModelOptions(**configs.preset(name, "main.model"))
    )
    length = session.config.training.sequence_length
    key = "model" if name is None else "main.model"
    return configs.resolve(options, store.vocabulary_size, store.end_of_document, length, key)

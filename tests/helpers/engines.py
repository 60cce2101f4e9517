"""Started by test_engines on every rank: proxies of every cut on one engine, one after another.

    torchrun … tests/helpers/engines.py ENGINE OUT DATA REFERENCE OTHER

writes OUT/CASE/domain_weights.jsonl and metrics.jsonl for every case of `CASES`; OUT/stopped is a
run in the middle. The case "moved" continues that of another engine, if its OUT is given as OTHER.
"""

import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.methods import doremi
from doremi_train.model import configs, folders, language_model, weights
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import comm, engine, place
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.parallel.place import start
from doremi_train.storage.runs import Preempted, Run, stop
from doremi_train.training import saving
from doremi_train.training.frozen import Live
from doremi_train.training.task import Task, TrainingOptions
from doremi_train.training.trainer import Trainer

STEPS = 12
LENGTH = 32
SEED = 1
SAVED = "exact-1"  # the case of which the model is looked at
FILE = 20_000  # bytes of its weights
CONFIG = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 67,  # divides by no number of processes
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class Case(NamedTuple):
    """One proxy run."""

    batch: int = 16
    parts: int = 1  # micro-batches of every rank
    accumulation: str = "exact"
    precision: str = "fp32"
    logits: int | None = None  # that may exist at once: the projection is fused with the loss
    stopped: int | None = None  # told to stop in this step, and continued
    # One sequence of this step, counted from 0, has a loss that is not a number.
    broken_step: int | None = None


CASES = {
    **{
        f"{how}-{parts}": Case(parts=parts, accumulation=how)
        for how in ("exact", "lagged")
        for parts in (1, 2, 4)
    },
    "uneven": Case(
        batch=13, parts=2
    ),  # 7 and 6 rows for two ranks; some ranks of four have none in a micro-batch
    "bf16": Case(precision="bf16"),
    "fused": Case(parts=2, logits=20 * 300),
    "broken": Case(broken_step=4),
    "resumed": Case(stopped=5),
    "moved": Case(),
}


# Four processes on two cores take long: there, what differs from two of them.
FEW = ("exact-1", "exact-4", "lagged-2", "uneven", "resumed", "moved")


def cases(world: int) -> dict[str, Case]:
    return CASES if world < 4 else {name: CASES[name] for name in FEW}


def options(case: Case, world: int) -> TrainingOptions:
    return TrainingOptions(
        steps=STEPS,
        batch_size=case.batch,
        micro_batch_size=-(-case.batch // (case.parts * world)),
        sequence_length=LENGTH,
        learning_rate=1e-3,
        precision=case.precision,  # type: ignore[arg-type]
        checkpoint_every=10 * STEPS,
        log_every=1,
        on_nonfinite="skip" if case.broken_step else "stop",
    )


def shape(store: TokenStore) -> dict[str, Any]:
    return configs.resolve(
        ModelOptions(config=CONFIG), store.vocabulary_size, store.end_of_document, LENGTH
    )


def train(case: Case, out: Path, place: place.Place, store: TokenStore, reference: Path) -> None:
    begins = out.exists()  # with what another engine left
    task = Task(
        label=out.name,
        run=Run(out, "proxy", {}),
        objective=doremi,
        objective_options=doremi.Options(),
        store=store,
        seed=0,
        training=options(case, comm.world().size),
        evaluation=EvaluationOptions(sequences=4, every=STEPS),
        accumulation=case.accumulation,  # type: ignore[arg-type]
        reference=Live(
            engine.frozen(
                place, folders.load(reference, store.vocabulary_size, "reference", case.precision)
            ),
            place.device,
        ),
    )
    built = folders.shaped(shape(store), SEED, precision=case.precision)
    if case.broken_step is not None:
        break_one(built, store, case)
    if case.stopped is not None:
        with pytest.raises(Preempted, match=f"saved at step {case.stopped} of {STEPS}"):
            fit(task, built, place, case.stopped)
        stop.requested = False
        comm.on_first(lambda: shutil.copytree(out, out.parent / "stopped"))
        # Another one: what counts is in the checkpoint.
        built = folders.shaped(shape(store), SEED + 1, precision=case.precision)
    begun = fit(task, built, place)
    assert begun == (CASES["resumed"].stopped if begins else case.stopped or 0)


def fit(
    task: Task, built: language_model.LanguageModel, place: place.Place, stopped: int | None = None
) -> int:
    """Returns the step that it began after."""
    size = sum(parameter.numel() for parameter in built.parameters())
    trainer = Trainer(task, built, place)
    if task.label == SAVED:
        record(trainer, task.run.folder.parent.parent / "birth.json")
    if place.strategy.startswith("zero"):  # no room for more than there is to sum
        assert trainer.engine.optimizer.reduce_bucket_size <= size
    if stopped is not None:
        stop_in(built, stopped)
    try:
        trainer.fit()
        if task.label == SAVED:
            save(trainer, task.run.folder.parent.parent)
    finally:
        trainer.engine.close()
    return trainer.begins_at


def save(trainer: Trainer, out: Path) -> None:
    """The trained model as a folder of many files, and the bits of its tensors."""
    store = trainer.task.store
    assert isinstance(store, TokenStore)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "FILE", FILE)
        saving.save(trainer.engine, trainer.bare, out / "model", store, LENGTH)
    record(trainer, out / "trained.json")


def record(trainer: Trainer, file: Path) -> None:
    """Bits of every tensor now."""
    digests = digests_of(trainer.engine.state()["model"])
    if comm.world().first:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(digests))


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def stop_in(built: language_model.LanguageModel, step: int) -> None:
    """Set the flag that a signal sets, on the last rank alone, in the forward of this step."""
    forwards = itertools.count(1)

    def hook(*_: Any) -> None:
        last = comm.world().rank == comm.world().size - 1
        stop.requested = next(forwards) == step and last

    built.register_forward_pre_hook(hook)


def break_one(built: language_model.LanguageModel, store: TokenStore, case: Case) -> None:
    """Wherever the first sequence of the broken step turns up, its loss is not a number."""
    from doremi_train.data.batches import Batches

    step = case.broken_step or 0
    with Batches(store, LENGTH, case.batch, [slice(0, 1)], seed=0) as batches:
        weights = torch.full((len(store.domains),), 1 / len(store.domains), dtype=torch.float64)
        counts = batches.sampler.counts_before(step, weights.numpy())
        broken = batches.get(step, weights, counts).micro[0].tokens

    def hook(_: Any, inputs: tuple[Tensor], losses: Tensor) -> Tensor:
        bad = (inputs[0] == broken).all(1, keepdim=True)
        return torch.where(bad, torch.nan, losses)

    built.register_forward_hook(hook)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Elements of every sum of float64 over the ranks: what our own code exchanges."""
    sizes: list[int] = []
    really = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *more: Any, **named: Any) -> Any:
        if tensor.dtype == torch.float64:
            sizes.append(tensor.numel())
        return really(tensor, *more, **named)

    torch.distributed.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        torch.distributed.all_reduce = really


def main() -> None:
    strategy, out, data, reference, other = sys.argv[1], *map(Path, sys.argv[2:6])
    torch.set_num_threads(1)
    # Memory that nobody has written to is full of NaN: no engine's padding may be read.
    torch.use_deterministic_algorithms(True, warn_only=True)
    place = start(EngineOptions(strategy=strategy), "fp32", timeout=120)  # type: ignore[arg-type]
    store = TokenStore.open(data)
    for name, case in cases(comm.world().size).items():
        if name == "moved" and other != out:
            comm.on_first(lambda: shutil.copytree(other / "stopped", out / "moved"))
        with pytest.MonkeyPatch.context() as patch, counted() as exchanges:
            patch.setattr(language_model, "NARROW_ON_CPU", 0)  # plain logits in all cases but one
            if case.logits is not None:
                patch.setattr(language_model, "_LOGITS_ON_CPU", case.logits)
            train(case, out / name, place, store, reference)
        if comm.world().first:
            (out / name / "exchanges.json").write_text(json.dumps(exchanges))
    comm.leave()


if __name__ == "__main__":
    main()

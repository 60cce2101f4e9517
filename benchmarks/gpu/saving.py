"""Checkpoints of 280m: whether a run that continues ends in the same bits, what a save and a
continuation take, and how long steps stand still while a thread writes the file."""

import os

# Read when CUDA's matrix library starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import step
from benchmarks.gpu import sized
from benchmarks.gpu.record import Record, main
from benchmarks.step import DOMAINS, Setting
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.methods import cross_entropy
from doremi_train.storage import checkpoint, parts
from doremi_train.storage.parts import Saved
from doremi_train.storage.runs import Run
from doremi_train.training import checkpoints
from doremi_train.training.task import Position, Task, TrainingOptions
from doremi_train.training.trainer import Trainer

_EVERY, _LAST = 3, 6  # steps between checkpoints, and the last one, which has one too
_OPTIONS = cross_entropy.Options(weights=(1 / DOMAINS,) * DOMAINS)


def measure(record: Record) -> None:
    with sized.setting(record) as of:
        stall(record, of)
        continued(record, of, "as it is trained")
        torch.use_deterministic_algorithms(True, warn_only=True)
        continued(record, of, "deterministic algorithms")


# ── The same bits ───────────────────────────────────────────────────────────────────


def continued(record: Record, of: Setting, label: str) -> None:
    """Write whether the checkpoint at the end is the same in all bits, of a run to the end and of
    one that continues it from its first checkpoint."""
    few = replace(of.training, steps=_LAST, checkpoint_every=_EVERY)
    whole, resumed = trainer(of, f"{label}, whole", 0, few), f"{label}, resumed"
    whole.fit()
    folder = whole.task.run.folder / checkpoint.FOLDER
    first, last = checkpoint.paths(folder)
    there = Run(of.folder / resumed, "saving", {}).folder / checkpoint.FOLDER
    shutil.copytree(first, there / first.name)
    whole.engine.close()
    del whole
    sized.empty(of.place.device)
    began = time.monotonic()
    again = trainer(of, resumed, 1, few)  # another model: what counts is in the checkpoint
    taken = time.monotonic() - began
    record.figure(f"{label}: read a checkpoint, and build from it", taken, "s")
    again.fit()
    same = equal(checkpoint.read(last), checkpoint.read(there / last.name))
    record.figure(f"{label}: a continued run ends in the same bits", same)
    shutil.rmtree(folder)
    shutil.rmtree(there)


def trainer(of: Setting, label: str, seed: int, training: TrainingOptions) -> Trainer:
    """A plain run, with all that it needs to be saved and to continue."""
    task = Task(
        label=label,
        run=Run(of.folder / label, "saving", {}),
        objective=cross_entropy,
        objective_options=_OPTIONS,
        store=of.store,
        seed=0,
        training=training,
        evaluation=EvaluationOptions(sequences=1, every=step.STEPS),
        accumulation="exact",
    )
    return Trainer(task, step.built(of, seed), of.place)


def equal(one: Saved, other: Saved) -> bool:
    """Whether two checkpoints are the same in all bits."""
    plain = [(of.step, of.shapes, parts.divide(of.values)[0]) for of in (one, other)]
    return plain[0] == plain[1] and all(
        torch.equal(one.whole(name), other.whole(name)) for name in one.shapes
    )


# ── Standing still ──────────────────────────────────────────────────────────────────


def stall(record: Record, of: Setting) -> None:
    """Write how long a save takes, copy to the host and file apart, and what steps lose while a
    thread writes the file."""
    device, folder = of.place.device, of.folder / "kept"
    train = trainer(of, "stall", 0, of.training)
    state = cross_entropy.init(DOMAINS, step.STEPS, _OPTIONS)
    begin = Position(0, state, np.zeros(DOMAINS, dtype=np.int64))
    steps = (taken.position.step for taken in train.steps(begin))
    for _ in range(3):
        next(steps)
    usual = statistics.median(_timed(steps, device) for _ in range(10))
    run = Run(folder, "saving", {})
    saver = checkpoints.Saver(run, 1, of.training.timeout)
    began = time.monotonic()
    saver.save(1, {}, train.engine.pieces())
    copying = time.monotonic() - began
    saver.settle()
    writing = time.monotonic() - began - copying
    (path,) = checkpoint.paths(run.folder / checkpoint.FOLDER)
    size = sum(file.stat().st_size for file in path.iterdir())
    record.figure("a checkpoint", size / 1e9, "GB")
    record.figure("a save: copy to the host", copying, "s")
    record.figure("a save: file, checksum and disk", writing, "s")
    beside = []
    saver.save(2, {}, train.engine.pieces())
    while saver.writing:
        beside.append(_timed(steps, device))
    saver.settle()
    lost = sum(beside) - usual * len(beside)
    record.figure("a step", usual, "s")
    record.figure("steps while a thread writes the file", len(beside))
    record.figure("a save in a thread: steps stand still for", copying + max(lost, 0.0), "s")
    steps.close()
    train.engine.close()


def _timed(steps: Iterator[Any], device: torch.device) -> float:
    began = time.monotonic()
    next(steps)
    sized.wait(device)
    return time.monotonic() - began


if __name__ == "__main__":
    main("saving", measure)

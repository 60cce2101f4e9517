"""Domain weights α of a proxy of `tiny` in float32: those of a GPU against those of the CPU, at
every step; then of two processes on the one card through gloo, and of one through NCCL.

All are trained at the same time, those of a GPU in processes of their own, against the same
reference: this is about numbers, not about speed.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.gpu.record import Record, at_most, main
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.methods import cross_entropy, doremi
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import comm, engine, place
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.storage.runs import Run
from doremi_train.training import frozen
from doremi_train.training.task import Task, TrainingOptions
from doremi_train.training.trainer import Trainer

DOMAINS = 8
_GOAL = at_most(1e-3)
_LABEL = "{}: α is off the CPU's by at most"


class Size(NamedTuple):
    """Sizes of the run."""

    model: str
    vocabulary: int
    batch: int  # sequences
    length: int  # tokens
    steps: int


class Launch(NamedTuple):
    """Processes that train together, once with each strategy."""

    device: str  # auto: the GPU; or cpu
    backend: str = "none"  # through which they exchange: none, gloo, nccl
    processes: int = 1
    strategies: tuple[str, ...] = ("single",)

    def name(self, strategy: str) -> str:
        device = {"cpu": "CPU", "auto": "GPU"}[self.device]
        if self.backend == "none":
            return device
        return f"{device}, {self.processes} × {strategy} by {self.backend}"


# Training makes ten of one in what was rounded otherwise, every 15 steps or so: on a CPU two
# processes and one differed by 9e-6 at most after 60 steps, and by 0.08 after 200.
SIZE, REHEARSED = Size("tiny", 1024, 32, 128, 60), Size("nano", 64, 8, 16, 12)
CPU = Launch("cpu")
ON_A_GPU = (
    Launch("cpu", "gloo", 2, ("ddp",)),  # what another rounding does
    Launch("auto"),
    Launch("auto", "gloo", 2, ("ddp",)),
    Launch("auto", "nccl", 1, ("ddp", "fsdp2")),
)
# The same code where there is none.
ON_A_CPU = (Launch("cpu", "gloo", 2, ("ddp",)), Launch("cpu", "gloo", 1, ("ddp", "fsdp2")))


def measure(record: Record) -> None:
    size = REHEARSED if record.rehearse else SIZE
    torch.set_num_threads(1 if record.rehearse else 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, size)
        launches = ON_A_CPU if record.rehearse else ON_A_GPU
        started = [(launch, start(folder, launch, size)) for launch in launches]
        train(folder, CPU, size)
        ended = [(launch, end(ranks, record.left() - 10)) for launch, ranks in started]
        cpu = trace(folder, CPU, "single")
        assert cpu.shape == (size.steps, DOMAINS), cpu.shape
        record.figure("α moved from uniform by", float(np.abs(cpu - 1 / DOMAINS).max()))
        for launch, wrong in ended:
            for strategy in launch.strategies:
                label = _LABEL.format(launch.name(strategy))
                if wrong:
                    record.not_measured(label, wrong, _GOAL)
                else:
                    apart = np.abs(trace(folder, launch, strategy) - cpu).max()
                    record.figure(label, float(apart), goal=_GOAL)
        for launch in [at for at in ON_A_GPU if record.rehearse and at.device != "cpu"]:
            for strategy in launch.strategies:
                record.not_measured(_LABEL.format(launch.name(strategy)), "needs a GPU", _GOAL)


def trace(folder: Path, launch: Launch, strategy: str) -> NDArray[np.float64]:
    """(steps, K) α of every step."""
    (path,) = (folder / launch.name(strategy)).rglob("domain_weights.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return np.array([list(line["weights"].values()) for line in lines])


# ── Launches ────────────────────────────────────────────────────────────────────────


def start(folder: Path, launch: Launch, size: Size) -> list["subprocess.Popen[bytes]"]:
    """Start the processes of a launch as torchrun would, but that all have the one card."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(launch.processes):
        told: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": launch.processes}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        alone = launch.backend == "none"
        known = {} if alone else {name: str(value) for name, value in told.items()}
        said = json.dumps([str(folder), launch, size])
        command = [sys.executable, "-m", "benchmarks.gpu.alpha", "--rank", said]
        ranks.append(subprocess.Popen(command, env=os.environ | known))
    return ranks


def end(ranks: "list[subprocess.Popen[bytes]]", seconds: float) -> str:
    """Wait for all of a launch; what went wrong, or nothing."""
    ends = time.monotonic() + seconds
    try:
        codes = [rank.wait(max(ends - time.monotonic(), 1.0)) for rank in ranks]
    except subprocess.TimeoutExpired:
        return "did not end in time"
    finally:
        for rank in ranks:
            rank.kill()
    return f"exit codes {codes}: see the log" if any(codes) else ""


def rank(said: str) -> None:
    """One process of a launch, which is as `start` says."""
    name, (device, backend, processes, strategies), sizes = json.loads(said)
    folder, size = Path(name), Size(*sizes)
    launch = Launch(device, backend, processes, tuple(strategies))
    torch.set_num_threads(1 if size == REHEARSED else 4)
    if backend == "gloo":
        # On a GPU it would be NCCL, which refuses two processes on one card.
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder / f'meeting-{device}-{processes}'}",
            rank=int(os.environ["RANK"]), world_size=processes,
        )  # fmt: skip
    train(folder, launch, size)
    comm.leave()


def train(folder: Path, launch: Launch, size: Size) -> None:
    """Train the proxy with every strategy of a launch, of which this process is one."""
    device: Any = launch.device
    at = place.start(EngineOptions(device=device), "fp32", timeout=60)
    assert comm.backend() == launch.backend, f"{comm.backend()} instead of {launch.backend}"
    assert at.device.type == {"cpu": "cpu", "auto": "cuda"}[device], at.device
    store = TokenStore.open(folder / "data")
    for strategy in launch.strategies:
        reference = folders.build(shape(store, size), 1)
        reference.load_state_dict(torch.load(folder / "reference.pt", weights_only=True))
        reference = engine.frozen(at, reference, divided=False)
        task = task_of(folder / launch.name(strategy), store, size)._replace(
            objective=doremi,
            objective_options=doremi.Options(),
            reference=frozen.Live(reference, at.device),
        )
        model = folders.build(shape(store, size), 2)
        Trainer(task, model, at._replace(strategy=strategy)).fit()


# ── What all have in common ─────────────────────────────────────────────────────────


def prepare(folder: Path, size: Size) -> None:
    """Data of domains that are learned to different ends, and a reference that has learned some of
    it, which α needs in order to move."""
    tokens = 64 * size.batch * size.length // DOMAINS
    store = common.token_store(folder / "data", DOMAINS, tokens, size.vocabulary, graded=True)
    task, model = task_of(folder / "reference", store, size), folders.build(shape(store, size), 1)
    Trainer(task, model, place.start(EngineOptions(device="cpu"), "fp32", timeout=60)).fit()
    torch.save(model.state_dict(), folder / "reference.pt")


def task_of(folder: Path, store: TokenStore, size: Size) -> Task:
    """The reference's."""
    return Task(
        label=folder.name,
        run=Run(folder, "alpha", {}),
        objective=cross_entropy,
        objective_options=cross_entropy.Options(weights=(1 / DOMAINS,) * DOMAINS),
        store=store,
        seed=0,
        training=TrainingOptions(
            steps=size.steps,
            batch_size=size.batch,
            sequence_length=size.length,
            checkpoint_every=10 * size.steps,
        ),
        evaluation=EvaluationOptions(sequences=1, every=size.steps),
        accumulation="exact",
    )


def shape(store: TokenStore, size: Size) -> dict[str, Any]:
    preset = ModelOptions(**configs.preset(size.model, "--model"))
    return configs.resolve(preset, store.vocabulary_size, store.end_of_document, size.length)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank(sys.argv[2])
    else:
        main("alpha", measure)

"""What a checkpoint takes of a model that is divided among processes (gloo, FSDP2): seconds that
training stands still, seconds until all of it is on disk, seconds to continue from it, and each
process's peak of host memory. `today` is the way until 2026-11-30: gathered into the first process,
pickled by it while the others wait, and read whole by all; and embedding and output projection were
gathered together, and malloc was left to itself.

Each side begins in processes of its own. Peaks are the kernel's (VmHWM), with libraries and model.
Files are read from the page cache.
"""

import argparse
import hashlib
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.scale import llama
from doremi_train.model import configs, folders, language_model
from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import comm, engine, heap, place
from doremi_train.parallel.engine import Engine
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.storage.runs import Run
from doremi_train.training import checkpoints

SIDES = ("now", "today")
LENGTH, STEPS = 32, 2
Figures = dict[str, list[float]]  # of each process, by rank


def measure(given: argparse.Namespace) -> common.Result:
    config = llama(int(1e6 * (given.parameters or (2 if given.quick else 200))))
    rounds: list[dict[str, Figures]] = []
    for turn in range(given.rounds):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            order = SIDES if turn % 2 else SIDES[::-1]
            rounds.append({side: of(side, config, given.processes, folder) for side in order})

    def ratio(name: str) -> common.Ratio:
        now, today = ([max(each[side][name]) for each in rounds] for side in SIDES)
        return common.ratio(now, today)

    ratios = {
        f"{name}_over_todays": ratio(name)
        for name in ("standing_still", "steps_lose", "resume", "peak_of_a_save", "peak_of_a_resume")
    }
    for name in ("peak_of_a_save", "peak_of_a_resume"):
        ratios[f"{name}_fullest_over_emptiest"] = common.ratio(
            [max(each["now"][name]) for each in rounds], [min(each["now"][name]) for each in rounds]
        )
    parameters = configs.parameters(config)[0]
    names = [*rounds[0]["now"]]
    common.table(
        f"a llama of {parameters / 1e6:.0f} M parameters, {given.processes} processes",
        ("", "fullest: now", "today", "emptiest: now", "today"),
        [
            (name, *(statistics.median(which(each[side][name]) for each in rounds)
             for which in (max, min) for side in SIDES))
            for name in names
        ],
    )  # fmt: skip
    return common.Result(
        ratios, {"parameters": parameters, "processes": given.processes, "rounds": rounds}
    )


# ── As it was ───────────────────────────────────────────────────────────────────────


def model_of(side: str, config: dict[str, Any], seed: int) -> LanguageModel:
    """The model of a side, before it is divided as that did it."""
    if side == "now":
        return folders.shaped(config, seed)
    heap.give_back = lambda: None
    model = folders.build(config, seed)
    blocks = [[block] for block in model.blocks()]
    model.groups = lambda: blocks  # type: ignore[method-assign]
    return model


def save_whole(of: Engine, path: Path) -> None:
    """Gather all into the first process, which writes it and its checksum while the others wait."""
    state = of.state()

    def write() -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".sha256").write_text(_digest(path))

    comm.on_first(write)


def resume_whole(at: place.Place, model: LanguageModel, path: Path) -> Engine:
    """Read all of it on every process, before the model is divided."""
    from torch.distributed.tensor import distribute_tensor

    assert path.with_suffix(".sha256").read_text() == _digest(path)
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in language_model.tensors_of(model):
        tensor.data.copy_(state["model"][name])
    built = engine.build(at, model, OptimizerOptions())

    def part(value: torch.Tensor, like: Any) -> torch.Tensor:
        if not value.ndim:
            return value.clone()
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    for name, tensor in model.named_parameters():
        moments = state["optimizer"][name]
        built.optimizer.state[tensor] = {key: part(value, tensor) for key, value in moments.items()}
    return built


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── Processes ───────────────────────────────────────────────────────────────────────


def of(side: str, config: dict[str, Any], processes: int, folder: str) -> Figures:
    """Figures of a side: a start that saves, and one that continues."""
    path = Path(folder) / side
    path.mkdir()
    found = started(_save, side, config, processes, path)
    found |= started(_resume, side, config, processes, path)
    shutil.rmtree(path)
    return found


def started(
    function: Callable[..., dict[str, float]],
    side: str,
    config: dict[str, Any],
    processes: int,
    folder: Path,
) -> Figures:
    """What the function returns in every process of a fresh start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    all_of = [
        context.Process(target=_process, args=(rank, processes, port, queue, function, *rest))
        for rank in range(processes)
        for rest in [(side, config, folder)]
    ]
    for process in all_of:
        process.start()
    for process in all_of:
        process.join()
    if any(process.exitcode for process in all_of):
        raise RuntimeError(f"{side}: exit codes {[process.exitcode for process in all_of]}")
    every = [found for _, found in sorted(queue.get() for _ in all_of)]
    return {name: [found[name] for found in every] for name in every[0]}


def _process(
    rank: int, processes: int, port: int, queue: Any, function: Callable[..., Any], *rest: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    at = place.start(EngineOptions(device="cpu", strategy="fsdp2"), "fp32", timeout=600)
    found = function(at, *rest)
    comm.barrier()
    comm.leave()
    queue.put((rank, found))


def _save(at: place.Place, side: str, config: dict[str, Any], folder: Path) -> dict[str, float]:
    train = engine.build(at, model_of(side, config, 0), OptimizerOptions())
    _forget_peak()
    usual = statistics.median([_step(train) for _ in range(STEPS + 1)][1:])
    comm.barrier()
    peak_of_a_step = _status("VmHWM")
    _forget_peak()
    before, began = _status("VmRSS"), time.perf_counter()
    saver = checkpoints.Saver(Run(folder, "run", {}), 2, 600)
    if side == "now":
        saver.save(1, {}, train.pieces())
    else:
        save_whole(train, folder / "whole.pt")
    still = time.perf_counter() - began
    steps = 0
    while comm.broadcast(saver.writing):
        _step(train)
        steps += 1
    saver.settle()
    whole = time.perf_counter() - began
    return {
        "a_step": usual,
        "standing_still": still,
        "until_all_is_on_disk": whole,
        "steps_meanwhile": steps,
        "steps_lose": max(whole - steps * usual, still),
        "between_steps": before,
        "peak_of_a_step": peak_of_a_step,
        "peak_of_a_save": _status("VmHWM"),
    }


def _resume(at: place.Place, side: str, config: dict[str, Any], folder: Path) -> dict[str, float]:
    model = model_of(side, config, 1)
    comm.barrier()
    _forget_peak()
    began = time.perf_counter()
    if side == "now":
        saved = checkpoints.newest(Run(folder, "run", {}))
        assert saved is not None
        train = engine.build(at, model, OptimizerOptions(), saved)
        saved.close()
    else:
        train = resume_whole(at, model, folder / "whole.pt")
    comm.barrier()
    seconds = time.perf_counter() - began
    assert all(train.optimizer.state[tensor]["step"] > 0 for tensor in model.parameters())
    return {"resume": seconds, "peak_of_a_resume": _status("VmHWM")}


def _step(train: Engine) -> float:
    """Seconds of an optimiser step on one sequence."""
    began = time.perf_counter()
    with train.accumulating(last=True):
        train.backward(train.model(torch.arange(LENGTH + 1)[None]).sum())
    train.step(1e-4)
    return time.perf_counter() - began


def _forget_peak() -> None:
    """Let the kernel's peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> float:
    """Megabytes."""
    said = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert said is not None
    return int(said[1]) / 1000


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parameters", type=float, help="millions; default: 200, quick: 2")
    parser.add_argument("--processes", type=int, default=4, help="default: 4")
    parser.add_argument("--rounds", type=int, default=1, help="default: 1")
    parser.add_argument("--folder", help="where checkpoints go; default: the temporary folder")


if __name__ == "__main__":
    common.main("checkpoints", __doc__, measure, options)

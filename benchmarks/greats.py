"""What picking the examples of every step costs: GREATS with sketches and exact, in one pass and in
two, over ordinary training on the same candidates, of which half are picked; and beside gradients
that are computed one example at a time.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common, step
from benchmarks.step import DOMAINS, STEPS, Setting, Steps
from doremi_train.data.batches import read
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.methods import cross_entropy, greats
from doremi_train.model import folders, optim
from doremi_train.model.language_model import LanguageModel
from doremi_train.storage.runs import Run
from doremi_train.training import batch_selection
from doremi_train.training.batch_selection import BatchSelectionOptions
from doremi_train.training.task import Position, Task
from doremi_train.training.trainer import Trainer

TURN = 10  # steps: so many of a run have one gradient of the validation loss, but for the first ten


def training(
    of: Setting, label: str, selection: BatchSelectionOptions | None, parts: int = 1
) -> Steps:
    """The trainer on all candidates, or on half of them as picked; with `parts` micro-batches it
    takes two passes."""
    count = of.training.batch_size
    shown = np.arange(count // 2)  # as many validation sequences as picks
    target = read(
        of.store, "train", np.zeros_like(shown), shown, of.training.sequence_length
    ).tokens
    task = Task(
        label=label,
        run=Run(of.folder / label, "greats", {}),
        objective=cross_entropy,
        objective_options=cross_entropy.Options(weights=(1 / DOMAINS,) * DOMAINS),
        store=of.store,
        seed=0,
        training=replace(
            of.training,
            batch_size=count // 2 if selection else count,
            micro_batch_size=-(-count // parts),
        ),
        evaluation=EvaluationOptions(every=STEPS),
        selection=batch_selection.Setting(selection, count, target) if selection else None,
    )
    trainer = Trainer(task, built(of), of.place)
    state = cross_entropy.init(DOMAINS, STEPS, task.objective_options)
    yield from trainer.steps(Position(0, state, np.zeros(DOMAINS, dtype=np.int64)))


def built(of: Setting) -> LanguageModel:
    return folders.build(of.config, 0, precision=of.training.precision)


def naive(of: Setting) -> Steps:
    """A backward for every example, all their gradients in memory, and the picks once more."""
    device, count, length = of.place.device, of.training.batch_size, of.training.sequence_length
    lm = built(of).to(device)
    parameters = list(lm.parameters())
    optimizer = optim.build(lm, of.training)

    def gradient(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [part.flatten() for part in torch.autograd.grad(lm(tokens).mean(), parameters)]
        )

    at = 0
    while True:
        domain, sequence = np.zeros(count, np.int64), (at + np.arange(count)) % 512
        tokens = read(of.store, "train", domain, sequence, length).tokens.to(device)
        rows = torch.stack([gradient(tokens[i : i + 1]) for i in range(count)])
        picks = greats.pick(
            rows @ gradient(tokens[:2]), rows @ rows.T, count // 2, 1e-3, 1.0, 0.95
        ).picked
        del rows
        lm(tokens[picks]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        at += count
        yield None


SIDES: dict[str, Callable[[Setting], Steps]] = {
    "plain": lambda of: training(of, "plain", None),
    "sketched": lambda of: training(of, "sketched", BatchSelectionOptions(method="greats")),
    "exact": lambda of: training(
        of, "exact", BatchSelectionOptions(method="greats", route="exact")
    ),
    "two_passes": lambda of: training(
        of, "two_passes", BatchSelectionOptions(method="greats"), parts=2
    ),
    "naive": naive,
}


def measure(given: argparse.Namespace) -> common.Result:
    """The ratios of every model; those of the last one also under their bare names."""
    torch.set_num_threads(given.threads)
    ratios: dict[str, common.Ratio] = {}
    figures: dict[str, Any] = {"threads": given.threads, "clock": given.clock}
    for name in given.model[:1] if given.quick else given.model:
        model_ratios, figures[name] = of_model(name, given)
        ratios |= {f"{name}.{key}": value for key, value in model_ratios.items()}
    return common.Result(model_ratios | ratios, figures)


def of_model(
    name: str, given: argparse.Namespace
) -> tuple[dict[str, common.Ratio], dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # what the trainers say
        of = step.setting(name, given, folder)
        device = of.place.device
        sides = [side for side in SIDES if side in given.sides]
        turns = {}
        for side in sides:
            steps = stack.enter_context(contextlib.closing(SIDES[side](of)))
            turns[side] = step.turn(device, steps, TURN if side != "naive" else 1)
        clock = time.process_time if given.clock == "cpu" else time.perf_counter
        times = common.alternate(
            turns, given.rounds or (3 if given.quick else 10), warm_up=1, clock=clock
        )
    seconds = {
        side: statistics.median(rounds) / (TURN if side != "naive" else 1)
        for side, rounds in times.items()
    }
    memory = {side: _peak(name, side, given) for side in sides}
    common.table(
        f"{name}: {of.training.batch_size} candidates of {of.training.sequence_length} tokens",
        ("side", "ms a step", "over plain", "peak MB"),
        [
            (side, 1e3 * seconds[side], seconds[side] / seconds["plain"], memory[side])
            for side in sides
        ],
    )
    per_step = {
        side: [t / (TURN if side != "naive" else 1) for t in rounds]
        for side, rounds in times.items()
    }
    ratios = {
        f"{side}_over_plain_on_candidates": common.ratio(per_step[side], per_step["plain"])
        for side in sides
        if side != "plain"
    }
    return ratios, {"seconds_per_step": seconds, "peak_megabytes": memory}


def _peak(name: str, side: str, given: argparse.Namespace) -> float:
    """Peak memory in MB of a process that takes a few steps of one side, above what it has before
    them."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.greats",
        "--model",
        name,
        "--peak",
        side,
        "--device",
        given.device,
    ]
    sizes = [
        f"--{key}={value}"
        for key in ("vocabulary", "batch", "length")
        if (value := getattr(given, key))
    ]
    done = subprocess.run(
        [*command, *sizes, f"--precision={given.precision}", f"--threads={given.threads}"],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def _peak_here(side: str, given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        of = step.setting(given.model[0], given, Path(folder))
        # The peak begins anew, after the store was written.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident()
        with contextlib.closing(SIDES[side](of)) as steps:
            for _ in range(3):
                next(steps)
        peak = _resident() - before
        if of.place.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e6
    print(peak)


def _resident() -> float:
    """Peak resident memory of this process in MB."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return float(line.split()[1]) / 1e3


def options(parser: argparse.ArgumentParser) -> None:
    step.options(parser)
    parser.add_argument(
        "--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="plain is always one"
    )
    parser.add_argument(
        "--peak", choices=list(SIDES), help="print the peak memory of one side alone, in MB"
    )


if __name__ == "__main__":
    if "--peak" in sys.argv:
        parser = argparse.ArgumentParser()
        options(parser)
        parsed = parser.parse_args()
        _peak_here(parsed.peak, parsed)
    else:
        common.main("greats", __doc__, measure, options)

"""What the loss without logits saves and costs: peak memory of a training step by vocabulary, fused
with the output projection and with plain logits, without the embedding's parameters, gradient and
optimiser states; and the time of projection, loss and backward, fused over plain, by shape.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import common, step
from doremi_train.model import language_model
from doremi_train.model.projection import Projection

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler talks

VOCABULARIES = (1 << 10, 1 << 13, 1 << 15, 1 << 17)
SHAPES = [
    (tokens, width, vocabulary)
    for tokens in (1024, 4096)
    for width in (64, 256)
    for vocabulary in VOCABULARIES
]
LARGEST = 1 << 28  # logits that the plain side of a shape may have


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(given.threads)
    ratios: dict[str, common.Ratio] = {}
    peaks = {
        vocabulary: _peaks(vocabulary, given)
        for vocabulary in (VOCABULARIES[1::2] if given.quick else VOCABULARIES)
    }
    for side in ("fused", "plain"):
        # Counted, not measured: it has no spread.
        exact = peaks[1 << 17][side] / peaks[1 << 13][side]
        name = "" if side == "fused" else "_plain"
        ratios[f"peak_128k_over_8k_vocabulary{name}"] = common.Ratio(exact, exact, exact)
    common.table(
        f"peak memory of a step of {given.model}, MB",
        ("vocabulary", "fused", "plain"),
        [
            (vocabulary, peak["fused"] / 1e6, peak["plain"] / 1e6)
            for vocabulary, peak in peaks.items()
        ],
    )
    rows = []
    for shape in SHAPES[1:6:4] if given.quick else SHAPES:
        if shape[0] * shape[2] <= LARGEST:
            times = times_of(*shape, given)
            ratio = common.ratio(times["fused"], times["plain"])
            ratios["fused_over_plain_{}x{}x{}".format(*shape)] = ratio
            taken = (
                "fused"
                if language_model.fuses(shape[0], shape[2], shape[1], _device(given).type)
                else "plain"
            )
            rows.append(
                (
                    *shape,
                    *(1e3 * statistics.median(times[side]) for side in ("fused", "plain")),
                    ratio,
                    taken,
                )
            )
    common.table(
        "projection, loss and backward",
        ("tokens", "width", "vocabulary", "fused ms", "plain ms", "ratio", "taken"),
        rows,
    )
    return common.Result(ratios, {"threads": given.threads, "peak_bytes": peaks})


def _device(given: argparse.Namespace) -> torch.device:
    return torch.device("cuda" if given.device == "auto" and torch.cuda.is_available() else "cpu")


# ── Memory ──────────────────────────────────────────────────────────────────────────


def _peaks(vocabulary: int, given: argparse.Namespace) -> dict[str, int]:
    """Bytes of a step beyond what stays, and beyond the gradient of the embedding."""
    size = argparse.Namespace(**vars(given) | {"vocabulary": vocabulary})
    peaks = {}
    for side in ("fused", "plain"):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            of = step.setting(given.model, size, Path(folder))._replace(fused=side == "fused")
            with contextlib.closing(step.plain(of)) as steps:
                for _ in range(2):  # with the optimiser's states, and the next batch read
                    next(steps)
                peak = peak_of(steps, of.place.device)
        peaks[side] = peak - 4 * vocabulary * of.config["hidden_size"]
    return peaks


def peak_of(steps: step.Steps, device: torch.device) -> int:
    """The most bytes that torch's allocator has given out at a time during a step, beyond those
    before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        next(steps)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        next(steps)
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


# ── Time ────────────────────────────────────────────────────────────────────────────


def times_of(tokens: int, width: int, vocabulary: int, given: argparse.Namespace) -> common.Times:
    device = _device(given)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device)
    fused = Projection(head)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    at_once = language_model.logits_at_once(tokens, vocabulary, device.type)

    def backward(losses: torch.Tensor) -> None:
        losses.sum().backward()
        head.weight.grad = hidden.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()

    def on(side: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
                losses = side()
            backward(losses)

        return work

    sides = {
        "fused": on(lambda: fused(hidden, targets, at_once)),
        "plain": on(lambda: F.cross_entropy(head(hidden), targets, reduction="none")),
    }
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    return common.alternate(sides, given.rounds or (3 if given.quick else 9), clock=clock)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="a preset; default: tiny")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step; default: 8")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence; default: 128")
    step.common_options(parser)


if __name__ == "__main__":
    common.main("memory", __doc__, measure, options)

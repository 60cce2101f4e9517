"""What influence costs an example: gradients in batches with a sparse projection, or straight
against the targets, beside the published way, one example at a time with a dense projection; on
LoRA of the paper's rank and of a small one.

The dense projection is given its matrix: that of the published code is drawn again for every 16
examples, which is not counted here. All sides take AdamW's direction at the same checkpoint.
"""

import argparse
import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from doremi_train.methods import less
from doremi_train.model import language_model, lora
from doremi_train.model.lora import LoraOptions
from doremi_train.selection.examples import influence
from doremi_train.selection.examples.influence import Checkpoint, Coded

# Of a projection; examples, and numbers of a gradient, projected at once.
SIZE, TOGETHER, BLOCK = (
    8192,
    16,
    4096,
)
OPTIONS = less.Options()


class Setting(NamedTuple):
    at: Checkpoint
    pool: list[Coded]
    targets: list[dict[str, Tensor]]
    tokens: int  # of a batch
    device: torch.device


def measure(given: argparse.Namespace) -> common.Result:
    """The ratios for every rank; those of the first one, the paper's, also under their bare
    names."""
    torch.set_num_threads(given.threads)
    ratios: dict[str, common.Ratio] = {}
    figures: dict[str, Any] = {"threads": given.threads}
    for rank in reversed(given.ranks):
        rank_ratios, figures[f"rank_{rank}"] = of_rank(rank, given)
        ratios |= {f"rank_{rank}.{key}": value for key, value in rank_ratios.items()}
    return common.Result(rank_ratios | ratios, figures)


def of_rank(rank: int, given: argparse.Namespace) -> tuple[dict[str, common.Ratio], dict[str, Any]]:
    count = given.examples or (8 if given.quick else 32)
    of = setting(rank, count, 32, given)
    matrix = torch.randint(0, 2, (BLOCK, SIZE), device=of.device).float() * 2 - 1
    sides = {
        "published": lambda: published(of, matrix),
        "one_at_a_time": lambda: published(of, None),
        "features": lambda: features(of),
        "direct": lambda: direct(of, 1),
    }
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    times = common.alternate(sides, given.rounds or (2 if given.quick else 6), clock=clock)
    ours = times["features"]
    growth = common.alternate(
        {
            "half_the_pool": lambda: direct(of._replace(pool=of.pool[::2]), 1),
            "pool": lambda: direct(of, 1),
            "8_targets": lambda: direct(of, 8),
            "32_targets": lambda: direct(of, 32),
            "2_checkpoints": lambda: direct(of._replace(pool=of.pool * 2), 1),
        },
        3,
        clock=clock,
    )
    seconds = {name: float(np.median(rounds)) / count for name, rounds in times.items()}
    common.table(
        f"LoRA of rank {rank}: {numbers(of):,} of {every(of):,} parameters, {count} examples",
        ("side", "ms an example", "over features"),
        [(name, 1e3 * took, took / seconds["features"]) for name, took in seconds.items()],
    )
    ratios = {
        "one_at_a_time_dense_over_ours": common.ratio(times["published"], ours),
        "one_at_a_time_dense_over_direct": common.ratio(times["published"], times["direct"]),
        "one_at_a_time_over_ours": common.ratio(times["one_at_a_time"], ours),
    }
    of_growth = {
        name: float(np.median(rounds)) / float(np.median(growth["pool"]))
        for name, rounds in growth.items()
    }
    return ratios, {
        "seconds_per_example": seconds,
        "parameters": [numbers(of), every(of)],
        "over_pool": of_growth,
    }


def setting(rank: int, count: int, targets: int, given: argparse.Namespace) -> Setting:
    """A model after a few steps of AdamW, and random examples of 32 to 160 tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device = torch.device(given.device)
    config = AutoConfig.for_model(
        "llama", vocab_size=given.vocabulary, hidden_size=given.width,
        intermediate_size=4 * given.width,
        num_hidden_layers=given.layers, num_attention_heads=max(1, given.width // 64),
        pad_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    with device:  # a large model is initialised there much sooner
        inner = AutoModelForCausalLM.from_config(config)
    options = LoraOptions(
        rank=rank, alpha=4.0 * rank, targets=("q_proj", "k_proj", "v_proj", "o_proj")
    )
    lora.add(inner, options, 0, "rank")
    tuning = language_model.CompletionModel(inner, precision=given.precision).to(device)
    random = np.random.default_rng(0)
    pool = [
        random.integers(0, given.vocabulary, length).astype(np.int32)
        for length in random.integers(32, 161, count)
    ]
    optimizer = torch.optim.AdamW([p for p in tuning.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        for _, batch in influence.batches(pool[:8], 1 << 12, device):
            influence.losses(tuning, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    at = Checkpoint(tuning.eval(), influence.moments(tuning, optimizer))
    drawn = [
        {name: torch.randn_like(m.first) for name, m in at.moments.items()} for _ in range(targets)
    ]
    return Setting(at, pool, drawn, given.tokens, device)


def features(of: Setting) -> None:
    for _, batch in influence.batches(of.pool, of.tokens, of.device):
        influence.features(of.at, batch, SIZE, 0, OPTIONS)
    _wait(of)


def direct(of: Setting, targets: int) -> None:
    for _, batch in influence.batches(of.pool, of.tokens, of.device):
        influence.cosines(of.at, batch, of.targets[:targets], OPTIONS)
    _wait(of)


def published(of: Setting, matrix: Tensor | None) -> None:
    """A backward for every example, its whole direction as one vector, and 16 of these projected by
    a dense matrix."""
    named = {name: p for name, p in of.at.model.named_parameters() if p.requires_grad}
    moments = [
        torch.cat([getattr(of.at.moments[n], key).flatten() for n in named])
        for key in ("first", "second")
    ]
    moment = next(iter(of.at.moments.values()))
    waiting: list[Tensor] = []
    for number, example in enumerate(of.pool, 1):
        batch = torch.from_numpy(example).long()[None].to(of.device)
        gradient = torch.autograd.grad(
            influence.losses(of.at.model, batch).sum(), list(named.values())
        )
        whole = torch.cat([part.flatten() for part in gradient])
        waiting.append(
            less.direction(whole, moment._replace(first=moments[0], second=moments[1]), OPTIONS)
        )
        if matrix is not None and (len(waiting) == TOGETHER or number == len(of.pool)):
            rows = torch.stack(waiting)
            total = rows.new_zeros(len(rows), SIZE)
            for first in range(0, rows.shape[1], BLOCK):
                piece = rows[:, first : first + BLOCK]
                total.addmm_(piece, matrix[: piece.shape[1]])
            waiting = []
        elif matrix is None:
            waiting = []
    _wait(of)


def _wait(of: Setting) -> None:
    if of.device.type == "cuda":
        torch.cuda.synchronize()


def numbers(of: Setting) -> int:
    """Trained parameters."""
    return sum(m.first.numel() for m in of.at.moments.values())


def every(of: Setting) -> int:
    return sum(math.prod(p.shape) for p in of.at.model.parameters())


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[128, 16], help="of LoRA, on q, k, v, o"
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--examples", type=int, help="of the pool")
    parser.add_argument("--tokens", type=int, default=512, help="of a batch; 8192 on a GPU")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: of this process, on a busy machine",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    common.main("less", __doc__, measure, options)

"""Many small proxies as one batched model, beside one after another: tokens a second of whole
training steps, with clipping and optimiser, of S models of a size. It decides whether such a model
is worth building into the trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.gpu import sized
from benchmarks.gpu.record import Record, at_most, main
from benchmarks.gpu.stacked import Stacked
from doremi_train.model import configs, folders, optim
from doremi_train.model.configs import ModelOptions
from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions

OPTIONS = OptimizerOptions()
CLIP = 1.0
_SAME = at_most(1e-3)  # nats, after some steps in float32


class Size(NamedTuple):
    name: str
    preset: str
    vocabulary: int
    wider: dict[str, int]  # than the preset
    precision: str  # of what is timed


# 0.06M, 0.17M and 15M.
_WIDER = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
SIZES = (
    Size("nano", "nano", 1024, {}, "fp32"),
    Size("tiny", "tiny", 1024, {}, "fp32"),
    Size("15M", "small", 12288, _WIDER, "bf16"),
)


class Batch(NamedTuple):
    """Of every model and step."""

    sequences: int
    length: int


_BATCH, _REHEARSED_BATCH = Batch(32, 128), Batch(2, 16)
_REHEARSED = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def measure(record: Record) -> None:
    torch.set_num_threads(1)
    counts = (1, 3) if record.rehearse else (1, 8, 32)
    cases = [(size, count) for size in SIZES for count in counts]
    models: list[LanguageModel] = []
    for number, (size, count) in enumerate(cases):
        if count == counts[0]:
            models = [
                built(size, seed, record.rehearse).to(record.device) for seed in range(counts[-1])
            ]
            parameters = sum(p.numel() for p in models[0].parameters())
            record.figure(f"{size.name}: parameters", parameters / 1e6, "10⁶")
        seconds = record.left() / (len(cases) - number) / 2
        work = partial(together, record, size, models[:count], seconds)
        if not sized.fits(record.device, work):
            record.not_measured(f"{size.name}, S = {count}", "does not fit into memory")
        sized.empty(record.device)


def together(record: Record, size: Size, models: list[LanguageModel], seconds: float) -> None:
    """Write what S models are worth as one; and first, that they are the same."""
    name, batch = f"{size.name}, S = {len(models)}", _REHEARSED_BATCH if record.rehearse else _BATCH
    shape = (len(models), batch.sequences, batch.length + 1)
    vocabulary: int = models[0].inner.config.vocab_size
    tokens = torch.randint(vocabulary, shape, device=record.device)
    apart = difference(models, tokens, steps=3)
    record.figure(f"{name}: losses differ by at most", apart, "nats", _SAME)
    with computing(models, size.precision):
        sides = {
            "one by one": one_by_one(models, tokens),
            "batched": as_one(Stacked(models), tokens),
        }
        turns = {side: partial(_whole, turn, record.device) for side, turn in sides.items()}
        found = sized.rounds(turns, seconds, 9)
    for side, taken in sized.median(found).items():
        record.figure(f"{name}: {side}", tokens[..., 1:].numel() / taken, "tokens/s")
    gain = common.ratio(found["one by one"], found["batched"])
    record.figure(f"{name}: one by one over batched", gain)


def _whole(turn: Callable[[], Tensor], device: torch.device) -> None:
    turn()
    sized.wait(device)


@contextmanager
def computing(models: list[LanguageModel], precision: str) -> Iterator[None]:
    """Give models another precision than float32 for a while."""
    for model in models:
        model.precision = precision
    yield
    for model in models:
        model.precision = "fp32"


def difference(models: list[LanguageModel], tokens: Tensor, steps: int) -> float:
    """The largest difference of any token's loss between the two, over some steps of training that
    begin alike."""
    batched = as_one(Stacked(models), tokens)
    apart = one_by_one(models, tokens)
    return max(float((batched() - apart()).abs().max()) for _ in range(steps))


def one_by_one(models: list[LanguageModel], tokens: Tensor) -> Callable[[], Tensor]:
    """A step of every model on its row of tokens (S, B, T + 1); gives the losses (S, B, T)."""
    optimizers = [optim.build(model, OPTIONS) for model in models]

    def turn() -> Tensor:
        found = []
        for model, optimizer, row in zip(models, optimizers, tokens, strict=True):
            losses = model(row)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            found.append(losses.detach())
        return torch.stack(found)

    return turn


def as_one(stacked: Stacked, tokens: Tensor) -> Callable[[], Tensor]:
    """The same step of all of them together."""
    optimizer = stacked.optimizer(OPTIONS)

    def turn() -> Tensor:
        losses = stacked.losses(tokens)
        losses.mean((1, 2)).sum().backward()
        stacked.clip(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return losses.detach()

    return turn


def built(size: Size, seed: int, rehearse: bool) -> LanguageModel:
    preset: Any = configs.preset(size.preset, "--model")
    config = {**preset["config"], **(_REHEARSED if rehearse else size.wider)}
    resolved = configs.resolve(
        ModelOptions(**{**preset, "config": config}),
        64 if rehearse else size.vocabulary,
        0,
        _BATCH.length,
    )
    return folders.build(resolved, seed)


if __name__ == "__main__":
    main("proxies", measure)

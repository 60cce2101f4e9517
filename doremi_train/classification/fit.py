"""Fitting a classifier: batches in an order that is a function of the seed, losses and weights of
examples."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from doremi_train.classification import figures
from doremi_train.classification.models import ClassifierOptions, Kind, Table
from doremi_train.methods import importance


class NotFinite(Exception):
    """A classifier was trained to nothing. Exit code 1, one message."""

    exit_code = 1


class Fitted(NamedTuple):
    model: nn.Module  # as after its best epoch
    epoch: int  # that one, from 1


def fit(
    kind: Kind,
    classes: int,
    table: Table,
    options: ClassifierOptions,
    weighting: importance.Options,
    seed: int,
    device: torch.device,
    reference: Tensor | None = None,
    validation: Table | None = None,
    watch: Callable[[dict[str, float]], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train a new model; the best epoch is that of the highest validation accuracy, and of those
    the lowest loss.

    `reference` (N,) is the column that `weighting` reads: losses of the checker, or of imp its
    `log_ratio`. Without `validation` the last epoch counts. `watch` gets a line after every step,
    `check` is called after every epoch.
    """
    torch.manual_seed(seed)
    model = kind.build(classes).to(device)
    decay = options.weight_decay
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=decay, fused=True
    )
    state, step = importance.init(1, 0, weighting), 0
    in_epoch = math.ceil(len(table.label) / options.batch_size)
    epochs = max(options.epochs, math.ceil(options.least_steps / in_epoch))
    best, best_epoch, kept = (-1.0, 0.0), epochs, None
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in order(len(table.label), seed, epoch).split(options.batch_size):
            # (B, 1): a label is a sequence of one token
            losses = _losses(model, table, rows, device)[:, None]
            column = None if reference is None else reference[rows, None].to(device)
            domain = torch.zeros(len(rows), dtype=torch.int64, device=device)
            stats = importance.observe(losses, column, domain, 1, weighting)
            stats = importance.Stats(*(part.cpu() for part in stats))
            state = importance.update(state, stats, weighting)
            weights = importance.weigh(state, domain, stats.tokens, weighting, losses, column)
            loss = (weights * losses).sum()
            optimizer.param_groups[0]["lr"] = options.learning_rate * (
                1 - step / (epochs * in_epoch)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            watch(
                {
                    "step": step,
                    "loss": float(stats.loss / stats.tokens),
                    "effective_sample_size": float(state.effective),
                }
            )
        check()
        if validation is not None:
            logs = log_probabilities(model, validation, device)
            score = (
                figures.accuracy(logs, validation.label),
                -float(figures.label_probabilities(logs, validation.label).neg().mean()),
            )
            if score > best:
                best, best_epoch = score, epoch
                kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)
    return Fitted(model.eval(), best_epoch)


def order(count: int, seed: int, epoch: int) -> Tensor:
    """Examples (N,) in the order of an epoch."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(mixed[0]) >> 1))


def _losses(model: nn.Module, table: Table, rows: Tensor, device: torch.device) -> Tensor:
    """Losses (B,) in nats."""
    logits = model(*_batch(table, rows, device))
    return nn.functional.cross_entropy(logits, table.label[rows].to(device), reduction="none")


def _batch(table: Table, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L), no wider than the longest of them."""
    length = table.length[rows]
    width = max(1, int(length.max()))
    ids = table.ids[rows, :width]
    mask = (torch.arange(width) < length[:, None]).float()
    return ids.to(device), mask.to(device)


@torch.no_grad()
def log_probabilities(
    model: nn.Module, table: Table, device: torch.device, batch: int = 256
) -> Tensor:
    """Log-probabilities (N, C), float64 on the host, the model in evaluation mode.
    Raises NotFinite where training led to none."""
    training = model.training
    model.eval()
    parts = [
        model(*_batch(table, rows, device)).double().cpu()
        for rows in torch.arange(len(table.label)).split(batch)
    ]
    model.train(training)
    logs = torch.cat(parts).log_softmax(1)
    if logs.isnan().any():
        raise NotFinite(
            "classify: what the classifier says is not finite; lower classify.learning_rate or "
            "classify.weight_decay"
        )
    return logs

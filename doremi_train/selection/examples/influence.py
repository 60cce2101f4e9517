"""What `methods.less` needs of a model: gradients of examples, batch by batch, and AdamW's
direction for each of them.

No vector as long as the parameters exists for an example: of a layer's gradients a block of rows is
made from the factors of `gradients.capture`, turned into directions, multiplied or projected, and
dropped.

n examples of a batch, T tokens, S subtasks, k numbers of a projection.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from doremi_train.data.chat import padded
from doremi_train.gradients import capture, products
from doremi_train.gradients.factors import Direction, Examples
from doremi_train.methods import less
from doremi_train.methods.less import Moments, Options

Coded = NDArray[np.int32]  # (length,) ids; of a token that carries no loss its complement ~id


class Checkpoint(NamedTuple):
    """A model of the warm-up and what AdamW knew then. The model gives losses (n, T) of tokens (n,
    T + 1); a token that carries no loss stands there as its complement ~id, and its loss is 0."""

    model: nn.Module
    moments: Mapping[str, Moments]  # by parameter name


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Moments]:
    """AdamW's state of every trainable parameter. Raises TypeError for another optimiser."""
    if not isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam):
        raise TypeError(
            f"LESS follows AdamW's direction, and this run has {type(optimizer).__name__}"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    states = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group, state = groups[id(parameter)], optimizer.state.get(parameter, {})
            zero = torch.zeros_like(parameter, requires_grad=False)
            first, second = (state.get(key, zero) for key in ("exp_avg", "exp_avg_sq"))
            states[name] = Moments(
                first, second, int(state.get("step", 0)), group["betas"], group["eps"]
            )
    return states


def batches(
    examples: Sequence[Coded], tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor]]:
    """(numbers (n,), tokens (n, T + 1)) of examples of equal or similar length, at most so many
    `tokens` together with their padding, or one example."""
    waiting: list[int] = []
    for number in [*sorted(range(len(examples)), key=lambda n: (len(examples[n]), n)), None]:
        if waiting and (number is None or (len(waiting) + 1) * len(examples[number]) > tokens):
            yield waiting, torch.from_numpy(padded([examples[n] for n in waiting])).to(device)
            waiting = []
        if number is not None:
            waiting.append(number)


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    """(n, T) what every token adds to the mean loss of its example."""
    token_losses = model(batch)
    return token_losses / (batch[:, 1:] >= 0).sum(1, keepdim=True)


@torch.enable_grad()
def factors(model: nn.Module, batch: Tensor) -> Examples:
    """The gradients of the mean losses of the examples of a batch."""
    shape = (len(batch), batch.shape[1] - 1)
    return capture.capture(model, lambda: losses(model, batch), shape).examples


@torch.no_grad()
def target(model: nn.Module, batched: Iterable[Tensor], options: Options) -> dict[str, Tensor]:
    """What a subtask's examples are to their cosine with anything: the mean of their gradients,
    with length 1; or the mean of their gradients of length 1, whose products with a vector of
    length 1 are the mean of cosines."""
    total: dict[str, Tensor] = {}
    count = 0
    for batch in batched:
        examples = factors(model, batch)
        weights = torch.ones(len(batch), device=batch.device)
        if options.cosine == "mean":
            weights = products.norm2(examples).rsqrt()
        for name, part in products.weighted(examples, weights).items():
            total[name] = total[name] + part if name in total else part
        count += len(batch)
    length = float(count)
    if options.cosine == "of_mean":
        length = sum(float(part.double().square().sum()) for part in total.values()) ** 0.5
    return {name: part / length for name, part in total.items()}


@torch.no_grad()
def cosines(
    checkpoint: Checkpoint, batch: Tensor, targets: Sequence[Direction], options: Options
) -> Tensor:
    """(n, S) float64 of the directions of a batch and what `target` gave: exact."""
    dots, squares = [], []
    for name, start, part in _directions(checkpoint, batch, options):
        end = start + part.shape[1]
        against = torch.stack(
            [direction[name].flatten()[start:end].to(part.dtype) for direction in targets], 1
        )
        dots.append((part @ against).double())
        squares.append(part.square().sum(1).double())
    return torch.stack(dots).sum(0) / torch.stack(squares).sum(0).sqrt()[:, None]


@torch.no_grad()
def features(
    checkpoint: Checkpoint, batch: Tensor, size: int, seed: int, options: Options
) -> Tensor:
    """(n, k) projections of the directions of a batch."""
    projection = None
    for name, start, part in _directions(checkpoint, batch, options):
        projection = projection or less.Projection(len(part), size, seed, part)
        projection.add(name, checkpoint.moments[name].first.numel(), start, part)
    assert projection is not None
    return projection.result()


@torch.no_grad()
def feature(direction: Direction, size: int, seed: int) -> Tensor:
    """(k,) the projection of one vector, to be multiplied with `features`."""
    projection = less.Projection(1, size, seed, next(iter(direction.values())))
    for name, part in sorted(direction.items()):
        projection.add(name, part.numel(), 0, part.reshape(1, -1))
    return projection.result()[0]


def _directions(
    checkpoint: Checkpoint, batch: Tensor, options: Options
) -> Iterator[tuple[str, int, Tensor]]:
    """(name, number of the first, (n, numbers)) of every parameter in pieces, sorted by name."""
    for name, uses in sorted(factors(checkpoint.model, batch).items()):
        known = checkpoint.moments[name]
        width = known.first[0].numel() if known.first.dim() else 1
        for rows, part in products.materialised(uses):
            here = known._replace(first=known.first[rows], second=known.second[rows])
            directions = less.direction(
                part.to(torch.promote_types(part.dtype, torch.float32)), here, options
            )
            yield name, rows.start * width, directions.flatten(1)

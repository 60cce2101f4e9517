"""What is asked of per-example gradients is computed from their factors, what a layer saw; they
never exist.

A linear layer with inputs a_t and output gradients b_t has the gradient Σ_t b_t a_tᵀ of an example.
From one capture:

    ⟨g_i, G⟩     Σ_t b_itᵀ G a_it                  `tokens`, `dot`: also per token
    ⟨g_i, g_j⟩   Σ_t,s (a_it · a_js)(b_it · b_js)  `gram`, `norm2`; or rows, a block at a time
    Σ_i w_i g_i  Σ_i,t w_i b_it a_itᵀ              `weighted`: a step without another backward
    R g_i S      Σ_t (Rᵀ b_it)(Sᵀ a_it)ᵀ           `sketch`: few numbers whose dots are ⟨g_i, g_j⟩
                                                   on average

The gradient of a parameter is a tuple of factors, one for each use, and all that is linear adds up
over them. A Gram does not: a tied embedding and head have cross terms, so there the rows are added
before the product.

n examples, T tokens of each, p outputs and d inputs of a layer, J directions, r size of a sketch.
Sums are float32 where factors are bf16, float64 where they are.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from doremi_train.gradients.factors import Direction, Examples, Factor, blocks, in_place, wide

# Gradients (n, rows, …) themselves, a block of rows after the other.
Kept = Mapping[str, tuple[Tensor, ...]]


class Products(NamedTuple):
    gram: Tensor  # (n, n) ⟨g_i, g_j⟩
    dots: Tensor  # (n, J) ⟨g_i, G_j⟩
    kept: Kept  # for `weighted`


def products(examples: Examples, directions: tuple[Direction, ...] = (), keep: int = 0) -> Products:
    """All inner products in one pass: exact, by the cheaper of two routes for every parameter.

    Rows cost n · T · p · d multiplications and are materialised a block at a time; the token route
    n² T² (p + d), which is less where all tokens together are fewer than about half of the width.
    Of the rows that are materialised up to `keep` numbers are kept: a weighted sum of them costs
    almost nothing more.
    """
    gram, dots, kept = [], [], {}
    for name, uses in examples.items():
        against = [direction[name] for direction in directions]
        pairs = uses[0].gram() if len(uses) == 1 else None
        if pairs is not None:
            parts = [uses[0].tokens(direction).sum(1) for direction in against]
            along = torch.stack(parts, 1) if parts else pairs.new_zeros(len(pairs), 0)
        else:
            numbers = len(uses[0].floats) * math.prod(uses[0].shape)
            whole = len(uses) > 1 or not uses[0].sparse  # else few rows are looked at
            rows: list[Tensor] | None = [] if numbers <= keep and whole else None
            pairs, along = _pairs_by_row(uses, against, rows)
            if rows:
                kept[name] = tuple(rows)
                keep -= numbers
        gram.append(pairs)
        dots.append(along)
    return Products(torch.stack(gram).sum(0), torch.stack(dots).sum(0), kept)


def gram(examples: Examples) -> Tensor:
    """(n, n) ⟨g_i, g_j⟩."""
    return products(examples).gram


def dot(examples: Examples, *directions: Direction) -> Tensor:
    """(n, J) ⟨g_i, G_j⟩."""
    return torch.stack([tokens(examples, direction).sum(1) for direction in directions], 1)


def tokens(examples: Examples, direction: Direction) -> Tensor:
    """(n, T) what every token adds to ⟨g_i, G⟩; summed over a packed document, that document's
    own."""
    return torch.stack(
        [use.tokens(direction[name]) for name, uses in examples.items() for use in uses]
    ).sum(0)


def norm2(examples: Examples) -> Tensor:
    """(n,) |g_i|²."""
    return torch.stack(
        [
            part.flatten(1).to(wide(part)).square().sum(1)
            for uses in examples.values()
            for _, part in materialised(_compact(uses)[1])
        ]
    ).sum(0)


def weighted(examples: Examples, weights: Tensor, kept: Kept | None = None) -> dict[str, Tensor]:
    """Σ_i weights_i g_i by parameter name, for weights (n,), of what was kept and else from the
    factors; examples of weight 0 cost next to nothing, and may be NaN."""
    chosen = weights.nonzero()[:, 0]
    some = weights[chosen]

    def chosen_of(use: Factor) -> tuple[Factor, Tensor]:
        return (use, weights) if use.skips else (use.at(chosen), some)

    def total(uses: tuple[Factor, ...]) -> Tensor:
        first, *rest = _sparse_last(uses)
        use, own = chosen_of(first)
        gradient = use.weighted(own).to(wide(first.floats))
        for use, own in map(chosen_of, rest):
            gradient = use.added(gradient, own)
        return gradient

    kept = kept or {}
    return {
        name: torch.cat([_sum(part, weights) for part in kept[name]])
        if name in kept
        else total(uses)
        for name, uses in examples.items()
    }


def sketch(examples: Examples, size: int) -> Tensor:
    """(n, R) numbers whose inner products are those of the gradients on average; R is size² or less
    for a parameter.

    The same projection for every call, device and process: it depends on a parameter's name and
    shape alone.
    """
    parts = []
    for name, uses in sorted(examples.items()):
        like = uses[0].floats
        sides = signs(name, uses[0].shape, size, like.device, wide(like))
        first, *rest = (use.sketched(*sides).flatten(1) for use in uses)
        parts.append(sum(rest, first).to(sides[0].dtype))
    return torch.cat(parts, 1)


def sketch_of(direction: Direction, size: int) -> Tensor:
    """(R,) the sketch of one vector, to be multiplied with `sketch` of examples that have the same
    parameters."""
    parts = []
    for name, whole in sorted(direction.items()):
        left, right = signs(name, tuple(whole.shape), size, whole.device, whole.dtype)
        parts.append((left.T @ whole if right is None else left.T @ whole @ right).flatten())
    return torch.cat(parts)


def signs(
    name: str, shape: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The sides (p, r) and (d, r) of a parameter's sketch: random signs, or the identity where that
    is no longer. Of a vector (p, r²)."""
    width = size if len(shape) == 2 else size * size
    sides = [
        _signs(f"{name} {side}", length, width, device, dtype) for side, length in enumerate(shape)
    ]
    return sides[0], sides[1] if len(sides) == 2 else None


def at(examples: Examples, index: Tensor) -> dict[str, tuple[Factor, ...]]:
    """Some of the examples, by index."""
    return {name: tuple(use.at(index) for use in uses) for name, uses in examples.items()}


def materialised(uses: tuple[Factor, ...]) -> Iterator[tuple[slice, Tensor]]:
    """The gradients (n, rows, d) of one parameter, a block of rows after the other, for what is not
    linear in them."""
    p, *d = uses[0].shape
    first, *rest = _sparse_last(uses)
    for rows in blocks(p, len(first.floats) * (d[0] if d else 1)):
        total = first.rows(rows)
        for use in rest:
            total = use.added_rows(total, rows)
        yield rows, total


# ── How ─────────────────────────────────────────────────────────────────────────────


def _pairs_by_row(
    uses: tuple[Factor, ...], directions: list[Tensor], kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Gram and dots of one parameter; the rows are added to `kept`."""
    seen, uses = _compact(uses)
    of_dots = [direction[seen] for direction in directions]
    pairs, dots, start = [], [], 0
    for _, part in materialised(uses):
        if kept is not None:
            kept.append(part)
        flat = part.flatten(1).to(wide(part))  # (n, numbers)
        pairs.append(flat @ flat.T)
        against = [
            direction[start : start + part.shape[1]].flatten().to(flat.dtype)
            for direction in of_dots
        ]
        # A direction is as long as one of the rows: to put several of them into one matrix would be
        # to copy them.
        dots.append(
            torch.stack([flat @ direction for direction in against], 1)
            if against
            else flat.new_zeros(len(flat), 0)
        )
        start += part.shape[1]
    return torch.stack(pairs).sum(0), torch.stack(dots).sum(0)


def _compact(uses: tuple[Factor, ...]) -> tuple[Tensor | slice, tuple[Factor, ...]]:
    """Numbers of the rows of one parameter that are looked at, and its uses over these alone."""
    if len(uses) > 1:
        return slice(None), uses
    seen, use = uses[0].compact()
    return seen, (use,)


def _sparse_last(uses: tuple[Factor, ...]) -> list[Factor]:
    """The uses of one parameter in the order in which they are added up: a tied embedding to what
    its head gave, for another table of its size would be most of the memory."""
    return sorted(uses, key=lambda use: use.sparse)


def _sum(part: Tensor, weights: Tensor) -> Tensor:
    """Σ_i weights_i g_i of materialised gradients (n, rows, …), in float32 at least."""
    chosen = weights.nonzero()[:, 0]
    some = weights[chosen].to(wide(part))
    if not in_place(part):
        return (some @ part[chosen].flatten(1).to(some.dtype)).view(part.shape[1:])
    total = part.new_zeros(part.shape[1:])
    for number, weight in zip(chosen.tolist(), some.tolist(), strict=True):
        total.add_(part[number], alpha=weight)
    return total


@functools.lru_cache(maxsize=4096)
def _signs(name: str, length: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if length <= size:
        return torch.eye(length, device=device, dtype=dtype)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    drawn = torch.randint(2, (length, size), generator=torch.Generator().manual_seed(seed))
    return ((2.0 * drawn - 1.0) / size**0.5).to(device, dtype)

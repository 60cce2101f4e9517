"""Per-example gradients in factors: what is asked of them is computed from what a layer saw, and they never exist.

A linear layer with inputs a_t and output gradients b_t has the gradient Σ_t b_t a_tᵀ of an example. From one capture:

    ⟨g_i, G⟩     Σ_t b_itᵀ G a_it                          `tokens`, `dot`: also per token, and per packed document
    ⟨g_i, g_j⟩   Σ_t,s (a_it · a_js)(b_it · b_js)          `gram`, `norm2`; or rows of g_i, a bounded block at a time
    Σ_i w_i g_i  Σ_i,t w_i b_it a_itᵀ                      `weighted`: a gradient step without another backward
    R g_i S      Σ_t (Rᵀ b_it)(Sᵀ a_it)ᵀ                   `sketch`: few numbers whose dots are ⟨g_i, g_j⟩ on average

The gradient of a parameter is a tuple of factors, one for each use, and all that is linear adds up over them. A Gram
does not: a tied embedding and head have cross terms, so there the rows are added before the product.

n examples, T tokens of each, p outputs and d inputs of a layer, J directions, r size of a sketch. Sums are float32
where factors are bf16, float64 where they are.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

_NUMBERS = 1 << 20  # of materialised rows that may exist at once


class Factor(Protocol):
    """One use of a parameter of shape (p, d), or (p,)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    def rows(self, rows: slice) -> Tensor:
        """(n, rows, d) or (n, rows): these rows of every example's gradient."""

    def tokens(self, direction: Tensor) -> Tensor:
        """(n, T) what every token adds to ⟨g_i, direction⟩."""

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_i weights_i g_i, for weights (n,)."""

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        """(n, …) leftᵀ g_i right, for left (p, r) and right (d, r); of a vector leftᵀ g_i."""

    def at(self, examples: Tensor) -> "Factor":
        """The factor of these examples alone, by index."""

    def regrouped(self, index: Tensor, present: Tensor) -> "Factor":
        """Examples (m, L) of the tokens `index` into (n · T), as far as they are `present`."""


Examples = Mapping[str, tuple[Factor, ...]]  # the gradients of n examples: all uses of every parameter, by its name
Direction = Mapping[str, Tensor]  # one vector as long as the parameters, by their names


class Outer(NamedTuple):
    """Σ_t left_t right_tᵀ: a linear layer."""

    left: Tensor  # (n, T, p)
    right: Tensor  # (n, T, d)
    known: tuple[Tensor, Tensor] | None = None  # (n, T, r) each: their products with the sides of a sketch

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[-1], self.right.shape[-1]

    def rows(self, rows: slice) -> Tensor:
        return self.left[..., rows].mT @ self.right

    def tokens(self, direction: Tensor) -> Tensor:
        return _dot(self.left @ direction.to(self.left.dtype), self.right)

    def weighted(self, weights: Tensor) -> Tensor:
        left, right = self.left, self.right
        if _in_place(left):  # example by example, without a copy of any
            total = left.new_zeros(self.shape)
            for some, weight in _runs(weights):
                total.addmm_(left[some].flatten(0, 1).T, right[some].flatten(0, 1), alpha=weight)
            return total
        if self.shape[0] < self.shape[1]:
            left = left * weights[:, None, None].to(left.dtype)
        else:
            right = right * weights[:, None, None].to(right.dtype)
        return left.flatten(0, 1).T @ right.flatten(0, 1)

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        assert right is not None
        of_left, of_right = self.known or (None, None)
        if of_left is None or of_right is None or of_left.shape[-1] != left.shape[1]:
            of_left, of_right = self.left @ left.to(self.left.dtype), self.right @ right.to(self.right.dtype)
        return of_left.mT @ of_right

    def at(self, examples: Tensor) -> "Outer":
        return Outer(self.left.index_select(0, examples), self.right.index_select(0, examples))

    def regrouped(self, index: Tensor, present: Tensor) -> "Outer":
        return Outer(_regroup(self.left, index, present), _regroup(self.right, index))


class Softmax(NamedTuple):
    """The output projection under a cross-entropy. Its left factor is (softmax − 1 at the target) · gradient: whole
    where it is small, else made again where it is needed, some rows at a time, so that the logits of all tokens never
    exist."""

    hidden: Tensor  # (n, T, d)
    targets: Tensor  # (n, T)
    normalizers: Tensor  # (n, T) log Σ exp(logits)
    gradient: Tensor  # (n, T) of the token's loss
    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    known: Tensor | None = None  # (n, T, r) its product with the left side of a sketch, where a backward left it
    whole: Tensor | None = None  # (n, T, V) itself, where a backward left it

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def left(self, rows: slice) -> Tensor:
        """(n, T, rows)"""
        if self.whole is not None:
            return self.whole[..., rows]
        logits = self.hidden @ self.weight[rows].T.to(self.hidden.dtype)
        if self.bias is not None:
            logits = logits + self.bias[rows].to(logits.dtype)
        found = logits.to(self.normalizers.dtype).sub_(self.normalizers[..., None]).exp_()
        inside = (self.targets >= rows.start) & (self.targets < rows.stop)
        index = (self.targets - rows.start).clamp(0, found.shape[-1] - 1)
        found.scatter_add_(-1, index[..., None], -inside[..., None].to(found.dtype))
        return found.mul_(self.gradient[..., None]).to(self.hidden.dtype)

    def rows(self, rows: slice) -> Tensor:
        return self.left(rows).mT @ self.hidden

    def tokens(self, direction: Tensor) -> Tensor:
        return sum((Outer(self.left(r), self.hidden).tokens(direction[r]) for r in self._blocks()), torch.tensor(0.0))

    def weighted(self, weights: Tensor) -> Tensor:
        if self.whole is not None:
            return Outer(self.whole, self.hidden).weighted(weights)
        right = (self.hidden * weights[:, None, None].to(self.hidden.dtype)).flatten(0, 1)
        found = right.new_empty(self.shape)
        for rows in self._blocks():
            torch.mm(self.left(rows).flatten(0, 1).T, right, out=found[rows])
        return found

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        of_left = self.known
        if of_left is None or of_left.shape[-1] != left.shape[1]:
            of_left = sum((self.left(r) @ left[r].to(self.hidden.dtype) for r in self._blocks()), torch.tensor(0.0))
        assert right is not None
        return of_left.mT @ (self.hidden @ right.to(self.hidden.dtype))

    def at(self, examples: Tensor) -> "Softmax":
        hidden, targets, normalizers, gradient = (field.index_select(0, examples) for field in self[:4])
        whole = None if self.whole is None else self.whole.index_select(0, examples)
        return Softmax(hidden, targets, normalizers, gradient, self.weight, self.bias, whole=whole)

    def regrouped(self, index: Tensor, present: Tensor) -> "Softmax":
        hidden, targets, normalizers = (_regroup(field, index) for field in self[:3])
        gradient = _regroup(self.gradient, index, present)
        return Softmax(hidden, targets, normalizers, gradient, self.weight, self.bias)

    def _blocks(self) -> Iterator[slice]:
        width = self.targets.numel() if self.whole is None else 0
        return blocks(len(self.weight), width)


class SoftmaxBias(NamedTuple):
    """The bias of that projection."""

    of: Softmax

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.of.weight),)

    def rows(self, rows: slice) -> Tensor:
        return self.of.left(rows).sum(1)

    def tokens(self, direction: Tensor) -> Tensor:
        return sum((Sum(self.of.left(r)).tokens(direction[r]) for r in self.of._blocks()), torch.tensor(0.0))

    def weighted(self, weights: Tensor) -> Tensor:
        return torch.cat([Sum(self.of.left(r)).weighted(weights) for r in self.of._blocks()])

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        return sum((Sum(self.of.left(r)).sketched(left[r], None) for r in self.of._blocks()), torch.tensor(0.0))

    def at(self, examples: Tensor) -> "SoftmaxBias":
        return SoftmaxBias(self.of.at(examples))

    def regrouped(self, index: Tensor, present: Tensor) -> "SoftmaxBias":
        return SoftmaxBias(self.of.regrouped(index, present))


class Lookup(NamedTuple):
    """Σ_t e(id_t) values_tᵀ: an embedding."""

    ids: Tensor  # (n, T)
    values: Tensor  # (n, T, d)
    size: int  # V

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.values.shape[-1]

    def rows(self, rows: slice) -> Tensor:
        n, _, d = self.values.shape
        height = min(rows.stop, self.size) - rows.start
        return self.added_rows(self.values.new_zeros(n, height, d, dtype=_wide(self.values)), rows)

    def added_rows(self, total: Tensor, rows: slice) -> Tensor:
        """`total` (n, rows, d), in place, with these rows added to it."""
        n, height, d = total.shape
        inside = (self.ids >= rows.start) & (self.ids < rows.stop)
        of_example = torch.arange(n, device=self.ids.device)[:, None].expand_as(self.ids)[inside]
        place = of_example * height + self.ids[inside] - rows.start
        total.view(n * height, d).index_add_(0, place, self.values[inside].to(total.dtype))
        return total

    def tokens(self, direction: Tensor) -> Tensor:
        return _dot(self.values, direction[self.ids])

    def weighted(self, weights: Tensor) -> Tensor:
        return self.added(self.values.new_zeros(self.shape, dtype=_wide(self.values)), weights)

    def added(self, total: Tensor, weights: Tensor) -> Tensor:
        """`total` (V, d), in place, with Σ_i weights_i g_i added to it."""
        values = self.values.to(total.dtype) * weights[:, None, None].to(total.dtype)
        return total.index_add_(0, self.ids.flatten(), values.flatten(0, 1))

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        assert right is not None
        return left[self.ids].mT @ (self.values @ right.to(self.values.dtype)).to(left.dtype)

    def at(self, examples: Tensor) -> "Lookup":
        return Lookup(self.ids[examples], self.values[examples], self.size)

    def regrouped(self, index: Tensor, present: Tensor) -> "Lookup":
        return Lookup(_regroup(self.ids, index), _regroup(self.values, index, present), self.size)

    def compact(self) -> "Lookup":
        """The same examples over the ids that occur alone; rows in another order, all others being 0."""
        found, ids = self.ids.unique(return_inverse=True)
        return Lookup(ids, self.values, len(found))


class Sum(NamedTuple):
    """Σ_t values_t: a bias, or the scale of a norm."""

    values: Tensor  # (n, T, p)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.values.shape[-1],)

    def rows(self, rows: slice) -> Tensor:
        return self.values[..., rows].sum(1, dtype=_wide(self.values))

    def tokens(self, direction: Tensor) -> Tensor:
        return _dot(self.values, direction)

    def weighted(self, weights: Tensor) -> Tensor:
        rows, chosen = self.rows(slice(0, None)), weights.nonzero()[:, 0]  # others may not be finite: not even 0 times
        return weights[chosen].to(rows.dtype) @ rows[chosen]

    def sketched(self, left: Tensor, right: Tensor | None) -> Tensor:
        return self.rows(slice(0, None)).to(left.dtype) @ left

    def at(self, examples: Tensor) -> "Sum":
        return Sum(self.values[examples])

    def regrouped(self, index: Tensor, present: Tensor) -> "Sum":
        return Sum(_regroup(self.values, index, present))


# ── What is asked of them ───────────────────────────────────────────────────────────


Kept = Mapping[str, tuple[Tensor, ...]]  # gradients (n, rows, …) themselves, a block of rows after the other


class Products(NamedTuple):
    gram: Tensor  # (n, n) ⟨g_i, g_j⟩
    dots: Tensor  # (n, J) ⟨g_i, G_j⟩
    kept: Kept  # for `weighted`


def products(examples: Examples, directions: tuple[Direction, ...] = (), keep: int = 0) -> Products:
    """All inner products in one pass: exact, by the cheaper of two routes for every parameter.

    Rows cost n · T · p · d multiplications and are materialised a block at a time; the token route n² T² (p + d), which
    is less where all tokens together are fewer than about half of the width. Of the rows that are materialised up to
    `keep` numbers are kept: a weighted sum of them costs almost nothing more.
    """
    gram, dots, kept = [], [], {}
    for name, uses in examples.items():
        against = [direction[name] for direction in directions]
        if len(uses) == 1 and isinstance(uses[0], Outer) and _short(uses[0]):
            met, along = _pairs_by_token(uses[0], against)
        else:
            numbers = _examples(uses[0]) * math.prod(uses[0].shape)
            blocks: list[Tensor] | None = [] if numbers <= keep and not _only_lookup(uses) else None
            met, along = _pairs_by_row(uses, against, blocks)
            if blocks:
                kept[name] = tuple(blocks)
                keep -= numbers
        gram.append(met)
        dots.append(along)
    return Products(torch.stack(gram).sum(0), torch.stack(dots).sum(0), kept)


def gram(examples: Examples) -> Tensor:
    """(n, n) ⟨g_i, g_j⟩."""
    return products(examples).gram


def dot(examples: Examples, *directions: Direction) -> Tensor:
    """(n, J) ⟨g_i, G_j⟩."""
    return torch.stack([tokens(examples, direction).sum(1) for direction in directions], 1)


def tokens(examples: Examples, direction: Direction) -> Tensor:
    """(n, T) what every token adds to ⟨g_i, G⟩; summed over a packed document, that document's own."""
    return torch.stack([use.tokens(direction[name]) for name, uses in examples.items() for use in uses]).sum(0)


def norm2(examples: Examples) -> Tensor:
    """(n,) |g_i|²."""
    return torch.stack(
        [part.flatten(1).to(_wide(part)).square().sum(1) for uses in examples.values() for part in _materialised(uses)]
    ).sum(0)


def weighted(examples: Examples, weights: Tensor, kept: Kept | None = None) -> dict[str, Tensor]:
    """Σ_i weights_i g_i by parameter name, for weights (n,), of what was kept and else from the factors; examples of
    weight 0 cost next to nothing, and may be NaN."""
    chosen = weights.nonzero()[:, 0]
    some = weights[chosen]

    def part(use: Factor) -> Tensor:
        return use.weighted(weights) if _passes_over(use) else use.at(chosen).weighted(some)

    def total(uses: tuple[Factor, ...]) -> Tensor:
        # A tied embedding is added to what its head gave: another table of its size would be most of the memory.
        first, *rest = sorted(uses, key=lambda use: isinstance(use, Lookup))
        found = part(first).to(_wide(_first(first)))
        for use in rest:
            found = use.at(chosen).added(found, some) if isinstance(use, Lookup) else found + part(use)
        return found

    kept = kept or {}
    return {
        name: torch.cat([_sum(part, weights) for part in kept[name]]) if name in kept else total(uses)
        for name, uses in examples.items()
    }


def sketch(examples: Examples, size: int) -> Tensor:
    """(n, R) numbers whose inner products are those of the gradients on average; R is size² or less for a parameter.

    The same projection for every call, device and process: it depends on a parameter's name and shape alone.
    """
    parts = []
    for name, uses in sorted(examples.items()):
        sides = signs(name, uses[0].shape, size, _device(uses[0]), _dtype(uses[0]))
        found = [use.sketched(*sides).flatten(1) for use in uses]
        parts.append(sum(found[1:], found[0]).to(sides[0].dtype))
    return torch.cat(parts, 1)


def sketch_of(direction: Direction, size: int) -> Tensor:
    """(R,) the sketch of one vector, to be multiplied with `sketch` of examples that have the same parameters."""
    parts = []
    for name, whole in sorted(direction.items()):
        left, right = signs(name, tuple(whole.shape), size, whole.device, whole.dtype)
        parts.append((left.T @ whole if right is None else left.T @ whole @ right).flatten())
    return torch.cat(parts)


def signs(
    name: str, shape: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The sides (p, r) and (d, r) of a parameter's sketch: random signs, or the identity where that is no longer. Of a
    vector (p, r²)."""
    width = size if len(shape) == 2 else size * size
    sides = [_signs(f"{name} {side}", length, width, device, dtype) for side, length in enumerate(shape)]
    return sides[0], sides[1] if len(sides) == 2 else None


def at(examples: Examples, index: Tensor) -> dict[str, tuple[Factor, ...]]:
    """Some of the examples, by index."""
    return {name: tuple(use.at(index) for use in uses) for name, uses in examples.items()}


def documents(examples: Examples, document: Tensor) -> dict[str, tuple[Factor, ...]]:
    """Packed documents as examples of their own, for sequences whose documents do not attend to each other.

    `document` (n, T) numbers them 0 … m − 1; a token with −1 belongs to none.
    """
    flat = document.flatten()
    count = int(flat.max()) + 1
    order = flat.argsort(stable=True)[int((flat < 0).sum()) :]
    lengths = torch.bincount(flat[flat >= 0], minlength=count)
    position = torch.arange(len(order), device=flat.device) - (lengths.cumsum(0) - lengths)[flat[order]]
    index = torch.zeros(count, int(lengths.max()), dtype=torch.int64, device=flat.device)
    present = torch.zeros_like(index, dtype=torch.bool)
    index[flat[order], position] = order
    present[flat[order], position] = True
    return {name: tuple(use.regrouped(index, present) for use in uses) for name, uses in examples.items()}


def materialised(uses: tuple[Factor, ...]) -> Iterator[tuple[slice, Tensor]]:
    """The gradients (n, rows, d) of one parameter, a block of rows after the other, for what is not linear in them."""
    p, *d = uses[0].shape
    first, *rest = sorted(uses, key=lambda use: isinstance(use, Lookup))  # which is added to what a tied head gave
    for rows in blocks(p, _examples(first) * (d[0] if d else 1)):
        found = first.rows(rows)
        for use in rest:
            if isinstance(use, Lookup) and found.dtype == _wide(use.values):
                use.added_rows(found, rows)
            else:
                found = found + use.rows(rows)
        yield rows, found


def blocks(rows: int, width: int) -> Iterator[slice]:
    """0 … rows in pieces of so few that `width` numbers for each of them stay within bounds."""
    step = max(1, _NUMBERS // max(1, width))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


# ── How ─────────────────────────────────────────────────────────────────────────────


def _pairs_by_token(use: Outer, directions: list[Tensor]) -> tuple[Tensor, Tensor]:
    n, T = use.left.shape[:2]
    left, right = (side.flatten(0, 1) for side in (use.left, use.right))
    met = (left @ left.T).to(_wide(left)) * (right @ right.T)
    dots = [use.tokens(direction).sum(1) for direction in directions]
    return met.view(n, T, n, T).sum((1, 3)), torch.stack(dots, 1) if dots else met.new_zeros(n, 0)


def _pairs_by_row(
    uses: tuple[Factor, ...], directions: list[Tensor], kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Gram and dots of one parameter; the rows are added to `kept`."""
    of_dots = list(directions)
    if _only_lookup(uses):
        of_dots = [direction[uses[0].ids.unique()] for direction in directions]
        uses = (uses[0].compact(),)
    met, dots, start = [], [], 0
    for part in _materialised(uses):
        if kept is not None:
            kept.append(part)
        flat = part.flatten(1).to(_wide(part))  # (n, numbers)
        met.append(flat @ flat.T)
        against = [direction[start : start + part.shape[1]].flatten().to(flat.dtype) for direction in of_dots]
        # A direction is as long as one of the rows: to put several of them into one matrix would be to copy them.
        dots.append(torch.stack([flat @ one for one in against], 1) if against else flat.new_zeros(len(flat), 0))
        start += part.shape[1]
    return torch.stack(met).sum(0), torch.stack(dots).sum(0)


def _materialised(uses: tuple[Factor, ...]) -> Iterator[Tensor]:
    """The gradients (n, rows, d) of one parameter, a block of rows after the other; rows that are 0 left out."""
    if _only_lookup(uses):
        uses = (uses[0].compact(),)
    return (part for _, part in materialised(uses))


def _sum(part: Tensor, weights: Tensor) -> Tensor:
    """Σ_i weights_i g_i of materialised gradients (n, rows, …), in float32 at least."""
    chosen = weights.nonzero()[:, 0]
    some = weights[chosen].to(_wide(part))
    if not _in_place(part):
        return (some @ part[chosen].flatten(1).to(some.dtype)).view(part.shape[1:])
    total = part.new_zeros(part.shape[1:])
    for number, weight in zip(chosen.tolist(), some.tolist(), strict=True):
        total.add_(part[number], alpha=weight)
    return total


def _only_lookup(uses: tuple[Factor, ...]) -> TypeGuard[tuple[Lookup]]:
    """Whether most rows are 0, so that only those of ids that occur are looked at."""
    return len(uses) == 1 and isinstance(uses[0], Lookup)


def _short(use: Outer) -> bool:
    n, T, p = use.left.shape
    d = use.right.shape[-1]
    return n * T * (p + d) < p * d and (n * T) ** 2 <= _NUMBERS


def _passes_over(use: Factor) -> bool:
    """Whether its weighted sum costs least as it is, rather than with a copy of the examples of other weights than 0: a
    sum over tokens is read but once."""
    if isinstance(use, Outer):
        return _in_place(use.left)
    if isinstance(use, Softmax):
        return use.whole is not None and _in_place(use.whole)
    return isinstance(use, Sum)


def _in_place(left: Tensor) -> bool:
    """Whether products of examples are best added up one after the other: on a GPU each would be a launch, and in bf16
    the sum would be rounded as often."""
    return left.device.type == "cpu" and left.dtype == _wide(left)


def _runs(weights: Tensor) -> list[tuple[slice, float]]:
    """Examples that follow each other and have the same weight; those of weight 0 left out."""
    found: list[tuple[slice, float]] = []
    for number, weight in enumerate(weights.tolist()):
        if found and found[-1] == (slice(found[-1][0].start, number), weight):
            found[-1] = slice(found[-1][0].start, number + 1), weight
        elif weight:
            found.append((slice(number, number + 1), weight))
    return found


@functools.lru_cache(maxsize=4096)
def _signs(name: str, length: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if length <= size:
        return torch.eye(length, device=device, dtype=dtype)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    drawn = torch.randint(2, (length, size), generator=torch.Generator().manual_seed(seed))
    return ((2.0 * drawn - 1.0) / size**0.5).to(device, dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _dot(one: Tensor, two: Tensor) -> Tensor:
    """Σ over the last dimension, in float32 at least."""
    return (one.to(_wide(one)) * two).sum(-1)


def _regroup(tensor: Tensor, index: Tensor, present: Tensor | None = None) -> Tensor:
    """(n, T, …) → (m, L, …); 0 where not present."""
    found = tensor.flatten(0, 1)[index]
    if present is None:
        return found
    return found * present.view(*present.shape, *[1] * (found.dim() - 2)).to(found.dtype)


def _first(use: Factor) -> Tensor:
    """A tensor (n, T, …) of floats."""
    if isinstance(use, SoftmaxBias):
        use = use.of
    return use.values if isinstance(use, Lookup | Sum) else use[0]  # type: ignore[index]


def _examples(use: Factor) -> int:
    return len(_first(use))


def _device(use: Factor) -> torch.device:
    return _first(use).device


def _dtype(use: Factor) -> torch.dtype:
    return _wide(_first(use))

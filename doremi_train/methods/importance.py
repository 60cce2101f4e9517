"""Importance-weighted losses: how much one label or token counts, from its excess loss over a
reference.

IMP and DIMP (Kuo et al. 2025, https://arxiv.org/abs/2410.21526). The data come from a generator Q,
a few real examples show the law P that is wanted, and p̂' is a model of those:
  IMP   w = (p̂'(y|x) / q̂(y|x))^γ        with a model q̂ of the data: static, a column made once;
  DIMP  w = (p̂'(y|x) / sg p_θ(y|x))^γ   with the model as it is now (sg: no gradient);
  L = (1/n) Σ w · ℓ_θ.
RHO-1 (Lin et al. 2024, https://arxiv.org/abs/2404.07965): the mean loss of a batch's top k % of
tokens by ℓ_θ − ℓ_ref.
Focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002): w = (1 − p_θ)^γ.

All of them are a policy on one excess e, in nats (ℓ is −log p, ℓ_ref that of p̂'):
  imp    e = ℓ_q − ℓ_ref    exp(γ e)
  dimp   e = ℓ_θ − ℓ_ref    exp(γ e)
  rho    e = ℓ_θ − ℓ_ref    1 for the highest, 0 for the others
  focal  e = ℓ_θ            (1 − exp(−e))^γ
  none   –                  1
No gradient passes through a weight, but through focal's, as its paper has it.

It is an objective (see `methods`), so sums make it the same on any number of ranks. RHO's global
top k needs more than K sums: a histogram of e.

K domains, B sequences, T tokens a sequence (a label of a classifier is a sequence of one token).
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, NonNegativeFloat, PositiveFloat
from doremi_train.methods import simplex

token_wise = True

# Of RHO's histogram: e from −16 to 16 nats, the outermost bins hold what lies beyond.
BINS, _PER_NAT = 2048, 64
_TINY = 1e-300  # where every weight is 0, so is the loss


@dataclass(frozen=True, config=STRICT)
class Weighting:
    """clip=None and normalize=False is the papers' form."""

    power: NonNegativeFloat = 1.0
    """Power γ of the ratio; 0 is the ordinary loss."""

    clip: PositiveFloat | None = 5.0
    """Largest weight of imp and dimp; null: none, as in the papers."""

    normalize: bool = True
    """Whether weights are divided by their mean over the global batch; false: as in the papers."""

    keep: Annotated[float, Gt(0), Le(1)] = 0.6
    """Part of a batch's tokens that rho keeps."""


@dataclass(frozen=True, config=STRICT)
class Options(Weighting):
    policy: Literal["none", "imp", "dimp", "rho", "focal"] = "none"
    weights: tuple[float, ...] = (1.0,)  # (K,) the mixture of the run, on the simplex

    @property
    def of_the_batch(self) -> bool:
        """Whether a weight depends on the whole batch: then no part of it can be weighed before all
        is seen."""
        return self.policy == "rho" or (self.normalize and self.policy != "none")


class Stats(NamedTuple):
    """Sums over a batch, per domain."""

    loss: Tensor  # (K,) nats
    tokens: Tensor  # (K,)
    weight: Tensor  # (K,) Σ w; of rho 0: its weights follow from the histogram
    square: Tensor  # (K,) Σ w²
    histogram: Tensor  # (K, BINS) tokens by their excess; (K, 0) where the policy is not rho


class State(NamedTuple):
    mixture: Tensor  # (K,) never changes
    scale: Tensor  # () what weights are divided by: their mean, or 1
    boundary: Tensor  # () rho keeps the bins above,
    share: Tensor  # () and of those in this one so much each, so that the kept part is exact
    effective: Tensor  # () effective sample size of the last batch, (Σ w)² / Σ w², in tokens


def ratio(excess: Tensor, options: Weighting) -> Tensor:
    """exp(γ e), at most `clip`, of the same shape. e = −∞ (p̂' is 0) gives 0, e = ∞ (q̂ is 0) the
    clip, or ∞."""
    if options.power == 0:
        return torch.ones_like(excess)
    logarithm = options.power * excess.detach()
    return (
        logarithm if options.clip is None else logarithm.clamp_max(math.log(options.clip))
    ).exp()


def focal(excess: Tensor, options: Weighting) -> Tensor:
    """(1 − exp(−e))^γ, with gradient."""
    return (-torch.expm1(-excess)) ** options.power


def log_ratio(reference: Tensor, data: Tensor) -> Tensor:
    """IMP's static column ℓ_ref − ℓ_q = −e, from the losses of p̂' and of q̂. Where p̂' is 0 it is
    ∞, whatever q̂ is."""
    return torch.where(reference == math.inf, reference, reference - data)


def init(domains: int, steps: int, options: Options) -> State:
    mixture = torch.tensor(options.weights, dtype=torch.float64)
    return State(mixture, *torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))


def observe(
    losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Options
) -> Stats:
    """Sums of a batch: losses (B, T), domain (B,) ids below K, reference (B, T): ℓ_ref, or of imp
    its `log_ratio`."""
    rho = options.policy == "rho"
    excess = _excess(losses.detach(), reference, options)
    weights = torch.zeros_like(excess) if rho else _weights(excess, None, options)
    columns = torch.stack([losses.detach(), weights, weights**2])  # (3, B, T)
    (loss, weight, square), tokens = simplex.sums(columns, domain, domains)
    bins = BINS if rho else 0
    histogram = torch.zeros(domains, bins, dtype=torch.float64, device=losses.device)
    if rho:
        place = (domain[:, None] * bins + _bin(excess)).flatten()
        histogram.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.float64))
    return Stats(loss, tokens, weight, square, histogram)


def update(state: State, stats: Stats, options: Options) -> State:
    """What the weights of this very batch need of the whole of it."""
    tokens = stats.tokens.sum()
    if options.policy == "rho":
        boundary, share = _top(stats.histogram.sum(0), options.keep * tokens)
        state = state._replace(boundary=boundary, share=share)
    weight, square = (part.sum() for part in _sums(state, stats))
    effective = weight**2 / square.clamp_min(_TINY)
    # RHO's loss is the mean over what it keeps.
    scale = (weight / tokens).clamp_min(_TINY) if options.of_the_batch else torch.ones_like(weight)
    return state._replace(scale=scale, effective=effective)


def weigh(
    state: State,
    domain: Tensor,
    tokens: Tensor,
    options: Options,
    losses: Tensor,
    reference: Tensor | None,
) -> Tensor:
    """(B, T) token weights from losses (B, T) and the reference's (B, T), divided by the batch's
    tokens (K,) and, where asked for, by their global mean."""
    weights = _weights(_excess(losses, reference, options), state, options)
    return weights / (state.scale * tokens.sum())


def sampling(state: State, options: Options) -> Tensor:
    return state.mixture


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """How much each domain's tokens count on average, and how many tokens do the work."""
    mean = _sums(state, stats)[0] / stats.tokens.clamp_min(1) / state.scale
    return {
        "loss_weight": mean,
        "tokens": stats.tokens.long(),
        "effective_sample_size": state.effective,
    }


def result(state: State) -> None:
    """None: the mixture is given, not learned."""


# ── Parts ───────────────────────────────────────────────────────────────────────────


def _excess(losses: Tensor, reference: Tensor | None, options: Options) -> Tensor:
    """(B, T) e, nats."""
    if options.policy in ("none", "focal"):
        return losses
    if reference is None:
        raise ValueError(
            f"{options.policy} weighs against a reference: its losses (B, T) are missing"
        )
    return -reference if options.policy == "imp" else -log_ratio(reference, losses)


def _weights(excess: Tensor, state: State | None, options: Options) -> Tensor:
    """(B, T) before any division; rho's need the state."""
    if options.policy == "rho":
        assert state is not None
        place = _bin(excess)
        return (place > state.boundary).to(excess.dtype) + (
            place == state.boundary
        ) * state.share.to(excess.dtype)
    if options.policy == "none":
        return torch.ones_like(excess)
    return focal(excess, options) if options.policy == "focal" else ratio(excess, options)


def _bin(excess: Tensor) -> Tensor:
    place = (excess.detach().nan_to_num() * _PER_NAT).floor() + BINS // 2
    return place.clamp(0, BINS - 1).long()


def _top(histogram: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of a histogram (BINS,) in which the `wanted` () highest end, and the part of it that
    is among them."""
    counted = histogram.flip(0).cumsum(0)
    nth = torch.searchsorted(counted, wanted)
    boundary = len(histogram) - 1 - nth
    inside = histogram[boundary]
    return boundary.double(), 1 - (counted[nth] - wanted) / inside


def _sums(state: State, stats: Stats) -> tuple[Tensor, Tensor]:
    """(K,) Σ w and Σ w², before any division."""
    if not stats.histogram.numel():
        return stats.weight, stats.square
    boundary = int(state.boundary)
    above, inside = stats.histogram[:, boundary + 1 :].sum(1), stats.histogram[:, boundary]
    return above + state.share * inside, above + state.share**2 * inside

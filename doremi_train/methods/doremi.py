"""DoReMi: domain reweighting by minimax optimisation (Xie et al. 2023,
https://arxiv.org/abs/2305.10429), Algorithm 1.

α_0 = 1/K. For t = 1 … T:
  1. a batch of b sequences, uniform over domains;
  2. λ_t[k] = Σ over the tokens of domain k of max(ℓ_θ − ℓ_ref, 0), divided by their number;
  3. α' = α_{t−1} · exp(η λ_t);  α_t = (1 − c) α' / Σ α' + c / K;
  4. one optimiser step on Σ_k α_t[k] · (mean over the tokens of domain k of ℓ_θ), unclipped.
The result is ᾱ = (1/T) Σ_{t=1..T} α_t.

Beside the paper's form, η may follow from the run (`hedge`), and so may the step from which α moves
and is averaged (`startup`).

K domains, B sequences, T tokens a sequence. Losses are nats per token. Sums and weights are
float64.
"""

import math
from typing import Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Fraction, NonNegativeFloat, PositiveFloat
from doremi_train.methods import batch_means, hedge, pieces, simplex, startup

token_wise = False

LEAST = 0.25  # part of a run's steps that are averaged before it may be settled


@dataclass(frozen=True, config=STRICT)
class Options:
    """Defaults are the paper's."""

    step_size: NonNegativeFloat | Literal["auto"] = 1.0
    """Step size η of the exponentiated update; 0 keeps α uniform; auto: from the number of steps,
    and how far domains' excess losses were apart so far."""

    smoothing: Fraction = 1e-3
    """Part c of the uniform mixture in α."""

    clip: Literal["token", "domain"] = "token"
    """Where the excess is clipped at 0: at every token, or after the domain's mean."""

    absent: Literal["zero", "hold"] | None = None
    """Excess of a domain that is not in the batch: 0, or the last one; null: hold for resample,
    else zero."""

    warmup: Fraction | Literal["auto"] = 0.0
    """Part of the run in which α stays uniform; it is left out of the average; auto: until excess
    losses are less far apart than at first, and at most half of the run."""

    average_from: Fraction = 0.0
    """Part of the run, at its start, that is left out of the average."""

    settled: PositiveFloat | None = None
    """Half-width of the 95 % interval of the average, that of the domain known least, at which a
    proxy ends before its steps, a quarter of which are averaged at least; null: never."""

    objective: Literal["weight", "resample"] = "weight"
    """Whether α weighs the loss, or draws the next batch."""

    score: Literal["excess", "hardest", "easiest"] = "excess"
    """What raises a weight: ℓ_θ − ℓ_ref clipped at 0, or unclipped ℓ_θ alone, or −ℓ_ref alone."""

    @property
    def holds(self) -> bool:
        # A domain that is not drawn and counts as excess 0 only loses weight, and is drawn still
        # less: with resampling it would starve. Its last known excess keeps it in the game.
        return (self.absent or ("hold" if self.objective == "resample" else "zero")) == "hold"


class Stats(NamedTuple):
    """Sums over a batch, per domain: those of two batches add up to those of their union."""

    excess: Tensor  # (K,) score summed over tokens, nats
    tokens: Tensor  # (K,) tokens that carry a loss


class State(NamedTuple):
    weights: Tensor  # (K,) α_t on the simplex
    weight_sum: Tensor  # (K,) sum of the α_t that are averaged; α_0 is never among them
    averaged: Tensor  # () how many those are
    excess: Tensor  # (K,) λ_t as used by the last update, nats per token
    step: Tensor  # () t
    moves_after: Tensor  # () α_t changes for t above this; of warmup=auto at the latest
    average_after: Tensor  # () α_t is averaged for t above this too
    # Of step_size=auto.
    rounds: Tensor  # () steps that η is for; 0 where η is given
    span: Tensor  # () largest range of λ over domains so far, nats per token
    step_size: Tensor  # () η of the last update; 0 where α stayed
    # Of warmup=auto, while α stays; empty where it is given.
    curve: Tensor  # (P, K) of `startup.Curve`
    highest: Tensor  # () of the same
    # Of settled; empty where nothing ends the run.
    path: Tensor  # (P, K) `pieces` of the α_t that are averaged
    half_width: Tensor  # () of the interval of ᾱ when last a piece was full
    least: Tensor  # () steps that are averaged before it is asked


def init(domains: int, steps: int, options: Options) -> State:
    """State before step 1 of a run of `steps` steps."""
    zeros = torch.zeros(domains, dtype=torch.float64)
    waits = options.warmup == "auto"
    still = steps // 2 if waits else int(options.warmup * steps)
    return State(
        weights=simplex.uniform(domains),
        weight_sum=zeros,
        averaged=torch.tensor(0),
        excess=zeros,
        step=torch.tensor(0),
        moves_after=torch.tensor(still),
        average_after=torch.tensor(int(options.average_from * steps)),
        rounds=torch.tensor(steps if options.step_size == "auto" else 0),
        span=zeros.new_zeros(()),
        step_size=zeros.new_zeros(()),
        curve=startup.empty(domains).sums if waits else zeros.new_zeros(0),
        highest=zeros.new_zeros(()),
        path=pieces.empty(domains) if options.settled is not None else zeros.new_zeros(0),
        half_width=zeros.new_tensor(math.inf),
        # From the uniform α on it hardly moves at first, and looks as if it was known.
        least=torch.tensor(int(LEAST * steps)),
    )


def observe(
    losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Options
) -> Stats:
    """Sums of a batch: losses (B, T) of the proxy, reference (B, T), domain (B,) ids below K."""
    if reference is None and options.score != "hardest":
        raise ValueError(
            "the excess loss needs the reference's losses; without them this would be the raw loss"
        )
    if options.score == "hardest":
        score = losses
    elif options.score == "easiest":
        assert reference is not None
        score = -reference
    else:
        assert reference is not None
        score = losses - reference
        if options.clip == "token":
            score = score.clamp_min(0)
    return Stats(*simplex.sums(score, domain, domains))


def update(state: State, stats: Stats, options: Options) -> State:
    """One exponentiated-gradient step on the domain weights, from the sums of the whole global
    batch."""
    present = stats.tokens > 0
    excess = stats.excess / stats.tokens.clamp_min(1)
    if options.clip == "domain" and options.score == "excess":
        excess = excess.clamp_min(0)
    excess = torch.where(
        present, excess, state.excess if options.holds else torch.zeros_like(excess)
    )
    step = state.step + 1
    span = torch.maximum(state.span, hedge.spread(excess))
    step_size, power = _step_size(state, span, options)
    moved = simplex.exponentiated(state.weights, step_size * excess, options.smoothing, power)
    # At the start, excess is what the reference has learned already: largest where there was most
    # to learn quickly.
    moves = step > state.moves_after
    weights = torch.where(moves, moved, state.weights)
    counts = moves & (step > state.average_after)
    following = _with_curve(state, excess)._replace(
        weights=weights,
        weight_sum=state.weight_sum + weights * counts,
        averaged=state.averaged + counts,
        excess=excess,
        step=step,
        span=span,
        step_size=torch.where(moves, step_size, 0.0),
    )
    return _with_path(following) if counts else following


def _step_size(state: State, span: Tensor, options: Options) -> tuple[Tensor, Tensor | float]:
    """η (), and the power of α that makes it that of all gains so far."""
    if options.step_size != "auto":
        return state.span.new_tensor(options.step_size), 1.0
    power = state.span / span if state.span > 0 else 1.0
    return hedge.step_size(span, len(state.weights), int(state.rounds)), power


def _with_curve(state: State, excess: Tensor) -> State:
    """The state with λ_t (K,) in its curve, which says where the start of the run ends."""
    if not len(state.curve) or state.step >= state.moves_after:
        return state
    curve = startup.add(startup.Curve(state.curve, state.highest, state.step), excess)
    ends = curve.steps if startup.over(curve) else state.moves_after
    return state._replace(curve=curve.sums, highest=curve.highest, moves_after=ends)


def _with_path(state: State) -> State:
    """The state with its α_t among those whose average is asked how well it is known."""
    if not len(state.path):
        return state
    number = int(state.averaged)
    path = pieces.add(state.path, number, state.weights)
    full, known = pieces.means(path, number), state.half_width
    if len(full) >= pieces.FEWEST and number >= state.least:
        known = known.new_tensor(batch_means.half_width(full))
    return state._replace(path=path, half_width=known)


def settled(state: State, options: Options) -> bool:
    """Whether ᾱ is known as well as it was asked for, so that the run may end."""
    return options.settled is not None and bool(state.half_width <= options.settled)


def weigh(state: State, domain: Tensor, tokens: Tensor, options: Options) -> Tensor:
    """(B, 1) weight of every token of a sequence, such that Σ weight · ℓ is the objective over the
    global batch.

    `tokens` (K,) counts the loss-carrying tokens of the global batch; a domain without any has no
    term.
    """
    if options.objective == "resample":
        return (1 / tokens.sum()).expand(len(domain), 1)
    return (state.weights / tokens.clamp_min(1))[domain, None]


def sampling(state: State, options: Options) -> Tensor:
    """(K,) the mixture from which the next batch is drawn."""
    return state.weights if options.objective == "resample" else simplex.uniform(len(state.weights))


def record(state: State, stats: Stats) -> dict[str, Tensor]:
    """What a stranger needs to recompute every α_t: λ_t, beside α_t itself and the tokens it came
    from; and what was not given: η, 0 where α stayed, the first step of ᾱ as known by now, and the
    half-width of its interval once there is one."""
    line = {"weights": state.weights, "excess_loss": state.excess, "tokens": stats.tokens.long()}
    if state.rounds > 0:
        line["step_size"] = state.step_size
    if len(state.curve):
        line["average_from"] = torch.maximum(state.moves_after, state.average_after) + 1
    if state.half_width < math.inf:
        line["half_width"] = state.half_width
    return line


def result(state: State) -> Tensor:
    """(K,) ᾱ, the average of α_t over the run. Raises ValueError before the first averaged step."""
    if state.averaged == 0:
        raise ValueError("no α_t was averaged yet: the run has not passed average_from")
    return state.weight_sum / state.averaged

"""DoReMi against its golden trajectory, a naive oracle, and every mistake made in public.

K domains, B sequences, T tokens a sequence.
"""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from doremi_train.config import UserError, load
from doremi_train.methods import (
    cross_entropy,
    doremi,
    simplex,
)
from doremi_train.methods.doremi import Options, State, Stats
from doremi_train.parallel.world import World
from doremi_train.stages.runs.language_model import learned
from doremi_train.training.task import TrainingFailed

EXCESS = [[1, 0.25, 0], [1, 0.25, 0], [0, 0.5, 2]]  # λ_t of three domains, nats per token
WEIGHTS = [
    [0.5431955394213764, 0.25676328223652456, 0.200041178342099],
    [0.7355619234816233, 0.16449745560495282, 0.09994062091342373],
    [0.4213795418316516, 0.15557809210870632, 0.4230423660596419],
]
AVERAGE = [0.5667123349115504, 0.19227960998339455, 0.24100805510505485]


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def means(excess: Any, tokens: float = 10) -> Stats:
    """Sums of a batch in which every domain has `tokens` tokens and this mean excess (K,)."""
    return Stats(
        float64(excess) * tokens, torch.full((len(excess),), float(tokens), dtype=torch.float64)
    )


def trajectory(excess: Any, options: Options) -> list[State]:
    states = [doremi.init(len(excess[0]), len(excess), options)]
    for row in excess:
        states.append(doremi.update(states[-1], means(row), options))
    return states


def random_batch(
    seed: int, domains: int, sequences: int = 12, tokens: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """losses (B, T), reference (B, T), domain (B,)."""
    generator = torch.Generator().manual_seed(seed)
    losses, reference = (
        torch.rand(2, sequences, tokens, generator=generator, dtype=torch.float64) * 6
    )
    return losses, reference, torch.randint(domains, (sequences,), generator=generator)


def add(parts: list[Stats]) -> Stats:
    return Stats(*(sum(fields[1:], start=fields[0]) for fields in zip(*parts, strict=True)))


def naive(
    batches: list[tuple[Tensor, Tensor, Tensor]], domains: int, eta: float, c: float
) -> list[list[float]]:
    """Algorithm 1 in plain Python: α_1 … α_T, then ᾱ."""
    alpha, path = [1 / domains] * domains, []
    for losses, reference, domain in batches:
        lam = []
        for k in range(domains):
            rows = [i for i in range(len(domain)) if domain[i] == k]
            clipped = [
                max(float(a - b), 0)
                for i in rows
                for a, b in zip(losses[i], reference[i], strict=True)
            ]
            lam.append(sum(clipped) / len(clipped) if clipped else 0.0)
        raised = [a * math.exp(eta * x) for a, x in zip(alpha, lam, strict=True)]
        alpha = [(1 - c) * a / sum(raised) + c / domains for a in raised]
        path.append(alpha)
    return [*path, [sum(column) / len(path) for column in zip(*path, strict=True)]]


# The golden figures


def test_golden_trajectory_and_average() -> None:
    states = trajectory(EXCESS, Options())
    for state, expected in zip(states[1:], WEIGHTS, strict=True):
        torch.testing.assert_close(state.weights, float64(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(doremi.result(states[-1]), float64(AVERAGE), rtol=0, atol=1e-12)


def test_the_initial_weights_are_uniform_and_never_averaged() -> None:
    states = trajectory(EXCESS, Options())
    assert states[0].weights.tolist() == [1 / 3] * 3
    with_initial = torch.stack([s.weights for s in states]).mean(0)
    assert simplex.total_variation(doremi.result(states[-1]), with_initial) > 0.01


def test_clips_per_token_and_divides_by_all_tokens() -> None:
    excess = float64([[0.6, -0.6], [0.1, 0.1], [-0.3, -0.1]])
    stats = doremi.observe(excess, torch.zeros_like(excess), torch.arange(3), 3, Options())
    mean = stats.excess / stats.tokens
    torch.testing.assert_close(mean, float64([0.3, 0.1, 0.0]), rtol=0, atol=1e-15)
    assert not torch.allclose(mean, float64([0.0, 0.1, 0.0]))  # clipped after the domain's mean
    assert not torch.allclose(mean, float64([0.6, 0.1, 0.0]))  # mean over positive tokens only


def test_domain_level_clip_is_there_by_name() -> None:
    excess = float64([[0.6, -0.6], [0.1, 0.1], [-0.3, -0.1]])
    options = Options(clip="domain")
    stats = doremi.observe(excess, torch.zeros_like(excess), torch.arange(3), 3, options)
    state = doremi.update(doremi.init(3, 1, options), stats, options)
    torch.testing.assert_close(state.excess, float64([0.0, 0.1, 0.0]), rtol=0, atol=1e-15)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 30), st.integers(1, 6), st.floats(0, 3), st.floats(0, 0.9))
def test_equals_the_naive_algorithm(seed: int, domains: int, eta: float, c: float) -> None:
    options = Options(step_size=eta, smoothing=c)
    batches = [random_batch(seed + i, domains, sequences=6, tokens=3) for i in range(3)]
    *path, average = naive(batches, domains, eta, c)
    state = doremi.init(domains, len(batches), options)
    for (losses, reference, domain), expected in zip(batches, path, strict=True):
        state = doremi.update(
            state, doremi.observe(losses, reference, domain, domains, options), options
        )
        torch.testing.assert_close(state.weights, float64(expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(doremi.result(state), float64(average), rtol=1e-12, atol=1e-14)


# Invariants of α


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(0, 1e4), min_size=4, max_size=4), min_size=1, max_size=5),
    st.floats(0, 0.99),
)
def test_weights_stay_on_the_simplex_above_the_floor(excess: list[list[float]], c: float) -> None:
    for state in trajectory(excess, Options(smoothing=c))[1:]:
        assert torch.isfinite(state.weights).all()
        assert float(state.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert float(state.weights.min()) >= c / 4 * (1 - 1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 1e-3])
def test_extreme_excess_gives_no_nan(smoothing: float) -> None:
    excess = [[1e4, 0, 0], [0, 1e4, 0], [0, 0, 1e4], [1e4, 1e4, 1e4]]
    for state in trajectory(excess, Options(smoothing=smoothing))[1:]:
        assert torch.isfinite(state.weights).all()
        assert float(state.weights.sum()) == pytest.approx(1, abs=1e-12)


def test_sums_of_parts_are_the_sums_of_the_batch_whatever_the_order() -> None:
    losses, reference, domain = random_batch(0, 4, sequences=16)
    whole = doremi.observe(losses, reference, domain, 4, Options())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        doremi.observe(losses[order], reference[order], domain[order], 4, Options()).excess,
        whole.excess,
        atol=1e-12,
    )
    for size, micro in [(1, 4), (2, 8), (2, 2), (4, 1), (4, 4)]:
        parts = [
            doremi.observe(losses[rows], reference[rows], domain[rows], 4, Options())
            for rank in range(size)
            for rows in World(rank, size).rows(16, micro)
        ]
        together = add(parts)
        torch.testing.assert_close(together.excess, whole.excess, rtol=0, atol=1e-12)
        assert torch.equal(together.tokens, whole.tokens)


def test_local_sums_give_other_weights_than_global_ones() -> None:
    """A rank that updates from its own data alone is the commonest mistake: the sums must be seen
    to differ."""
    losses, reference, domain = random_batch(0, 3)
    options, start = Options(), doremi.init(3, 1, Options())
    parts = [
        doremi.observe(losses[r], reference[r], domain[r], 3, options)
        for r in (slice(0, 6), slice(6, 12))
    ]
    global_weights = doremi.update(start, add(parts), options).weights
    assert all(
        not torch.allclose(doremi.update(start, part, options).weights, global_weights)
        for part in parts
    )


def test_zero_step_size_keeps_the_weights_uniform() -> None:
    for state in trajectory(EXCESS, Options(step_size=0)):
        torch.testing.assert_close(state.weights, simplex.uniform(3), rtol=0, atol=1e-15)


def test_a_proxy_equal_to_its_reference_moves_towards_uniform_only_through_smoothing() -> None:
    losses, _, domain = random_batch(0, 3)
    for c in (0.0, 0.1):
        options = Options(smoothing=c)
        state = trajectory(EXCESS, options)[-1]
        after = doremi.update(
            state, doremi.observe(losses, losses.clone(), domain, 3, options), options
        )
        torch.testing.assert_close(
            after.weights, (1 - c) * state.weights + c / 3, rtol=0, atol=1e-14
        )


def test_weights_are_carried_from_step_to_step() -> None:
    states = trajectory([[1, 0], [1, 0]], Options(smoothing=0))
    assert float(states[2].weights[0]) == pytest.approx(math.e**2 / (math.e**2 + 1), abs=1e-12)


def test_update_leaves_the_old_state_alone() -> None:
    state = trajectory(EXCESS, Options())[-1]
    before = copy.deepcopy(state)
    doremi.update(state, means([3, 2, 1]), Options())
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


# Named switches


@pytest.mark.parametrize(("absent", "expected"), [("zero", 0.0), ("hold", 0.25), (None, 0.0)])
def test_excess_of_an_absent_domain(absent: Any, expected: float) -> None:
    options = Options(absent=absent)
    state = doremi.update(doremi.init(2, 2, options), means([1, 0.25]), options)
    state = doremi.update(state, Stats(float64([10, 0]), float64([10, 0])), options)
    assert state.excess.tolist() == [1, expected]


def test_an_absent_domain_does_not_start_at_a_large_excess() -> None:
    for absent in ("zero", "hold"):
        options = Options(absent=absent)
        state = doremi.update(
            doremi.init(2, 1, options), Stats(float64([0, 0]), float64([10, 0])), options
        )
        assert state.excess.tolist() == [0, 0]


def test_resample_holds_by_default_and_can_be_told_not_to() -> None:
    assert Options(objective="resample").holds
    assert not Options(objective="resample", absent="zero").holds
    assert not Options().holds


def test_resample_draws_from_the_weights_and_weighs_all_tokens_alike() -> None:
    options = Options(objective="resample")
    state = trajectory(EXCESS, options)[-1]
    assert torch.equal(doremi.sampling(state, options), state.weights)
    weights = doremi.weigh(state, torch.tensor([0, 0, 2]), float64([20, 0, 10]), options)
    assert weights.tolist() == [[1 / 30]] * 3


def test_the_paper_always_draws_uniformly() -> None:
    state = trajectory(EXCESS, Options())[-1]
    assert torch.equal(doremi.sampling(state, Options()), simplex.uniform(3))


@pytest.mark.parametrize(("part", "left_out"), [(0.0, 0), (0.34, 1), (0.5, 1), (0.67, 2)])
def test_average_from_leaves_out_the_start_of_the_run(part: float, left_out: int) -> None:
    states = trajectory(EXCESS, Options(average_from=part))
    expected = torch.stack([s.weights for s in states[1 + left_out :]]).mean(0)
    torch.testing.assert_close(doremi.result(states[-1]), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("part", "still"), [(0.34, 1), (0.5, 1), (0.67, 2)])
def test_in_the_warm_up_the_weights_stay_uniform_and_are_not_averaged(
    part: float, still: int
) -> None:
    """After it they are those of a run that begins there."""
    states = trajectory(EXCESS, Options(warmup=part))
    later = trajectory(EXCESS[still:], Options())
    for state in states[: 1 + still]:
        assert torch.equal(state.weights, simplex.uniform(3))
    for state, expected in zip(states[1 + still :], later[1:], strict=True):
        assert torch.equal(state.weights, expected.weights)
    torch.testing.assert_close(
        doremi.result(states[-1]), doremi.result(later[-1]), rtol=0, atol=1e-15
    )
    # Recorded all the same.
    assert torch.equal(states[1].excess, trajectory(EXCESS, Options())[1].excess)


def test_no_result_before_a_step_was_averaged() -> None:
    before = doremi.init(3, 10, Options())
    with pytest.raises(ValueError, match="average_from"):
        doremi.result(before)
    with pytest.raises(
        TrainingFailed, match=r"proxy/seed-1: no .* has not passed proxy\.average_from"
    ):
        learned("proxy/seed-1", doremi, before)


@pytest.mark.parametrize("clip", ["token", "domain"])
def test_hardest_is_the_loss_and_easiest_minus_the_reference_both_unclipped(clip: Any) -> None:
    losses, reference, domain = random_batch(0, 3)
    for score, expected in (("hardest", losses), ("easiest", -reference)):
        options = Options(score=score, clip=clip)  # type: ignore[arg-type]
        stats = doremi.observe(losses, reference, domain, 3, options)
        state = doremi.update(doremi.init(3, 1, options), stats, options)
        for k in range(3):
            assert float(state.excess[k]) == pytest.approx(
                float(expected[domain == k].mean()), abs=1e-12
            )


@pytest.mark.parametrize("score", ["excess", "easiest"])
def test_a_missing_reference_is_an_error_and_not_the_raw_loss(score: Any) -> None:
    losses, _, domain = random_batch(0, 3)
    with pytest.raises(ValueError, match="reference"):
        doremi.observe(losses, None, domain, 3, Options(score=score))


@pytest.mark.parametrize(
    ("key", "value"),
    [("step_size", v) for v in (math.inf, -math.inf, math.nan, -1.0, "1", False)]
    + [("smoothing", v) for v in (1.0, 1.5, -0.1, math.nan, math.inf)]
    + [("warmup", 1.0), ("average_from", 1.0)]
    + [("clip", "sequence"), ("score", "loss"), ("objective", "both"), ("absent", "skip")],
)
def test_invalid_options_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        load(Options, {key: value}, "proxy")
    assert str(error.value).startswith(f"proxy.{key}={value!r}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zero", [0, 0.0])
def test_zero_step_size_and_smoothing_are_allowed(zero: float) -> None:
    assert load(Options, {"step_size": zero, "smoothing": zero}) == Options(
        step_size=0.0, smoothing=0.0
    )


# Equation 1


class Tiny(nn.Module):
    """Per-token losses (B, T) of a bigram model in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = (
            nn.Embedding(11, 6, dtype=torch.float64),
            nn.Linear(6, 11, dtype=torch.float64),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embed(tokens[:, :-1])))
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)


TOKENS = torch.randint(11, (16, 8), generator=torch.Generator().manual_seed(0))
DOMAIN = torch.tensor([0] * 7 + [1] * 3 + [3] * 5 + [0])  # domain 2 is absent


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ]
    )


def equation_1(model: Tiny, weights: Tensor) -> Tensor:
    """Σ_k α_k · (mean over the tokens of domain k), by autograd of the whole batch at once."""
    losses = model(TOKENS)
    terms = [weights[k] * losses[k == DOMAIN].mean() for k in range(4) if k in DOMAIN]
    return gradient(torch.stack(terms).sum(), model)


def one_step(
    model: Tiny, reference: Tiny, options: Options, size: int, micro: int
) -> tuple[State, Tensor]:
    """α_1, and the gradient as `size` ranks with micro-batches of `micro` sequences make it,
    averaged as DDP does."""
    shares = [World(rank, size).rows(len(TOKENS), micro) for rank in range(size)]
    with torch.no_grad():
        stats = add(
            [
                doremi.observe(model(TOKENS[r]), reference(TOKENS[r]), DOMAIN[r], 4, options)
                for share in shares
                for r in share
            ]
        )
    state = doremi.update(doremi.init(4, 1, options), stats, options)
    gradients = []
    for share in shares:
        parts = [
            (doremi.weigh(state, DOMAIN[r], stats.tokens, options) * model(TOKENS[r])).sum()
            for r in share
        ]
        # × ranks: DDP divides by them.
        gradients.append(gradient(torch.stack(parts).sum() * size, model))
    return state, torch.stack(gradients).mean(0)


def models() -> tuple[Tiny, Tiny]:
    model, reference = Tiny(), Tiny()
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(0.3)
    return model, reference


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_gradient_is_that_of_equation_1_for_any_ranks_and_accumulation(
    size: int, accumulation: int
) -> None:
    model, reference = models()
    options = Options()
    state, found = one_step(model, reference, options, size, len(TOKENS) // size // accumulation)
    whole, _ = one_step(model, reference, options, 1, len(TOKENS))
    torch.testing.assert_close(state.weights, whole.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, equation_1(model, state.weights), rtol=0, atol=1e-10)


def test_gradient_uses_the_new_weights_and_no_common_normaliser_and_no_clip() -> None:
    model, reference = models()
    options = Options()
    state, found = one_step(model, reference, options, 1, len(TOKENS))
    losses, alpha = model(TOKENS), state.weights[DOMAIN, None]
    excess = (losses - reference(TOKENS).detach()).clamp_min(0)
    per_token = doremi.weigh(
        state, DOMAIN, torch.bincount(DOMAIN, minlength=4) * losses.shape[1], options
    )
    wrong = {
        "old weights": equation_1(model, simplex.uniform(4)),
        "one normaliser": gradient((alpha * losses).sum() / (alpha.expand_as(losses)).sum(), model),
        "clipped excess": gradient((per_token * excess).sum(), model),
    }
    for name, other in wrong.items():
        assert float((found - other).abs().max()) > 1e-4, name


def test_a_domain_has_its_weight_whatever_its_tokens() -> None:
    state = doremi.init(2, 1, Options())._replace(weights=float64([0.3, 0.7]))
    domain = torch.tensor([0, 1, 1, 1])
    weights = doremi.weigh(state, domain, float64([5, 15]), Options()).expand(4, 5)
    assert float(weights[domain == 0].sum()) == pytest.approx(0.3)
    assert float(weights[domain == 1].sum()) == pytest.approx(0.7)


def test_an_absent_domain_has_no_term_and_the_others_are_not_renormalised() -> None:
    state = doremi.init(2, 1, Options())
    assert doremi.weigh(state, torch.tensor([0]), float64([4, 0]), Options()).tolist() == [
        [0.5 / 4]
    ]


def test_no_gradient_flows_through_the_excess_or_the_reference() -> None:
    model, reference = models()
    stats = doremi.observe(model(TOKENS), reference(TOKENS), DOMAIN, 4, Options())
    state = doremi.update(doremi.init(4, 1, Options()), stats, Options())
    assert not stats.excess.requires_grad and not state.weights.requires_grad
    (doremi.weigh(state, DOMAIN, stats.tokens, Options()) * model(TOKENS)).sum().backward()
    assert all(p.grad is None for p in reference.parameters())


def test_cross_entropy_is_the_mean_over_all_tokens() -> None:
    losses, _, domain = random_batch(0, 3)
    options = cross_entropy.Options(weights=(0.2, 0.3, 0.5))
    stats = cross_entropy.observe(losses, None, domain, 3, options)
    weights = cross_entropy.weigh(cross_entropy.init(3, 1, options), domain, stats.tokens, options)
    assert float((weights * losses).sum()) == pytest.approx(float(losses.mean()), abs=1e-12)
    assert float(stats.loss.sum()) == pytest.approx(float(losses.sum()), abs=1e-9)

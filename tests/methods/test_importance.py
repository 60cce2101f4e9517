"""Importance weights against what their paper proves, a naive oracle, and the ways to get them
wrong.

C classes, B sequences, T tokens a sequence. q is the law of the data, p that of the checker.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from doremi_train.methods import importance
from doremi_train.methods.importance import Options, State, Stats, Weighting

Q, P = ([0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.3, 0.05, 0.25, 0.3])
PARITY: dict[str, Any] = {"clip": None, "normalize": False}


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(values: Tensor) -> Tensor:
    return values / values.sum()


def step(
    losses: Tensor, reference: Tensor | None, options: Options, domain: Tensor | None = None
) -> tuple[Tensor, State]:
    """Token weights (B, T) of one whole batch."""
    domain = torch.zeros(len(losses), dtype=torch.int64) if domain is None else domain
    stats = importance.observe(losses.detach(), reference, domain, len(options.weights), options)
    state = importance.update(importance.init(len(options.weights), 1, options), stats, options)
    return importance.weigh(state, domain, stats.tokens, options, losses, reference), state


# ── Fixed points of a table at one x ────────────────────────────────────────────────


def fixed_point(gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """(C,) where a softmax comes to rest under the gradient of its logits."""
    logits = torch.zeros(len(Q), dtype=torch.float64)
    for _ in range(20_000):
        change = gradient(logits)
        logits = logits - 5 * change
        if change.abs().max() < 1e-12:
            return logits.softmax(0)
    raise AssertionError("it does not come to rest")


def expected(
    policy: str, reference: Tensor | None = None, **how: Any
) -> Callable[[Tensor], Tensor]:
    """The gradient of E_q[w ℓ] in the logits (C,)."""
    options = Options(policy=policy, **how)

    def gradient(logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        # (C, 1): every class once, and then as often as q draws it.
        losses = -logits.log_softmax(0)[:, None]
        weights, _ = step(losses, None if reference is None else reference[:, None], options)
        (float64(Q)[:, None] * weights * losses).sum().backward()
        return logits.grad

    return gradient


Q_LOSS, P_LOSS = -float64(Q).log(), -float64(P).log()
QP = float64(Q) * float64(P)


@pytest.mark.parametrize(
    ("gradient", "rests_at"),
    [
        (expected("none"), float64(Q)),
        (expected("imp", importance.log_ratio(P_LOSS, Q_LOSS), **PARITY), float64(P)),
        (expected("imp", P_LOSS, **PARITY), normal(QP)),  # the checker of quality alone: q̂ = 1
        (expected("dimp", P_LOSS, **PARITY), normal(QP.sqrt())),
        (
            expected("dimp", P_LOSS, power=0.5, **PARITY),
            normal((float64(Q) * float64(P) ** 0.5) ** (1 / 1.5)),
        ),
        (
            expected("dimp", P_LOSS, power=2.0, **PARITY),
            normal((float64(Q) * float64(P) ** 2) ** (1 / 3)),
        ),
        (
            expected("dimp", P_LOSS, clip=None, normalize=True),
            normal(QP.sqrt()),
        ),  # a common factor moves nothing
        (expected("dimp", P_LOSS, power=0.0), float64(Q)),
        (expected("imp", P_LOSS, power=0.0), float64(Q)),
    ],
    ids=[
        "ce",
        "imp",
        "quality",
        "dimp",
        "dimp γ=½",
        "dimp γ=2",
        "dimp normalised",
        "dimp γ=0",
        "imp γ=0",
    ],
)
def test_fixed_points(gradient: Callable[[Tensor], Tensor], rests_at: Tensor) -> None:
    torch.testing.assert_close(fixed_point(gradient), rests_at, rtol=0, atol=1e-6)


def test_without_the_detach_it_would_rest_elsewhere() -> None:
    def gradient(logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        losses = -logits.log_softmax(0)
        (float64(Q) * (losses - P_LOSS).exp() * losses).mean().backward()
        return logits.grad

    assert (fixed_point(gradient) - normal(QP.sqrt())).abs().max() > 0.01


def test_no_gradient_passes_through_a_weight_but_focal_s() -> None:
    losses = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    for policy in ("imp", "dimp", "rho"):
        assert not step(losses, torch.rand(4, 3, dtype=torch.float64), Options(policy=policy))[
            0
        ].requires_grad
    weights, _ = step(losses, None, Options(policy="focal", power=2.0, normalize=False))
    (weights * losses).sum().backward()
    p = (-losses.detach()).exp().requires_grad_()
    (-((1 - p) ** 2) * p.log()).mean().backward()  # as its paper writes it
    torch.testing.assert_close(losses.grad, -p.grad * p.detach(), rtol=0, atol=1e-12)


def test_the_importance_identity_on_a_finite_table() -> None:
    """E_q[(p/q) ℓ] = E_p[ℓ]."""
    losses = torch.rand(len(Q), 1, dtype=torch.float64)
    weights, _ = step(
        losses, importance.log_ratio(P_LOSS, Q_LOSS)[:, None], Options(policy="imp", **PARITY)
    )
    assert float((float64(Q)[:, None] * weights * len(Q) * losses).sum()) == pytest.approx(
        float(float64(P) @ losses[:, 0]), abs=1e-12
    )


# ── Weights ─────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from(["imp", "dimp"]),
    st.floats(0, 3),
    st.floats(0.5, 10),
    st.booleans(),
)
def test_equals_the_naive_formula(
    seed: int, policy: str, power: float, clip: float, normalize: bool
) -> None:
    losses, reference, data = (
        torch.rand(3, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6
    )
    column = importance.log_ratio(reference, data) if policy == "imp" else reference
    weights, state = step(
        losses, column, Options(policy=policy, power=power, clip=clip, normalize=normalize)
    )
    below = (data if policy == "imp" else losses).flatten().tolist()
    raw = [
        min((math.exp(-r) / math.exp(-b)) ** power, clip) if power else 1.0
        for r, b in zip(reference.flatten().tolist(), below, strict=True)
    ]
    divisor = sum(raw) if normalize else len(raw)
    assert weights.flatten().tolist() == pytest.approx([w / divisor for w in raw], rel=1e-9)
    assert float(state.effective) == pytest.approx(
        sum(raw) ** 2 / sum(w * w for w in raw), rel=1e-9
    )


def test_the_papers_form_is_one_line_bit_for_bit() -> None:
    """Without clip and normalisation: exp(γ (log p̂' − log p_θ)) / B, in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 7, generator=generator)
    label = torch.randint(7, (32,), generator=generator)
    checker = torch.randn(32, 7, generator=generator).log_softmax(1).gather(1, label[:, None])[:, 0]
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    weights, _ = step(losses[:, None], -checker[:, None], Options(policy="dimp", **PARITY))
    assert torch.equal(weights[:, 0], (checker + losses).exp() / 32)


def test_a_probability_of_exactly_0_has_a_defined_limit() -> None:
    inf = math.inf
    reference, data = float64([[1.0, inf, 1.0, inf]]), float64([[1.0, 1.0, inf, inf]])
    column = importance.log_ratio(reference, data)
    assert importance.ratio(-column, Weighting(clip=5.0))[0].tolist() == pytest.approx([1, 0, 5, 0])
    assert importance.ratio(-column, Weighting(clip=None)).tolist() == [[1, 0, inf, 0]]
    assert importance.ratio(-column, Weighting(power=0.0)).tolist() == [[1, 1, 1, 1]]
    nothing, state = step(float64([[1.0, 2.0]]), float64([[inf, inf]]), Options(policy="dimp"))
    assert nothing.tolist() == [[0, 0]] and float(state.effective) == 0


def test_equal_weights_count_every_token_and_one_counts_one() -> None:
    losses = torch.rand(8, 4, dtype=torch.float64)
    assert float(
        step(losses, losses.clone(), Options(policy="dimp"))[1].effective
    ) == pytest.approx(32)
    one = torch.full_like(losses, 800.0)
    one[3, 2] = 0.0
    assert float(step(losses, one, Options(policy="dimp"))[1].effective) == pytest.approx(1)


# ── RHO ─────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=50)
@example(609, 0.015625, 5.453125)  # the edge is in the last bin
@given(st.integers(0, 1 << 30), st.floats(0.01, 1), st.floats(0.001, 30))
def test_rho_keeps_the_highest_and_exactly_as_many(seed: int, keep: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses, reference = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64) * spread
    weights, state = step(losses, reference, Options(policy="rho", keep=keep))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-9)  # the mean over what is kept
    # Of every token: 0, 1, or the share of the bin between.
    part = (weights * keep * losses.numel()).flatten()
    wanted = keep * losses.numel()
    ordered = (losses - reference).flatten().sort(descending=True).values
    edge = float(ordered[math.ceil(wanted) - 1])
    for excess, kept in zip((losses - reference).flatten().tolist(), part.tolist(), strict=True):
        # The outermost bins hold what lies beyond them too.
        if 1 / 64 - 16 < edge < 16 - 1 / 64 and abs(excess - edge) > 1 / 64:
            assert kept == pytest.approx(float(excess > edge), abs=1e-9)
        assert -1e-9 <= kept <= 1 + 1e-9
    assert 0 < float(state.share) <= 1


def test_rho_is_the_top_k_where_no_two_tokens_share_a_bin() -> None:
    excess = (
        torch.arange(40, dtype=torch.float64)[
            torch.randperm(40, generator=torch.Generator().manual_seed(1))
        ]
        - 20
    ) / 4
    weights, _ = step(
        excess[:, None], torch.zeros(40, 1, dtype=torch.float64), Options(policy="rho", keep=0.3)
    )
    assert (weights[:, 0] > 0).nonzero()[:, 0].tolist() == sorted(excess.topk(12).indices.tolist())
    assert weights[weights > 0].tolist() == pytest.approx([1 / 12] * 12)


# ── Sums ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["none", "imp", "dimp", "rho"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_any_division_of_a_batch_gives_the_same_weights(policy: str, parts: int) -> None:
    """As many ranks, or micro-batches: weights are those of the whole batch, and not of each part's
    own mean."""
    generator = torch.Generator().manual_seed(parts)
    losses, reference = torch.rand(2, 12, 5, generator=generator, dtype=torch.float64) * 4
    domain = torch.randint(3, (12,), generator=generator)
    options = Options(policy=policy, weights=(0.2, 0.3, 0.5))
    whole, state = step(losses, reference, options, domain)
    rows = torch.arange(12).chunk(parts)
    sums = [importance.observe(losses[r], reference[r], domain[r], 3, options) for r in rows]
    stats = Stats(*(sum(fields[1:], start=fields[0]) for fields in zip(*sums, strict=True)))
    again = importance.update(importance.init(3, 1, options), stats, options)
    torch.testing.assert_close(again, state, rtol=1e-12, atol=0)
    pieces = [
        importance.weigh(again, domain[r], stats.tokens, options, losses[r], reference[r])
        for r in rows
    ]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=0)
    alone = torch.cat([step(losses[r], reference[r], options, domain[r])[0] / parts for r in rows])
    assert (policy == "none") == torch.allclose(alone, whole, rtol=1e-6)


def test_a_record_says_which_domains_count() -> None:
    losses = float64([[1.0, 1.0], [3.0, 3.0]])
    for policy, keep in (("dimp", 0.6), ("rho", 0.5)):
        options = Options(policy=policy, keep=keep, clip=None, weights=(0.5, 0.5))
        stats = importance.observe(
            losses, torch.zeros_like(losses), torch.tensor([0, 1]), 2, options
        )
        state = importance.update(importance.init(2, 1, options), stats, options)
        found = importance.record(state, stats)
        weights = importance.weigh(
            state, torch.tensor([0, 1]), stats.tokens, options, losses, torch.zeros_like(losses)
        )
        assert found["loss_weight"].tolist() == pytest.approx((weights.sum(1) * 2).tolist())
        assert found["tokens"].tolist() == [2, 2]
    assert float(found["effective_sample_size"]) == 2


def test_what_is_missing_is_named() -> None:
    losses = torch.rand(2, 2)
    for policy in ("imp", "dimp", "rho"):
        with pytest.raises(ValueError, match="reference"):
            step(losses, None, Options(policy=policy))


def test_a_loss_that_is_not_finite_is_seen_in_the_sums() -> None:
    losses = torch.tensor([[1.0, math.nan]])
    for policy in ("none", "imp", "dimp", "rho"):
        stats = importance.observe(
            losses, torch.ones(1, 2), torch.tensor([0]), 1, Options(policy=policy)
        )
        assert not stats.loss.isfinite().all()
        assert stats.histogram.isfinite().all()

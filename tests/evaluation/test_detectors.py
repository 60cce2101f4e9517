"""Every detector both ways: it fires on what is planted, and is silent on what is healthy."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_train.evaluation import detectors
from doremi_train.evaluation.detectors import Finding

NAMES = ("a", "b", "c", "d")
EVEN = [0.25] * 4


def one(found: list[Finding], kind: str, *domains: str) -> Finding:
    """The only finding, which must be this one."""
    assert [(finding.kind, finding.domains) for finding in found] == [(kind, domains)]
    assert found[0].message.endswith(".")
    return found[0]


mixtures = st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(
    lambda values: sum(values) > 1e-3
)


@given(mixtures)
def test_the_effective_number_is_between_one_and_all(values: list[float]) -> None:
    weights = np.array(values) / sum(values)
    assert 1 - 1e-9 <= detectors.effective_number(weights) <= len(weights) + 1e-9


def test_the_effective_number_of_equal_domains_is_their_number() -> None:
    assert detectors.effective_number(EVEN) == pytest.approx(4)
    assert detectors.effective_number([0.5, 0.5, 0, 0]) == pytest.approx(2)
    assert detectors.effective_number([0, 1, 0]) == 1


# one_hot


def test_one_domain_with_nearly_all_of_the_average() -> None:
    assert one(detectors.one_hot(NAMES, [0.02, 0.94, 0.02, 0.02]), "one_hot", "b").value < 1.5


def test_a_mixture_of_hardly_two_of_many_domains() -> None:
    one(detectors.one_hot(NAMES * 2, [0.6, 0.4, 0, 0, 0, 0, 0, 0]), "one_hot", "a")


def test_weights_that_hop_though_their_average_is_even() -> None:
    hops = np.tile(np.eye(4) * 0.96 + 0.01, (25, 1))
    assert (
        1 < one(detectors.one_hot(NAMES, hops.mean(0), [hops, hops]), "one_hot", *NAMES).value < 1.3
    )


@pytest.mark.parametrize(
    "weights",
    [
        EVEN,
        [0.61, 0.15, 0.14, 0.1],  # as much as any published run gave to one domain
        [0.7, 0.2, 0.05, 0.05],
    ],
)
def test_healthy_weights(weights: list[float]) -> None:
    trace = np.tile(weights, (100, 1))
    trace[:50] = [0.97, 0.01, 0.01, 0.01]  # a start-up
    trace[50::2] += [-0.1, 0.1, -0.05, 0.05]  # and some noise
    assert detectors.one_hot(NAMES, weights, [trace, trace]) == []


def test_two_domains_may_be_uneven_and_one_is_all_there_is() -> None:
    assert detectors.one_hot(("a", "b"), [0.75, 0.25]) == []
    assert detectors.one_hot(("a",), [1.0], [[[1.0]]]) == []


# absent


def test_absent_where_a_share_is_less_than_a_sequence() -> None:
    missing = detectors.missing_by_quota(8, [0.5, 0.3, 0.15, 0.05])
    assert missing == pytest.approx([0, 0, 0, 0.6])
    assert one(detectors.absent(NAMES, missing), "absent", "d").value == pytest.approx(0.6)
    assert detectors.absent(NAMES, detectors.missing_by_quota(8, EVEN)) == []


def test_absent_in_the_steps_that_were_made() -> None:
    tokens = np.full((100, 4), 512)
    tokens[::30, 1] = 0  # 4 of 100
    assert detectors.absent(NAMES, detectors.missing_by_trace(tokens)) == []
    tokens[::3, 2] = 0
    assert (
        one(detectors.absent(NAMES, detectors.missing_by_trace(tokens)), "absent", "c").value
        == 0.34
    )


def test_the_quota_is_that_of_the_sampler() -> None:
    from doremi_train.data.sampler import Sampler

    weights, counts, seen = np.array([0.6, 0.33, 0.05, 0.02]), np.zeros(4, np.int64), []
    sampler = Sampler(np.full(4, 1000), NAMES, 8, seed=0)
    for step in range(2000):
        draw = sampler.draw(step, weights, counts)
        seen.append(draw.counts - counts)
        counts = draw.counts
    assert detectors.missing_by_trace(seen) == pytest.approx(
        detectors.missing_by_quota(8, weights), abs=0.01
    )


# repeated, mismatched


def test_repeated_by_the_proxy() -> None:
    finding = one(detectors.repeated(NAMES, [0.3, 25.0, 1.0, 4.0]), "repeated", "b")
    assert finding.value == 25 and "25.0 times" in finding.message


def test_a_domain_that_only_one_of_the_runs_repeats() -> None:
    one(detectors.mismatched(NAMES, [1, 1, 5, 0.1], [20, 3, 6, 3]), "mismatched", "a")
    one(detectors.mismatched(NAMES, [1, 1, 25, 0.1], [2, 3, 0.5, 3]), "mismatched", "c")
    assert detectors.mismatched(NAMES, [0.01, 1, 8, 0], [3.9, 3, 20, 0]) == []
    json.dumps(detectors.mismatched(NAMES, [9, 1, 1, 1], [0, 1, 1, 1])[0], allow_nan=False)


# noise, trivial, overfit


def curve(start: list[float], end: list[float], points: int = 20) -> np.ndarray:
    """(E, K): falls quickly at first, then slowly."""
    return np.array(end) + (np.array(start) - end) * np.exp(-np.linspace(0, 4, points))[:, None]


FLAT = [6.9, 6.9, 6.9, 6.9]
UNIGRAM = [5.0, 4.6, 5.2, 2.5]
LEARNED = [3.4, 4.58, 4.2, 0.01]


def noisy(steps: int = 20) -> np.ndarray:
    known = curve(FLAT, LEARNED, steps)
    known[2:, 1] = 4.58  # the frequencies of its tokens are soon known, and nothing comes after
    return known


def test_noise_is_what_no_model_learns() -> None:
    assert one(detectors.noise(NAMES, UNIGRAM, [noisy(), noisy(10)]), "noise", "b").value < 0.01
    healthy = [3.4, 3.9, 4.2, 0.01]
    assert detectors.noise(NAMES, UNIGRAM, [curve(FLAT, healthy)]) == []


def test_what_one_of_two_models_learns_is_no_noise() -> None:
    assert detectors.noise(NAMES, UNIGRAM, [noisy(), curve(FLAT, [3.4, 3.9, 4.2, 0.01])]) == []


def test_what_is_still_falling_is_no_noise() -> None:
    assert detectors.noise(NAMES, UNIGRAM, [np.linspace(FLAT, LEARNED, 20)]) == []


def test_before_anything_is_learned_nothing_is_noise() -> None:
    assert detectors.noise(NAMES, UNIGRAM, [curve(FLAT, [5.1, 4.7, 5.2, 2.4])]) == []
    assert detectors.noise(NAMES, UNIGRAM, [[[6.8, 6.7, 6.9, 6.8]]]) == []
    assert detectors.noise(NAMES, UNIGRAM, [[], []]) == []


def test_a_neglected_domain_is_no_noise() -> None:
    assert detectors.noise(NAMES, UNIGRAM, [noisy() + np.array([0, 0.5, 0, 0])]) == []


def test_trivial_is_what_the_best_model_foresees() -> None:
    assert one(detectors.trivial(NAMES, [LEARNED, [4, 5, 5, 1.5]]), "trivial", "d").value == 0.01
    assert detectors.trivial(NAMES, [[4, 5, 5, 0.5], [4, 5, 5, 1.5]]) == []


def test_overfit_is_training_far_below_validation() -> None:
    finding = one(
        detectors.overfit(NAMES, [3.4, 4.5, 1.5, 0.0], [3.5, 4.6, 3.5, 0.05]), "overfit", "c"
    )
    assert finding.value == 2
    assert detectors.overfit(NAMES, [3.4, 4.7, 3.4, 0.01], [3.5, 4.6, 3.5, 0.03]) == []
    uneven, passes = [3.4, 4.5, 1.5, 0.0], [1.5, 9, 0.2, 1]
    assert detectors.overfit(NAMES, uneven, [3.5, 4.6, 3.5, 0.05], passes) == []


@given(st.integers(2, 50), st.integers(1000, 20_000), st.integers(0, 2**32))
def test_the_unigram_entropy_is_that_of_the_distribution(
    letters: int, count: int, seed: int
) -> None:
    """Corrected for the sample's size: within four standard deviations or so of the truth."""
    shares = 1 / np.arange(1, letters + 1)
    shares /= shares.sum()
    truth = -(shares * np.log(shares)).sum()
    deviation = np.sqrt(((np.log(shares) + truth) ** 2 * shares).sum() / count)
    counts = np.random.default_rng(seed).multinomial(count, shares)
    assert abs(detectors.unigram_entropy(counts) - truth) < 6 * deviation + 2 * letters / count


# duplicate


def sampled(languages: list[int], size: int, buckets: int = 2000) -> np.ndarray:
    """(K, 2, H) counts of two halves of a sample of each domain, one number a language."""
    halves = []
    for number, language in enumerate(languages):
        shares = np.random.default_rng(language).permutation(1 / np.arange(1, buckets + 1))
        generator = np.random.default_rng([number, 99])
        halves.append([generator.multinomial(size, shares / shares.sum()) for _ in range(2)])
    return np.array(halves)


def test_forgotten_is_what_the_first_model_knew_better() -> None:
    found = detectors.forgotten(NAMES, [3.0, 2.0, 1.0, 4.0], [3.02, 2.5, 0.5, 4.1])
    assert [one.domains for one in found] == [("b", "d")] and found[0].value == 0.5
    assert "b (2.00 before, 2.50 now)" in found[0].message
    assert detectors.forgotten(NAMES, [3.0] * 4, [3.0] * 4) == []


@pytest.mark.parametrize("size", [3000, 100_000])
def test_two_domains_of_one_language(size: int) -> None:
    assert (
        one(detectors.duplicate(NAMES, sampled([1, 2, 3, 2], size)), "duplicate", "b", "d").value
        < 1.1
    )
    assert detectors.duplicate(NAMES, sampled([1, 2, 3, 4], size)) == []


def test_samples_too_small_to_tell_are_not_called_equal() -> None:
    assert detectors.duplicate(NAMES, sampled([1, 2, 3, 4], 50)) == []
    assert detectors.duplicate(NAMES, np.zeros((4, 2, 2000))) == []


def test_a_domain_that_holds_the_text_of_another() -> None:
    shared = np.zeros((4, 4))
    shared[0, 3] = shared[3, 0] = 0.5
    finding = one(
        detectors.duplicate(NAMES, sampled([1, 2, 3, 4], 1000), shared), "duplicate", "a", "d"
    )
    assert finding.value == 0.5 and "50 %" in finding.message
    shared[0, 3] = shared[3, 0] = 0.1  # licences
    assert detectors.duplicate(NAMES, sampled([1, 2, 3, 4], 1000), shared) == []


# seed_spread


def seeds(mean: list[float], spread: float, count: int = 5) -> np.ndarray:
    noise = np.random.default_rng(3).normal(size=(count, len(mean))) * spread
    return np.array(mean) + noise - noise.mean(1, keepdims=True)


OTHERS = {"uniform": EVEN, "natural": [0.7, 0.1, 0.1, 0.1]}


def test_weights_that_seeds_do_not_agree_on() -> None:
    finding = one(
        detectors.seed_spread(NAMES, seeds([0.26, 0.25, 0.25, 0.24], 0.05), OTHERS),
        "seed_spread",
        *NAMES,
    )
    assert "from uniform:" in finding.message and "natural" not in finding.message


def test_weights_that_seeds_agree_on() -> None:
    assert detectors.seed_spread(NAMES, seeds([0.3, 0.25, 0.25, 0.2], 0.002), OTHERS) == []
    assert detectors.seed_spread(NAMES, seeds(EVEN, 0.1)[:1], OTHERS) == []  # one seed says nothing


def test_uniform_weights_are_uniform_in_19_of_20_cases() -> None:
    found = 0
    for number in range(400):
        drawn = np.random.default_rng(number).normal(0.25, 0.03, size=(4, 4))
        found += bool(detectors.seed_spread(NAMES, drawn, {"uniform": EVEN}))
    assert found / 400 > 0.93


# All


@given(st.permutations(range(4)), st.integers(0, 2**32))
def test_the_order_of_domains_does_not_matter(order: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(4, 0.3))
    trace = generator.dirichlet(np.full(4, 0.1), size=50)
    epochs, later = generator.lognormal(1, 2, size=(2, 4))
    losses = generator.choice([0.02, 2.0, 4.8, 5.0], size=(2, 6, 4))
    samples = generator.dirichlet(np.full(4, 30.0), size=5)
    halves = sampled(generator.integers(3, size=4).tolist(), 500)

    def found(order: list[int]) -> list[tuple]:
        names = [NAMES[k] for k in order]
        everything = [
            *detectors.one_hot(names, weights[order], [trace[:, order]]),
            *detectors.absent(names, detectors.missing_by_quota(6, weights[order])),
            *detectors.repeated(names, epochs[order]),
            *detectors.mismatched(names, epochs[order], later[order]),
            *detectors.noise(names, [5.0] * 4, list(losses[:, :, order])),
            *detectors.trivial(names, losses[:, -1][:, order]),
            *detectors.overfit(names, losses[0, 0, order], losses[1, 0, order]),
            *detectors.duplicate(names, halves[order]),
            *detectors.seed_spread(names, samples[:, order], {"uniform": EVEN}),
        ]
        return sorted((f.kind, sorted(f.domains), round(f.value, 9)) for f in everything)

    assert found(list(range(4))) == found(order)

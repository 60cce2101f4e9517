"""The sampler: quotas, closed-form counts, one pass per epoch, an order that nothing but the seed
decides."""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from doremi_train.config import UserError
from doremi_train.data.sampler import Draw, Ints, Sampler, Subsample
from doremi_train.parallel.world import World

Weights = NDArray[np.float64]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"domain-{k}" for k in range(count))


def sampler(sizes: list[int], batch: int, seed: int = 0) -> Sampler:
    return Sampler(np.array(sizes), names(len(sizes)), batch, seed)


def run(source: Sampler, weights: Weights, steps: int, start: int = 0) -> list[Draw]:
    counts, draws = source.counts_before(start, weights), []
    for step in range(start, start + steps):
        draws.append(source.draw(step, weights, counts))
        counts = draws[-1].counts
    return draws


def quota(draw: Draw, domains: int) -> Ints:
    return np.bincount(draw.domain, minlength=domains)


@st.composite
def mixtures(draw: st.DrawFn) -> Weights:
    """Mixtures of 1 to 8 domains, some of weight 0 or nearly."""
    parts = draw(
        st.lists(st.sampled_from([0.0, 1e-6, 0.01]) | st.floats(0, 1), min_size=1, max_size=8)
    )
    values = np.array([*parts, 0.5])
    return values / values.sum()


# Quotas


@settings(deadline=None, max_examples=100)
@given(mixtures(), st.integers(1, 64), st.integers(0, 10**9))
def test_quotas_sum_to_the_batch_and_differ_from_the_weights_by_less_than_one(
    weights: Weights, batch: int, step: int
) -> None:
    source = sampler([7] * len(weights), batch)
    got = quota(source.draw(step, weights, np.zeros(len(weights), dtype=np.int64)), len(weights))
    assert got.sum() == batch
    assert (np.abs(got - batch * weights) < 1 + 1e-6).all()
    assert (got[weights == 0] == 0).all()


@pytest.mark.parametrize(
    ("domains", "batch"), [(2, 2), (3, 12), (7, 56), (22, 22), (8, 512), (23, 23 * 64)]
)
def test_uniform_quotas_are_exact_where_the_domains_divide_the_batch(
    domains: int, batch: int
) -> None:
    for draw in run(sampler([100] * domains, batch), np.full(domains, 1 / domains), 20):
        assert quota(draw, domains).tolist() == [batch // domains] * domains


def test_uniform_quotas_rotate_where_the_domains_do_not_divide_the_batch() -> None:
    quotas = np.array([quota(d, 7) for d in run(sampler([100] * 7, 10), np.full(7, 1 / 7), 70)])
    assert set(quotas.flatten()) == {1, 2}
    assert (np.abs(quotas.sum(0) - 100) <= 2).all()


def test_a_batch_smaller_than_the_domains_reaches_all_of_them() -> None:
    quotas = np.array([quota(d, 9) for d in run(sampler([100] * 9, 2), np.full(9, 1 / 9), 9)])
    assert (quotas.sum(0) >= 1).all()


@settings(deadline=None, max_examples=60)
@given(mixtures(), st.integers(1, 40), st.integers(0, 60))
def test_closed_form_counts_are_the_accumulated_draws(
    weights: Weights, batch: int, steps: int
) -> None:
    source = sampler([5] * len(weights), batch)
    counts = np.zeros(len(weights), dtype=np.int64)
    for step in range(steps):
        assert np.array_equal(counts, source.counts_before(step, weights))
        counts = source.draw(step, weights, counts).counts
    assert np.array_equal(counts, source.counts_before(steps, weights))


@pytest.mark.parametrize(
    "weights", [[1 / 3] * 3, [0.9, 0.09, 0.01], [1e-6, 0.5 - 1e-6, 0.5], [0.0, 0.25, 0.75]]
)
def test_counts_stay_close_to_the_weights(weights: list[float]) -> None:
    mixture, source = np.array(weights), sampler([50, 60, 70], 10)
    steps = np.unique(np.concatenate([np.arange(0, 20_000, 7), [20_000]]))
    counts = np.array([source.counts_before(int(step), mixture) for step in steps])
    assert np.abs(counts - steps[:, None] * 10 * mixture).max() < 4


def test_seeking_far_agrees_with_drawing() -> None:
    weights, source = np.array([0.7, 0.2999, 0.0001]), sampler([1000, 77, 3], 33)
    start = 10**9
    draws = run(source, weights, 5, start)
    for step, draw in enumerate(draws, start + 1):
        assert np.array_equal(draw.counts, source.counts_before(step, weights))
    assert source.counts_before(start, weights).sum() == start * 33
    again = source.draw(start + 3, weights, source.counts_before(start + 3, weights))
    assert np.array_equal(again.sequence, draws[3].sequence) and np.array_equal(
        again.domain, draws[3].domain
    )


def test_a_step_out_of_range_is_refused() -> None:
    for step in (-1, (1 << 30) + 1):
        with pytest.raises(ValueError, match=f"step={step}"):
            sampler([3], 1).counts_before(step, np.array([1.0]))


@pytest.mark.parametrize("weights", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1.0]])
def test_what_is_not_a_mixture_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="not a mixture"):
        sampler([3, 3], 2).counts_before(1, np.array(weights))


# Order


def epochs(size: int, count: int, seed: int = 0, name: str = "a") -> Ints:
    """(count, size) the sequences of a domain's first epochs, in the order drawn."""
    source = Sampler(np.array([size]), (name,), size, seed)
    return np.array([draw.sequence for draw in run(source, np.array([1.0]), count)])


def test_every_sequence_comes_once_per_epoch_for_every_size() -> None:
    for size in range(1, 301):
        assert (np.sort(epochs(size, 2), axis=1) == np.arange(size)).all(), size


@pytest.mark.parametrize(("size", "batch"), [(10, 7), (5, 12), (1, 3)])
def test_every_sequence_comes_once_per_epoch_where_batches_cross_epochs(
    size: int, batch: int
) -> None:
    drawn = np.concatenate(
        [d.sequence for d in run(sampler([size], batch), np.array([1.0]), size * 3)]
    )
    assert (np.sort(drawn.reshape(-1, size), axis=1) == np.arange(size)).all()


def test_epochs_seeds_and_domains_have_permutations_of_their_own() -> None:
    first, second = epochs(200, 2)
    others = [second, epochs(200, 1, seed=1)[0], epochs(200, 1, name="b")[0], np.arange(200)]
    assert all((first == other).mean() < 0.05 for other in others)
    assert np.array_equal(first, epochs(200, 1)[0])


@pytest.mark.slow
def test_any_sequence_may_come_first() -> None:
    """χ² over the first position of many permutations of 11: a false alarm once in ten thousand
    draws of the seed."""
    firsts = [epochs(11, 1, seed=seed)[0, 0] for seed in range(2200)]
    assert stats.chisquare(np.bincount(firsts, minlength=11)).pvalue > 1e-4


def test_neighbours_in_order_are_not_neighbours_in_the_domain() -> None:
    order = epochs(5000, 1)[0]
    assert (np.abs(np.diff(order)) == 1).mean() < 0.005
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06


def test_adding_a_domain_leaves_the_order_of_the_others_alone() -> None:
    few = Sampler(np.array([50, 60]), ("a", "c"), 30, 0)
    more = Sampler(np.array([50, 40, 60]), ("a", "b", "c"), 30, 0)
    old = run(few, np.array([0.5, 0.5]), 10)
    new = run(more, np.array([0.3, 0.4, 0.3]), 10)
    for k_old, k_new in ((0, 0), (1, 2)):
        sequences = [
            np.concatenate([d.sequence[d.domain == k] for d in ds])
            for ds, k in ((old, k_old), (new, k_new))
        ]
        shared = min(map(len, sequences))
        assert shared > 50 and np.array_equal(sequences[0][:shared], sequences[1][:shared])


def test_changing_weights_with_carried_counts_still_pass_over_each_domain_in_order() -> None:
    sizes, random = [13, 40, 7], np.random.default_rng(0)
    source, counts = sampler(sizes, 11), np.zeros(3, dtype=np.int64)
    drawn: list[list[int]] = [[], [], []]
    for step in range(60):
        draw = source.draw(step, random.dirichlet(np.ones(3)), counts)
        assert np.array_equal(draw.counts - counts, quota(draw, 3))
        counts = draw.counts
        for k, sequence in zip(draw.domain, draw.sequence, strict=True):
            drawn[k].append(int(sequence))
    for size, sequences in zip(sizes, drawn, strict=True):
        for start in range(0, len(sequences) - size, size):
            assert sorted(sequences[start : start + size]) == list(range(size))


def test_what_was_computed_ahead_is_what_would_be_drawn_now() -> None:
    """Whatever was asked before: other weights, an earlier step, a later one."""
    random, source = np.random.default_rng(0), sampler([13, 4000, 7, 900], 9)
    counts = np.zeros(4, dtype=np.int64)
    for step in range(400):
        draw = source.draw(
            step, random.dirichlet([0.3] * 4) if step % 3 else np.full(4, 0.25), counts
        )
        number = counts[draw.domain].copy()
        for k in range(4):
            number[draw.domain == k] += np.arange((draw.domain == k).sum())
        assert np.array_equal(draw.sequence, source.sequence(draw.domain, number)), step
        counts = draw.counts if step % 50 else random.integers(0, 10**6, 4)


def test_the_order_is_that_of_every_run_so_far() -> None:
    """The digest is of what this drew when it was first written, on 2026-11-30: runs that continue
    rely on it, however it is computed."""
    random, digest = np.random.default_rng(0), hashlib.sha256()
    for case in range(40):
        sizes = random.integers(1, 10 ** int(random.integers(1, 8)), int(random.integers(1, 40)))
        part = Subsample(Fraction(int(random.integers(1, 5)), 5), 3) if case % 3 == 0 else None
        source = Sampler(sizes, names(len(sizes)), int(random.integers(1, 300)), case, part)
        weights = random.dirichlet(np.full(len(sizes), 0.4))
        counts = source.counts_before(case * 1000, weights)
        for step in range(case * 1000, case * 1000 + 30):
            if step % (7 + case) == 0:
                weights = random.dirichlet(np.full(len(sizes), 0.4))
            draw = source.draw(step, weights, counts)
            counts = draw.counts if step % 23 else random.integers(0, 10**6, len(sizes))
            digest.update(b"".join(field.astype("<i8").tobytes() for field in draw))
    assert digest.hexdigest() == "12bc1c6da8aff6ba4d5065a37dabd12c599ab2520701929b724f85c9bd060040"


def test_a_batch_spreads_every_domain_over_its_parts() -> None:
    draw = run(sampler([100] * 4, 32), np.array([0.25] * 4), 1)[0]
    for part in np.split(draw.domain, 4):
        assert np.bincount(part, minlength=4).tolist() == [2] * 4


def test_order_does_not_depend_on_the_hash_seed_of_python() -> None:
    code = (
        "import numpy as np; from doremi_train.data.sampler import Sampler;"
        "s = Sampler(np.array([90, 50]), ('x', 'y'), 20, 3); w = np.array([.6, .4]);"
        "d = s.draw(9, w, s.counts_before(9, w)); print(d.domain.tolist(), d.sequence.tolist())"
    )
    root = str(Path(__file__).parents[2])
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        )
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# Sub-samples


def subsampled(
    sizes: list[int], batch: int, part: Fraction, seed: int = 0, order: int = 0
) -> Sampler:
    return Sampler(np.array(sizes), names(len(sizes)), batch, order, Subsample(part, seed))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 10**12), min_size=1, max_size=6),
    st.integers(1, 10**15),
    st.integers(0, 10**15),
)
def test_a_sub_sample_is_the_part_rounded_up_and_never_empty(
    sizes: list[int], some: int, more: int
) -> None:
    kept = Subsample(Fraction(some, some + more), 0).sizes(np.array(sizes))
    for size, left in zip(sizes, kept.tolist(), strict=True):
        assert left == math.ceil(Fraction(size * some, some + more)) and 1 <= left <= size


def test_a_sub_sample_is_the_same_in_every_epoch_and_comes_once_in_each() -> None:
    for size, part in (
        (1, Fraction(1, 9)),
        (50, Fraction(1, 3)),
        (101, Fraction(99, 100)),
        (7, Fraction(1)),
    ):
        source = subsampled([size], 1, part)
        kept = int(source.sizes[0])
        drawn = np.concatenate(
            [d.sequence for d in run(source, np.array([1.0]), 3 * kept)]
        ).reshape(3, kept)
        passes = [frozenset(row.tolist()) for row in drawn]
        assert len(passes[0]) == kept and len(set(passes)) == 1 and max(passes[0]) < size
    assert not np.array_equal(drawn[0], drawn[1])  # each in an order of its own


def test_a_sub_sample_depends_on_its_seed_and_the_domain_s_name_alone() -> None:
    def kept(source: Sampler, k: int) -> frozenset[int]:
        draws = run(source, np.full(len(source.sizes), 1 / len(source.sizes)), 60)
        return frozenset(np.concatenate([d.sequence[d.domain == k] for d in draws]).tolist())

    half = Fraction(1, 2)
    source = subsampled([200, 300], 20, half)
    # Whatever the order is drawn by.
    assert kept(source, 0) == kept(subsampled([200, 40, 7], 30, half, order=9), 0)
    assert len(kept(source, 0)) == 100
    assert kept(source, 0) != kept(subsampled([200, 300], 20, half, seed=1), 0)
    assert kept(subsampled([200, 200], 20, half), 0) != kept(subsampled([200, 200], 20, half), 1)
    nested = kept(subsampled([200, 300], 20, Fraction(1, 4)), 0)
    assert nested < kept(source, 0)  # a smaller part is a part of the larger


@pytest.mark.slow
def test_any_sequence_may_be_kept() -> None:
    """χ² over the one sequence of 11 that is kept: a false alarm once in ten thousand draws of the
    seed."""
    kept = [
        run(subsampled([11], 1, Fraction(1, 11), seed), np.array([1.0]), 1)[0].sequence[0]
        for seed in range(2200)
    ]
    assert stats.chisquare(np.bincount(kept, minlength=11)).pvalue > 1e-4


def test_seeking_into_a_sub_sample_agrees_with_drawing() -> None:
    weights, source = np.array([0.7, 0.3]), subsampled([90, 33], 10, Fraction(1, 4))
    draws = run(source, weights, 40)
    for draw, again in zip(draws[25:], run(source, weights, 15, 25), strict=True):
        assert np.array_equal(draw.sequence, again.sequence) and np.array_equal(
            draw.counts, again.counts
        )


def test_quotas_do_not_see_a_sub_sample() -> None:
    whole, part = sampler([90, 33, 5], 10), subsampled([90, 33, 5], 10, Fraction(1, 9))
    weights = np.array([0.5, 0.3, 0.2])
    for a, b in zip(run(whole, weights, 30), run(part, weights, 30), strict=True):
        assert np.array_equal(a.domain, b.domain) and np.array_equal(a.counts, b.counts)


# Who takes which rows


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 8), st.integers(1, 6) | st.none(), st.integers(0, 40))
def test_ranks_and_micro_batches_cover_the_batch_exactly_once(
    size: int, micro: int | None, more: int
) -> None:
    batch = size + more
    shares = [World(rank, size).rows(batch, micro) for rank in range(size)]
    parts = {len(share) for share in shares}
    assert len(parts) == 1  # every forward and backward is a collective under sharding
    # And there are no more of them than needed.
    assert parts == {math.ceil(batch / (size * (micro or batch)))}
    rows = [row for share in shares for part in share for row in range(batch)[part]]
    assert sorted(rows) == list(range(batch))
    sizes = {part.stop - part.start for share in shares for part in share}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) == World(0, size).largest(batch, micro) <= (
        micro or batch
    )
    # Micro-batch m of all ranks together is one contiguous block.
    for part in zip(*shares, strict=True):
        assert all(a.stop == b.start for a, b in itertools.pairwise(part))


def test_a_batch_that_divides_is_divided_evenly() -> None:
    assert World(1, 4).rows(32, None) == [slice(8, 16)]
    assert World(1, 4).rows(32, 4) == [slice(4, 8), slice(20, 24)]


def test_fewer_sequences_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match=r"training.batch_size=3: .*\(4\)"):
        World(0, 4).rows(3, None)

"""What makes domain weights worth less than they look, seen in numbers: one function a failure, no
files, no torch.

Each takes the names of the domains and the numbers it judges, and returns what it found, which is
mostly nothing.

K domains, T steps, S seeds, M models, E evaluations, H hash buckets. Losses are nats per token.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import scipy  # each part is imported when it is first used
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# The largest weight that any published run of DoReMi gave a domain is 0.61, of 22.
DOMINANT = 0.8  # average weight of one domain above which the others hardly count
FEW = 2.0  # effective number of domains below which a mixture of many is one of hardly two
# Effective number in a step, as a part of that of the steps' average: 0.75 to 1 in sound runs.
HOPS = 0.65
ABSENT = 0.05  # part of the batches that may miss a domain
# Passes that are worth nearly as much as fresh text (Muennighoff et al. 2023, arXiv 2305.16264).
EPOCHS = 4.0
# Ratio of passes between proxy and final run, where one of them repeats more than EPOCHS.
MISMATCH = 4.0
GAIN = 0.05  # part of the context-free loss: a small model soon saves more on any language
# Part of the loss that a domain which is still being learned loses over a run's second half.
FLAT = 0.02
TRIVIAL = 0.1  # nats per token: each is foreseen with 90 %
# Part of the validation loss that is missing on training text; an uneven split makes up to as
# much.
OVERFIT = 0.1
LOST = 0.01  # part of the loss that a model may lose on a domain before it has forgotten it
# Distance beyond that of two halves, as a part of it, up to which two domains are one language.
SAME = 0.1
# Distance of two halves of one domain, beyond which the sample is too small to compare.
UNSURE = 0.3
# Part of a domain's text that may stand in another: licences and boilerplate stay below.
COPIED = 0.2
LEVEL = 0.95  # of the test whether seeds agree on a difference


class Finding(NamedTuple):
    """One thing that a user should know before trusting the weights."""

    kind: str  # the name of the detector
    domains: tuple[str, ...]
    message: str  # what was seen, why it matters, what to do
    value: float  # the number that was judged


def effective_number(weights: ArrayLike) -> float:
    """exp(entropy) of weights (K,) that sum to 1: how many equal domains would be as mixed, from 1
    to K."""
    shares = _floats(weights)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def one_hot(
    names: Sequence[str], weights: ArrayLike, traces: Sequence[ArrayLike] = ()
) -> list[Finding]:
    """The average weights (K,) are those of one domain, or the weights of the steps (T, K), one
    array a seed, jump from one domain to another: each step has far fewer domains than the average
    of the steps, past the start-up."""
    average = _floats(weights)
    if len(names) < 2:
        return []
    top, number = int(average.argmax()), effective_number(average)
    remedy = "take mixture=doremi_steady (step size 0.1, uniform reference), or a longer proxy run"
    if average[top] > DOMINANT or number < min(FEW, len(names) / 2):
        message = (
            f"The mixture is almost only {names[top]}: weight {average[top]:.2f}, and the "
            f"effective number of domains is {number:.1f} of {len(names)}. The final model would "
            f"hardly see the others; {remedy}."
        )
        return [Finding("one_hot", (names[top],), message, number)]
    late = [steps[len(steps) // 2 :] for steps in map(_floats, traces)]
    if not late:
        return []
    each = fmean(fmean(map(effective_number, steps)) for steps in late)
    mean = fmean(effective_number(steps.mean(axis=0)) for steps in late)
    if each >= HOPS * mean:
        return []
    message = (
        "The weights jump between domains and do not converge: a step of the second half has "
        f"{each:.1f} domains in effect, the average over these steps {mean:.1f}. The average looks "
        f"balanced, but no model was trained on anything like it; {remedy}."
    )
    return [Finding("one_hot", tuple(names), message, each)]


def missing_by_quota(batch: int, mixture: ArrayLike) -> Floats:
    """Probability (K,) that a batch of `batch` sequences misses a domain, where each gets its share
    rounded up or down in turn."""
    return 1 - np.minimum(batch * _floats(mixture), 1)


def missing_by_trace(tokens: ArrayLike) -> Floats:
    """Part (K,) of the steps whose batch had no token of a domain, from tokens (T, K) of each
    step."""
    return (np.asarray(tokens) == 0).mean(axis=0)


def absent(names: Sequence[str], missing: ArrayLike) -> list[Finding]:
    """Domains that more than a few batches miss: one finding for all. `missing` (K,) is a part of
    the batches."""
    parts = _floats(missing)
    indices = np.flatnonzero(parts > ABSENT)
    if not len(indices):
        return []
    domains = tuple(names[k] for k in indices.tolist())
    message = (
        f"{_percent(parts.max())} of the proxy's batches miss a domain ({', '.join(domains)}). In "
        "such a step its excess loss is not known and its weight moves by the others' alone; raise "
        "training.batch_size, or merge domains."
    )
    return [Finding("absent", domains, message, float(parts.max()))]


def repeated(names: Sequence[str], proxy_epochs: ArrayLike) -> list[Finding]:
    """Domains that the proxy passes over too often, from epochs (K,)."""
    return [
        Finding(
            "repeated",
            (name,),
            f"The proxy passes over {name} {epochs:.1f} times. Beyond about {EPOCHS:.0f} passes "
            "the excess loss measures what the models remember, not what is left to learn; add "
            "text, merge the domain with a like one, or train the proxy for fewer steps.",
            epochs,
        )
        for name, epochs in _pairs(names, proxy_epochs)
        if epochs > EPOCHS
    ]


def mismatched(
    names: Sequence[str], proxy_epochs: ArrayLike, final_epochs: ArrayLike
) -> list[Finding]:
    """Domains that only one of the two runs repeats often, from the epochs (K,) of the proxy and of
    the final run."""
    findings = []
    for (name, proxy), final in zip(
        _pairs(names, proxy_epochs), _floats(final_epochs).tolist(), strict=True
    ):
        low, high = sorted((proxy, final))
        if high > EPOCHS and high > MISMATCH * low:
            message = (
                f"The proxy passes over {name} {proxy:.1f} times and the planned final run "
                f"{final:.1f} times. A weight found on fresh text does not hold for repeated text, "
                "nor the other way round; with main.tokens set, proxy.match_repetition=true makes "
                "the proxy repeat its text as the final run will."
            )
            findings.append(Finding("mismatched", (name,), message, high))
    return findings


def unigram_entropy(counts: ArrayLike) -> float:
    """Nats per token of the best model without context, from the counts (V,) of a sample of tokens.

    With the correction of Miller and Madow, since rare tokens that a sample misses make it look too
    predictable.
    """
    seen = _floats(counts)
    seen = seen[seen > 0]
    total = seen.sum()
    return float(
        np.log(total) - (seen * np.log(seen)).sum() / total + (len(seen) - 1) / (2 * total)
    )


def noise(names: Sequence[str], unigram: ArrayLike, curves: Sequence[ArrayLike]) -> list[Finding]:
    """Domains on which the best model gets as far as guessing without context, and no further,
    though the other domains are learned. One that is neglected does not get there, and is not
    meant.

    `unigram` (K,) is that guess's loss; `curves` are the validation losses (E, K) of each model
    over its run.
    """
    models = [curve for curve in map(_floats, curves) if len(curve)]
    if not models:
        return []
    bare = np.maximum(_floats(unigram), 1e-9)  # a domain of one token has 0
    domain = np.arange(len(names))
    best = np.argmin([curve[-1] for curve in models], axis=0)  # (K,) which model
    last = np.array([curve[-1] for curve in models])[best, domain]
    middle = np.array([curve[(len(curve) - 1) // 2] for curve in models])[best, domain]
    gain, fall = 1 - last / bare, 1 - last / middle
    if np.median(gain) < GAIN:  # so early that nothing is told apart
        return []
    return [
        Finding(
            "noise",
            (name,),
            f"No model learns {name}: its loss of {last[k]:.2f} nats per token is that of "
            f"guessing without context ({bare[k]:.2f}), and falls no more. It takes tokens and "
            "teaches nothing; look at its text, and leave it out if it is noise.",
            float(gain[k]),
        )
        for k, name in enumerate(names)
        if abs(gain[k]) < GAIN and fall[k] < FLAT and last[k] > TRIVIAL
    ]


def trivial(names: Sequence[str], losses: ArrayLike) -> list[Finding]:
    """Domains that the best model foresees, from the last validation losses (M, K) of M models."""
    best = _floats(losses).min(axis=0)
    return [
        Finding(
            "trivial",
            (name,),
            f"Nothing is left to learn in {name}: its loss is {loss:.3f} nats per token. The "
            "weight it gets is spent for nothing; look for repeated or generated text in it, and "
            "leave it out or deduplicate it.",
            loss,
        )
        for name, loss in _pairs(names, best)
        if loss < TRIVIAL
    ]


def overfit(
    names: Sequence[str],
    training: ArrayLike,
    validation: ArrayLike,
    epochs: ArrayLike | None = None,
) -> list[Finding]:
    """Domains that the reference knows by heart, from its losses (K,) on training and on validation
    text. One that it passed over less than once, where its `epochs` (K,) are known, has but an
    uneven split."""
    passes = np.full(len(names), np.inf) if epochs is None else _floats(epochs)
    return [
        Finding(
            "overfit",
            (name,),
            f"The reference has learned {name} by heart: {seen:.2f} nats per token on its "
            f"training text, {unseen:.2f} on validation text. The proxy is held against losses "
            "that nobody reaches on new text; add text, or train the reference for fewer steps or "
            "on less of this domain.",
            float(unseen - seen),
        )
        for (name, seen), unseen, times in zip(
            _pairs(names, training), _floats(validation), passes, strict=True
        )
        if unseen - seen > max(OVERFIT * unseen, TRIVIAL) and times > 1
    ]


def forgotten(names: Sequence[str], before: ArrayLike, after: ArrayLike) -> list[Finding]:
    """Domains whose losses (K,) are higher than those of the model that training began with: one
    finding for all."""
    lost = [
        (name, old, new)
        for (name, old), new in zip(_pairs(names, before), _floats(after), strict=True)
        if new > (1 + LOST) * old
    ]
    if not lost:
        return []
    said = ", ".join(f"{name} ({old:.2f} before, {new:.2f} now)" for name, old, new in lost)
    message = (
        f"The model that training began with was better on {said}, in nats per token. Give these "
        "domains more weight (mixture=file, or swarm.floor), with text of the first training as "
        "a domain of its own; lower training.learning_rate, or train for fewer steps."
    )
    worst = max(float(new - old) for _, old, new in lost)
    return [Finding("forgotten", tuple(name for name, _, _ in lost), message, worst)]


def duplicate(
    names: Sequence[str], halves: ArrayLike, shared: ArrayLike | None = None
) -> list[Finding]:
    """Pairs of domains that hold the same language, or the same text.

    `halves` (K, 2, H): counts of hashed bigrams in two halves of a sample of each domain. `shared`
    (K, K): part of the text of the smaller one that also stands in the other.
    """
    counts = _floats(halves)
    roots = np.sqrt(counts / np.maximum(counts.sum(axis=2, keepdims=True), 1))
    flat = roots.reshape(2 * len(names), -1)
    # Squared Hellinger distance of two halves, which the noise of sampling makes larger by as much
    # in every term.
    distance = (1 - flat @ flat.T).reshape(len(names), 2, len(names), 2)
    within = distance[:, 0, :, 1].diagonal()  # (K,) between the halves of one domain
    between = distance.mean(axis=(1, 3))
    copied = np.zeros_like(between) if shared is None else _floats(shared)
    findings = []
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            pair = (names[a], names[b])
            halfway = (within[a] + within[b]) / 2
            if copied[a, b] > COPIED:
                seen = f"{_percent(copied[a, b])} of the text of one stands in the other too"
                value = float(copied[a, b])
            elif halfway < UNSURE and between[a, b] <= (1 + SAME) * halfway:
                seen = "their bigrams differ no more than those of two halves of one domain"
                value = float(between[a, b] / halfway) if halfway > 0 else 1.0
            else:
                continue
            message = (
                f"{pair[0]} and {pair[1]} hold the same language: {seen}. Nothing tells their "
                "weights apart, and how the two share what they get is chance; merge them, or "
                "deduplicate them."
            )
            findings.append(Finding("duplicate", pair, message, value))
    return findings


def seed_spread(
    names: Sequence[str], samples: ArrayLike, mixtures: Mapping[str, ArrayLike]
) -> list[Finding]:
    """Mixtures (K,) from which the weights (S, K) of S seeds are not distinguishable: one finding.

    Student-t on every domain, with the level divided among them (Bonferroni): the weights differ
    from a mixture where one domain's do. One seed says nothing, and nothing is returned.
    """
    weights = _floats(samples)
    seeds, domains = weights.shape
    if seeds < 2:
        return []
    quantile = float(scipy.stats.t.ppf(1 - (1 - LEVEL) / domains / 2, seeds - 1))
    half = quantile * weights.std(axis=0, ddof=1) / np.sqrt(seeds)
    alike = [
        mixture
        for mixture, values in mixtures.items()
        # 1e-12: equal weights that differ in their last bits are equal.
        if (np.abs(weights.mean(axis=0) - _floats(values)) <= half + 1e-12).all()
    ]
    if not alike:
        return []
    message = (
        f"The weights are not distinguishable from {' or '.join(alike)}: over {seeds} seeds no "
        "domain's weight differs from it by more than its interval, which is up to "
        f"±{half.max():.3f}. Take {alike[0]}, or more proxy.seeds and a longer proxy run."
    )
    return [Finding("seed_spread", tuple(names), message, float(half.max()))]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _pairs(names: Sequence[str], values: ArrayLike) -> list[tuple[str, float]]:
    return list(zip(names, _floats(values).tolist(), strict=True))


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"

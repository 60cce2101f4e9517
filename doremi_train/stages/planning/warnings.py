"""Warnings of what makes domain weights worth less, before anything runs."""

from collections.abc import Mapping
from typing import Any

from doremi_train.evaluation import detectors
from doremi_train.methods import simplex
from doremi_train.stages.runs import budget, followed
from doremi_train.stages.session import Session

# Measured at 400 and 800 steps of `tiny`: for some 200 steps α follows which domain is learned
# first, not which has most left to learn. A step size of 0.1 hardly lets it.
START_UP = 200  # steps
START_UP_SHARE = 0.1  # part of ᾱ that they may be
SMALL_STEP = 0.1
# The losses of a domain's sequences spread by some 0.3 nats per token: so many tell 0.01 apart.
SEQUENCES = 1000
UNWRITABLE = 0.01  # part of a domain's text
TINY = 20  # training sequences of a domain below which they cannot stand for it


def warnings(
    session: Session, domains: Mapping[str, Mapping[str, Any]], proxies: bool
) -> dict[str, list[str]]:
    """Warnings by kind of what makes domain weights worth less, before anything runs. `proxies`:
    whether they come from proxies."""
    names = list(domains)
    messages = {
        "tiny": [
            f"Domain {name} has only {domain['training_sequences']} training sequences "
            f"({domain['training_tokens']:,} tokens), which cannot stand for it; add text, or "
            "merge it with a like one."
            for name, domain in domains.items()
            if domain["training_sequences"] < TINY
        ],
        "unwritable": unwritable({name: domain["unwritable"] for name, domain in domains.items()}),
        "followed": [
            f"The final model follows main.mixture_file={session.config.main.mixture_file}; the "
            f"weights and epochs here are those of mixture={session.method}."
        ]
        * followed.asked(session),
    }
    if not proxies:
        return messages
    options, training = session.config.proxy, session.config.training
    epochs = [domain["proxy_epochs"] for domain in domains.values()]
    ways = [domain["final_epochs"] for domain in domains.values()]
    mismatched = detectors.mismatched(
        names, epochs, [way.get("learned", way["uniform"]) for way in ways]
    )
    absent = detectors.missing_by_quota(training.batch_size, simplex.uniform(len(names)).numpy())
    for finding in [
        *detectors.absent(names, absent),
        *detectors.repeated(names, epochs),
        *mismatched,
    ]:
        messages.setdefault(finding.kind, []).append(finding.message)
    longer = (
        budget.final_tokens(session)
        > training.steps * training.batch_size * training.sequence_length
    )
    if mismatched and longer and not options.match_repetition:
        hint = (
            "proxy.match_repetition=true lets reference and proxy repeat their data as the final "
            "run will."
        )
        messages["mismatched"].insert(0, hint)
    size, start = options.step_size, options.warmup
    left_out = options.average_from if start == "auto" else max(start, options.average_from)
    if size == "auto" or start == "auto":  # which leave the start out, or hardly let it count
        size = SMALL_STEP
    messages["short"] = too_short(training.steps, training.batch_size, len(names), size, left_out)
    return messages


def unwritable(shares: Mapping[str, float]) -> list[str]:
    """Which domains have text that the tokeniser cannot write, of {domain: share}, in sentences."""
    return [
        f"The tokeniser cannot write {share:.1%} of the text of domain {name}: it becomes unknown "
        "tokens, or is dropped; give a tokeniser that writes it, or data.tokenizer=train to learn "
        "one."
        for name, share in shares.items()
        if share > UNWRITABLE
    ]


def too_short(
    steps: int, batch: int, domains: int, step_size: float, average_from: float
) -> list[str]:
    """Whether a proxy of so many steps can tell its domains apart, in sentences."""
    messages = []
    left_out = int(average_from * steps)
    share = max(0, min(START_UP, steps) - left_out) / (steps - left_out)
    if share > START_UP_SHARE and step_size > SMALL_STEP:
        messages.append(
            f"The proxy has {steps} steps. For about the first {START_UP} α follows which domain "
            f"is learned first, and they are {share:.0%} of its average; take "
            f"mixture=doremi_steady (step size {SMALL_STEP}, uniform reference), or "
            f"training.steps={round(START_UP / START_UP_SHARE)} or more."
        )
    seen = steps * batch / domains
    if seen < SEQUENCES:
        enough = -(-SEQUENCES * domains // batch)
        messages.append(
            f"The proxy sees {seen:.0f} sequences of each domain. Fewer than about {SEQUENCES} do "
            "not tell losses apart that differ by 0.01 nats per token; take "
            f"training.steps={enough} or more, a larger training.batch_size, or fewer domains."
        )
    return messages

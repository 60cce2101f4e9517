"""Text towards which something is chosen: given as files, or drawn apart from what is evaluated.

Batch selection looks at it while the final model is trained, and some mixtures are made for it
(keys `target.*`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train.config import UserError
from doremi_train.data import options
from doremi_train.data.batches import Store, fixed_sequences, read
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import tokenizer
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import box
from doremi_train.methods.box import Box
from doremi_train.stages.session import Session
from doremi_train.training.batch_selection import Setting

TARGET = "target"  # the metric that is the loss on this text


class _Wanted(NamedTuple):
    """So many sequences of these domains, and the keys of the configuration that say so, for
    messages."""

    files_key: str
    domains_key: str
    domains: Sequence[str]
    sequences_key: str
    sequences: int
    shares: Sequence[float] | None = None  # of the domains; None: equal ones


def setting(session: Session, store: TokenStore) -> Setting | None:
    """Selection among a step's candidates; None where all are trained on."""
    files = session.config.batch_selection.validation
    return chosen(
        session, store, lambda: _given(session, store, _of_selection(session, store), files or ())
    )


def chosen(session: Session, store: Store, given: Callable[[], Tensor]) -> Setting | None:
    """The same for any store, with `given` reading the files of batch_selection.validation."""
    asked, training = session.config.batch_selection, session.config.training
    if asked.method == "none":
        return None
    if asked.method not in ("greats", "topk"):
        validation = _nothing(session)
    elif asked.validation is not None:
        validation = given()
    else:
        validation = _drawn(session, store, _of_selection(session, store))
    return Setting(asked, asked.candidates or 2 * training.batch_size, validation)


def _of_selection(session: Session, store: Store) -> _Wanted:
    asked, name = session.config.batch_selection, "batch_selection"
    domains, sequences = asked.domains or store.domains, asked.validation_sequences
    return _Wanted(
        f"{name}.validation", f"{name}.domains", domains, f"{name}.validation_sequences", sequences
    )


def of_mixtures(session: Session, store: TokenStore) -> Tensor:
    """(M, T + 1) what target.files or target.domains say; without them none: M is 0."""
    return _of(session, store, session.config.target.domains or (), None)


def of_ways(session: Session, store: TokenStore, otherwise: Sequence[str] = ()) -> Tensor:
    """(M, T + 1) what a mixture that looks at a target is for: what target.* says; without it text
    of the domains that the objective weighs, in proportion; or else of those of `otherwise`."""
    if given(session):
        return of_mixtures(session, store)
    shares = weighed(session, store)
    return _of(session, store, list(shares) or otherwise, list(shares.values()) or None)


def given(session: Session) -> bool:
    """Whether target.* names a target."""
    asked = session.config.target
    return asked.files is not None or asked.domains is not None


def weighed(session: Session, store: TokenStore) -> dict[str, float]:
    """The domains that the objective weighs, with their weights, where it is a weighted mean of
    them and of nothing else; none where all count alike."""
    asked = session.config.objective
    weights = {name: weight for name, weight in (asked.metrics or {}).items() if weight}
    if asked.reduce != "mean" or not set(weights) <= set(store.domains):
        return {}
    return weights if all(weight > 0 for weight in weights.values()) else {}


def alone(session: Session, store: TokenStore, within: Box) -> Tensor | None:
    """(K,) the mixture of nothing but the domains that the objective is for, in its shares; what
    the box leaves no room for goes to them in proportion, and when all are full to the others,
    nearly by their sizes. None where the objective is for no domain more than for others."""
    shares = _shares(session, store)
    wanted = np.array([shares.get(name, 0.0) for name in store.domains])
    if not shares or np.ptp(wanted) == 0:
        return None
    wanted /= wanted.sum()
    if not box.inside(wanted, within):
        sizes = np.asarray(store.sizes("train"), dtype=np.float64)
        wanted = box.on_grid(box.project(wanted + 1e-9 * sizes / sizes.sum(), within), within)
    return torch.from_numpy(wanted)


def _shares(session: Session, store: TokenStore) -> dict[str, float]:
    """The domains that the objective is for, with their shares: those that it weighs, and those
    that its target is drawn from; none where it is for something else too."""
    asked, target = session.config.objective, session.config.target
    shares: dict[str, float] = {}
    for name, weight in (asked.metrics or {}).items():
        of = target.domains or () if name == TARGET and target.files is None else (name,)
        for domain in of:
            shares[domain] = shares.get(domain, 0.0) + weight / len(of)
    known = set(shares) <= set(store.domains) and min(shares.values(), default=0.0) >= 0
    return shares if known and asked.reduce == "mean" else {}


def _of(
    session: Session, store: TokenStore, names: Sequence[str], shares: Sequence[float] | None
) -> Tensor:
    asked = session.config.target
    if asked.files is None and not names:
        return _nothing(session)
    keys = ("target.files", "target.domains", "target.sequences")
    wanted = _Wanted(keys[0], keys[1], names, keys[2], asked.sequences, shares)
    return (
        _drawn(session, store, wanted)
        if asked.files is None
        else _given(session, store, wanted, asked.files)
    )


def _nothing(session: Session) -> Tensor:
    return torch.zeros(0, session.config.training.sequence_length + 1, dtype=torch.int64)


def _drawn(session: Session, store: Store, wanted: _Wanted) -> Tensor:
    """(M, T + 1) from the validation split, evenly over the domains and none that the reported
    evaluation looks at."""
    names, length = wanted.domains, session.config.training.sequence_length
    unknown = sorted(set(names) - set(store.domains))
    if unknown:
        raise UserError(
            f"{wanted.domains_key}: {', '.join(unknown)}: unknown; allowed: "
            f"{', '.join(store.domains)}"
        )
    reported = set(zip(*(part.tolist() for part in evaluated(session, store)), strict=True))
    drawn, counts = [], _counts(wanted)
    for nth, name in enumerate(names):
        k = store.domains.index(name)
        free = [
            s
            for s in range(int(store.sequences("validation", length)[k]))
            if (k, s) not in reported
        ]
        count = counts[nth]
        if wanted.shares and not count:
            raise UserError(
                f"{wanted.sequences_key}={wanted.sequences}: none of domain {name!r}, of which the "
                "objective weighs little; raise it"
            )
        if len(free) < count:
            raise UserError(
                f"{wanted.sequences_key}={wanted.sequences}: {count} of domain {name!r}, but "
                f"besides those that are evaluated its validation split has {len(free)}; lower "
                "evaluation.sequences, raise data.validation_fraction, choose "
                f"{wanted.domains_key}, or give {wanted.files_key}"
            )
        drawn += [(k, free[i * len(free) // count]) for i in range(count)]
    domain, sequence = np.array(drawn, dtype=np.int64).T
    return read(store, "validation", domain, sequence, length).tokens


def _counts(wanted: _Wanted) -> list[int]:
    """Sequences of each domain, by its share; they sum to all of them."""
    shares = wanted.shares or [1.0] * len(wanted.domains)
    part = wanted.sequences / sum(shares)
    # A hair more, for sums of shares are not exact.
    ends = [int(sum(shares[:n]) * part + 1e-9) for n in range(len(shares) + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _given(session: Session, store: TokenStore, wanted: _Wanted, files: tuple[str, ...]) -> Tensor:
    """(M, T + 1) from the start of the target's files, packed as training text is."""
    length = session.config.training.sequence_length
    where = DataOptions(
        embedded=None,
        domains={"target": options.Split(train=files)},
        text_key=session.config.data.text_key,
        allow_pipe=session.config.data.allow_pipe,
    )
    tokens, needed = [], wanted.sequences * length + 1
    for ids in _documents(where, store, wanted.files_key):
        tokens += [*ids, store.end_of_document]
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise UserError(
            f"{wanted.files_key}: {len(tokens)} tokens, but {wanted.sequences} sequences of "
            f"{length} need {needed}; give more text, or lower {wanted.sequences_key}"
        )
    target = np.array(tokens[:needed])
    reported = read(store, "validation", *evaluated(session, store), length).tokens.numpy()
    # Whatever shares a whole sequence, wherever it begins, shares one of its halves.
    half = -(-length // 2)
    known = {
        row[start : start + half].tobytes() for row in reported for start in (0, length - half)
    }
    if any(target[start : start + half].tobytes() in known for start in range(needed - half)):
        raise UserError(
            f"{wanted.files_key}: shares text with the reported evaluation, towards which would "
            "then be trained; give text that is not in the data's validation split"
        )
    return torch.from_numpy(target).unfold(0, length + 1, length).clone()


def _documents(where: DataOptions, store: TokenStore, key: str) -> Iterator[list[int]]:
    encoder, bad = store.tokenizer(), opening.BadLines(where)
    for source in sources.resolve_one(where, key):
        for piece in reading.read(source, where, bad):
            tokens = (
                piece.tokens if piece.text is None else tokenizer.encode(encoder, [piece.text])[0]
            )
            assert tokens is not None
            yield tokens.tolist()


def evaluated(session: Session, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Domain and sequence of what the reported evaluation looks at."""
    length = session.config.training.sequence_length
    return fixed_sequences(store, "validation", length, session.config.evaluation.sequences)

"""The validation set that batch selection looks at: given as files, or drawn apart from what is evaluated."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from doremi_train.batch_selection import Setting
from doremi_train.config import UserError
from doremi_train.data import options, sources, tokenizer
from doremi_train.data.batches import Store, fixed_sequences, read
from doremi_train.data.shards import TokenStore
from doremi_train.stages import Session


def setting(session: Session, store: TokenStore) -> Setting | None:
    """How a step's candidates are picked; None where all are trained on."""
    return chosen(session, store, lambda: _given(session, store))


def chosen(session: Session, store: Store, given: Callable[[], Tensor]) -> Setting | None:
    """The same for any store, with `given` reading the files of batch_selection.validation."""
    asked, training = session.config.batch_selection, session.config.training
    if asked.method == "none":
        return None
    if asked.method not in ("greats", "topk"):
        validation = torch.zeros(0, training.sequence_length + 1, dtype=torch.int64)
    elif asked.validation is not None:
        validation = given()
    else:
        validation = _drawn(session, store)
    return Setting(asked, asked.candidates or 2 * training.batch_size, validation)


def _drawn(session: Session, store: Store) -> Tensor:
    """(M, T + 1) from the validation split, evenly over the domains and none that the reported evaluation looks at."""
    asked, length = session.config.batch_selection, session.config.training.sequence_length
    names = asked.domains or store.domains
    unknown = sorted(set(names) - set(store.domains))
    if unknown:
        raise UserError(f"batch_selection.domains: {', '.join(unknown)}: unknown; allowed: {', '.join(store.domains)}")
    reported = set(zip(*(part.tolist() for part in evaluated(session, store)), strict=True))
    found = []
    for nth, name in enumerate(names):
        k = store.domains.index(name)
        free = [s for s in range(int(store.sequences("validation", length)[k])) if (k, s) not in reported]
        wanted = (nth + 1) * asked.validation_sequences // len(names) - nth * asked.validation_sequences // len(names)
        if len(free) < wanted:
            raise UserError(
                f"batch_selection.validation_sequences={asked.validation_sequences}: {wanted} of domain {name!r}, but "
                f"besides those that are evaluated its validation split has {len(free)}; lower evaluation.sequences, "
                "raise data.validation_fraction, choose batch_selection.domains, or give batch_selection.validation"
            )
        found += [(k, free[i * len(free) // wanted]) for i in range(wanted)]
    domain, sequence = np.array(found, dtype=np.int64).T
    return read(store, "validation", domain, sequence, length).tokens


def _given(session: Session, store: TokenStore) -> Tensor:
    """(M, T + 1) from the start of the target's files, packed as training text is."""
    asked, length = session.config.batch_selection, session.config.training.sequence_length
    assert asked.validation is not None
    where = options.Options(
        embedded=None,
        domains={"target": options.Split(train=asked.validation)},
        text_key=session.config.data.text_key,
        allow_pipe=session.config.data.allow_pipe,
    )
    tokens, wanted = [], asked.validation_sequences * length + 1
    for ids in _documents(where, store):
        tokens += [*ids, store.end_of_document]
        if len(tokens) >= wanted:
            break
    if len(tokens) < wanted:
        raise UserError(
            f"batch_selection.validation: {len(tokens)} tokens, but {asked.validation_sequences} sequences of "
            f"{length} need {wanted}; give more text, or lower batch_selection.validation_sequences"
        )
    target = np.array(tokens[:wanted])
    reported = read(store, "validation", *evaluated(session, store), length).tokens.numpy()
    half = -(-length // 2)  # whatever shares a whole sequence, wherever it begins, shares one of its halves
    known = {row[start : start + half].tobytes() for row in reported for start in (0, length - half)}
    if any(target[start : start + half].tobytes() in known for start in range(wanted - half)):
        raise UserError(
            "batch_selection.validation: shares text with the reported evaluation, towards which would then be "
            "trained; give text that is not in the data's validation split"
        )
    return torch.from_numpy(target).unfold(0, length + 1, length).clone()


def _documents(where: options.Options, store: TokenStore) -> Iterator[list[int]]:
    encoder, bad = store.tokenizer(), sources.BadLines(where)
    for source in sources.resolve(where):
        for piece in sources.read(source, where, bad):
            found = piece.tokens if piece.text is None else tokenizer.encode(encoder, [piece.text])[0]
            assert found is not None
            yield found.tolist()


def evaluated(session: Session, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Domain and sequence of what the reported evaluation looks at."""
    length = session.config.training.sequence_length
    return fixed_sequences(store, "validation", length, session.config.evaluation.sequences)

"""Tasks as metrics of runs: bits per byte of the gold answers in `downstream.files`, and of the
cloze task that is made of held-out text.
"""

import itertools
from pathlib import Path

import orjson
import torch
import torch.nn.functional as F

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import downstream, gold
from doremi_train.evaluation.gold import Gold
from doremi_train.stages.runs import measuring
from doremi_train.stages.session import Session

CLOZE = "cloze"
_SHOTS = 8  # passages kept apart, from which the one shot is taken
_ANSWER = 16  # tokens of room for it


def known(session: Session) -> list[str]:
    """Names of the tasks that there are: those of downstream.files, and cloze."""
    return [*(name for name in session.config.downstream.files or {} if name != CLOZE), CLOZE]


def counted(session: Session, store: TokenStore) -> list[str]:
    """The tasks that the objective counts. Raises UserError for one that is a domain too, or where
    all are to count and there is none."""
    asked, asked_tasks = session.config.objective, session.config.downstream.tasks
    names = [n for n in known(session) if n in (asked.metrics or {}) or n in (asked.guard or {})]
    if asked.over == "tasks" and asked.metrics is None:
        alike = [n for n in known(session) if n != CLOZE or n in asked_tasks]
        if not alike:
            raise UserError(
                "objective=tasks: there are no tasks; give downstream.files={NAME: FOLDER}, "
                "downstream.tasks=[cloze], or objective.metrics={cloze: 1}"
            )
        names = [name for name in known(session) if name in (*names, *alike)]
    for name in names:
        if name in store.domains:
            raise UserError(
                f"objective: {name} is a domain of the data, and a task of downstream.files; "
                "rename one of them"
            )
    return names


def golds(session: Session, store: TokenStore) -> dict[str, tuple[Gold, str]]:
    """Every task that counts in tokens, read once, with its fingerprint."""
    if __name__ not in session.results:
        read = {name: _gold(session, store, name) for name in counted(session, store)}
        session.results[__name__] = {
            name: (one, fingerprint([part.tolist() for part in one])) for name, one in read.items()
        }
    found: dict[str, tuple[Gold, str]] = session.results[__name__]
    return found


def bits_per_byte(session: Session, store: TokenStore, model: Path) -> dict[str, float]:
    """Those of a model's folder on every task that counts; of a run in the store they are measured
    once, and kept there. A collective."""
    asked = golds(session, store)
    texts = [text for _, text in asked.values()]
    found = measuring.known(session, model, texts)
    missing = {n: one for (n, one), value in zip(asked.items(), found, strict=True) if not value}
    if missing:
        width = max(one.tokens.shape[1] for one, _ in missing.values())
        rows = [F.pad(one.tokens, (0, width - one.tokens.shape[1])) for one, _ in missing.values()]
        losses = measuring.losses_on(session, store, model, torch.cat(rows))
        parts = losses.split([len(one.tokens) for one, _ in missing.values()])
        new = {
            text: {"bits_per_byte": gold.bits_per_byte(part[:, : one.answer.shape[1]], one)}
            for part, (one, text) in zip(parts, missing.values(), strict=True)
        }
        measuring.keep(session, model, new)
        found = [new.get(text, value) for text, value in zip(texts, found, strict=True)]
    return {
        name: float(value["bits_per_byte"])
        for name, value in zip(asked, found, strict=True)
        if value is not None
    }


def write_cloze(session: Session, store: TokenStore, folder: Path) -> Path:
    """The files of the cloze task."""
    passages = _passages(session, store)
    for part, texts in (("train", passages[:_SHOTS]), ("test", passages[_SHOTS:])):
        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
        files.write_bytes(folder / f"{part}.jsonl", lines)
    return folder


def _gold(session: Session, store: TokenStore, name: str) -> Gold:
    asked, length = session.config.downstream, session.config.training.sequence_length
    if name == CLOZE:
        passages = _passages(session, store)
        records = [{"text": text} for text in (passages[0], *passages[_SHOTS:])]
    else:
        records = gold.read(name, Path((asked.files or {})[name]), asked.examples)
    return gold.gold(name, records, store.tokenizer(), length, store.end_of_document)


def _passages(session: Session, store: TokenStore) -> list[str]:
    """Passages of validation text for the cloze task, as many of every domain as there are, in
    turn; the first are for the one shot."""
    wanted = session.config.downstream.examples + _SHOTS
    # So that shot and question fit the model.
    length = (session.config.training.sequence_length - _ANSWER) // 2
    if length < downstream.LEAST_PASSAGES:
        raise UserError(
            f"downstream.tasks: cloze needs sequences of {2 * downstream.LEAST_PASSAGES + _ANSWER} "
            "tokens at least, not "
            f"training.sequence_length={session.config.training.sequence_length}"
        )
    by_domain = [downstream.passages(store, k, length) for k in range(len(store.domains))]
    passages: list[str] = []
    # Of every domain the first, then of every domain the second, …
    for together in itertools.zip_longest(*by_domain):
        passages += [passage for passage in together if passage is not None]
        if len(passages) >= wanted:
            break
    if len(passages) <= _SHOTS:
        raise UserError(
            f"downstream.tasks: the validation text has {len(passages)} passages for cloze; give "
            "more"
        )
    return passages[:wanted]

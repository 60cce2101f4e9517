"""What a user should know before trusting the weights: the detectors on what the stages left, as findings.json."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_train import comm, detectors, files
from doremi_train.config import UserError
from doremi_train.data.batches import fixed_sequences
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.detectors import Finding
from doremi_train.stages import Session, evaluate, language_model, mixture, once, prepare

SAMPLE = 2**17  # training tokens of a domain that are looked at
BUCKETS = 2**14  # of hashed bigrams
SHINGLE = 24  # tokens that are hardly the same by chance
KEPT = 8  # one of so many shingles is compared, chosen by its hash wherever it stands
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd: spreads neighbouring numbers

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]


@once
def run(session: Session) -> list[Finding]:
    """Every finding of every detector that the stages of this run give numbers for, written to findings.json."""
    store = prepare.run(session)
    figures = evaluate.run(session)
    findings: list[Finding] = comm.on_first(lambda: _diagnose(session, store, figures))
    return findings


def _diagnose(session: Session, store: TokenStore, figures: dict[str, Any]) -> list[Finding]:
    samples = sample(store, session.config.training.sequence_length)
    findings = [
        *_of_the_proxies(session, store),
        *_of_the_models(session, store.domains, figures, samples),
        *of_the_text(store.domains, samples),
    ]
    files.write_json(session.run_dir / "findings.json", [finding._asdict() for finding in findings])
    return findings


def _of_the_proxies(session: Session, store: TokenStore) -> list[Finding]:
    """How the weights came about; nothing, where they were not learned."""
    names, folders = store.domains, proxies(session.run_dir)
    if not folders:
        return []
    mixed = files.read_json(session.run_dir / "weights.json")
    results = [files.read_json(folder / "result.json") for folder in folders]  # of S seeds
    epochs = np.mean([_row(names, result["epochs"]) for result in results], axis=0)
    alphas = [_trace(names, folder, "weights") for folder in folders]
    tokens = [_trace(names, folder, "tokens") for folder in folders]
    others = {}
    for name in ("uniform", "natural", "unimax"):
        with contextlib.suppress(UserError):  # unimax, where the final run needs more text than it allows
            others[name] = language_model.heuristic(session, store, name, mixture.main_steps(session)).numpy()
    return [
        *detectors.one_hot(names, _row(names, mixed["weights"]), alphas),
        *detectors.absent(names, detectors.missing_by_trace(np.concatenate(tokens))),
        *detectors.repeated(names, epochs),
        *detectors.mismatched(names, epochs, _row(names, mixed["epochs"])),
        *detectors.seed_spread(names, [_row(names, result["weights"]) for result in results], others),
    ]


def _of_the_models(
    session: Session, names: Sequence[str], figures: dict[str, Any], samples: list[Tokens]
) -> list[Finding]:
    """What reference and proxy make of each domain."""
    folders = [session.run_dir / "reference", *proxies(session.run_dir)]
    found = [list(files.read_lines(folder / "evaluations.jsonl")) for folder in folders]
    curves = [_columns(names, (line["domains"] for line in lines)) for lines in found if lines]
    findings = []
    if curves:  # an existing reference has none
        entropies = [detectors.unigram_entropy(np.bincount(tokens.ravel())) for tokens in samples]
        findings += detectors.noise(names, entropies, curves)
        findings += detectors.trivial(names, [curve[-1] for curve in curves])
    if "reference" in figures:
        seen, unseen = figures["reference"]["training_loss"], figures["reference"]["domains"]
        result = session.run_dir / "reference" / "result.json"  # not of an existing reference
        epochs = _row(names, files.read_json(result)["epochs"]) if result.exists() else None
        losses = [unseen[name]["loss"] for name in names]
        findings += detectors.overfit(names, _row(names, seen), losses, epochs)
    return findings


def of_the_text(names: Sequence[str], samples: list[Tokens]) -> list[Finding]:
    """What the domains share, seen in a sample of the text of each."""
    bigrams = [[_bigrams(tokens[half::2]) for half in range(2)] for tokens in samples]
    return detectors.duplicate(names, bigrams, _shared([_shingles(tokens) for tokens in samples]))


def proxies(run_dir: Path) -> list[Path]:
    """Folders of the proxies that the weights come from: the seeds of the last round, or the one there is."""
    rounds = sorted(run_dir.glob("proxy/round-*"), key=lambda folder: int(folder.name.removeprefix("round-")))
    folders = sorted(rounds[-1].glob("seed-*")) if rounds else [run_dir / "proxy"]
    return [folder for folder in folders if (folder / "result.json").exists()]


def sample(store: TokenStore, length: int) -> list[Tokens]:
    """Training sequences (n, length + 1) of each domain, about SAMPLE tokens, evenly spread over it."""
    domain, sequence = fixed_sequences(store, "train", length, max(2, SAMPLE // length))
    tokens = store.gather("train", domain, sequence, length)
    return [tokens[domain == k] for k in range(len(store.domains))]


def _bigrams(tokens: Tokens) -> Tokens:
    """(BUCKETS,) counts of hashed pairs of neighbours in (n, T + 1)."""
    pairs = tokens.astype(np.uint64)
    hashed = (pairs[:, :-1] * MULTIPLIER + pairs[:, 1:]) * MULTIPLIER >> np.uint64(64 - BUCKETS.bit_length() + 1)
    return np.bincount(hashed.ravel().astype(np.int64), minlength=BUCKETS)


def _shingles(tokens: Tokens) -> NDArray[np.uint64]:
    """Different hashes of SHINGLE neighbouring tokens in (n, T + 1), one of KEPT, sorted."""
    rows = tokens.astype(np.uint64)
    width = min(SHINGLE, rows.shape[1])
    hashed = np.zeros_like(rows[:, width - 1 :])
    for start in range(width):
        hashed = hashed * MULTIPLIER + rows[:, start : start + hashed.shape[1]] + np.uint64(1)
    hashed = (hashed ^ (hashed >> np.uint64(32))) * MULTIPLIER
    return np.unique(hashed[hashed % np.uint64(64 * KEPT) // np.uint64(64) == 0])


def _shared(shingles: Sequence[NDArray[np.uint64]]) -> Floats:
    """(K, K) part of the smaller domain's shingles that are in the other too."""
    shared = np.zeros((len(shingles), len(shingles)))
    for a, mine in enumerate(shingles):
        for b, other in enumerate(shingles[:a]):
            both = np.intersect1d(mine, other, assume_unique=True)
            shared[a, b] = shared[b, a] = len(both) / max(min(len(mine), len(other)), 1)
    return shared


def _trace(names: Sequence[str], folder: Path, key: str) -> Floats:
    """(T, K) of the steps of a proxy."""
    return _columns(names, (line[key] for line in files.read_lines(folder / "domain_weights.jsonl")))


def _columns(names: Sequence[str], rows: Iterable[Mapping[str, float]]) -> Floats:
    """(T, K) of T rows by domain, read one by one: a long run has many."""
    return np.fromiter((row[name] for row in rows for name in names), np.float64).reshape(-1, len(names))


def _row(names: Sequence[str], values: Mapping[str, float]) -> Floats:
    return np.array([values[name] for name in names], dtype=np.float64)

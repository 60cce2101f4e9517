"""Fine clusters of a sample: k-means of scikit-learn from several starts, each a task of its own,
then polished in whole numbers.

N documents of a group, m buckets of words, F fine clusters, D dimensions.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from doremi_train.config import UserError
from doremi_train.files import replacing
from doremi_train.methods import clusters
from doremi_train.selection.documents.tasks import read_arrays, write_arrays
from doremi_train.selection.regroup.assigning import Model, save_model
from doremi_train.selection.regroup.features import BUCKETS, good_ratios, vectors
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.selection.regroup.sampling import Sample, gathered
from doremi_train.selection.regroup.task import Task

FEW = 16  # fine clusters that a small sample is divided into all the same
BATCH = 4096  # documents of a step of mini-batch k-means
# Documents met by these steps, and again by the rounds that polish them: of a sample of a million
# two passes and two rounds.
MET = 2_000_000
PASSES = 10  # and rounds, at most


def require_sklearn() -> None:
    """Raises UserError where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("stage=regroup: needs scikit-learn; pip install 'doremi-train[select]'")


def word_weights(sample: Sample, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(m,) log of the inverse part of a group's documents that hold a word; 0 of rare words, which
    only blur the projection: of fewer than √N / 8 documents, or of one."""
    seen = np.zeros(BUCKETS, np.int64)
    for row in rows:
        seen[sample.buckets[sample.first[row] : sample.first[row + 1]]] += 1
    least = max(2, round(np.sqrt(len(rows)) / 8))
    # A word of every document tells none apart, but where all words are such they are all there is.
    weights = np.log((len(rows) + 1) / np.maximum(seen, 1))
    return np.where(seen >= min(least, len(rows)), weights, 0).astype(np.float32)


def projected(
    sample: Sample, rows: NDArray[np.int64], weights: NDArray[np.float32], dimensions: int
) -> NDArray[np.int16]:
    """(N, D) vectors of a group's documents."""
    first = sample.first[rows[0] : rows[-1] + 2]  # a group's documents stand together
    own = slice(first[0], first[-1])
    return vectors(sample.buckets[own], sample.counts[own], first - first[0], weights, dimensions)


def begun(home: Path, work: list[Task], options: RegroupOptions) -> list["Start"]:
    """The starts to be made on the sample that the tasks have gathered, whose vectors are
    written."""
    sample, grams = gathered(work)
    groups = sorted(set(sample.group.tolist()))
    weights = np.zeros((len(groups), BUCKETS), np.float32)
    known = np.zeros(len(sample.draw), bool)
    for number, group in enumerate(groups):
        rows = np.flatnonzero(sample.group == group)
        weights[number] = word_weights(sample, rows)
        documents = sample.encoded[rows]
        if options.encoder is None:
            documents = projected(sample, rows, weights[number], options.dimensions)
        known[rows] = documents.any(1)
        _write(home / f"vectors-{number}.npy", documents[known[rows]])
    write_arrays(
        home / "sample.npz",
        {
            "groups": np.array(groups, str),
            "group": np.searchsorted(groups, sample.group),
            "known": known,  # whether it has a vector
            "tokens": sample.tokens,
            "text": sample.text,
            "text_first": sample.text_first,
            "weights": weights,
            "grams": grams,
        },
    )
    return starts(home, groups, options)


def require_documents(home: Path, options: RegroupOptions) -> None:
    """Raise UserError where a group has fewer documents than domains are asked for."""
    sample = read_arrays(home / "sample.npz")
    for number, group in enumerate(sample["groups"]):
        different = int(sample["known"][sample["group"] == number].sum())
        if different < options.domains:
            where = f"domain {str(group)!r}" if options.within == "domain" else "the data"
            raise UserError(
                f"regroup.domains={options.domains}: {where} has only {different} different "
                "documents with words that others have too; ask for fewer, or give more text"
            )


def starts(home: Path, groups: list[str], options: RegroupOptions) -> list["Start"]:
    """A task for every group and seed."""
    return [
        Start(home, number, seed, options)
        for number in range(len(groups))
        for seed in range(options.starts)
    ]


def finished(home: Path, made: list["Start"], good: list[bytes], options: RegroupOptions) -> None:
    """Write the model, of the best starts, and beside it the clusters of the sample."""
    sample = read_arrays(home / "sample.npz")
    label = np.full(len(sample["group"]), -1)
    cosine = np.zeros(len(label))
    centres: list[NDArray[np.int16]] = []
    owner: list[int] = []
    for number in range(len(sample["groups"])):
        rows = np.flatnonzero((sample["group"] == number) & sample["known"])
        documents = np.load(home / f"vectors-{number}.npy", mmap_mode="r")
        best = in_order([task for task in made if task.group == number])[0]
        nearest, cosine[rows] = clusters.nearest(documents, best["centres"])
        label[rows] = nearest + len(owner)
        centres.append(best["centres"])
        owner += [number] * len(best["centres"])
    write_arrays(home / "clusters.npz", {"label": label, "cosine": cosine})
    save_model(
        home,
        Model(
            [str(name) for name in sample["groups"]],
            sample["weights"],
            np.concatenate(centres),
            np.array(owner, np.int64),
            good_ratios(good, sample["grams"], np.asarray(sample["weights"].max(0) > 0))
            if good
            else np.empty((0, 1), np.float32),
        ),
    )


class Start(NamedTuple):
    """K-means on one group from one start."""

    folder: Path
    group: int
    seed: int
    options: RegroupOptions

    @property
    def documents(self) -> Path:
        return self.folder / f"vectors-{self.group}.npy"

    @property
    def path(self) -> Path:
        return self.folder / "starts" / f"{self.group}-{self.seed}.npz"


def start(task: Start) -> None:
    """The fine clusters from one start. On one thread, so that any number of cores gives the same
    bytes."""
    if task.path.exists():
        return
    from sklearn.cluster import MiniBatchKMeans

    documents = np.load(task.documents, mmap_mode="r")
    n, options = len(documents), task.options
    fine = min(max(min(options.fine, n // 4), FEW), n)
    size = min(max(BATCH, 4 * fine), n)  # the first batch is what the start is drawn from
    passes = min(max(MET // n, 1), PASSES)
    fit = MiniBatchKMeans(fine, n_init=1, random_state=task.seed, batch_size=size)
    with threadpool_limits(1):
        for first in [*range(0, n, size)] * passes:  # they stand in a random order already
            fit.partial_fit(documents[first : first + size] / np.float32(clusters.UNIT))
        means = clusters.quantized(fit.cluster_centers_)
        polished = clusters.polished(documents, means, passes)
    write_arrays(
        task.path,
        {
            "centres": polished.centres,
            "label": polished.label,
            "total": np.array(polished.total),
        },
    )


def _write(path: Path, documents: NDArray[np.int16]) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.save(file, documents)


def in_order(starts: list[Start]) -> list[dict[str, NDArray]]:
    """What the starts of a group found: the largest total first, the first of equal ones."""
    return sorted((read_arrays(task.path) for task in starts), key=lambda one: -int(one["total"]))


def stability(home: Path, options: RegroupOptions) -> dict[str, float] | None:
    """Adjusted Rand on the sample between the two best starts, of fine clusters and of domains, the
    mean over groups; None of one start."""
    if options.starts == 1:
        return None
    sample = read_arrays(home / "sample.npz")
    found = []
    for number in range(len(sample["groups"])):
        tokens = sample["tokens"][(sample["group"] == number) & sample["known"]]
        both = in_order([Start(home, number, seed, options) for seed in range(options.starts)])[:2]
        fine, domains = [], []
        for one in both:
            size = np.bincount(one["label"], tokens).astype(np.int64)
            enough = least(options, int(size.sum()))
            merged = clusters.merged(one["centres"], size, options.domains, enough)
            fine.append(one["label"])
            domains.append(merged[one["label"]])
        found.append([clusters.adjusted_rand(_table(*pair)) for pair in (fine, domains)])
    of_fine, of_domains = np.mean(found, 0).tolist()
    return {"fine": of_fine, "domains": of_domains}


def least(options: RegroupOptions, tokens: int) -> float:
    """Words that a domain of a group of so many has at least."""
    if options.least_tokens is not None:
        return options.least_tokens
    return tokens / options.domains / 10


def _table(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many documents are in each pair of cells."""
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1), np.int64)
    np.add.at(table, (a, b), 1)
    return table

"""Domains of fine clusters, with names, and what is told of them.

F fine clusters, K domains, n documents of the sample, H hash buckets.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_train.methods import clusters
from doremi_train.selection.documents import kernels
from doremi_train.selection.documents.parts import Document, batched
from doremi_train.selection.documents.tasks import read_arrays
from doremi_train.selection.regroup import names
from doremi_train.selection.regroup.assigning import Model
from doremi_train.selection.regroup.fit import least, stability
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.selection.regroup.task import Task
from doremi_train.selection.regroup.write import Domains, level_cuts

HASHED = 2**13  # H, of the bigrams by which domains are compared
EXAMPLES = 3  # texts that are shown of a domain
SHOWN = 300  # characters of each
# Cosine to the centre of a cluster of so many texts, from which on they are near copies.
COPIES, TOGETHER = 0.9, 4


def made(
    home: Path,
    work: list[Task],
    model: Model,
    given: dict[str, NDArray[np.int64]],
    options: RegroupOptions,
) -> tuple[Domains, dict[str, Any], NDArray[np.int64]]:
    """(the domains; what is told of them, for result.json; counts (K, 2, H) of hashed bigrams in
    two halves of the sampled texts of each). `given` are the sums of `write.sums`."""
    fine = len(model.centres)
    of, of_group = _merged(work[0], model, given, options)
    sample, found = read_arrays(home / "sample.npz"), read_arrays(home / "clusters.npz")
    label = np.append(of, -1)[found["label"]]  # (n,) −1: without a vector
    texts = _texts(sample, label, len(of_group))
    words, near = _words(texts, of_group), _near_copies(found)
    kinds = []
    for k, own in enumerate(texts):
        copies = 2 * int(near[label == k].sum()) > int((label == k).sum())
        kinds.append("junk" if names.is_junk(own) else "copies" if copies else "")
    prefixes = [
        "-".join(part for part in (model.groups[group], kind) if part)
        for group, kind in zip(of_group, kinds, strict=True)
    ]
    named = names.named(words, prefixes, set())
    every = np.sum(list(given.values()), 0)  # (F + 1, 2)
    tokens = np.bincount(of, every[:fine, 1], len(of_group))
    rest = {
        name: max((k for k, g in enumerate(of_group) if g == number), key=lambda k: tokens[k])
        for number, name in enumerate(model.groups)
    }
    domains = Domains(named, of.tolist(), rest, encoder=options.encoder)
    if options.levels > 1:
        cuts = level_cuts(work, domains, options.levels)
        domains = replace(domains, levels=options.levels, cuts=cuts)
    told = _told(model, domains, every[:fine, 1], texts, words, kinds)
    return domains, told | {"stability": stability(home, options)}, _halves(texts)


def _merged(
    task: Task, model: Model, given: dict[str, NDArray[np.int64]], options: RegroupOptions
) -> tuple[NDArray[np.int64], list[int]]:
    """((F,) domain of each fine cluster; (K,) group of each domain)."""
    fine = len(model.centres)
    of, of_group = np.zeros(fine, np.int64), list[int]()
    for number, group in enumerate(model.groups):
        own = np.flatnonzero(model.owner == number)
        mine = [counts[own, 1] for name, counts in given.items() if task.group(name) == group]
        size = sum(mine, np.zeros(len(own), np.int64))
        label = clusters.merged(
            model.centres[own], size, options.domains, least(options, int(size.sum()))
        )
        of[own] = label + len(of_group)
        of_group += [number] * (int(label.max()) + 1)
    return of, of_group


def _near_copies(found: dict[str, NDArray]) -> NDArray[np.bool_]:
    """(n,) whether a document of the sample is a near copy of others."""
    label = found["label"]
    size = np.bincount(label[label >= 0], minlength=int(label.max()) + 1)[label]
    return (label >= 0) & (size >= TOGETHER) & (found["cosine"] >= COPIES)


def _texts(sample: dict[str, NDArray], label: NDArray[np.int64], domains: int) -> list[list[str]]:
    """How the looked-at texts of each domain begin, in the order of their draws."""
    first, text = sample["text_first"], sample["text"]
    texts: list[list[str]] = [[] for _ in range(domains)]
    for row in np.flatnonzero((np.diff(first) > 0) & (label >= 0)):
        content = text[first[row] : first[row + 1]].tobytes()
        texts[label[row]].append(content.decode(errors="ignore"))
    return texts


def _words(texts: list[list[str]], of_group: list[int]) -> list[list[str]]:
    """(K,) words that tell each domain apart from the others of its group."""
    words: list[list[str]] = [[] for _ in texts]
    for group in sorted(set(of_group)):
        own = [k for k, of in enumerate(of_group) if of == group]
        for k, told in zip(own, names.telling_words([texts[k] for k in own]), strict=True):
            words[k] = told
    return words


def _halves(texts: list[list[str]]) -> NDArray[np.int64]:
    """(K, 2, H) counts of hashed words and bigrams in every other text."""
    counts = np.zeros((len(texts), 2, HASHED), np.int64)
    for k, own in enumerate(texts):
        for half in range(2):
            documents = [Document(n, 0, "", text.encode()) for n, text in enumerate(own[half::2])]
            for batch in batched(documents, None):
                kernels.count(batch.tokens.hashes, batch.bounds, counts[k, half])
    return counts


def _told(
    model: Model,
    domains: Domains,
    tokens: NDArray[np.int64],
    texts: list[list[str]],
    words: list[list[str]],
    kinds: list[str],
) -> dict[str, Any]:
    of = np.array(domains.of)
    return {
        "domains": [
            {
                "name": name,
                "kind": kind,
                "words": own,
                "clusters": int((of == k).sum()),
                "texts": [text[:SHOWN] for text in texts[k][:EXAMPLES]],
            }
            for k, (name, kind, own) in enumerate(zip(domains.names, kinds, words, strict=True))
        ],
        "picture": _picture(model.centres, tokens).tolist(),
        "tokens": tokens.tolist(),  # of the fine clusters
        "distances": clusters.centre_distances(model.centres, tokens, of).round(4).tolist(),
    }


def _picture(centres: NDArray[np.int16], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """(F, 2) the fine clusters along the two directions in which they differ most, by their
    words."""
    unit = centres.astype(np.float64) / clusters.UNIT
    weight = np.maximum(tokens, 1) / np.maximum(tokens, 1).sum()
    centred = unit - weight @ unit
    _, _, axes = np.linalg.svd(centred * np.sqrt(weight)[:, None], full_matrices=False)
    axes = axes[:2]
    # A direction and its opposite are one: the largest entry is positive.
    largest = np.abs(axes).argmax(1)
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    flat = centred @ axes.T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))).round(4)

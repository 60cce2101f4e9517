"""The baselines of document selection: BM25 against its formula, embeddings by a real encoder."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.command import run_here
from helpers.corpus import documents, write_jsonl
from helpers.encoder import untrained
from scipy import optimize

from doremi_train.selection.documents import baselines
from doremi_train.selection.documents.registry import METHODS
from doremi_train.selection.documents.scorers import whole
from doremi_train.selection.options import SelectionOptions

pytest.importorskip("numba")


def test_bm25_is_lucene_s() -> None:
    corpus = [text.split() for text in documents(1, "abcdefgh", 60, 20_000)]
    queries = [text.split()[:20] for text in documents(7, "abcdefgh", 60, 1000)] + [corpus[3][:5]]
    scorer = METHODS["bm25"](SelectionOptions(method="bm25"))
    sums, batch = scorer.sums(), whole([" ".join(words).encode() for words in corpus])
    scorer.observe(batch, sums)
    model = scorer.fit({"t": [" ".join(words).encode() for words in queries]}, sums)
    found = scorer.score(batch, model)[:, 0]
    mean = sum(map(len, corpus)) / len(corpus)
    holds = Counter(word for words in corpus for word in set(words))
    expected = [
        sum(
            math.log(1 + (len(corpus) - holds[word] + 0.5) / (holds[word] + 0.5))
            * words.count(word) * 2.5
            / (words.count(word) + 1.5 * (0.25 + 0.75 * len(words) / mean))
            for query in queries for word in query
        ) / len(queries)
        for words in corpus
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """A domain that hides documents of the target's language, and overrides to select 12 of its 100
    documents."""
    hidden, stream = documents(3, "nopqrst", 300, 8000), documents(3, "nopqrst", 300, 10**6)
    write_jsonl(
        tmp_path / "raw" / "mixed" / "train.jsonl",
        [*documents(2, "hijklmno", 200, 30_000), *hidden],
    )
    for _ in range(100):
        next(stream)
    target = write_jsonl(tmp_path / "target.jsonl", [next(stream) for _ in range(5)])
    return [
        "stage=select", f"data.root={tmp_path / 'raw'}", f"selection.targets={{t: [{target}]}}",
        "selection.workers=1", "selection.documents=12", "selection.temperature=0",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def found(tmp_path: Path, run_dir: str = "run") -> int:
    """How many of the chosen were hidden: those after the documents of the other language."""
    others = sum(1 for _ in documents(2, "hijklmno", 200, 30_000))
    table = pq.read_table(
        tmp_path / run_dir / "select/t/sidecar.parquet", filters=[("selected", "==", True)]
    )
    return int((table["row"].to_numpy() >= others).sum())


def test_bm25_finds_what_is_hidden(place: list[str], tmp_path: Path) -> None:
    done = run_here("selection=bm25", *place)
    assert done.code == 0, done
    assert found(tmp_path) >= 11


def test_a_classifier_finds_what_is_hidden(place: list[str], tmp_path: Path) -> None:
    done = run_here("selection=classifier", *place)
    assert done.code == 0, done
    assert found(tmp_path) >= 11


def test_a_classifier_is_the_minimum_of_its_loss_whatever_the_division() -> None:
    corpus = [text.encode() for text in documents(1, "abcdefgh", 60, 20_000)]
    target = {"t": [text.encode() for text in documents(2, "cdefghij", 60, 3000)]}
    scorer = METHODS["classifier"](SelectionOptions(method="classifier", buckets=50))
    sums = [scorer.sums() for _ in range(3)]
    for some, part in zip(sums, (corpus, corpus[:20], corpus[20:]), strict=True):
        scorer.observe(whole(part), some)
    both = scorer.together(sums[2], sums[1])
    assert all(np.array_equal(both[name], sums[0][name]) for name in both)
    table = scorer.fit(target, sums[0])["table"].astype(np.float64)

    def loss(table: np.ndarray) -> float:
        """As the docstring says it; the penalty is that of the weights without their offset, the
        least there is."""
        served, others = (
            scorer.score(whole(texts), {"table": table})[:, 0] for texts in (target["t"], corpus)
        )
        weights = optimize.minimize_scalar(lambda offset: ((table - offset) ** 2).sum()).fun
        return float(
            (
                np.logaddexp(0, -served).mean()
                + np.logaddexp(0, others).mean()
                + baselines.PENALTY * weights
            )
            / 2
        )

    assert loss(table) < 0.2 < loss(0 * table)
    directions = np.random.default_rng(0).normal(size=(20, *table.shape))
    assert all(
        loss(table + step * d) > loss(table) - 1e-5
        for d in directions
        for step in (-1, -0.1, 0.1, 1)
    )


def test_chance_finds_little_and_the_seed_decides_what(place: list[str], tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 1):
        done = run_here("selection=random", *place, f"seed={seed}", "selection.temperature=1.0",
                        f"run_dir={tmp_path / str(seed)}",
                        f"store={tmp_path / 'store'}")  # fmt: skip
        assert done.code == 0, done
        table = pq.read_table(
            tmp_path / str(seed) / "select/t/sidecar.parquet", filters=[("selected", "==", True)]
        )
        chosen.append(set(table["row"].to_pylist()))
        assert len(chosen[-1]) == 12
    assert chosen[0] != chosen[1]


def test_embeddings_need_an_encoder_and_use_it(place: list[str], tmp_path: Path) -> None:
    refused = run_here("selection=embedding", *place)
    assert refused.code == 2 and "selection.encoder=None" in refused.err
    refused = run_here("selection=embedding", *place, f"selection.encoder={tmp_path / 'none'}")
    assert refused.code == 2 and "not a local folder" in refused.err

    texts = [*documents(3, "nopqrst", 300, 5000), *documents(2, "hijklmno", 200, 5000)]
    untrained(tmp_path / "encoder", texts)
    place[-1] = f"run_dir={tmp_path / 'other'}"
    done = run_here("selection=embedding", *place, f"selection.encoder={tmp_path / 'encoder'}")
    assert done.code == 0, done
    # Even an encoder that learned nothing tells languages apart by their tokens.
    assert found(tmp_path, "other") >= 9

"""The sample and the vectors against the most naive forms; giant documents; names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doremi_train.config import UserError
from doremi_train.data.corpus import records
from doremi_train.data.corpus.opening import BadLines
from doremi_train.data.corpus.sources import resolve
from doremi_train.data.options import DataOptions
from doremi_train.methods import clusters, ngram
from doremi_train.selection.documents.parts import Document, batched
from doremi_train.selection.regroup import assigning, features, fit, names, sampling
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.selection.regroup.task import Task

pytest.importorskip("numba")


def made(root: Path, folder: Path, **options: Any) -> list[Task]:
    data = DataOptions(embedded=None, root=str(root))
    numbered = enumerate(resolve(data))
    return [Task(folder, n, source, data, RegroupOptions(**options)) for n, source in numbered]


def corpus(root: Path, texts: list[str], parts: int) -> Path:
    for part in range(parts):
        path = root / "web" / f"train-{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::parts]]
        path.write_text("".join(lines))
    return root


def sampled(work: list[Task]) -> sampling.Sample:
    for task in work:
        sampling.draw(sampling.Drawing(task, 7))
    sampling.write_draws(work[0].folder, sampling.drawn(work))
    for task in work:
        sampling.gather(sampling.Drawing(task, 7))
    return sampling.gathered(work)[0]


def test_the_sample_is_of_the_smallest_draws_each_text_once(tmp_path: Path) -> None:
    texts = [f"word{n} and word{n % 7} of {n % 3}" for n in range(60)] + ["the same"] * 40
    expected = sorted({sampling.draw_of(text.encode(), 7) for text in texts})[:20]
    both = []
    for parts in (1, 3):
        root = corpus(tmp_path / f"raw{parts}", texts, parts)
        both.append(sampled(made(root, tmp_path / f"home{parts}", sample=20)))
        assert both[-1].draw.tolist() == expected
        by_draw = {sampling.draw_of(text.encode(), 7): text for text in texts}
        assert [both[-1].shown(n) for n in range(20)] == [by_draw[draw] for draw in expected]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_vector_is_the_weighted_sum_of_its_words_directions() -> None:
    text = ["to", "be", "or", "not", "to", "be", "that", "is", "the", "question", "to", "ask"]
    (batch,) = batched([Document(0, 0, "", " ".join(text).encode())], None)
    buckets, counts, first = features.tallied(batch)
    mixed = ngram.mixed(batch.tokens.hashes)
    place = (mixed >> np.uint64(32)) * np.uint64(features.BUCKETS) >> np.uint64(32)
    unique, times = np.unique(place.astype(np.int64), return_counts=True)
    assert dict(zip(buckets.tolist(), counts.tolist(), strict=True)) == dict(
        zip(unique.tolist(), times.tolist(), strict=True)
    )
    weights = np.random.default_rng(0).random(features.BUCKETS).astype(np.float32)
    weights[unique[0]] = 0
    expected = np.zeros(64)
    for bucket, count in zip(unique, times, strict=True):
        bits = int(ngram.mixed(np.array([bucket], np.uint64) ^ np.uint64(0xD6E8FEB86659FD93))[0])
        for entry in range(4):
            low = bits >> (16 * entry) & 0xFFFF
            sign = 1 if low & 0x8000 else -1
            expected[(low & 0x7FFF) * 64 >> 15] += sign * weights[bucket] * (1 + np.log(count))
    found = features.vectors(buckets, counts, first, weights, 64)[0]
    np.testing.assert_allclose(
        found, expected / np.linalg.norm(expected) * clusters.UNIT, atol=0.501
    )


def test_nothing_known_is_no_vector_and_its_room_is_left_empty() -> None:
    batch = next(batched([Document(0, 0, "", b"a b"), Document(1, 0, "", b" ")], None))
    tallied = features.tallied(batch)
    assert not features.vectors(*tallied, np.zeros(features.BUCKETS, np.float32), 16).any()
    assert not features._seen().any()


def test_a_giant_document_is_one_row_with_the_cluster_of_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"ab{n % 5} cd{n % 3} ef gh" for n in range(30)]
    giant = " ".join(["ab1 cd1 ef gh"] * 3000) + " other words " * 3000
    root = corpus(tmp_path / "raw", [*texts, giant, "ab1 last"], 1)
    (task,) = made(root, tmp_path / "home", domains=1)
    sample = sampled([task])
    starts = fit.begun(task.folder, [task], task.options)
    for start in starts:
        fit.start(start)
    fit.finished(task.folder, starts, [], task.options)
    monkeypatch.setattr(records, "PIECE", 5000)
    monkeypatch.setattr("doremi_train.selection.documents.parts.BATCH", 9000)
    import pyarrow.parquet as pq

    assigning.assign(task)
    rows = pq.read_table(task.parts).to_pylist()
    assert [row["row"] for row in rows] == list(range(32))
    assert rows[30]["end"] == len(giant.encode()) and rows[31]["end"] == len("ab1 last")
    assert rows[30]["tokens"] == len(giant.split())
    assert len(sample.draw) < 32  # copies


def test_a_text_is_read_whatever_its_split(tmp_path: Path) -> None:
    root = corpus(tmp_path / "raw", [f"text {n}" for n in range(50)], 1)
    (task,) = made(root, tmp_path / "home")
    assert len(list(task.documents(BadLines(task.data)))) == 50


def test_tokens_are_refused(tmp_path: Path) -> None:
    task = made(corpus(tmp_path / "raw", ["a"], 1), tmp_path / "home")[0]
    with pytest.MonkeyPatch.context() as patch:
        tokens = [Document(0, 0, "web", np.arange(3))]
        read = "doremi_train.selection.regroup.task.documents"
        patch.setattr(read, lambda *_, **__: iter(tokens))
        with pytest.raises(UserError, match="holds tokens, not text"):
            list(task.documents(BadLines(task.data)))


def test_names_are_of_words_that_tell_apart_and_never_alike() -> None:
    physics, law = ["the quantum spin of the"] * 5, ["the court of the law"] * 5
    words = names.telling_words([physics, law])
    assert set(words[0][:2]) == {"quantum", "spin"} and set(words[1][:2]) == {"court", "law"}
    taken: set[str] = set()
    same = names.named([["a/b..", "x"], ["a/b..", "x"], [], []], ["", "", "", "junk"], taken)
    assert same == ["a/b..-x", "a/b..-x-2", "domain", "junk"]
    assert names.telling_words([["1 2 3"]]) == [[]]
    long = names.named([["w" * 20, "v" * 20, "u" * 20]], [""], taken)[0]
    assert long == "w" * 20  # no more than fit


def test_a_word_of_a_language_without_spaces_is_a_pair_of_characters() -> None:
    assert names.words_of("数学の本 and 42 of_it") == {"数学", "学の", "の本", "and"}
    assert names.words_of("Ünder Русский х") == {"ünder", "русский"}


def test_junk_is_mostly_neither_letters_nor_digits() -> None:
    assert names.is_junk(["|-- *** --- ==== || a"]) and not names.is_junk(["a b, c."])
    assert not names.is_junk([]) and not names.is_junk([" "])

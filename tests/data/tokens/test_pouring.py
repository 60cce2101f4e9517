"""Rare domains poured into one: their text joined, whatever was killed on the way."""

import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from data.tokens.test_shards import TOKENIZER, Documents, contents, members, some, write

from doremi_train.data.tokens import tokenizer
from doremi_train.data.tokens.pouring import poured
from doremi_train.data.tokens.shards import SPLITS, TokenStore
from doremi_train.data.tokens.writing import ShardWriter, tidy, write_manifest


def pour(folder: Path, documents: Documents, least: int) -> TokenStore:
    writer = ShardWriter(folder, np.uint16, 50, 3)
    for stream, tokens in documents[sum(state.pieces for state in writer.streams.values()) :]:
        writer.append(stream, np.array(tokens), True, 2 * len(tokens))
    writer.finish()
    (folder / "tokenizer.json").write_text(tokenizer.serialise(TOKENIZER))
    write_manifest(poured(writer, least, "other"), TOKENIZER, 0, 0, 0, {})
    return TokenStore.open(folder)


@pytest.fixture
def long_tail() -> Documents:
    """A large domain, five of one document a split, which fill no sequence, and one named other."""
    rare = [
        ((split, f"r{n}"), [100 * number + n] * (3 + n))
        for number, split in enumerate(SPLITS)
        for n in range(5)
    ]
    return [*some(0, ("big", "other"), 80), *rare]


@pytest.mark.parametrize("named", [True, False])
def test_what_is_poured_is_the_text_of_all_in_order(
    tmp_path: Path, long_tail: Documents, named: bool
) -> None:
    documents = [one for one in long_tail if named or one[0][1] != "other"]
    store = pour(tmp_path / "poured", documents, 100)
    assert store.domains == ("big", "other")
    assert store.manifest["poured"] == {"other": [f"r{n}" for n in range(5)]}
    for split in SPLITS:
        sources = ["other"] * named + [f"r{n}" for n in range(5)]
        expected = [d for name in sources for stream, d in documents if stream == (split, name)]
        parts = members(store, split, "other")
        tokens = np.concatenate([part[0] for part in parts])
        assert tokens.tolist() == list(chain.from_iterable(expected))
        begins = np.cumsum([0, *(len(part[0]) for part in parts)])
        ends = [e + begin for (_, es), begin in zip(parts, begins[:-1], strict=True) for e in es]
        assert ends == np.cumsum([len(d) for d in expected]).tolist()
        described = store.manifest["domains"]["other"][split]
        assert described["documents"] == len(expected)
        assert described["bytes"] == 2 * len(tokens)
    # A sequence of the tail crosses what was a domain; none of the domains fills one.
    assert store.sequences("train", 20)[1] >= 1
    window = store.gather("train", np.array([1]), store.sequences("train", 20)[1:] - 1, 20)[0]
    assert window.shape == (21,)
    left = {path.name for path in (tmp_path / "poured/train").iterdir()}
    assert left == {"big", "other+poured"}


def test_nothing_to_pour_is_the_store_itself(tmp_path: Path) -> None:
    plain, same = write(tmp_path / "a", some()), pour(tmp_path / "b", some(), 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and plain.domains == same.domains


def test_a_killed_pouring_is_done_again(tmp_path: Path, long_tail: Documents) -> None:
    whole = pour(tmp_path / "whole", long_tail, 100)
    for number, state in enumerate(("journal", "poured", "manifest")):
        folder = tmp_path / str(number)
        writer = ShardWriter(folder, np.uint16, 50, 3)
        for stream, tokens in long_tail:
            writer.append(stream, np.array(tokens), True, 2 * len(tokens))
        writer.finish()
        if state == "poured":
            poured(writer, 100, "other")
        if state == "manifest":  # and not tidied
            kept = folder.with_name("kept")
            shutil.copytree(folder, kept)
            pour(folder, long_tail, 100)
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            assert (folder / "journal.jsonl").exists()
            tidy(folder)
        else:
            pour(folder, long_tail, 100)
        assert contents(folder) == contents(tmp_path / "whole"), state
    assert not (whole.path / "journal.jsonl").exists()

"""The token store: anyone's reader opens it, gather equals a naive reading, damage is refused,
kills are survived."""

import io
import json
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.config import UserError
from doremi_train.data.tokens import shards, tokenizer
from doremi_train.data.tokens.shards import Stream, TokenStore
from doremi_train.data.tokens.writing import ShardWriter, write_manifest

TOKENIZER = tokenizer.learn(["a small text"], 300)
Documents = list[tuple[Stream, list[int]]]


def write(folder: Path, documents: Documents, **options: Any) -> TokenStore:
    """A finished store: one document a piece."""
    writer = ShardWriter(
        folder, **({"dtype": np.uint16, "member_tokens": 50, "members_per_shard": 3} | options)
    )
    skip = {stream: state.pieces for stream, state in writer.streams.items()}
    for stream, tokens in documents:
        if skip.get(stream, 0):
            skip[stream] -= 1
        else:
            writer.append(stream, np.array(tokens), True, 2 * len(tokens))
    writer.finish()
    (folder / "tokenizer.json").write_text(tokenizer.serialise(TOKENIZER))
    write_manifest(writer.written(), TOKENIZER, 0, 0, 0, {})
    return TokenStore.open(folder)


def some(seed: int = 0, domains: tuple[str, ...] = ("a", "b"), documents: int = 60) -> Documents:
    """Documents of random lengths, streams interleaved."""
    random = np.random.default_rng(seed)
    streams = [(split, domain) for split in shards.SPLITS for domain in domains]
    order = [streams[i] for i in random.integers(0, len(streams), documents)] + streams
    return [(stream, random.integers(1, 300, random.integers(1, 60)).tolist()) for stream in order]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def members(store: TokenStore, split: str, domain: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, ends) of each member, with the tarfile module only."""
    found = []
    for path in sorted((store.path / store.manifest["domains"][domain][split]["folder"]).iterdir()):
        with tarfile.open(path) as archive:
            arrays = [
                np.load(io.BytesIO(archive.extractfile(m).read())) for m in archive.getmembers()
            ]  # type: ignore
        found += list(zip(arrays[::2], arrays[1::2], strict=True))
    return found


def test_all_tokens_and_ends_are_there_in_order(tmp_path: Path) -> None:
    documents = some()
    store = write(tmp_path, documents)
    for split in shards.SPLITS:
        for k, domain in enumerate(store.domains):
            wanted = [tokens for stream, tokens in documents if stream == (split, domain)]
            parts = members(store, split, domain)
            assert np.concatenate([tokens for tokens, _ in parts]).tolist() == list(chain(*wanted))
            starts = np.cumsum([0] + [len(tokens) for tokens, _ in parts])
            ends = np.concatenate(
                [ends + start for (_, ends), start in zip(parts, starts[:-1], strict=True)]
            )
            assert ends.tolist() == np.cumsum([len(tokens) for tokens in wanted]).tolist()
            assert store.sizes(split)[k] == len(list(chain(*wanted))) and store.documents(split)[
                k
            ] == len(wanted)
            assert store.bytes_per_token(split)[k] == 2
            # Closed by the piece that reached it.
            assert all(50 <= len(tokens) < 110 for tokens, _ in parts[:-1])


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    store = write(tmp_path, some(domains=("<script> & {a,b}", "ü/..")))
    for domain in store.domains:
        folder = tmp_path / store.manifest["domains"][domain]["train"]["folder"]
        paths = sorted(str(path) for path in folder.iterdir())
        assert len(paths) == store.manifest["domains"][domain]["train"]["shards"]
        dataset = webdataset.WebDataset(paths, shardshuffle=False).decode()  # type: ignore[attr-defined]
        for sample, (tokens, ends) in zip(dataset, members(store, "train", domain), strict=True):
            np.testing.assert_array_equal(sample["tokens.npy"], tokens)
            np.testing.assert_array_equal(sample["ends.npy"], ends)


def test_tar_headers_are_deterministic_and_tokens_aligned(tmp_path: Path) -> None:
    store = write(tmp_path, some())
    for path in tmp_path.rglob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (
                    0,
                    0,
                    0,
                    "",
                    "",
                )
                assert member.type == tarfile.REGTYPE
    assert (np.load(tmp_path / "index.npy")["offset"] % 64 == 0).all()
    assert store.domains == ("a", "b")


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 70), wide=st.booleans())
def test_gather_equals_a_naive_reading(
    tmp_path_factory: Any, seed: int, length: int, wide: bool
) -> None:
    store = write(
        tmp_path_factory.mktemp("store"), some(seed), dtype=np.uint32 if wide else np.uint16
    )
    for split in shards.SPLITS:
        naive = []
        for k, domain in enumerate(store.domains):
            windows = []
            for tokens, _ in members(store, split, domain):
                for start in range(0, len(tokens) - length, length):
                    windows.append(tokens[start : start + length + 1].astype(np.int64))
            assert store.sequences(split, length)[k] == len(windows)
            naive += [(k, i, window) for i, window in enumerate(windows)]
        if not naive:
            continue
        order = np.random.default_rng(seed).permutation(len(naive))
        domain_ids, sequence_ids = (
            np.array([naive[i][column] for i in order]) for column in (0, 1)
        )
        gathered = store.gather(split, domain_ids, sequence_ids, length)
        assert gathered.dtype == np.int64
        np.testing.assert_array_equal(gathered, np.stack([naive[i][2] for i in order]))


def test_gather_refuses_what_does_not_exist(tmp_path: Path) -> None:
    store = write(tmp_path, some())
    count = store.sequences("train", 8)
    for domain, sequence in ((0, count[0]), (0, -1), (2, 0), (-1, 0)):
        with pytest.raises(IndexError, match="no such domain or sequence"):
            store.gather("train", np.array([domain]), np.array([sequence]), 8)
    assert store.gather("train", np.array([], int), np.array([], int), 8).shape == (0, 9)
    with pytest.raises(ValueError, match="length 0"):
        store.sequences("train", 0)


def test_maps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_MAPS", 2)
    store = write(tmp_path, some(documents=200), members_per_shard=1)
    count = int(store.sequences("train", 8)[0])
    first = store.gather("train", np.zeros(count, int), np.arange(count), 8)
    np.testing.assert_array_equal(
        first[::-1], store.gather("train", np.zeros(count, int), np.arange(count)[::-1], 8)
    )
    assert len(store._maps) == 2


def test_opening_touches_no_shard(tmp_path: Path) -> None:
    domains = tuple(f"domain {k}" for k in range(60))
    store = write(tmp_path, some(domains=domains, documents=300))
    sizes = store.sizes("train")
    for path in tmp_path.rglob("*.tar"):
        path.unlink()
    again = TokenStore.open(tmp_path)
    assert again.domains == tuple(sorted(domains))
    np.testing.assert_array_equal(again.sizes("train"), sizes)
    domain = int(np.argmax(again.sequences("train", 4)))
    with pytest.raises(UserError, match=r"00000.tar is missing; delete .* stage=prepare"):
        again.gather("train", np.array([domain]), np.array([0]), 4)


@pytest.mark.parametrize("change", [-2, -512, 1, 512])
def test_a_torn_shard_is_refused(tmp_path: Path, change: int) -> None:
    write(tmp_path, some())
    path = tmp_path / "train" / "a" / "00000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(
        UserError, match=rf"{path} has {len(data) + change} bytes where {len(data)} were written"
    ):
        TokenStore.open(tmp_path).gather("train", np.array([0]), np.array([0]), 4)


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    store = write(tmp_path, some())
    (tmp_path / "tokenizer.json").write_text(
        tokenizer.serialise(tokenizer.learn(["another one"], 290))
    )
    with pytest.raises(
        UserError, match=r"tokenizer.json is not the tokeniser that wrote the tokens"
    ):
        store.tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        store.tokenizer()
    index = (tmp_path / "index.npy").read_bytes()
    (tmp_path / "index.npy").write_bytes(index[:-8])
    with pytest.raises(UserError, match=r"index.npy is not the file"):
        TokenStore.open(tmp_path)
    (tmp_path / "index.npy").unlink()
    with pytest.raises(UserError, match=r"index.npy is missing"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 2}')
    with pytest.raises(UserError, match="schema 2 where 1 is read"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"sch')
    with pytest.raises(UserError, match="is not JSON"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished token store; run with stage=prepare"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize(
    "buffer_bytes", [10**6, 400]
)  # 400: members close early, for want of memory
def test_a_writer_stopped_anywhere_continues_with_the_same_bytes(
    tmp_path: Path, buffer_bytes: int
) -> None:
    documents = some(3, documents=80)
    write(tmp_path / "whole", documents, buffer_bytes=buffer_bytes)
    whole = contents(tmp_path / "whole")
    for stop in range(0, len(documents), 7):
        folder = tmp_path / f"stopped-{stop}"
        options: dict[str, Any] = {"dtype": np.uint16, "member_tokens": 50, "members_per_shard": 3}
        writer = ShardWriter(folder, **options, buffer_bytes=buffer_bytes)
        for stream, tokens in documents[:stop]:
            writer.append(stream, np.array(tokens), True, 2 * len(tokens))
        journal = folder / "journal.jsonl"
        # What a kill leaves: half a line, and a member that the journal does not know.
        if journal.exists():
            with journal.open("a") as file:
                file.write('{"stream": ["tr')
            for part in folder.rglob("*.part"):
                with part.open("ab") as tar:
                    tar.write(b"half a member")
        write(folder, documents, buffer_bytes=buffer_bytes)
        assert contents(folder) == whole


def test_a_writer_stopped_while_finishing_continues(tmp_path: Path) -> None:
    documents = some(4)
    write(tmp_path / "whole", documents)
    folder = tmp_path / "stopped"
    writer = ShardWriter(folder, np.uint16, 50, 3)
    for stream, tokens in documents:
        writer.append(stream, np.array(tokens), True, 2 * len(tokens))
    writer.finish()  # and no manifest
    write(folder, documents)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_writer_stopped_between_journal_and_rename_continues(tmp_path: Path) -> None:
    documents: Documents = [(("train", "a"), list(range(60)))] * 3 + [(("validation", "a"), [1, 2])]
    write(tmp_path / "whole", documents)
    folder = tmp_path / "stopped"
    writer = ShardWriter(folder, np.uint16, 50, 3)
    for stream, tokens in documents[:3]:
        writer.append(stream, np.array(tokens), True, 2 * len(tokens))
    shard = folder / "train" / "a" / "00000.tar"
    shard.rename(shard.with_name("00000.tar.part"))
    write(folder, documents)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("kept", range(1, 6))
def test_a_journal_that_lost_lines_of_a_closed_shard_is_written_on(
    kept: int, tmp_path: Path
) -> None:
    documents: Documents = [(("train", "a"), list(range(60)))] * 6
    write(tmp_path / "whole", documents)
    folder = tmp_path / "cut"
    writer = ShardWriter(folder, np.uint16, 50, 3)
    for stream, tokens in documents:
        writer.append(stream, np.array(tokens), True, 2 * len(tokens))
    journal = folder / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:kept]))
    write(folder, documents)
    assert contents(folder) == contents(tmp_path / "whole")


def test_an_earlier_shard_that_was_cut_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, np.uint16, 50, 3)
    for _ in range(4):
        writer.append(("train", "a"), np.arange(60), True, None)
    with (tmp_path / "train" / "a" / "00000.tar").open("r+b") as file:
        file.truncate(900)
    with pytest.raises(UserError, match=r"00000.tar has 900 bytes where"):
        ShardWriter(tmp_path, np.uint16, 50, 3)


def test_a_lost_part_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, np.uint16, 50, 3)
    writer.append(("train", "a"), np.arange(60), True, None)
    (tmp_path / "train" / "a" / "00000.tar.part").unlink()
    with pytest.raises(UserError, match=r"00000.tar is missing"):
        ShardWriter(tmp_path, np.uint16, 50, 3)


def test_fingerprint_follows_tokens_ends_and_members(tmp_path: Path) -> None:
    base = some()
    same = write(tmp_path / "0", base).fingerprint
    # Where a member is stored says nothing.
    assert write(tmp_path / "1", base, members_per_shard=2).fingerprint == same
    by_stream = sorted(base, key=lambda document: document[0])
    assert write(tmp_path / "2", by_stream).fingerprint == same
    stream, tokens = base[0]
    others = [
        [(stream, [*tokens[:-1], 301]), *base[1:]],  # a token
        [(stream, [*tokens, 5]), *base[1:]],
        [(("train" if stream[0] == "validation" else "validation", stream[1]), tokens), *base[1:]],
        [((stream[0], "c"), tokens), *base[1:]],
    ]
    found = {write(tmp_path / f"other-{i}", other).fingerprint for i, other in enumerate(others)}
    # Other members, other sequences.
    found.add(write(tmp_path / "members", base, member_tokens=40).fingerprint)
    assert len(found) == 5 and same not in found


def test_unknown_text_size_is_nan(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, np.uint16, 50, 3)
    for split in shards.SPLITS:
        writer.append((split, "a"), np.arange(9), True, None)
    writer.append(("train", "b"), np.arange(9), True, 18)
    writer.finish()
    write_manifest(writer.written(), TOKENIZER, 0, 0, 0, {})
    store = TokenStore.open(tmp_path)
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["domains"]["a"]["train"]["bytes"]
        is None
    )
    np.testing.assert_array_equal(store.bytes_per_token("train"), [np.nan, 2.0])
    assert np.isnan(store.bytes_per_token("validation")).all()
    assert store.sizes("validation").tolist() == [9, 0] and store.sequences(
        "validation", 4
    ).tolist() == [2, 0]


@pytest.mark.slow
@given(st.lists(st.text(max_size=300), unique=True, max_size=20))
def test_domain_folders_are_safe_and_different(names: list[str]) -> None:
    folders = [
        shards.domain_folder(name) for name in [*names, "..", ".", "", "a/b", "../x", "<script>"]
    ]
    assert len(set(folders)) >= len(set(names))
    assert all(0 < len(f.encode()) < 240 and "/" not in f and f[0] != "." for f in folders)


def test_token_type_follows_the_vocabulary() -> None:
    assert shards.token_dtype(2**16) is np.uint16 and shards.token_dtype(2**16 + 1) is np.uint32

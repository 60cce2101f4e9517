"""Preparation: the same text gives the same shards in whatever files it comes, whoever is killed on
the way."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.processes import documents_of
from helpers.sources import write_tar

from doremi_train import files
from doremi_train.config import UserError, load
from doremi_train.data.corpus import routing
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import encoding
from doremi_train.data.tokens import prepare as preparation
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.prepare import address, explain_change, prepare, request
from doremi_train.data.tokens.sample import _sample
from doremi_train.data.tokens.shards import TokenStore

WORDS = [
    "the",
    "of",
    "wolf",
    "river",
    "green",
    "walks",
    "under",
    "<|endoftext|>",
    "über",
    "naïve",
    "雪",
    "📚",
    "\n",
]
SMALL = {
    "embedded": None,
    "vocabulary_size": 300,
    "member_tokens": 500,
    "members_per_shard": 3,
    "validation_fraction": 0.2,
}
REPOSITORY = Path(__file__).parents[3]


def texts(seed: int, count: int = 60) -> list[str]:
    random = np.random.default_rng(seed)
    return [
        f"{seed}-{i} " + " ".join(random.choice(WORDS, random.integers(1, 80)))
        for i in range(count)
    ]


def jsonl(documents: Iterable[str], **more: Any) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in documents).encode()


def tar(documents: Iterable[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i, text in enumerate(documents):
            info = tarfile.TarInfo(f"{i:06d}.txt")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def write(folder: Path, split: str, documents: list[str], form: str) -> None:
    """The documents as files of one format."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "divided":  # over files of any size
        for i, start in enumerate(range(0, len(documents), 13)):
            (folder / f"{split}-{i:03d}.jsonl").write_bytes(jsonl(documents[start : start + 13]))
    elif form == "txt":  # a file is a document
        for i, text in enumerate(documents):
            (folder / f"{split}-{i:03d}.txt").write_bytes(text.encode())
    elif form == "parquet":
        pq.write_table(pa.table({"text": documents}), folder / f"{split}.parquet", row_group_size=7)
    elif form == "tar":
        (folder / f"{split}.tar").write_bytes(tar(documents))
    else:
        compress = {
            "jsonl": bytes,
            "jsonl.gz": gzip.compress,
            "jsonl.zst": zstandard.ZstdCompressor().compress,
        }[form]
        (folder / f"{split}.{form}").write_bytes(compress(jsonl(documents)))


def options(root: Path | None = None, **more: Any) -> DataOptions:
    return load(DataOptions, SMALL | ({"root": str(root)} if root else {}) | more, "data")


def corpus(root: Path, form: str = "jsonl", domains: str = "ab") -> Path:
    for i, domain in enumerate(domains):
        write(root / domain, "train", texts(i), form)
    return root


def shards(store: Path) -> dict[str, bytes]:
    """Everything but the manifest, which names the sources, and the status, which has a time."""
    found = [path for path in store.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in found
        if path.name not in ("manifest.json", "status.json")
    }


def test_the_same_text_gives_the_same_shards_in_any_files(tmp_path: Path) -> None:
    found = {}
    for form in ("jsonl", "divided", "jsonl.gz", "jsonl.zst", "parquet", "tar", "txt"):
        found[form] = prepare(options(corpus(tmp_path / "in" / form, form)), tmp_path / "out")
    # Other sources: other addresses.
    assert len({path.name for path in found.values()}) == len(found)
    wanted = shards(found["jsonl"])
    assert sum(name.endswith(".tar") for name in wanted) > 4
    for form, path in found.items():
        assert shards(path) == wanted, form
    assert len({TokenStore.open(path).fingerprint for path in found.values()}) == 1


def test_one_stream_with_a_domain_key_gives_the_same_shards(tmp_path: Path) -> None:
    root = prepare(options(corpus(tmp_path / "in")), tmp_path / "out")
    lines = [
        jsonl([text], meta={"set": domain})
        for pair in zip(texts(0), texts(1), strict=True)
        for domain, text in zip("ab", pair, strict=True)
    ]
    (tmp_path / "mixed.jsonl").write_bytes(b"".join(lines))
    mixed = prepare(
        options(files=[str(tmp_path / "mixed.jsonl")], domain_key="meta.set"), tmp_path / "out"
    )
    assert shards(mixed) == shards(root)


def test_documents_come_back_and_no_text_is_in_both_splits(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")
    write(root / "b", "train-again", texts(0)[:20], "jsonl")  # the same texts in another domain
    store = TokenStore.open(prepare(options(root), tmp_path / "out"))
    found = {(s, d): documents_of(store, s, d) for s in ("train", "validation") for d in "ab"}
    assert sorted(found["train", "a"] + found["validation", "a"]) == sorted(texts(0))
    assert sorted(found["train", "b"] + found["validation", "b"]) == sorted(
        texts(1) + texts(0)[:20]
    )
    assert not set(found["train", "a"] + found["train", "b"]) & set(
        found["validation", "a"] + found["validation", "b"]
    )
    text_bytes = sum(len(text.encode()) for text in found["train", "a"])
    assert store.bytes_per_token("train")[0] == text_bytes / store.sizes("train")[0]


def test_training_documents_that_are_validation_documents_are_dropped(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")
    # A: given; b: split by hash.
    write(root / "a", "validation", [*texts(0)[:5], "only here"], "jsonl")
    write(root / "a", "train_more", texts(1), "jsonl")
    store = TokenStore.open(prepare(options(root), tmp_path / "out"))
    validation_b = documents_of(store, "validation", "b")
    assert documents_of(store, "validation", "a") == [*texts(0)[:5], "only here"]
    assert documents_of(store, "train", "a") == texts(0)[5:] + [
        text for text in texts(1) if text not in validation_b
    ]
    assert store.manifest["dropped_validation_duplicates"] == 5 + len(validation_b) > 5


def test_the_learned_tokeniser_never_sees_validation_text(tmp_path: Path) -> None:
    for name, validation in (("x", ["zqzqzq " * 50]), ("y", ["wholly other text"])):
        write(tmp_path / name / "a", "train", texts(0), "jsonl")
        write(tmp_path / name / "a", "validation", validation, "jsonl")
    stores = [TokenStore.open(prepare(options(tmp_path / name), tmp_path / "out")) for name in "xy"]
    tokenizer = [store.manifest["tokenizer"]["fingerprint"] for store in stores]
    assert tokenizer[0] == tokenizer[1] and stores[0].fingerprint != stores[1].fingerprint


def test_the_sample_is_bounded_and_shared_evenly(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")
    given = options(root, tokenizer_sample=1000)
    sources = preparation.resolve(given)
    sample = _sample(given, sources, preparation.Meter(sources, "", preparation.silent))
    joined = "".join(sample)
    assert len(joined) == 1000 and joined.startswith("0-") and joined[500:].startswith("1-")


def test_a_finished_store_is_found_at_once(tmp_path: Path) -> None:
    given = options(corpus(tmp_path / "in"))
    calls: list[tuple[str, int, int | None]] = []
    path = prepare(given, tmp_path / "out", lambda *call: calls.append(call))
    assert path == tmp_path / "out" / address(request(given))
    descriptions, done, total = zip(*calls, strict=True)
    assert set(descriptions) == {"learning the tokeniser", "tokenising"}
    assert all(0 <= part <= whole for part, whole in zip(done, total, strict=True))
    assert TokenStore.open(path).manifest["request"] == request(given)
    calls.clear()
    assert prepare(given, tmp_path / "out", lambda *call: calls.append(call)) == path and not calls


def test_a_change_gives_another_address_and_is_explained(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")
    given = options(root)
    old = request(given)
    assert explain_change(old, request(given)) == "" and request(given) == old
    write(root / "a", "train", [*texts(0), "one more"], "jsonl")
    write(root / "b", "train-2", ["another file"], "jsonl")
    new = request(options(root, vocabulary_size=310, validation_fraction=0.5))
    assert address(new) != address(old)
    assert explain_change(old, new) == (
        "new files: b/train-2.jsonl; changed files: a/train.jsonl; "
        "tokenizer.vocabulary_size: 300 → 310; validation_fraction: 0.2 → 0.5"
    )
    assert explain_change(new, old).startswith("files gone: b/train-2.jsonl")
    assert request(options(root, max_bad_lines=5, allow_pipe=True)) == request(given)


def test_a_changed_tokeniser_gives_another_address(tmp_path: Path) -> None:
    root, file = corpus(tmp_path / "in"), tmp_path / "tokenizer.json"
    file.write_text(tokenizers.serialise(tokenizers.learn(texts(5), 290)))
    old = request(options(root, tokenizer=str(file)))
    store = TokenStore.open(prepare(options(root, tokenizer=str(file)), tmp_path / "out"))
    assert store.manifest["tokenizer"]["fingerprint"] == old["tokenizer"]["fingerprint"]
    file.write_text(tokenizers.serialise(tokenizers.learn(texts(6), 290)))
    new = request(options(root, tokenizer=str(file)))
    assert address(old) != address(new) and "tokenizer.fingerprint: " in explain_change(old, new)


def test_the_end_is_named_in_the_address_where_it_is_not_the_first_usual_one(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizers.learn(texts(5), 290)
    tokenizer.add_special_tokens(["<stop>"])
    folder = tmp_path / "tokeniser"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizers.serialise(tokenizer))
    given = options(corpus(tmp_path / "in"), tokenizer=str(folder))
    before = request(given)
    assert before["tokenizer"]["end_of_document"] is None
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert request(given) == before
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert "end_of_document: None → '<stop>'" in explain_change(before, request(given))
    store = TokenStore.open(prepare(given, tmp_path / "out"))
    assert store.end_of_document == tokenizer.token_to_id("<stop>")


def test_a_text_that_the_tokeniser_cannot_encode_is_named_with_file_and_domain(
    tmp_path: Path,
) -> None:
    words = {"</s>": 0, "word": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = options(corpus(tmp_path / "in"), tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"in/a/train.jsonl: in the .* domain a, data.tokenizer ca"):
        prepare(given, tmp_path / "out")


def test_a_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(70_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for split in ("train", "validation"):
        write(tmp_path / "in" / "a", split, [f"w69999 w1 w65535 {split}"], "jsonl")
    file = str(tmp_path / "tokenizer.json")
    given = options(tmp_path / "in", tokenizer=file, max_unwritable=None)
    store = TokenStore.open(prepare(given, tmp_path / "out"))
    assert store.manifest["dtype"] == "uint32" and store.vocabulary_size == 70_002
    assert store.gather("train", np.array([0]), np.array([0]), 4).tolist() == [
        [70_001, 3, 65_537, 0, 1]
    ]


def test_a_giant_document_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 200)
    for split in ("train", "validation"):
        write(
            tmp_path / "in" / "a",
            split,
            [split + " ".join(texts(3)), split + "short", "x" * 1001 + split],
            "jsonl",
        )
    store = TokenStore.open(prepare(options(tmp_path / "in"), tmp_path / "out"))
    assert documents_of(store, "train", "a") == [
        "train" + " ".join(texts(3)),
        "trainshort",
        "x" * 1001 + "train",
    ]
    assert store.documents("train").tolist() == [3]


def megatron(path: Path, documents: list[list[int]]) -> None:
    """A .bin and .idx of int32, as Megatron-LM writes them."""
    np.concatenate([np.array(tokens, "<i4") for tokens in documents]).tofile(
        path.with_suffix(".bin")
    )
    sizes = np.array([len(tokens) for tokens in documents], "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1], dtype="<i8") * 4]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + np.array(1, "<u8").tobytes() + b"\x04"
    head += np.array([len(documents), len(documents) + 1], "<u8").tobytes()
    path.with_suffix(".idx").write_bytes(
        head
        + sizes.tobytes()
        + pointers.tobytes()
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )


def test_tokenised_documents_end_once(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizers.serialise(tokenizers.learn(texts(0), 300)))
    (tmp_path / "in" / "a").mkdir(parents=True)
    megatron(tmp_path / "in" / "a" / "train", [[5, 6, 0], [7, 8], [9]])
    megatron(tmp_path / "in" / "a" / "validation", [[7, 8], [11]])
    given = options(tmp_path / "in", tokenizer=str(tmp_path / "tokenizer.json"))
    store = TokenStore.open(prepare(given, tmp_path / "out"))
    assert store.sizes("train").tolist() == [5] and store.documents("train").tolist() == [2]
    # [7, 8] is validation.
    assert store.gather("train", np.array([0]), np.array([0]), 4).tolist() == [[5, 6, 0, 9, 0]]
    assert np.isnan(store.bytes_per_token("train")).all()
    with pytest.raises(
        UserError, match=r"data.tokenizer='train': .*train.bin is already tokenised|validation.bin"
    ):
        prepare(options(tmp_path / "in"), tmp_path / "out")
    megatron(tmp_path / "in" / "a" / "train", [[5, 300]])
    with pytest.raises(
        UserError, match=r"train.bin: token ids 5 to 300, but data.tokenizer has only ids 0 to 299"
    ):
        prepare(given, tmp_path / "out")


def test_domains_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")
    write(root / "lonely", "train", ["one document"], "txt")
    with pytest.raises(
        UserError,
        match=r"no (validation|training) document in domain lonely: .*data.validation_fraction",
    ):
        prepare(options(root), tmp_path / "out")
    write(root / "lonely", "validation", ["one document"], "txt")
    with pytest.raises(UserError, match="no training document in domain lonely"):
        prepare(options(root), tmp_path / "out")
    write(root / "lonely", "validation", ["another document"], "txt")
    prepare(options(root), tmp_path / "out")


def test_a_store_with_lines_left_out_is_not_used_strictly(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")
    with (root / "a" / "train.jsonl").open("ab") as file:
        file.write(b'{"text": "brok\n')
    with pytest.raises(UserError, match=r"train.jsonl, line 61"):
        prepare(options(root), tmp_path / "out")
    path = prepare(options(root, max_bad_lines=1), tmp_path / "out")
    assert TokenStore.open(path).manifest["bad_lines"] == 1
    with pytest.raises(UserError, match=r"data.max_bad_lines=0: .* 1 broken lines"):
        prepare(options(root), tmp_path / "out")


def test_what_is_left_out_is_said_and_named_where_nothing_remains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = corpus(tmp_path / "in")
    with (root / "a" / "train.jsonl").open("ab") as file:
        file.write(b'{"text": null}\n')
    prepare(options(root, max_bad_lines=1), tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 broken lines and records without text are left out" in said and "line 61" in said
    (root / "lonely").mkdir()
    (root / "lonely" / "train.jsonl").write_bytes(b'{"content": "x"}\n' * 9)
    with pytest.raises(UserError) as error:
        prepare(options(root, max_bad_lines=10), tmp_path / "out")
    for word in ("domain lonely", "10 broken lines", "data.text_key='text': a string is needed"):
        assert word in str(error.value)


def test_what_is_not_read_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = corpus(tmp_path / "in")
    write(root / "a", "valid", ["held out by hand"], "jsonl")
    (root / "t").mkdir()
    members = [(f"{i}.{end}", f"{i} x".encode()) for i in range(90) for end in ("txt", "url.txt")]
    write_tar(root / "t" / "train.tar", members)
    for _ in range(2):
        prepare(options(root), tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("not read") == 2
    assert "1 files .jsonl (a/valid.jsonl)" in said and "90 members .url.txt" in said


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in")

    def progress(description: str, done: int, total: int | None) -> None:
        write(root / "b", "train-2", ["late"], "jsonl")

    with pytest.raises(
        UserError, match=r"changed while it was read \(new files: b/train-2.jsonl\); run again"
    ):
        prepare(options(root), tmp_path / "out", progress)
    assert not list((tmp_path / "out").glob("*/manifest.json"))
    prepare(options(root), tmp_path / "out")


KILLED = """
import json, os, signal, sys
from pathlib import Path
from doremi_train.config import load
from doremi_train.data.tokens import encoding, prepare
from doremi_train.data.options import DataOptions

calls, most = 0, int(sys.argv[3])
def progress(description, done, total):
    global calls
    calls += description == "tokenising"
    if calls == most:
        os.kill(os.getpid(), signal.SIGKILL)

encoding.BATCH_PIECES = 10
prepare.prepare(load(DataOptions, json.loads(sys.argv[1]), "data"), Path(sys.argv[2]), progress)
"""


def run(values: dict[str, Any], folder: Path, calls: int, **environment: str) -> int:
    command = [sys.executable, "-c", KILLED, json.dumps(values), str(folder), str(calls)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    ).returncode


@pytest.mark.slow
def test_a_killed_preparation_continues_with_the_same_bytes(tmp_path: Path) -> None:
    root = corpus(tmp_path / "in", domains="abc")
    values = SMALL | {"root": str(root)}
    whole = prepare(options(root), tmp_path / "whole")
    for calls in (6, 11):  # killed, continued, killed again
        assert run(values, tmp_path / "killed", calls) == -signal.SIGKILL
    killed = tmp_path / "killed" / whole.name
    assert (killed / "journal.jsonl").stat().st_size > 0 and not (killed / "manifest.json").exists()
    assert run(values, tmp_path / "killed", 0, RAYON_NUM_THREADS="1", PYTHONHASHSEED="7") == 0
    assert shards(killed) == shards(whole)
    assert (killed / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_what_shards_hold_is_not_tokenised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = corpus(tmp_path / "in")
    monkeypatch.setattr(encoding, "BATCH_PIECES", 10)
    calls = 0

    def stop(description: str, done: int, total: int | None) -> None:
        nonlocal calls
        calls += description == "tokenising"
        if calls == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options(root), tmp_path / "out", stop)
    journal = (
        (tmp_path / "out" / address(request(options(root))) / "journal.jsonl")
        .read_text()
        .splitlines()
    )
    held = sum(json.loads(line)["pieces"] for line in journal)
    tokenised = 0
    encode = tokenizers.encode

    def counting(tokenizer: Any, batch: list[str]) -> list[np.ndarray]:
        nonlocal tokenised
        tokenised += len(batch)
        return encode(tokenizer, batch)

    monkeypatch.setattr(tokenizers, "encode", counting)
    prepare(options(root), tmp_path / "out")
    assert held > 0 and tokenised == 120 - held


def test_what_a_kill_leaves_of_a_finished_store_is_cleared(tmp_path: Path) -> None:
    """After the manifest come the end of the journal and the status: a kill falls there too."""
    given = options(corpus(tmp_path / "in"))
    store = prepare(given, tmp_path / "out")
    whole = {path.name for path in store.iterdir()}
    (store / "status.json").unlink()
    left = [store / "journal.jsonl", *map(files.aside_of, (store / "status.json", store / "a"))]
    for path in left:
        path.write_bytes(b"")
    assert prepare(given, tmp_path / "out") == store
    assert {path.name for path in store.iterdir()} == whole and "status.json" in whole


def test_two_preparations_of_one_address_wait_for_each_other(tmp_path: Path) -> None:
    given = options(corpus(tmp_path / "in"))
    descriptions: list[str] = []

    def one() -> None:
        found.append(
            prepare(
                given,
                tmp_path / "out",
                lambda description, done, total: descriptions.append(description),
            )
        )

    found: list[Path] = []
    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert descriptions.count("tokenising") == 1  # one batch, tokenised once


def test_a_hash_set_is_a_set() -> None:
    random = np.random.default_rng(0)
    keys = [int(key) for key in random.integers(0, 2**64, 2**18 + 500, dtype=np.uint64)]
    held = routing.HashSet()
    for key in keys[:-200]:
        held.add(key)
    assert all(key in held for key in keys[:300] + keys[-500:-200])
    assert not any(key in held for key in keys[-200:])
    assert 2**64 - 1 not in held


MEMORY = """
import json, re, sys
from pathlib import Path
from doremi_train.config import load
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens.prepare import prepare

prepare(load(DataOptions, json.loads(sys.argv[1]), "data"), Path(sys.argv[2]))
# Not ru_maxrss, which a child inherits from the process that started it.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.acceptance
def test_memory_is_bounded(tmp_path: Path) -> None:
    """60 MB of text, some of it one giant document, within 600 MB with all libraries."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    with (tmp_path / "in" / "a" / "train.jsonl").open("wb") as file:
        for count, size in ((1, 12_000_000), (480, 100_000)):
            file.write(jsonl((f"{i} " + f"about {i} words " * size)[:size] for i in range(count)))
    values = SMALL | {
        "root": str(tmp_path / "in"),
        "member_tokens": 1_000_000,
        "tokenizer_sample": 1_000_000,
    }
    command = [sys.executable, "-c", MEMORY, json.dumps(values), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600, f"{done.stdout} MB"
    print(done.stdout)

"""A bench: a folder with a small sound input of every kind, and paths that are none.

Commands are run in it, so that all paths are relative to it; a mistake spoils a copy of it.
"""

import contextlib
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from doremi_train.data.tokens import tokenizer
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.selection.documents import granular
from helpers.corpus import documents, write_jsonl
from helpers.sources import write_megatron, write_tar

WORDS = "abcdefgh"
DATA = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tar", "txt", "bin")


def make(folder: Path) -> Path:
    """A small sound input of every kind, and paths that are none."""
    texts = [f"é {text}" for text in documents(1, WORDS, 60, 16_000)]
    for name, seed in (("one", 1), ("two", 2)):
        write_jsonl(
            folder / "corpus" / name / "train.jsonl",
            [f"é {text}" for text in documents(seed, WORDS, 60, 16_000)],
        )
        write_jsonl(
            folder / "corpus" / name / "validation.jsonl", documents(seed + 5, WORDS, 60, 6_000)
        )
    write_jsonl(folder / "target.jsonl", documents(3, WORDS, 60, 3_000))
    spoken = tokenizer.learn(texts, 300)
    shape = configs.resolve(ModelOptions(config=SHAPE), tokenizer.vocabulary_size(spoken), 0, 64)
    built = folders.build(shape, 0)
    folders.save(built, dict(built.named_parameters()), folder / "model", spoken, 0)
    (folder / "tokenizer.json").write_text(tokenizer.serialise(spoken))
    _write_data(folder / "data", texts[:6], spoken)
    asked = [{"prompt": text[:40], "completion": text[40:60]} for text in texts]
    asked[::3] = [
        {
            "messages": [
                {"role": "user", "content": one["prompt"]},
                {"role": "assistant", "content": one["completion"]},
            ]
        }
        for one in asked[::3]
    ]
    for split, part in (("train", asked[:24]), ("validation", asked[24:32])):
        _write_lines(folder / "chats" / "all" / f"{split}.jsonl", part)
    labels = [{"text": text[:60], "label": "ab"[n % 2]} for n, text in enumerate(texts)]
    for split, few in (("generated", labels), ("real", labels[:12]), ("test", labels[12:24])):
        _write_lines(folder / "labelled" / f"{split}.jsonl", few)
    columns = {"text": [one["text"] for one in labels], "label": [one["label"] for one in labels]}
    pq.write_table(pa.table(columns), folder / "labelled.parquet")
    (folder / "labelled.csv").write_text(
        "text,label\n" + "".join(f"{one['text']},{one['label']}\n" for one in labels)
    )
    for part in ("test", "train"):
        _write_lines(
            folder / "tasks" / f"{part}.jsonl", [{"text": text[:80]} for text in texts[:8]]
        )
    (folder / "weights.json").write_text(json.dumps({"weights": {"one": 0.25, "two": 0.75}}))
    (folder / "pairs.json").write_text(json.dumps({"one": "a/b", "two": "c/d"}))
    (folder / "deepspeed.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}, "steps_per_print": 10})
    )
    rows = {
        "shard": ["one/train.jsonl"] * 2,
        "row": [0, 2],
        "start": [0, 0],
        "end": [20, 50],
        "selected": [True, True],
    }
    sidecar_ = pa.table(rows).replace_schema_metadata({"domains": '["one"]', "rows": "0"})
    pq.write_table(sidecar_, folder / "sidecar.parquet")
    granular.save(folder / "vocabulary.json", [b"ab", b"cd", *(bytes([n]) for n in range(256))])
    _write_places(folder)
    return folder


SHAPE = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def _write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_data(folder: Path, texts: list[str], spoken: Any) -> None:
    for ending in DATA:
        (folder / ending).mkdir(parents=True)
    lines = "".join(
        json.dumps({"text": text, "meta": {"set": "s"}}) + "\n" for text in texts
    ).encode()
    (folder / "jsonl" / "train.jsonl").write_bytes(lines)
    (folder / "jsonl.gz" / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "jsonl.zst" / "train.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "txt" / "train.txt").write_text(texts[0])
    table = pa.table({"text": texts, "meta": [{"set": "s"}] * len(texts)})
    pq.write_table(table, folder / "parquet" / "train.parquet", row_group_size=2)
    members = [(f"{n:03}.txt", text.encode()) for n, text in enumerate(texts[:3])]
    members += [
        (f"{n:03}.json", json.dumps({"text": text, "meta": {"set": "s"}}).encode())
        for n, text in enumerate(texts[3:], 3)
    ]
    write_tar(folder / "tar" / "train.tar", members)
    ids = [[spoken.encode(text).ids] for text in texts]
    write_megatron(folder / "bin" / "train", ids)


def _write_places(folder: Path) -> None:
    """What a path may lead to that is none of the above."""
    (folder / "empty").mkdir()
    (folder / "blank").touch()
    (folder / "junk").write_bytes(bytes(range(256)) * 8)
    (folder / "list.json").write_text("[1, 2]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "utf16.json").write_text('{"one": 1}', encoding="utf-16")
    for ending in ENDINGS:
        (folder / f"junk.{ending}").write_bytes(b"\x93\x00junk\xff" * 40)
        (folder / f"blank.{ending}").touch()
        (folder / f"folder.{ending}").mkdir()
        (folder / f"loop.{ending}").symlink_to(f"loop.{ending}")  # nobody can read it, root neither
    (folder / "loop").symlink_to("loop")


# Each of them is there with each ending.
ODD, ENDINGS = ("junk", "blank", "folder", "loop"), (*DATA, "json", "yaml")
PLACES = (
    "nowhere", "nowhere/at/all.json", "empty", "blank", "junk", "loop", "corpus", "model", "data",
    "corpus/one/train.jsonl", "target.jsonl", "weights.json", "pairs.json", "list.json",
    "deep.json", "utf16.json", "tokenizer.json", "chats", "labelled", "tasks", "/dev/null",
    "/proc/nowhere",
    "corpus/one/train.jsonl/below", "loop/below", "*", "corpus/**", "[", "~nobody/x", "pipe:true",
    "http://[::1", "s3://bucket/x", "memory://none", "file://nowhere", "a::b", "ftp://", "://",
    "data/bin/train.idx",
    *(f"{name}.{ending}" for name in ODD for ending in ENDINGS),
    *(f"data/{ending}" for ending in DATA), *(f"data/{ending}/train.{ending}" for ending in DATA),
    "labelled.parquet", "labelled.csv", "data/*/*",
)  # fmt: skip


@contextlib.contextmanager
def copied(bench: Path) -> Iterator[Path]:
    """A copy of a bench that may be spoiled, as the working directory."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bench"
        shutil.copytree(bench, copy, symlinks=True)
        with contextlib.chdir(copy):
            yield copy

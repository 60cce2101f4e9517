"""Sources: every format gives the same texts, and every mistake one clear message."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.sources import (
    TEXTS,
    jsonl,
    one,
    options,
    pieces,
    refused,
    texts,
    write_as,
    write_megatron,
    write_parquet,
    write_tar,
)

from doremi_train.config import UserError
from doremi_train.data.corpus import records
from doremi_train.data.corpus.opening import BadLines
from doremi_train.data.corpus.reading import read
from doremi_train.data.corpus.records import PIECE
from doremi_train.data.corpus.sources import passed_over, resolve, signature

PROJECT = Path(__file__).parents[3]
SHARED = PROJECT.parent / "shared"


# Formats


def test_jsonl_line_ends_blank_lines_byte_order_mark_and_empty_texts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + jsonl(["a", "", "b"], newline="\r\n\r\n") + b"\n  \n" + jsonl(["c"])
    )
    assert texts(one(path)) == ["a", "b", "c"]
    path.write_bytes(b"")
    assert texts(one(path)) == []


def test_tar_of_json_members_and_metadata(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(
        path,
        [
            ("./d/0.json", b'{"text": "from json",\n "source": "s"}'),
            ("d/1.json", b'{"source": "s"}'),
            ("d/1.txt", b"from txt"),
            ("d/2.cls", b"7"),
            ("d/2.txt", b"also txt"),
            ("d/2.json", b'{"source": "s", "text": "not this"}'),
            ("d/3.json", b'{"text": "last"}'),
        ],
    )
    assert texts(one(path)) == ["from json", "from txt", "also txt", "last"]


def test_tar_reads_regular_files_only_and_extracts_nothing(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        info = tarfile.TarInfo("x.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    before = sorted(tmp_path.rglob("*"))
    assert texts(one(path)) == ["text"]
    assert sorted(tmp_path.rglob("*")) == before


def test_webdataset_written_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for index, text in enumerate(TEXTS):
            writer.write(
                {"__key__": f"{index:06}", "txt": text, "json": {"source": f"s{index % 2}"}}
            )
    assert texts(one(tmp_path / "x.tar")) == TEXTS
    given = options(files=[str(tmp_path / "x.tar")], domain_key="source")
    assert [(piece.domain, piece.text) for piece in pieces(given)] == [
        (f"s{i % 2}", t) for i, t in enumerate(TEXTS)
    ]


@pytest.mark.parametrize(
    ("code", "dtype"), [(1, "<u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")]
)
def test_megatron(tmp_path, code, dtype):
    write_megatron(
        tmp_path / "x", [[[1, 2, 3], [4]], [[]], [[5, 6]], [], [[7], [], [8]]], code, dtype
    )
    result = pieces(one(tmp_path / "x.bin"))
    assert [piece.tokens.tolist() for piece in result] == [[1, 2, 3, 4], [5, 6], [7, 8]]
    assert all(piece.text is None and piece.last for piece in result)


def test_megatron_trailing_empty_documents_and_remote(tmp_path):
    write_megatron(tmp_path / "x", [[[1]], [], []])
    for ending in (".bin", ".idx"):
        fsspec.filesystem("memory").pipe_file(
            f"/meg/x{ending}", (tmp_path / f"x{ending}").read_bytes()
        )
    for url in (tmp_path / "x.bin", "memory://meg/x.bin"):
        assert [piece.tokens.tolist() for piece in pieces(one(url))] == [[1]]
    write_megatron(tmp_path / "none", [])
    assert pieces(one(tmp_path / "none.bin")) == []


def test_megatron_giant_document_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 3)
    write_megatron(tmp_path / "x", [[[0, 1, 2, 3], [4, 5, 6]], [[7, 8, 9]]])
    result = [(piece.tokens.tolist(), piece.last) for piece in pieces(one(tmp_path / "x.bin"))]
    assert result == [([0, 1, 2], False), ([3, 4, 5], False), ([6], True), ([7, 8, 9], True)]


# Which files


def test_root_takes_train_and_validation_files_of_its_folders(tmp_path):
    for name in (
        "b/train-1.jsonl",
        "b/train-0.jsonl",
        "a/train.jsonl",
        "a/validation.jsonl",
        "b/.train.jsonl.tmp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").write_text("no domain")
    (tmp_path / "a" / "notes.md").write_text("no data")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    given = options(root=str(tmp_path))
    refused(given, "listed twice", "domain 'a' (train)", "domain 'linked' (train)")
    (tmp_path / "linked").unlink()
    expected = [
        ("a", "train", "a/train.jsonl"),
        ("a", "validation", "a/validation.jsonl"),
        ("b", None, "b/train-0.jsonl"),
        ("b", None, "b/train-1.jsonl"),
    ]
    assert [piece[:3] for piece in pieces(given)] == expected
    assert [piece[:3] for piece in pieces(options(root=f"file://{tmp_path}/"))] == expected
    assert [piece[:3] for piece in pieces(options(root=os.path.relpath(tmp_path)))] == expected


def test_what_is_not_read_of_a_root_is_counted_by_kind(tmp_path):
    for name in (
        "a/train.jsonl",
        "a/valid.jsonl",
        "a/part-2.jsonl",
        "b/val-1.jsonl",
        "b/train-x.bin",
        "b/train-x.idx",
        "b/train-y.idx",
        "b/more/train.jsonl",
        "b/notes.md",
        "b/LICENSE",
        "b/._train.jsonl",
        "README.md",
        ".cache/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    expected = {
        "3 files .jsonl (a/part-2.jsonl, a/valid.jsonl, b/val-1.jsonl)",
        "2 hidden (.cache, b/._train.jsonl)",
        "1 files beside the domains (README.md)",
        "1 files .idx without their .bin (b/train-y.idx)",
        "1 folders in a domain's folder (b/more)",
        "1 files .md (b/notes.md)",
        "1 files without an ending (b/LICENSE)",
    }
    assert set(str(passed_over(options(root=str(tmp_path)))).split("; ")) == expected
    assert not str(passed_over(one(tmp_path / "a" / "train.jsonl")))
    said = str(passed_over(one(f"{tmp_path}/b/*")))
    assert set(said.split("; ")) == {
        f"1 folders that a glob matches ({tmp_path}/b/more)",
        f"1 hidden ({tmp_path}/b/._train.jsonl)",
    }
    assert not str(passed_over(one(f"{tmp_path}/**")))


def test_a_linked_folder_is_a_domain(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.txt").write_text("text")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    assert texts(options(root=str(tmp_path / "root"))) == ["text"]


def test_domains_take_globs_and_validation(tmp_path):
    for name in ("0.txt", "1.txt", "v.txt", "odd [name]?.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    given = options(
        domains={
            "x": {"train": [f"{tmp_path}/[01].txt"], "validation": [f"file://{tmp_path}/v.txt"]},
            "<y>": {"train": [f"{tmp_path}/odd [name]?.txt"]},
        }
    )
    assert [piece[:3] for piece in pieces(given)] == [
        ("<y>", None, "odd [name]?.txt"),
        ("x", "train", "0.txt"),
        ("x", "train", "1.txt"),
        ("x", "validation", "v.txt"),
    ]
    assert texts(one(f"{tmp_path}/*d*.txt")) == ["odd [name]?.txt"]
    assert all(source.url.startswith("/") for source in resolve(given))


def test_one_stream_divided_by_a_key(tmp_path):
    write_parquet(tmp_path / "x.parquet", TEXTS)
    lines = [
        {"body": {"content": text}, "meta": {"source": f"s{i % 2}"}} for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [(f"s{index % 2}", None, text) for index, text in enumerate(TEXTS)]
    parquet = options(files=[f"{tmp_path}/*.parquet"], domain_key="meta.source")
    assert [piece[:3] for piece in pieces(parquet)] == expected
    nested = options(
        files=[f"{tmp_path}/*.jsonl"], domain_key="meta.source", text_key="body.content"
    )
    assert [piece[:3] for piece in pieces(nested)] == expected


def test_a_key_that_holds_a_dot(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a.b": "dotted", "a": {"b": "nested"}}')
    assert texts(one(tmp_path / "x.jsonl", text_key="a.b")) == ["dotted"]


def test_memory_urls():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus/a/train-0.jsonl.zst", zstandard.compress(jsonl(TEXTS)))
    memory.pipe_file("/corpus/a/validation-0.txt", b"held out")
    given = options(root="memory://corpus")
    assert [piece[1:3] for piece in pieces(given)] == [("train", text) for text in TEXTS] + [
        ("validation", "held out")
    ]
    assert texts(one("memory://corpus/*/train*")) == TEXTS
    assert texts(one("memory://corpus/a/train-0.jsonl.zst")) == TEXTS
    assert all(source.url.startswith("memory://") and source.version for source in resolve(given))
    refused(one("memory://corpus/a/nothing*.txt"), "data.domains.a.train", "nothing*.txt")


def test_signature_follows_files_and_moves_with_root(tmp_path):
    write_as(tmp_path / "root" / "a", ".jsonl")
    given = options(root=str(tmp_path / "root"))
    first = signature(given, resolve(given))
    assert json.loads(json.dumps(first)) == first
    assert list(first["files"]) == ["a/train-0.jsonl"]
    (tmp_path / "root").rename(tmp_path / "moved")
    moved = options(root=str(tmp_path / "moved"))
    assert signature(moved, resolve(moved)) == first
    assert signature(options(root=str(tmp_path / "moved"), text_key="id"), resolve(moved)) != first
    os.utime(tmp_path / "moved" / "a" / "train-0.jsonl", (1, 1))
    assert signature(moved, resolve(moved)) != first


def test_the_order_is_the_same_in_two_processes(tmp_path):
    for domain in "zyxw":
        write_as(tmp_path / domain, ".txt")
    program = (
        "import sys; from doremi_train.data.options import DataOptions\nfrom "
        "doremi_train.data.corpus.opening import BadLines; from doremi_train.data.corpus.reading "
        "import *\nfrom doremi_train.data.corpus.sources import *\no = "
        "DataOptions(root=sys.argv[1]); s = resolve(o); print(signature(o, s), s)\nprint([p for x "
        "in s for p in read(x, o, BadLines(o))])"
    )
    outputs = set()
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(PROJECT)}
        outputs.add(
            subprocess.check_output([sys.executable, "-c", program, str(tmp_path)], env=environment)
        )
    assert len(outputs) == 1


def test_real_corpus():
    root = SHARED / "corpora" / "debpile"
    if not root.is_dir():
        pytest.skip("../shared/corpora/debpile is not here")
    given = options(root=str(root))
    found = resolve(given)
    assert len(found) == 16
    assert {source.split for source in found} == {"train", "validation"}
    validation = [source for source in found if source.split == "validation"]
    assert all(next(read(source, given, BadLines(given))).text for source in validation)


# Giant documents


def test_pieces_do_not_depend_on_chunks(monkeypatch):
    monkeypatch.setattr(records, "PIECE", 10)
    text = "one two three four five six_seven_eight nine"
    for size in (1, 3, 7, 100):
        chunks = [text[start : start + size] for start in range(0, len(text), size)]
        result = list(records.document("a", None, chunks))
        assert [piece.text for piece in result] == [
            "one two ",
            "three ",
            "four five ",
            "six_seven_",
            "eight nine",
        ]
        assert [piece.last for piece in result] == [False] * 4 + [True]


def test_giant_text_in_pieces_with_bounded_memory(tmp_path):
    line = "The quick brown fox jumps over the lazy dog, äöü. "
    path = tmp_path / "giant.txt"
    path.write_text(line * (30_000_000 // len(line.encode())))
    given = one(path)
    tracemalloc.start()
    try:
        result, last = [], []
        for source in resolve(given):
            for piece in read(source, given, BadLines(given)):
                assert piece.text is not None and len(piece.text) <= PIECE
                result.append(hash(piece.text))
                last.append(piece.last)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert last == [False] * (len(last) - 1) + [True] and len(last) > 5
    assert peak < 40_000_000
    whole = path.read_text()
    assert "".join(str(piece.text) for piece in pieces(given)) == whole
    (tmp_path / "giant.jsonl").write_bytes(jsonl([whole]))
    assert [hash(piece.text) for piece in pieces(one(tmp_path / "giant.jsonl"))] == result


def read_apart(path: Path, most: int = 300) -> str:
    """How many documents a file has, or why it is refused, of a process of its own that stays below
    so many MB."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc, as ru_maxrss counts the parent's too")
    program = (
        "import re, sys; from pathlib import Path; from doremi_train.data.options import *\nfrom "
        "doremi_train.data.corpus.opening import BadLines; from doremi_train.data.corpus.reading "
        "import *\nfrom doremi_train.data.corpus.sources import *\no = "
        "DataOptions(domains={'a': Split((sys.argv[1],))})\n"
        "try: n = sum(p.last for s in resolve(o) for p in read(s, o, BadLines(o)))\n"
        "except UserError as error: n = error\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', "
        "Path('/proc/self/status').read_text())[1]) // 1024, n)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", program, str(path)]
    megabytes, _, found = subprocess.check_output(command, env=environment, text=True).partition(
        " "
    )
    assert int(megabytes) < most
    return found.strip()


@pytest.mark.slow
def test_large_files_stay_within_memory(tmp_path):
    """200 MB of records in one parquet row group and in one zst frame."""
    records = ["word " * 2000 + str(index) for index in range(20_000)]
    pq.write_table(pa.table({"text": records}), tmp_path / "x.parquet", row_group_size=len(records))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(jsonl(records)))
    for name in ("x.parquet", "x.jsonl.zst"):
        assert read_apart(tmp_path / name) == str(len(records))


@pytest.mark.slow
def test_what_expands_a_thousandfold_is_read_in_little_memory_or_refused(tmp_path):
    """One entry of a dictionary that a thousand rows have, a page that is all of a row group, and a
    line that is all of a file: 2 GB, 512 MB and 256 MB of some kB."""
    pq.write_table(pa.table({"text": ["a" * 2_000_000] * 1024}), tmp_path / "entry.parquet")
    rows = pa.table({"text": ["b" * 1_000_000] * 512})
    pq.write_table(rows, tmp_path / "page.parquet", compression="zstd", use_dictionary=False)
    (tmp_path / "line.jsonl.zst").write_bytes(zstandard.compress(b"c" * (1 << 28)))
    assert all(path.stat().st_size < 200_000 for path in tmp_path.iterdir())
    assert read_apart(tmp_path / "entry.parquet") == "1024"
    assert "which become 512" in read_apart(tmp_path / "page.parquet")
    assert "longer than" in read_apart(tmp_path / "line.jsonl.zst", 400)


# Bad input: which files


def test_names_of_another_encoding(tmp_path):
    folder = tmp_path / os.fsdecode(b"b\xe9")
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(TEXTS))
    refused(options(root=str(tmp_path)), r"b\udce9/train.jsonl", "no UTF-8", "rename it")


def test_more_than_one_source(tmp_path):
    refused(options(root=str(tmp_path), files=["x"]), "data.root", "data.files", "only one")
    refused(options(root=str(tmp_path), domain_key="x"), "data.domain_key", "data.files")
    refused(options(embedded=None), "nothing to read", "data.root")
    refused(options(files=["x.jsonl"]), "data.domain_key", "missing")


def test_bad_root(tmp_path):
    refused(options(root=str(tmp_path / "nowhere")), "data.root", "nowhere", "no such folder")
    refused(options(root=""), "data.root=''")
    refused(options(root=str(tmp_path)), "no domain", ".jsonl")
    (tmp_path / "empty").mkdir()
    refused(options(root=str(tmp_path)), "'empty'", "no train* file")
    (tmp_path / "empty" / "part-0.jsonl").write_text("{}")
    refused(options(root=str(tmp_path)), "no train* file", "not read: 1 files .jsonl (empty/part")
    (tmp_path / "empty" / "train.csv").write_text("a,b")
    refused(options(root=str(tmp_path)), "train.csv", "unknown ending", ".jsonl.zst", ".parquet")


def test_bad_domains(tmp_path):
    refused(
        one(tmp_path / "*.jsonl"), "data.domains.a.train", f"{tmp_path}/*.jsonl", "matches none"
    )
    refused(one(tmp_path / "x.jsonl"), "data.domains.a.train", "no such file")
    refused(one(tmp_path), "a folder")
    refused(options(domains={}), "data.domains")
    refused(options(domains={"a": {"train": []}}), "data.domains.a.train=[]")
    refused(options(files=[], domain_key="x"), "data.files=[]")
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.csv").write_text("x")
    refused(one(tmp_path / "x.csv"), "data.domains.a.train", "x.csv", "unknown ending")
    refused(options(files=[str(tmp_path / "x.txt")], domain_key="x"), "x.txt", "data.domains")
    validation = options(domains={"a": {"train": [f"{tmp_path}/x.txt"], "validation": ["v*"]}})
    refused(validation, "data.domains.a.validation", "'v*'")


def test_a_file_listed_twice(tmp_path):
    path = str(tmp_path / "x.txt")
    Path(path).write_text("x")
    (tmp_path / "link.txt").symlink_to(path)
    refused(
        options(domains={"a": {"train": [path, f"{tmp_path}/x*"]}}), path, "listed twice", "overlap"
    )
    refused(
        options(domains={"a": {"train": [path]}, "b": {"train": [f"file://{path}"]}}),
        path,
        "'a'",
        "'b'",
    )
    refused(
        options(domains={"a": {"train": [path], "validation": [path]}}), "(train)", "(validation)"
    )
    refused(one(f"{tmp_path}/*.txt"), "listed twice")


@pytest.mark.parametrize(
    "url",
    [
        "pipe:echo hello",
        "simplecache::memory://x.txt",
        "exec://ls",
        "zip://x.txt::file:///x.zip",
        "reference://x",
    ],
)
def test_urls_that_may_run_commands(url):
    refused(one(url), url, "may run a command", "data.allow_pipe=true")
    refused(options(files=[url], domain_key="x"), url, "data.allow_pipe=true")
    if not url.startswith("pipe:"):
        refused(options(root=url), "data.root", url)


def test_a_protocol_that_is_not_installed(monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    refused(one("s3://bucket/x.jsonl"), "s3://bucket/x.jsonl", "pip install 's3fs'")


def test_pipe_where_allowed(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(TEXTS))
    assert texts(one(f"pipe:cat '{tmp_path}/x.jsonl' | cat", allow_pipe=True)) == TEXTS
    told = "kill -TERM $$; kill -USR1 $$"  # with everybody else: who reads decides when to stop
    assert texts(one(f"pipe:{told}; cat '{tmp_path}/x.jsonl'", allow_pipe=True)) == TEXTS
    refused(one(f"pipe:cat '{tmp_path}/x.jsonl'; exit 3", allow_pipe=True), "status 3", "exit 3")
    refused(one("pipe:false | cat", allow_pipe=True), "status 1")
    given = one('pipe:yes \'{"text": "y"}\'', allow_pipe=True)
    stream = read(resolve(given)[0], given, BadLines(given))
    assert next(stream).text == "y"
    stream.close()  # ends the endless command


# Bad input: what is in them


BROKEN = {
    "broken": b'{"text": "x"',
    "list": b'["text"]',
    "number": b"7",
    "utf8": b'{"text": "\xff"}',
    "surrogate": b'{"text": "\\ud800"}',
    "surrogate elsewhere": b'{"text": "x", "title": "\\udc00"}',
    "nan": b'{"text": "x", "score": NaN}',
    "infinity": b'{"text": "x", "score": -Infinity}',
    "no text": b'{"id": 7}',
    "text is null": b'{"text": null}',
    "text is a number": b'{"text": 7}',
    "text is a list": b'{"text": ["x"]}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_counted_up_to_the_limit(tmp_path, name):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        jsonl(["a"]) + b"\n" + BROKEN[name] + b"\n" + jsonl(["b"]) + b"\n" + BROKEN[name]
    )
    refused(one(path), str(path), "line 2", "data.max_bad_lines")
    refused(one(path, max_bad_lines=1), "line 4")
    given = one(path, max_bad_lines=2)
    bad = BadLines(given)
    assert [piece.text for source in resolve(given) for piece in read(source, given, bad)] == [
        "a",
        "b",
    ]
    assert bad.count == 2


def test_what_python_alone_takes_for_json_is_told_apart(tmp_path):
    for name in ("surrogate", "surrogate elsewhere", "nan", "infinity"):
        (tmp_path / "x.jsonl").write_bytes(BROKEN[name])
        refused(one(tmp_path / "x.jsonl"), "x.jsonl, line 1", "NaN, Infinity", "Python's json")
    (tmp_path / "x.jsonl").write_bytes(BROKEN["broken"])
    with pytest.raises(UserError) as error:
        texts(one(tmp_path / "x.jsonl"))
    assert "Python" not in str(error.value)


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("most", [0, 1000])
def test_one_json_value_is_not_taken_for_lines(tmp_path, indent, most):
    """An array, also one with a record a line or longer than a line may be, and pretty-printed
    records."""
    record = {"text": "a", "meta": {"source": "s"}}
    array = json.dumps([record] * 3, indent=indent)
    by_line = "[\n" + ",\n".join([json.dumps(record)] * 3) + "\n]\n"
    strings = json.dumps(["a", "b"], indent=1).replace("[\n", "[")
    arrays = (array, "\ufeff\n  " + array, by_line, by_line.replace("[\n", "["), strings)
    for content in arrays:
        (tmp_path / "x.jsonl").write_text(content)
        given = one(tmp_path / "x.jsonl", max_bad_lines=most)
        refused(given, "x.jsonl", "one JSON array", "not JSON lines", "jq -c '.[]'")
    pretty = "\n".join([json.dumps(record, indent=indent)] * 3)
    (tmp_path / "x.jsonl").write_text(pretty)
    if indent:
        refused(given, "x.jsonl", "pretty-printed JSON", "jq -c .")
    else:
        assert texts(given) == ["a"] * 3


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".tar"])
@pytest.mark.parametrize("wrong", [None, 7, "", "missing"])
def test_records_without_text_or_domain_are_counted_in_every_format(tmp_path, ending, wrong):
    """Null, a number or nothing at the key, in the text and in the domain."""
    for key, option in (("text", "data.text_key"), ("domain", "data.domain_key")):
        lines = [{"text": f"t{index}", "domain": "s"} for index in range(3)]
        if wrong == "missing":
            del lines[1][key]
        else:
            lines[1][key] = wrong
        path = tmp_path / f"{key}{ending}"
        if ending == ".parquet":
            if wrong == 7:
                continue  # a column has one type
            pq.write_table(
                pa.table({name: [line.get(name) for line in lines] for name in lines[0]}), path
            )
        elif ending == ".tar":
            write_tar(
                path, [(f"{i}.json", json.dumps(line).encode()) for i, line in enumerate(lines)]
            )
        else:
            path.write_text("\n".join(map(json.dumps, lines)))
        values = {"files": [str(path)], "domain_key": "domain"}
        if (key, wrong) == ("text", ""):
            assert texts(options(**values)) == ["t0", "t2"]  # an empty document, as ever
            continue
        refused(options(**values), option, str(path), "data.max_bad_lines=0")
        assert texts(options(**values, max_bad_lines=1)) == ["t0", "t2"]


def test_a_row_of_parquet_that_is_no_utf8_is_counted(tmp_path):
    offsets = np.array([0, 1, 2, 3], "<i4").tobytes()
    column = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    refused(one(tmp_path / "x.parquet"), "x.parquet, row 2", "invalid UTF-8")
    assert texts(one(tmp_path / "x.parquet", max_bad_lines=1)) == ["a", "b"]


def test_a_text_of_a_tar_whose_domain_is_missing_is_counted(tmp_path):
    members = [("0.json", b'{"d": "s"}'), ("0.txt", b"a"), ("1.json", b"{}"), ("1.txt", b"b")]
    write_tar(tmp_path / "x.tar", [*members, ("2.txt", b"c")])
    values = {"files": [f"{tmp_path}/x.tar"], "domain_key": "d"}
    refused(options(**values, max_bad_lines=1), "member '2.txt'")
    assert texts(options(**values, max_bad_lines=2)) == ["a"]


def test_a_line_too_long_is_a_broken_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE", 100)
    for length in (99, 100, 101, 199, 200, 201, 300, 350):
        long = b'{"text": "' + b"x" * (length - 12) + b'"}'
        (tmp_path / "x.jsonl").write_bytes(jsonl(["a"]) + b"\n" + long + b"\n" + jsonl(["b"]))
        if length == 99:  # and the line end
            assert len(texts(one(tmp_path / "x.jsonl"))) == 3
        else:
            assert texts(one(tmp_path / "x.jsonl", max_bad_lines=1)) == ["a", "b"]
            refused(one(tmp_path / "x.jsonl"), "line 2", "longer than 100 bytes")


def test_wrong_keys(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "meta": {"source": "s"}}\n{"content": "b", "meta": {"n": 1}}')
    refused(one(path), "data.text_key='text'", f"{path}, line 2", "content, meta.n")
    refused(one(path, text_key="meta"), "data.text_key='meta'", "line 1", "dict")
    refused(
        options(files=[str(path)], domain_key="meta.source", text_key="meta.n"),
        "data.text_key",
        "line 1",
    )
    refused(
        options(files=[str(path)], domain_key="meta.set"),
        "data.domain_key='meta.set'",
        "line 1",
        "meta.source",
    )
    path.write_text('{"text": "a", "domain": 3}')
    refused(
        options(files=[str(path)], domain_key="domain"),
        "data.domain_key='domain'",
        "a string is needed",
        "int",
    )
    path.write_text('{"text": "a", "domain": ""}')
    refused(
        options(files=[str(path)], domain_key="domain"),
        "data.domain_key='domain'",
        "empty",
        "line 1",
    )
    path.write_text('{"text": null}')
    refused(one(path), "data.text_key='text'", "NoneType")
    write_parquet(tmp_path / "x.parquet", ["a"])
    refused(
        one(tmp_path / "x.parquet", text_key="body"), "data.text_key='body'", "meta.source, text"
    )
    refused(
        one(tmp_path / "x.parquet", text_key="meta.n"), "data.text_key='meta.n'", "row 1", "int"
    )
    write_tar(tmp_path / "x.tar", [("0.json", b'{"body": "a"}'), ("1.json", b'{"text": "a"}')])
    refused(one(tmp_path / "x.tar"), "data.text_key='text'", "member '0.json'", "body")
    refused(
        options(files=[f"{tmp_path}/x.tar"], domain_key="d"),
        "data.domain_key='d'",
        "member '0.json'",
    )
    for domain, word in (('{"d": ""}', "empty"), ('{"e": "s"}', "no such key")):
        write_tar(tmp_path / "y.tar", [("0.json", domain.encode()), ("0.txt", b"a")])
        refused(
            options(files=[f"{tmp_path}/y.tar"], domain_key="d"),
            "data.domain_key='d'",
            "member '0.txt'",
            word,
        )


def test_columns_of_parquet_that_are_no_strings_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table(
            {
                "text": [["a", "b"]],
                "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
                "meta": [{"parts": ["a"], "title": "t"}],
                "a.b": ["dotted"],
            }
        ),
        path,
    )
    for key in ("text", "text.list.element", "text.element", "map", "meta.parts", "map.key_value"):
        words = "list of strings" if "map" not in key else "map<"
        refused(one(path, text_key=key), f"data.text_key={key!r}", "a column of strings", words)
    for key in ("tex", "meta", "meta.none", "a", "meta.title.more"):
        refused(one(path, text_key=key), "no such key", "a.b, map, meta.parts, meta.title, text")
    assert texts(one(path, text_key="meta.title")) == ["t"]
    assert texts(one(path, text_key="a.b")) == ["dotted"]


def test_invalid_utf8_in_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("ä".encode() * 700_000 + b"\xff" + b"more")
    refused(one(path), str(path), "invalid UTF-8", "byte 1400000")
    path.write_bytes("ä".encode()[:1])
    refused(one(path), "invalid UTF-8", "byte 0")
    write_tar(tmp_path / "x.tar", [("0.txt", b"\xff")])
    refused(one(tmp_path / "x.tar"), "x.tar, member '0.txt'", "invalid UTF-8")


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet", ".tar"])
def test_truncated_files(tmp_path, ending):
    write_as(tmp_path / "a", ending)
    path = tmp_path / "a" / f"train-0{ending}"
    whole = path.read_bytes()
    shorter = 512 * 4 + 100 if ending == ".tar" else len(whole) - 3
    for size in (shorter, len(whole) // 3, 0):
        path.write_bytes(whole[:size])
        refused(one(path), str(path), "truncated or corrupt")


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [1, 511, 512, 3_000_000])
def test_zeros_after_gzip_members_are_passed_over(tmp_path, zeros):
    write_as(tmp_path / "a", ".jsonl.gz")
    path = tmp_path / "a" / "train-0.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(zeros))
    assert texts(one(path)) == TEXTS
    path.write_bytes(whole + bytes(zeros) + b"no member")
    refused(one(path), str(path), "truncated or corrupt")
    path.write_bytes(whole[:20] + b"xxx" + whole[23:])
    refused(one(path), str(path), "truncated or corrupt")


def test_a_long_zstd_window_is_named_and_how_to_go_on(tmp_path):
    window = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=window).compressobj()
    long = stream.compress(jsonl(TEXTS)) + stream.flush()
    for content in (long, zstandard.compress(jsonl(["a"]) + b"\n") + long):
        (tmp_path / "x.jsonl.zst").write_bytes(content)
        refused(one(tmp_path / "x.jsonl.zst"), "x.jsonl.zst", "128 MB", "--long=31", "pipe:")
    if shutil.which("zstd"):
        (tmp_path / "x.jsonl.zst").write_bytes(long)
        piped = f"pipe:zstd -dc --long=31 '{tmp_path}/x.jsonl.zst'"
        assert texts(one(piped, allow_pipe=True)) == TEXTS


def test_a_tar_cut_between_members_is_truncated(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{index}.txt", b"x" * 512) for index in range(3)])
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:2048])
    refused(one(tmp_path / "x.tar"), "truncated or corrupt", "end of the archive")


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet", ".tar"])
def test_corrupt_files(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    path.write_bytes(b"this is something else entirely " * 100)
    refused(one(path), str(path), "truncated or corrupt")


@pytest.mark.parametrize("name", ["/etc/x.txt", "../x.txt", "a/../../x.txt"])
def test_tar_members_outside_are_refused(tmp_path, name):
    write_tar(tmp_path / "x.tar", [(name, b"x")])
    refused(one(tmp_path / "x.tar"), "x.tar", name, "outside")


def test_a_tar_without_texts(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.jpg", b"x")])
    refused(one(tmp_path / "x.tar"), "x.tar", "no KEY.txt", "1 members .jpg")


def test_text_and_record_of_a_sample_that_are_far_apart_are_refused(tmp_path):
    record = b'{"text": "b"}'
    first = [("d/0.txt", b"a"), ("d/1.txt", b"a")]
    write_tar(tmp_path / "x.tar", [*first, ("d/0.json", record), ("d/1.json", record)])
    refused(one(tmp_path / "x.tar"), "member 'd/0.json'", "d/0.txt", "sorted by name")
    joined = [("0.json", record), ("0.txt", b"a"), ("1.txt", b"b")]  # tars with the same keys
    write_tar(tmp_path / "x.tar", [*joined, *joined])
    assert texts(one(tmp_path / "x.tar")) == ["a", "b"] * 2


def test_fields_of_a_sample_are_no_documents(tmp_path):
    """A key ends at the first dot of the base name, also where the folder has dots."""
    members = [
        ("v1.0/000.meta.json", b"{}"),
        ("v1.0/000.txt", b"a"),
        ("v1.0/000.url.txt", b"https://example.org"),
        ("v1.0/000.jsonl", b"{}"),
        ("v1.0/001.json", b'{"text": "b"}'),
        ("v1.0/001.meta.json", b'{"text": "no"}'),
        ("v1.0/001.jpg", b"x"),
        ("v1.0/002.TXT", b"c"),
        ("v1.0/002.Url.Txt", b"no"),
    ]
    write_tar(tmp_path / "x.tar", members)
    given = one(tmp_path / "x.tar")
    bad = BadLines(given)
    read_texts = [piece.text for source in resolve(given) for piece in read(source, given, bad)]
    assert read_texts == ["a", "b", "c"]
    for words in ("2 members .meta.json", "2 members .url.txt", "1 members .jsonl", "001.jpg"):
        assert words in str(bad.passed_over)


@pytest.mark.parametrize(
    "name",
    ["1.url.txt", "v1.0-000.txt", "1.stats.json", "1.jsonl", "p/rows.jsonl.gz", "1.parquet",
     "1.txt.gz", "1.tar", "1.NDJSON"],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_members_that_may_be_documents_are_refused(tmp_path, name, last):
    members = [(name, b"{}"), ("more.jsonl", b"{}")]
    others = [(f"{index}.txt", b"x") for index in (0, 9)]
    write_tar(tmp_path / "x.tar", [others[0], *members, *([] if last else others[1:])])
    words = (repr(name), "1 more", "first dot", "unpack the tar", "rename it")
    refused(one(tmp_path / "x.tar", max_bad_lines=9), "x.tar", *words)


def test_what_is_not_read_of_a_tar_is_counted_by_kind(tmp_path):
    path = tmp_path / "x.tar"
    members = [
        *[(f"{index}.txt", b"x") for index in range(7)],
        *[(f"._{index}.txt", b"\0\5\x16\7") for index in range(7)],
        ("__MACOSX/._0.txt", b"\0\5\x16\7"),
        ("__MACOSX/0.txt", b"\0\5\x16\7"),
        (".DS_Store", b"x"),
        ("README", b"x"),
        ("a.b/LICENSE.", b"x"),
        ("notes.md", b"x"),
        ("more.of.them.md", b"x"),
    ]
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "0.txt"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder.txt")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    given = one(path)
    bad = BadLines(given)
    assert [piece.text for piece in read(resolve(given)[0], given, bad)] == ["x"] * 7
    said = str(bad.passed_over)
    for words in (
        "10 hidden members (such as an archiver's own) (x.tar: ._0.txt",
        "._4.txt, …)",
        "2 members without an ending (x.tar: README, x.tar: a.b/LICENSE.)",
        "2 members .md (x.tar: notes.md, x.tar: more.of.them.md)",
        "1 links and devices (x.tar: link.txt)",
    ):
        assert words in said
    assert "folder.txt" not in said and "\n" not in said


def test_tars_alone_have_a_new_address(tmp_path):
    """A change of one reader leaves what was prepared from other files where it is."""
    for ending, version in ((".jsonl", 1), (".tar", 2), (".txt", 1)):
        write_as(tmp_path / ending, ending)
        given = one(tmp_path / ending / f"train-0{ending}")
        assert signature(given, resolve(given))["reader"] == version


def test_a_broken_json_member_counts_as_a_line(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.json", b"{"), ("1.json", b'{"text": "a"}')])
    refused(one(tmp_path / "x.tar"), "member '0.json'", "data.max_bad_lines")
    assert texts(one(tmp_path / "x.tar", max_bad_lines=1)) == ["a"]


def test_bad_megatron(tmp_path):
    write_megatron(tmp_path / "x", [[[1, 2, 3], [4]], [[5]]])
    index, tokens = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    given = one(tmp_path / "x.bin")
    refused(options(files=[str(tmp_path / "x.bin")], domain_key="x"), "x.bin", "data.domains")
    for wrong in (
        b"",
        index[:20],
        index[:-1],
        index + b"12345",
        b"X" + index[1:],
        index[:17] + b"\x06" + index[18:],
    ):
        (tmp_path / "x.idx").write_bytes(wrong)
        refused(given, "x.idx", "corrupt index")
    # Sizes, pointers, bounds.
    for place, value in (
        (34, 9),
        (34 + 12 + 8, 7),
        (34 + 36 + 8, 5),
        (34 + 36 + 16, 2),
    ):
        (tmp_path / "x.idx").write_bytes(index[:place] + bytes([value]) + index[place + 1 :])
        refused(given, "x.idx", "corrupt index")
    # One mode per sequence, as multimodal writers append.
    (tmp_path / "x.idx").write_bytes(index + bytes(3))
    assert len(pieces(given)) == 2
    (tmp_path / "x.idx").write_bytes(index + b"\0\1\0")
    refused(given, "x.idx", "1 of 3 sequences have a mode", "text alone")
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(tokens[:-2])
    refused(given, "x.bin", "truncated or corrupt")
    (tmp_path / "x.idx").unlink()
    refused(given, "x.bin", "x.idx")
    write_megatron(tmp_path / "n", [[[1, -2]]], 4, "<i4")
    refused(one(tmp_path / "n.bin"), "n.bin", "-2 is negative")


def test_a_file_that_vanished_or_is_unreadable(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    given = one(tmp_path / "x.txt")
    found = resolve(given)
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UserError, match=r"x\.txt.*cannot be read"):
        list(read(found[0], given, BadLines(given)))

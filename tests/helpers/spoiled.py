"""Files of users with other bytes or another structure, to be drawn, and who reads them."""

import copy
import functools
import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

from doremi_train import mixture
from doremi_train.classification import labelled
from doremi_train.config import UserError, load, read_mappings
from doremi_train.data import instructions
from doremi_train.data.chat import Encoder
from doremi_train.data.corpus import sidecar
from doremi_train.data.corpus.opening import BadLines
from doremi_train.data.corpus.sources import resolve
from doremi_train.data.tokens import tokenizer
from doremi_train.evaluation import downstream
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import launcher
from doremi_train.selection.documents import granular
from doremi_train.stages.options import Config
from helpers.bench import DATA
from helpers.mistakes import base, changed
from helpers.sources import one, options, pieces

Spoil = Callable[[bytes], bytes]


def _at(data: bytes, where: float) -> int:
    return int(where * max(len(data) - 1, 0))


def truncated(data: bytes, where: float) -> bytes:
    return data[: _at(data, where)]


def flipped(data: bytes, where: float, bits: int) -> bytes:
    at = _at(data, where)
    return data[:at] + bytes([one ^ bits for one in data[at : at + 1]]) + data[at + 1 :]


def overwritten(data: bytes, where: float, by: bytes) -> bytes:
    at = _at(data, where)
    return data[:at] + by + data[at + len(by) :]


def inserted(data: bytes, where: float, what: bytes) -> bytes:
    at = _at(data, where)
    return data[:at] + what + data[at:]


def swapped(data: bytes, where: float) -> bytes:
    lines = data.split(b"\n")
    at = int(where * (len(lines) - 1))
    return b"\n".join(lines[at:] + lines[:at])


def recoded(data: bytes, encoding: str) -> bytes:
    return data.decode("utf-8", "replace").encode(encoding, "replace")


LIES = (
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    struct.pack("<q", -1),
    struct.pack("<q", 2**62),
    struct.pack("<q", 10**6),
    b"\x7f\xff\xff\xff",
    b"{",
    b'"',
    b"PAR1",
)
WEDGES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b"{",
    b"[" * 100_000,
    b"x" * 200_000,
    b'{"a":' * 3000,
    b'"',
    b"\xed\xa0\x80",
    b",",
    b"NaN",
    b"-",
    b"9" * 400,
)
SHARE = st.floats(0, 1, width=16)
BYTES: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just(truncated), SHARE),
    st.tuples(st.just(flipped), SHARE, st.integers(1, 255)),
    st.tuples(st.just(overwritten), SHARE, st.sampled_from(LIES)),
    st.tuples(st.just(overwritten), st.just(0.0), st.sampled_from(LIES)),
    st.tuples(st.just(inserted), SHARE, st.sampled_from(WEDGES)),
    st.tuples(st.just(inserted), st.just(0.0), st.sampled_from(WEDGES)),
    st.tuples(st.just(swapped), SHARE),
    st.tuples(
        st.just(recoded), st.sampled_from(("utf-16", "latin-1", "utf-8-sig", "utf-32", "cp500"))
    ),
)
OTHER = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    1e308,
    "",
    "x",
    "é",
    "\0",
    [],
    [None],
    ["x"],
    [[]],
    {},
    {"a": None},
    {"": {"": []}},
    "nowhere",
    2**31,
    2**63 - 1,
    -(2**63),
    "9" * 50,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value stand: some hundred of them, at most."""
    yield path
    parts = (
        list(value.items())[:60]
        if isinstance(value, dict)
        else list(enumerate(value))[:6]
        if isinstance(value, list)
        else []
    )
    for key, inner in parts:
        yield from _places(inner, (*path, key))


def restructured(value: Any, where: float, how: str, other: Any) -> Any:
    """A JSON value of which a part was replaced, removed, wrapped or renamed."""
    places = list(_places(value))
    *outer, last = places[int(where * (len(places) - 1))] or (None,)
    if last is None:
        return other if how == "replace" else [value]
    value = copy.deepcopy(value)
    inner = functools.reduce(lambda part, key: part[key], outer, value)
    if how == "replace":
        inner[last] = other
    elif how == "remove":
        del inner[last]
    elif how == "wrap":
        inner[last] = [inner[last]]
    elif isinstance(inner, dict):
        inner[f"{last}x"] = inner.pop(last)
    return value


STRUCTURE = st.tuples(
    SHARE,
    st.sampled_from(("replace", "replace", "remove", "wrap", "rename")),
    st.sampled_from(OTHER),
)


def spoiled_json(data: bytes, where: float, how: str, other: Any) -> bytes:
    """A JSON file of another structure."""
    return json.dumps(restructured(json.loads(data), where, how, other)).encode()


def spoiled_lines(data: bytes, where: float, how: str, other: Any) -> bytes:
    """JSON lines, of which one has another structure."""
    lines = data.splitlines()
    at = int(where * (len(lines) - 1))
    lines[at] = spoiled_json(lines[at], (where * 7919) % 1, how, other)
    return b"\n".join(lines) + b"\n"


def doubled_key(data: bytes, where: float, how: str, other: Any) -> bytes:
    """JSON in which a key comes twice."""
    return data.replace(b"{", b'{"text": ' + json.dumps(other).encode() + b", ", 1)


def spoiled_header(data: bytes, where: float, how: str, other: Any) -> bytes:
    """A safetensors file whose header has another structure."""
    (size,) = struct.unpack("<Q", data[:8])
    header = spoiled_json(data[8 : 8 + size], where, how, other)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


COLUMNS: tuple[Any, ...] = (
    pa.array([1, 2]), pa.array([None, None]), pa.array([b"\xff", b"x"]), pa.array([["a"], []]),
    pa.array([{"a": "b"}, None]),
    pa.array(["x", None]), pa.array([], pa.string()), pa.array(["x", "y"], pa.large_string()),
    pa.array(["x", "y"]).dictionary_encode(),
    pa.array([True, False]), pa.array([1.5, float("nan")]),
    pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string())),
    pa.array([10**15, 1], pa.timestamp("us")), pa.array(["x", "y"], pa.string_view()),
    pa.array([-1, 2**62]), pa.array([1, 3]), pa.array([0, 0]), pa.array([10, 5]),
    pa.array([2**64 - 1, 0], pa.uint64()),
)  # fmt: skip


def spoiled_columns(data: bytes, where: float, how: str, other: Any) -> bytes:
    """A parquet file with a column of another type, without it, or with it twice."""
    table = pq.read_table(io.BytesIO(data))
    at = int(where * 7919) % table.num_columns
    if how == "remove":
        table = table.remove_column(at)
    elif how == "rename":
        table = table.rename_columns([*table.column_names[:-1], table.column_names[0]])
    else:
        column = COLUMNS[int(where * (len(COLUMNS) - 1))]
        table = table.slice(0, len(column)).set_column(at, table.column_names[at], column)
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def spoiled_members(data: bytes, where: float, how: str, other: Any) -> bytes:
    """A tar with a member of another name or kind."""
    out, names = (
        io.BytesIO(),
        (
            "",
            ".txt",
            "a/../../b.txt",
            "/a.txt",
            "x",
            "x.jsonl",
            "é.txt",
            "\udcff.txt",
            "a" * 300 + ".txt",
            "000.json",
            "000.TXT",
            "..",
            "a\nb.txt",
        ),
    )
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as source,
        tarfile.open(
            fileobj=out,
            mode="w",
            format=tarfile.PAX_FORMAT if how == "wrap" else tarfile.GNU_FORMAT,
            errors="surrogateescape",
        ) as archive,
    ):
        members = source.getmembers()
        for nth, member in enumerate(members):
            content = source.extractfile(member)
            if nth == int(where * (len(members) - 1)):
                if how == "remove":
                    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                else:
                    member.name = names[int(where * 7919) % len(names)]
            archive.addfile(member, content)
    return out.getvalue()


def packed(data: bytes, ending: str, spoil: Spoil) -> bytes:
    """Compressed bytes, whose content was spoiled before."""
    if ending == "gz":
        return gzip.compress(spoil(gzip.decompress(data)))
    return zstandard.compress(spoil(zstandard.ZstdDecompressor().decompressobj().decompress(data)))


PLACED = ("nothing", "folder", "loop", "empty")


def put(path: Path, what: str) -> None:
    """Something else in the place of a file."""
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "empty":
        path.touch()


FORMS: dict[str, tuple[Callable[..., bytes], ...]] = {
    "json": (spoiled_json, doubled_key),
    "jsonl": (spoiled_lines, doubled_key),
    "parquet": (spoiled_columns,),
    "safetensors": (spoiled_header,),
    "tar": (spoiled_members,),
}


@st.composite
def spoils(draw: Callable[..., Any], name: str) -> tuple[Any, ...]:
    """How the file of this name is spoiled: (function, arguments …), or (None, what stands in its
    place)."""
    inner = name.removesuffix(".gz").removesuffix(".zst")
    structural = [
        st.tuples(st.just(function), STRUCTURE).map(lambda two: (two[0], *two[1]))
        for function in FORMS.get(inner.rpartition(".")[2], ())
    ]
    content = st.one_of(BYTES, *structural * 2)
    if inner != name:
        within = content.map(lambda spoil: (packed, name.rpartition(".")[2], spoil))
        content = st.one_of(BYTES, within, within)
    return draw(st.one_of(*[content] * 12, st.tuples(st.none(), st.sampled_from(PLACED))))


def spoil(path: Path, how: tuple[Any, ...]) -> None:
    function, *arguments = how
    if function is None:
        put(path, arguments[0])
    elif function is packed:
        ending, (within, *more) = arguments
        path.write_bytes(packed(path.read_bytes(), ending, lambda data: within(data, *more)))
    else:
        path.write_bytes(function(path.read_bytes(), *arguments))


# ── Who reads what ──────────────────────────────────────────────────────────────────


def _read_data(path: Path) -> None:
    ending = path.name.removeprefix("train")
    files = path.with_suffix(".bin") if ending == ".idx" else path
    found = pieces(one(files))
    assert all(piece.domain == "a" for piece in found)
    pieces(options(files=[str(files)], domain_key="meta.set", max_bad_lines=3)) if ending not in (
        ".txt",
        ".bin",
        ".idx",
    ) else None


def _read_chats(path: Path) -> None:
    given = options(root=str(path.parent.parent), embedded=None)
    encoder = Encoder("model", "finetune.model")
    list(instructions.examples(resolve(given), given, encoder, 32, BadLines(given)))


def _read_model(path: Path) -> None:
    """As reference, as a shape, and as what is fine-tuned."""
    failed = []
    for use in (
        lambda: folders.load(path.parent, 300, "reference.path"),
        lambda: folders.folder_fingerprint(path.parent),
        lambda: configs.resolve(ModelOptions(path=str(path.parent)), 300, 0, 32),
        lambda: Encoder(str(path.parent), "finetune.model").encode(
            {"prompt": "ab", "completion": "b"}, "here"
        ),
        lambda: Encoder(str(path.parent), "finetune.model").encode(
            {"messages": [{"role": "assistant", "content": "b"}]}, "here"
        ),
        lambda: (tokenizer.load(str(path.parent)), tokenizer.said_end(str(path.parent))),
    ):
        try:
            use()
        except UserError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _read_tokenizer(path: Path) -> None:
    spoken = tokenizer.load(str(path))
    tokenizer.end_of_document(spoken, None, tokenizer.said_end(str(path)))
    tokenizer.vocabulary_size(spoken)
    tokenizer.fingerprint(spoken)
    tokenizer.encode(spoken, ["ab cd", "é語 \0", ""])


def _read_labelled(path: Path) -> None:
    labelled.read(str(path), "text", "label")


def _read_task(path: Path) -> None:
    downstream.check("lambada", path.parent)


def _read_weights(path: Path) -> None:
    mixture.load(path, ["one", "two"])


def _read_mapping(path: Path) -> None:
    load(Config, read_mappings(changed(base("export"), [("export.paths", str(path))])))


def _read_deepspeed(path: Path) -> None:
    launcher.read_deepspeed(str(path), "zero2")


def _read_sidecar(path: Path) -> None:
    given = options(root="corpus", embedded=None, selection=str(path))
    sources = resolve(given)
    sidecar.identity(given, sources)
    sidecar.domains(given)
    for source in sources:
        chosen = sidecar.Selected(given, sources, source)
        for piece in pieces(given):
            chosen.parts(piece)


def _read_vocabulary(path: Path) -> None:
    granular.load(str(path))


CASES: list[tuple[str, Callable[[Path], None]]] = [
    *((f"data/{ending}/train.{ending}", _read_data) for ending in DATA),
    ("data/bin/train.idx", _read_data),
    ("chats/all/train.jsonl", _read_chats),
    *(
        (f"model/{name}", _read_model)
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        )
    ),
    ("tokenizer.json", _read_tokenizer),
    ("labelled/real.jsonl", _read_labelled),
    ("labelled.parquet", _read_labelled),
    ("labelled.csv", _read_labelled),
    ("tasks/test.jsonl", _read_task),
    ("weights.json", _read_weights),
    ("pairs.json", _read_mapping),
    ("deepspeed.json", _read_deepspeed),
    ("sidecar.parquet", _read_sidecar),
    ("vocabulary.json", _read_vocabulary),
]

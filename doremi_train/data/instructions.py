"""Examples for supervised fine-tuning: what is asked, and the answer, which alone carries a loss. A
line of JSON each:

    {"prompt": "…", "completion": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}

An example is pieces of text, each of which carries a loss or none. A piece is tokenised alone, as
the question will be when there is no answer yet. A completion ends with the tokeniser's end token,
which carries loss too. Messages are laid out by the tokeniser's chat template; where it has none,
as `<|role|>`, a new line, the content and a new line, an answer ending with the end token. Written
in a prompt, completion or content, special tokens are text; only a chat template, which mixes its
own with the content, has all of them read.

Each example is a sequence of its own, padded and not packed: what batch selection and influence
pick is an example, no example sees another, and any model's attention will do. Batches are cut to
their longest example.

    <folder>/manifest.json    what is there, and what was left out
             examples.npy     a row for each example, in the order of split, domain, file and line
             tokens.npy       ids of all of them; one that carries no loss as its complement ~id,
                              so negative
             records.jsonl    where they are kept: the record of each example, in the same order

K domains, B examples of a batch, n tokens of an example, T the most that are read.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from doremi_train.config import UserError, fingerprint
from doremi_train.data import chat
from doremi_train.data.chat import Encoder, Example, Ints
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.reading import records
from doremi_train.data.corpus.sources import RULE, passed_over, resolve, signature
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens.shards import SPLITS
from doremi_train.files import clear_partial, locked, read_json, replacing, write_json
from doremi_train.redaction import redact

RECIPE = 1  # raise when the same request would give other tokens
_INDEX = np.dtype([(name, "<i8") for name in ("stream", "end", "carrying", "file", "line", "cut")])
_NAMED = 10  # places of examples left out that are kept for the report


# ── All of them ─────────────────────────────────────────────────────────────────────


class Read(NamedTuple):
    """An example and where it comes from."""

    domain: str
    source: Source
    line: int  # from 1
    tokens: NDArray[np.int32]  # (n,) as they are stored
    cut: bool  # whether it has more of them
    record: Mapping[str, Any] | None  # None where it was picked
    told: Mapping[str, int] = {}  # what of chat.TOLD is to be said of how many of its answers


class Picked(NamedTuple):
    """Training examples that are tokenised already: the lines of the training file, in order."""

    pool: "Instructions"
    numbers: Sequence[int]  # among the training examples of the pool

    def serves(self, request: Mapping[str, Any]) -> bool:
        """Whether the request's tokeniser and length gave these tokens."""
        made = self.pool.manifest["request"]
        return all(made[key] == request[key] for key in ("recipe", "tokenizer", "sequence_length"))


def examples(
    sources: list[Source],
    options: DataOptions,
    encoder: Encoder,
    length: int,
    bad: BadLines,
    picked: Picked | None = None,
) -> Iterator[Read]:
    """Every example of the sources, in their order, cut to `length` + 1 tokens; those for training
    are not read where they were `picked`.

    Raises UserError naming file and line for one that is none.
    """
    for source in sources:
        if picked is not None and source.split == "train":
            for line, number in enumerate(picked.numbers, 1):
                tokens, cut = picked.pool.training(number)
                yield Read(str(source.domain), source, line, tokens, cut, None)
            continue
        for domain, line, record in records(source, options, bad):
            example, told = encoder.encoded(record, f"{source.url}, line {line}")
            tokens = chat.coded(example, length)
            yield Read(domain, source, line, tokens, len(example.ids) > len(tokens), record, told)


def prepare(
    options: DataOptions,
    encoder: Encoder,
    length: int,
    folder: Path,
    check: Callable[[], None] = lambda: None,
    keep_records: bool = False,
    picked: Picked | None = None,
) -> Path:
    """`folder`/<address> with the examples of these files, cut to `length` + 1 tokens: made, or
    found there. `keep_records` has each example's record beside its tokens; `picked` are the
    training examples, where another pool has them.

    An example without a token that carries a loss is left out, and so is a training example that is
    also a validation example. Without validation files data.validation_fraction of the examples is
    held out, by hash. Raises UserError for what is not such examples, and for a domain without any
    to train or validate on.
    """
    sources = resolve(options)
    request = {
        "recipe": RECIPE,
        "sources": signature(options, sources),
        "tokenizer": encoder.fingerprint,
        "sequence_length": length,
        "validation_fraction": options.validation_fraction,
    }
    target = folder / f"instructions-{fingerprint(request)}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{target.name}.lock", check):
        needed = ["manifest.json", *["records.jsonl"] * keep_records]
        clear_partial(target)
        if not all((target / name).exists() for name in needed):
            passed_over(options).say(RULE)
            collected = _Collected(options, length, keep_records)
            if picked is not None and not picked.serves(request):
                picked = None
            # First what is for validation: what comes again in training is left out there.
            ordered = sorted(sources, key=lambda source: source.split != "validation")
            for read in examples(ordered, options, encoder, length, collected.bad, picked):
                check()
                collected.add(read)
            collected.require_all(sources)
            _write(target, collected, request)
    bad = read_json(target / "manifest.json")["bad_lines"]
    if bad > options.max_bad_lines:
        raise UserError(
            f"data.max_bad_lines={options.max_bad_lines}: but {bad} lines are broken; mend the "
            "files"
        )
    return target


class _Row(NamedTuple):
    """What is kept of an example."""

    tokens: NDArray[np.int32]  # (n,)
    cut: bool
    file: int
    line: int
    record: bytes | None


class _Collected:
    """Examples in memory, before they are written: about 4 bytes a token, and their records."""

    def __init__(self, options: DataOptions, length: int, keep_records: bool) -> None:
        self.options, self.length, self.keep_records = options, length, keep_records
        self.rows: dict[tuple[str, str], list[_Row]] = {}  # by split and domain
        self.files: list[str] = []
        self.bad = BadLines(options)
        self.left_out: list[str] = []  # places
        self.counts: Counter[str] = Counter()
        self.told: dict[str, dict[str, Any]] = {}  # of chat.TOLD: how many answers, and the first
        self._validation: set[bytes] = set()

    def require_all(self, sources: list[Source]) -> None:
        """Raise UserError naming a domain without examples to train or validate on."""
        for domain in sorted(
            {domain for _, domain in self.rows} | {s.domain for s in sources if s.domain}
        ):
            for split in SPLITS:
                if (split, domain) not in self.rows:
                    raise UserError(self._nothing(split, domain))

    def add(self, read: Read) -> None:
        """Keep an example, or count why it is left out."""
        tokens, url = read.tokens, redact(read.source.url)
        for what, count in read.told.items():
            of = self.told.setdefault(what, {"answers": 0, "first": f"{url}, line {read.line}"})
            of["answers"] += count
        if (tokens < 0).all():
            self.left_out.append(f"{url}, line {read.line}")
            return
        self.counts["cut"] += read.cut
        key = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        split = read.source.split
        if split is None:
            part = int.from_bytes(key[:8], "little") / 2.0**64
            split = "validation" if part < self.options.validation_fraction else "train"
        if split == "validation":
            self._validation.add(key)
        elif key in self._validation:
            self.counts["also_in_validation"] += 1
            return
        if not self.files or self.files[-1] != url:
            self.files.append(url)
        record = orjson.dumps(read.record) if self.keep_records else None
        row = _Row(tokens, read.cut, len(self.files) - 1, read.line, record)
        self.rows.setdefault((split, read.domain), []).append(row)

    def _nothing(self, split: str, domain: str) -> str:
        because = (
            f"; {len(self.left_out)} have no token that carries a loss within "
            f"training.sequence_length={self.length} (such as {self.left_out[0]})"
            if self.left_out
            else ""
        )
        remedy = (
            "add some"
            if split == "train"
            else "give validation files, or raise "
            f"data.validation_fraction={self.options.validation_fraction}"
        )
        return f"domain {domain!r}: no {split} example{because}; {remedy}"


def _write(target: Path, collected: _Collected, request: Mapping[str, Any]) -> None:
    domains = sorted({domain for _, domain in collected.rows})
    streams = [collected.rows[split, domain] for split in SPLITS for domain in domains]
    rows = list(itertools.chain(*streams))
    index = np.zeros(len(rows), _INDEX)
    index["stream"] = np.repeat(np.arange(len(streams)), [len(stream) for stream in streams])
    index["file"] = [row.file for row in rows]
    index["line"] = [row.line for row in rows]
    index["cut"] = [row.cut for row in rows]
    index["end"] = np.cumsum([len(row.tokens) for row in rows])
    index["carrying"] = [int((row.tokens >= 0).sum()) for row in rows]
    tokens = np.concatenate([row.tokens for row in rows])
    target.mkdir(exist_ok=True)
    for name, values in (("tokens", tokens), ("examples", index)):
        with replacing(target / f"{name}.npy") as aside, aside.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    if collected.keep_records:
        with replacing(target / "records.jsonl") as aside, aside.open("wb") as file:
            file.writelines(row.record + b"\n" for row in rows if row.record is not None)
    content = hashlib.sha256(
        tokens.tobytes() + index["stream"].tobytes() + index["end"].tobytes()
    ).hexdigest()
    write_json(
        target / "manifest.json",
        {
            "fingerprint": fingerprint(
                {"content": content, "domains": domains, "tokenizer": request["tokenizer"]}
            ),
            "domains": domains,
            "files": collected.files,
            "sequence_length": collected.length,
            "examples": {
                domain: {split: len(collected.rows[split, domain]) for split in SPLITS}
                for domain in domains
            },
            "cut": collected.counts["cut"],
            "also_in_validation": collected.counts["also_in_validation"],
            "without_loss": {
                "examples": len(collected.left_out),
                "first": collected.left_out[:_NAMED],
            },
            **({"told": collected.told} if collected.told else {}),
            "bad_lines": collected.bad.count,
            "request": request,
        },
    )


class Instructions:
    """Random access to prepared examples; a `batches.Store`, whose sequences are examples."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = read_json(folder / "manifest.json")
        self.domains = tuple(self.manifest["domains"])
        self.fingerprint: str = self.manifest["fingerprint"]
        self._folder = folder
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        self._index = np.load(folder / "examples.npy", allow_pickle=False)
        self._ends = np.concatenate([[0], self._index["end"]])
        self._first = np.searchsorted(
            self._index["stream"], np.arange(len(SPLITS) * len(self.domains) + 1)
        )

    def named(self, vector: Any) -> dict[str, float]:
        """{domain: value} of a tensor or array (K,)."""
        return dict(zip(self.domains, vector.tolist(), strict=True))

    def sizes(self, split: str) -> Ints:
        """(K,) tokens."""
        return np.diff(self._ends[self._first])[self._streams(split)]

    def sequences(self, split: str, length: int) -> Ints:
        """(K,) examples."""
        return np.diff(self._first)[self._streams(split)]

    def gather(self, split: str, domain: Ints, sequence: Ints, length: int) -> Ints:
        """(B, n) tokens, padded to the longest of them."""
        self._require(length)
        return chat.padded(
            [self._stored(row) for row in self._rows(split, domain, sequence).tolist()]
        )

    def carrying(self, split: str, domain: Ints, sequence: Ints, length: int) -> Ints:
        """(B,) tokens that carry a loss."""
        self._require(length)
        return self._index["carrying"][self._rows(split, domain, sequence)]

    def bytes_per_token(self, split: str) -> NDArray[np.float64]:
        return np.full(len(self.domains), np.nan)  # of what carries a loss: not counted

    def example(self, split: str, domain: int, sequence: int) -> Example:
        tokens = self._stored(int(self._first[self._streams(split)][domain]) + sequence)
        return Example(np.where(tokens < 0, ~tokens, tokens), tokens >= 0)

    def place(self, split: str, domain: int, sequence: int) -> tuple[str, int]:
        """File and line of an example."""
        row = self._index[int(self._first[self._streams(split)][domain]) + sequence]
        return self.manifest["files"][row["file"]], int(row["line"])

    def training(self, number: int) -> tuple[NDArray[np.int32], bool]:
        """(tokens (n,), whether they were cut) of a training example, by its number among those of
        all domains: they are the first rows."""
        return self._stored(number), bool(self._index["cut"][number])

    def records(self) -> list[bytes]:
        """The record of every training example, a line of JSON each. Raises OSError where they were
        not kept."""
        with (self._folder / "records.jsonl").open("rb") as file:
            return list(itertools.islice(file, self._first[len(self.domains)]))

    def _stored(self, row: int) -> NDArray[np.int32]:
        return np.asarray(self._tokens[self._ends[row] : self._ends[row + 1]])

    def _streams(self, split: str) -> slice:
        first = SPLITS.index(split) * len(self.domains)
        return slice(first, first + len(self.domains))

    def _rows(self, split: str, domain: Ints, sequence: Ints) -> Ints:
        return self._first[self._streams(split)][domain] + sequence

    def _require(self, length: int) -> None:
        if length != self.manifest["sequence_length"]:
            raise ValueError(
                f"sequences of {length}: these were prepared for {self.manifest['sequence_length']}"
            )

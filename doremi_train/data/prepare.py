"""Text to token shards: one ordered stream, tokenised on all cores, the same bytes whoever computes it.

    sources → `routing`: training or validation → `tokenising`: cut, batched, on all cores → `writing`: shards

The result stands in a folder named by the content address of the request, so a changed source or tokeniser is never
silently reused, and a killed preparation continues where the shards end.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from doremi_train.config import UserError, fingerprint, flatten
from doremi_train.data import tokenizer as tokenizers
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.routing import Router
from doremi_train.data.corpus.sidecar import domains as chosen_domains
from doremi_train.data.corpus.sidecar import identity
from doremi_train.data.corpus.sources import resolve, signature
from doremi_train.data.options import Options
from doremi_train.data.shards import CHECKSUMS, shards_of, token_dtype
from doremi_train.data.tokenising import Meter, Progress, tokenised, work
from doremi_train.data.writing import ShardWriter, write_manifest
from doremi_train.files import read_json, try_lock, write_bytes, write_json
from doremi_train.remote import Mirror

RECIPE = 1  # raise when the same request would give other tokens
READ_AHEAD = 4  # how many times the tokeniser's sample is read in search of domains, where the files do not name them

Request = dict[str, Any]


def silent(description: str, done: int, total: int | None) -> None:
    """Show no progress."""


def request(options: Options) -> Request:
    """What decides the tokens: files (by size and time of change), reading options, tokeniser. Reads no text."""
    return _request(options, resolve(options))


def address(wanted: Request) -> str:
    """Content address of a request: the name of the prepared folder."""
    return fingerprint(wanted)


def explain_change(old: Request, new: Request) -> str:
    """One line naming the files and options that differ; "" where none does."""
    old_files, new_files = old["sources"]["files"], new["sources"]["files"]
    groups = {
        "new files": sorted(new_files.keys() - old_files.keys()),
        "files gone": sorted(old_files.keys() - new_files.keys()),
        "changed files": sorted(f for f in old_files.keys() & new_files.keys() if old_files[f] != new_files[f]),
    }
    parts = [f"{what}: {_some(files)}" for what, files in groups.items() if files]
    before, after = flatten(_without_files(old)), flatten(_without_files(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            parts.append(f"{key}: {before.get(key)!r} → {after.get(key)!r}")
    return "; ".join(parts)


def prepare(options: Options, folder: Path, progress: Progress = silent, mirror: Mirror | None = None) -> Path:
    """The finished token store `folder`/<address> of these options: made, continued or found there, or in `mirror`,
    where it is then too.

    Raises UserError for wrong options, unreadable sources, a domain without training tokens or validation documents.
    """
    sources = resolve(options)
    wanted = _request(options, sources)
    target = folder / address(wanted)
    if not (target / "manifest.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{target.name}.lock", progress):
            found = (target / "manifest.json").exists()  # where the process we waited for has made it
            if not found and not (mirror and fetch(target, mirror)):
                _fill(target, options, sources, wanted, progress)
    _refuse_bad_lines(target, options)
    if mirror is not None:
        _publish(target, mirror, progress)
    return target


def fetch(target: Path, mirror: Mirror) -> bool:
    """Bring what opens the store `target` from its second home, if it is finished there; its shards come when they are
    needed. Returns whether there is such a store."""
    home = mirror.at(target.name)
    missing = [name for name in _OPENED if not (target / name).exists()]
    if missing and home.has("manifest.json"):
        for name in missing:
            home.pull(target, name)
    return (target / "manifest.json").exists()


_OPENED = (CHECKSUMS, "index.npy", "tokenizer.json", "manifest.json")  # the manifest last: it says that all is there


def _publish(target: Path, mirror: Mirror, progress: Progress) -> None:
    """Copy a finished store to its second home, unless it is there; goes on where an earlier copy stopped."""
    home = mirror.at(target.name)
    if home.has("manifest.json"):
        return
    shards = shards_of(read_json(target / "manifest.json"))
    checksums: dict[str, str] = {}
    there, done, total = home.sizes(), 0, sum(shards.values())
    for name, size in shards.items():
        progress("uploading", done, total)
        with _shard(target / name).open("rb") as file:
            checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if there.get(name) != size:
            home.push(target, [name])
        done += size
    write_json(target / CHECKSUMS, checksums)
    home.push(target, _OPENED)


def _shard(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"store: {path} is missing, and it is not in remote either; delete {path.parents[2]}, run again"
        )
    return path


def _request(options: Options, sources: list[Source]) -> Request:
    if options.tokenizer == "train":
        tokenizer: Request = {"vocabulary_size": options.vocabulary_size, "tokenizer_sample": options.tokenizer_sample}
    else:
        tokenizer = {"fingerprint": tokenizers.fingerprint(tokenizers.load(options.tokenizer))}
    selection = {"selection": identity(options, sources)} if options.selection is not None else {}
    return {
        **selection,
        "recipe": RECIPE,
        "sources": signature(options, sources),
        "tokenizer": {**tokenizer, "end_of_document": options.end_of_document},
        "validation_fraction": options.validation_fraction,
        "member_tokens": options.member_tokens,
        "members_per_shard": options.members_per_shard,
    }


def _without_files(wanted: Request) -> Request:
    return {**wanted, "sources": {key: value for key, value in wanted["sources"].items() if key != "files"}}


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
    """Only one process prepares an address; the others wait, and may be told to stop."""
    with path.open("w") as file:
        while not try_lock(file):
            progress("waiting for another process", 0, None)
            time.sleep(0.2)
        yield


def _refuse_bad_lines(target: Path, options: Options) -> None:
    """max_bad_lines is not part of the address, so a store made under a looser one may be found."""
    bad = orjson.loads((target / "manifest.json").read_bytes())["bad_lines"]
    if bad > options.max_bad_lines:
        raise UserError(
            f"data.max_bad_lines={options.max_bad_lines}: {target} was prepared with {bad} broken lines left out; "
            "mend the files, or raise data.max_bad_lines"
        )


# ── The stages of a preparation ──────────────────────────────────────────────────────────────────────────────────────


def _fill(target: Path, options: Options, sources: list[Source], wanted: Request, progress: Progress) -> None:
    target.mkdir(exist_ok=True)
    tokenizer = _tokenizer(target, options, sources, progress)
    end = tokenizers.end_of_document(tokenizer, options.end_of_document)
    size = tokenizers.vocabulary_size(tokenizer)
    writer = ShardWriter(target, token_dtype(size), options.member_tokens, options.members_per_shard)
    router, bad = Router(options, sources), BadLines(options)
    meter = Meter(sources, "tokenising", progress)
    skip = {stream: state.pieces for stream, state in writer.streams.items()}
    with closing(tokenised(tokenizer, work(router, bad, skip, meter), size, end)) as batches:
        for batch in batches:
            for piece, tokens in batch:
                writer.append(piece.stream, tokens, piece.last, piece.text_bytes)
            meter.show(batch[-1][0].done)
    writer.finish()
    chosen = chosen_domains(options)
    now = request(options)
    if now != wanted:
        shutil.rmtree(target)  # nobody will ask for this address again
        raise UserError(f"data: changed while it was read ({explain_change(wanted, now)}); run again")
    try:
        _check(writer, [source for source in sources if chosen is None or source.domain in (None, *chosen)])
    except UserError:
        shutil.rmtree(target)  # the remedies lead to other addresses
        raise
    write_manifest(writer, tokenizer, end, bad.count, router.dropped, wanted)


def _check(writer: ShardWriter, sources: list[Source]) -> None:
    """Raises UserError for domains that cannot be trained on or evaluated."""
    streams = writer.streams
    domains = {source.domain for source in sources if source.domain is not None} | {domain for _, domain in streams}
    if not domains:
        raise UserError("data: no document in the given files; give files that hold text")
    empty = sorted(domain for domain in domains if ("train", domain) not in streams)
    if empty:
        raise UserError(
            f"data: no training document in domain {_some(empty)}: its files hold no text, or all of it went to "
            "validation (data.validation_fraction) or is also a validation document; add text or remove the domain"
        )
    unseen = sorted(d for d in domains if ("validation", d) not in streams or not streams["validation", d].documents)
    if unseen:
        raise UserError(
            f"data: no validation document in domain {_some(unseen)}: documents are split by hash, and it has too few "
            "of them; give validation files, or raise data.validation_fraction"
        )


def _tokenizer(target: Path, options: Options, sources: list[Source], progress: Progress) -> Tokenizer:
    """The store's tokeniser: given, or learned once; its file also serves a continued preparation."""
    file = target / "tokenizer.json"
    if file.exists():
        return tokenizers.parse(file.read_text(encoding="utf-8"))
    if options.tokenizer == "train":
        texts = _sample(options, sources, Meter(sources, "learning the tokeniser", progress))
        tokenizer = tokenizers.learn(texts, options.vocabulary_size)
    else:
        tokenizer = tokenizers.load(options.tokenizer)
    write_bytes(file, tokenizers.serialise(tokenizer).encode())
    return tokenizer


def _sample(options: Options, sources: list[Source], meter: Meter) -> list[str]:
    """The first training documents of each domain, up to an even share of data.tokenizer_sample characters.

    Where the files do not name the domains, a share shrinks whenever a new domain is met, and at most READ_AHEAD times
    the sample is read.
    """
    shares = {source.domain: _Share() for source in sources if source.domain is not None}
    named, seen = bool(shares), 0
    for domain, text in _sample_texts(options, sources, shares, meter):
        share = shares.setdefault(domain, _Share())
        share.add(text, _even(options, shares))
        seen += len(text)
        if not named and seen >= READ_AHEAD * options.tokenizer_sample:
            break
    for share in shares.values():
        share.keep(_even(options, shares))
    return [text for domain in sorted(shares) for text in shares[domain].texts]


def _sample_texts(
    options: Options, sources: list[Source], shares: dict[str, "_Share"], meter: Meter
) -> Iterator[tuple[str, str]]:
    """(domain, text) of training pieces, passing over the rest of a named domain once its share is full."""
    router, bad = Router(options, sources), BadLines(options)
    for source in router.order:
        named = shares.get(source.domain) if source.domain is not None and source.split != "validation" else None
        if named is not None and named.characters >= _even(options, shares):
            continue
        for split, piece in router.pieces(source, bad):
            if piece.text is None:
                raise UserError(
                    f"data.tokenizer='train': {source.url} is already tokenised; give the tokeniser it was made with"
                )
            meter.show(meter.read(source, len(piece.text)))
            if split == "train":
                yield piece.domain, piece.text
            if named is not None and named.characters >= _even(options, shares):
                break


def _even(options: Options, shares: dict[str, "_Share"]) -> int:
    return max(options.tokenizer_sample // len(shares), 1)


class _Share:
    """Text of one domain for the tokeniser."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.characters = 0

    def add(self, text: str, most: int) -> None:
        """Append as much of the text as fits `most` characters."""
        part = text[: max(most - self.characters, 0)]
        if part:
            self.texts.append(part)
            self.characters += len(part)

    def keep(self, most: int) -> None:
        """Keep the first `most` characters."""
        texts, self.texts, self.characters = self.texts, [], 0
        for text in texts:
            self.add(text, most)

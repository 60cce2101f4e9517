"""Text to token shards: one ordered stream, tokenised on all cores, the same bytes whoever computes
it.

    sources → `corpus.routing`: training or validation
            → `encoding`: cut, batched, on all cores
            → `writing`: shards

The result stands in a folder named by the content address of the request, so a changed source or
tokeniser is never silently reused, and a killed preparation continues where the shards end.
"""

import shutil
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from doremi_train.config import UserError, fingerprint, flatten
from doremi_train.console import say
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.routing import Router
from doremi_train.data.corpus.sidecar import domains as chosen_domains
from doremi_train.data.corpus.sidecar import identity, relabels
from doremi_train.data.corpus.sources import RULE, passed_over, resolve, signature
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import pouring, sample, second_home
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.encoding import Meter, Progress, tokenised, work
from doremi_train.data.tokens.shards import (
    SPLITS,
    read_manifest,
    taken,
    token_dtype,
    unwritable_share,
)
from doremi_train.data.tokens.writing import (
    ShardWriter,
    StreamState,
    Written,
    tidy,
    write_manifest,
)
from doremi_train.files import clear_partial, locked
from doremi_train.storage.mirror import Mirror
from doremi_train.storage.runs import set_status

RECIPE = 1  # raise when the same request would give other tokens

Request = dict[str, Any]


def silent(description: str, done: int, total: int | None) -> None:
    """Show no progress."""


def request(options: DataOptions) -> Request:
    """What decides the tokens: files (by size and time of change), reading options, tokeniser.
    Reads no text."""
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
        "changed files": sorted(
            f for f in old_files.keys() & new_files.keys() if old_files[f] != new_files[f]
        ),
    }
    parts = [f"{what}: {_some(files)}" for what, files in groups.items() if files]
    before, after = flatten(_without_files(old)), flatten(_without_files(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            parts.append(f"{key}: {before.get(key)!r} → {after.get(key)!r}")
    return "; ".join(parts)


def prepare(
    options: DataOptions, folder: Path, progress: Progress = silent, mirror: Mirror | None = None
) -> Path:
    """The finished token store `folder`/<address> of these options: made, continued or found there,
    or in `mirror`, where it is then too.

    Raises UserError for wrong options, unreadable sources, a domain without training tokens or
    validation documents, or with much text that the tokeniser cannot write.
    """
    sources = resolve(options)
    wanted = _request(options, sources)
    target = folder / address(wanted)
    if not _settled(target, mirror):
        folder.mkdir(parents=True, exist_ok=True)
        waiting = partial(progress, "waiting for another process", 0, None)
        with locked(folder / f"{target.name}.lock", waiting):
            clear_partial(target)
            # Where the process we waited for has made it.
            finished = (target / "manifest.json").exists()
            if not finished and not (mirror and second_home.fetch(target, mirror)):
                _fill(target, options, sources, wanted, progress)
            tidy(target)
            _refuse(target, options)
            if mirror is not None:
                second_home.publish(target, mirror, progress)
            set_status(target, "finished")
    _refuse(target, options)
    return target


def _settled(target: Path, mirror: Mirror | None) -> bool:
    """Whether nothing is left to write, here and in `mirror`."""
    published = mirror is None or mirror.at(target.name).has("manifest.json")
    return published and all((target / name).exists() for name in ("manifest.json", "status.json"))


def _request(options: DataOptions, sources: list[Source]) -> Request:
    end = options.end_of_document
    if options.tokenizer == "train":
        tokenizer: Request = {
            "vocabulary_size": options.vocabulary_size,
            "tokenizer_sample": options.tokenizer_sample,
        }
    else:
        given = tokenizers.load(options.tokenizer)
        tokenizer = {"fingerprint": tokenizers.fingerprint(given)}
        found = given.id_to_token(_end(options, given))
        # The end that needs no name is the first usual one.
        end = None if end is None and found == tokenizers.first_usual_end(given) else found
    selection = {"selection": identity(options, sources)} if options.selection is not None else {}
    return {
        **selection,
        **_poured(options),
        "recipe": RECIPE,
        "sources": signature(options, sources),
        "tokenizer": {**tokenizer, "end_of_document": end},
        "validation_fraction": options.validation_fraction,
        "member_tokens": options.member_tokens,
        "members_per_shard": options.members_per_shard,
    }


def _poured(options: DataOptions) -> Request:
    if options.rare_into is None:
        return {}
    if not options.least_tokens:
        raise UserError(
            f"data.rare_into={options.rare_into}: takes domains of fewer training tokens than "
            "data.least_tokens, which is 0; raise it, as to data.least_tokens=100000"
        )
    return {"poured": {"into": options.rare_into, "least_tokens": options.least_tokens}}


def _end(options: DataOptions, tokenizer: Tokenizer) -> int:
    said = tokenizers.said_end(options.tokenizer) if options.tokenizer != "train" else None
    return tokenizers.end_of_document(tokenizer, options.end_of_document, said)


def _without_files(wanted: Request) -> Request:
    return {
        **wanted,
        "sources": {key: value for key, value in wanted["sources"].items() if key != "files"},
    }


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse(target: Path, options: DataOptions) -> None:
    """Raise UserError for a finished store that these options do not take: what they refuse is no
    part of its address, so it may have been made under looser ones."""
    _refuse_bad_lines(target, options)
    _require_both_splits(_sizes_of(target), options)
    _refuse_unwritable(target, options)


def _refuse_bad_lines(target: Path, options: DataOptions) -> None:
    bad = read_manifest(target)["bad_lines"]
    if bad > options.max_bad_lines:
        raise UserError(
            f"data.max_bad_lines={options.max_bad_lines}: {target} was prepared with {bad} broken "
            "lines left out; mend the files, or raise data.max_bad_lines"
        )


def _refuse_unwritable(target: Path, options: DataOptions) -> None:
    most = options.max_unwritable
    if most is None:
        return
    domains = unwritable_share(read_manifest(target))
    above = [
        f"{domain} ({share:.1%})"
        for domain, share in domains.items()
        if share > most and (options.only is None or domain in options.only)
    ]
    if above:
        raise UserError(
            f"data.max_unwritable={most}: the tokeniser cannot write so much of the text of domain "
            f"{_some(above)}: it becomes unknown tokens, or is dropped; "
            f"{tokenizers.WRITES_ALL} (data.tokenizer), leave the domain out, or raise "
            "data.max_unwritable (null: never refused)"
        )


# ── The stages of a preparation ───────────────────────────────────────────────────


def _fill(
    target: Path, options: DataOptions, sources: list[Source], wanted: Request, progress: Progress
) -> None:
    target.mkdir(exist_ok=True)
    passed_over(options).say(RULE)
    tokenizer = sample.sampled_tokenizer(target, options, sources, progress)
    end = _end(options, tokenizer)
    size = tokenizers.vocabulary_size(tokenizer)
    writer = ShardWriter(
        target, token_dtype(size), options.member_tokens, options.members_per_shard
    )
    router, bad = Router(options, sources), BadLines(options)
    meter = Meter(sources, "tokenising", progress)
    skip = {stream: state.pieces for stream, state in writer.streams.items()}
    with closing(tokenised(tokenizer, work(router, bad, skip, meter), size, end)) as batches:
        for batch in batches:
            for piece, (tokens, lost) in batch:
                writer.append(piece.stream, tokens, piece.last, piece.text_bytes, lost)
            meter.show(batch[-1][0].done)
    writer.finish()
    now = request(options)
    if now != wanted:
        shutil.rmtree(target)  # nobody will ask for this address again
        raise UserError(
            f"data: changed while it was read ({explain_change(wanted, now)}); run again"
        )
    written = writer.written()
    if options.rare_into is not None:
        written = pouring.poured(writer, options.least_tokens, options.rare_into)
    try:
        _require_both_splits(_sizes(written, options, sources), options, bad)
    except UserError:
        shutil.rmtree(target)  # the remedies lead to other addresses
        raise
    bad.passed_over.say("documents of a tar are KEY.txt or KEY.json")
    if bad.count:
        say(f"data: {_skipped(bad)}")
    write_manifest(written, tokenizer, end, bad.count, router.dropped, wanted)


def _skipped(bad: BadLines) -> str:
    return f"{bad.count} broken lines and records without text are left out, the first: {bad.first}"


Sizes = Mapping[str, Mapping[str, tuple[int, int]]]  # {domain: {split: (tokens, documents)}}


def _sizes(written: Written, options: DataOptions, sources: list[Source]) -> Sizes:
    """What was written, of the domains that files name too, unless they may be poured, or named
    anew."""
    chosen, streams = chosen_domains(options), written.streams
    named = {source.domain for source in sources if source.domain is not None}
    if chosen is not None:
        named &= chosen
    if options.rare_into is not None or relabels(options):
        named = set()
    states = {
        domain: {split: streams.get((split, domain), StreamState()) for split in SPLITS}
        for domain in named | {domain for _, domain in streams}
    }
    return {
        domain: {split: (state.tokens, state.documents) for split, state in of.items()}
        for domain, of in states.items()
    }


def _sizes_of(target: Path) -> Sizes:
    domains = read_manifest(target)["domains"]
    return {
        domain: {split: (of[split]["tokens"], of[split]["documents"]) for split in SPLITS}
        for domain, of in domains.items()
    }


def _require_both_splits(sizes: Sizes, options: DataOptions, bad: BadLines | None = None) -> None:
    """Raise UserError for domains that take part and cannot be trained on or evaluated. `bad` are
    the lines that were left out while they were read."""
    skipped = f" ({_skipped(bad)})" if bad is not None and bad.count else ""
    if not sizes:
        raise UserError(f"data: no document in the given files{skipped}; give files that hold text")
    tokens = {domain: of["train"][0] for domain, of in sizes.items()}
    only = None if options.only is None else [name for name in options.only if name in sizes]
    domains = taken(tokens, only, options.least_tokens)
    if options.only is None and not domains:
        raise UserError(
            f"data.least_tokens={options.least_tokens}: no domain has so many training tokens, the "
            f"largest {max(tokens.values())}; lower it"
        )
    leave_out = (
        "or leave out what is rare, with data.least_tokens=1000 (and data.rare_into=other, to pour "
        "it together) or data.only=[…] of the others"
    )
    empty = [domain for domain in domains if not sizes[domain]["train"][0]]
    if empty:
        raise UserError(
            f"data: no training document in domain {_some(empty)}: its files hold no text, or all "
            "of it went to validation (data.validation_fraction) or is also a validation "
            f"document{skipped}; add text or remove the domain, {leave_out}"
        )
    unseen = [domain for domain in domains if not sizes[domain]["validation"][1]]
    if unseen:
        given = "" if options.files is not None else "give validation files, or "
        raise UserError(
            f"data: no validation document in domain {_some(unseen)}: documents are split by hash, "
            f"and it has too few of them; {given}raise data.validation_fraction, {leave_out}"
        )

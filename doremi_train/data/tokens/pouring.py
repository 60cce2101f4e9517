"""Pouring rare domains into one, after all are written: how large a domain is, is known only then.

What is left of a domain's text where it fills no sequence is lost, and a long tail is nothing but
such rests: so the text itself is joined, and not the domains' shards.
"""

import shutil
from typing import Any

from doremi_train.data.tokens.shards import SPLITS, Stream
from doremi_train.data.tokens.writing import ShardWriter, StreamState, Written
from doremi_train.files import aside_of, sync_folder


def rare(written: Written, least: int) -> list[str]:
    """The domains with fewer training tokens than `least`."""
    domains = sorted({domain for _, domain in written.streams})
    nothing = StreamState()
    return [
        name for name in domains if written.streams.get(("train", name), nothing).tokens < least
    ]


def poured(writer: ShardWriter, least: int, into: str) -> Written:
    """What a finished writer wrote, with its domains of fewer than `least` training tokens, and
    `into` itself, as the one domain `into`. Killed at any time, the same again gives the same
    bytes."""
    whole = writer.written()
    domains = {domain for _, domain in whole.streams}
    gone = sorted({*rare(whole, least), *({into} & domains)})
    if gone in ([], [into]):
        return whole
    new = _joined(writer, whole, gone, into)
    kept = {stream for stream in whole.streams if stream[1] not in gone}
    return whole._replace(
        streams={stream: whole.streams[stream] for stream in kept} | new.streams,
        records={stream: whole.records[stream] for stream in kept} | new.records,
        folders={stream: whole.folders[stream] for stream in kept} | new.folders,
        poured={into: [name for name in gone if name != into]},
    )


def _joined(writer: ShardWriter, whole: Written, domains: list[str], into: str) -> Written:
    aside = aside_of(writer.folder / "poured")
    joined = ShardWriter(aside, writer.dtype.type, writer.member_tokens, writer.members_per_shard)
    try:
        for split in SPLITS:
            for domain in domains:
                for record in whole.records.get((split, domain), ()):
                    _append(joined, (split, into), writer, record)
        joined.finish()
        new = joined.written()
        for stream, folder in new.folders.items():
            # Not where a domain of this name may stand: until the end the sources stay.
            new.folders[stream] = f"{folder}+poured"
            target = writer.folder / new.folders[stream]
            if target.exists():  # by a start that was killed
                shutil.rmtree(target)
            target.parent.mkdir(exist_ok=True)
            (aside / folder).rename(target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return new


def _append(
    joined: ShardWriter, stream: Stream, writer: ShardWriter, record: dict[str, Any]
) -> None:
    """Append one member, document by document."""
    tokens, ends = writer.read(record)
    text, lost = record["bytes"], record.get("lost", 0)
    begin = 0
    for end in (*ends.tolist(), len(tokens)):
        if end > begin:
            joined.append(stream, tokens[begin:end], end in ends, text, lost)
            text, lost = None if text is None else 0, 0
        begin = end

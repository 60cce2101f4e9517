"""How fast text becomes token shards: `stage=prepare` over what the tokenizers library reaches by
itself on the same cores and the same documents, already read and in memory; and what memory that
takes as the text grows.

Every side runs in a process of its own. The text is that of `--root`, or else the demonstration's,
repeated until it is large enough.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import prepare, tokenizer

VOCABULARY = 8192
SAMPLE = 4_000_000  # characters the tokeniser learns from
TOGETHER = 1 << 22  # bytes of text the library gets at a time


class Took(NamedTuple):
    seconds: float
    cpu: float  # seconds, of all cores together: what others on the machine leave alone
    peak: float  # of this process's memory, MB


def took(work: Callable[[], object]) -> Took:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()
    return Took(seconds, cpu, int(status.partition("VmHWM:")[2].split()[0]) / 1000)


def ours(options: DataOptions, folder: Path) -> Took:
    return took(lambda: prepare.prepare(options, folder))


def alone(options: DataOptions, method: str) -> Took:
    """A method of the library on all documents, which are in memory before."""
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts(options):
        batches[-1].append(text)
        size += len(text.encode())
        if size > TOGETHER:
            batches.append([])
            size = 0
    encode = getattr(tokenizer.load(options.tokenizer), method)

    def whole() -> None:
        for batch in batches:
            encode(batch, add_special_tokens=False)

    return took(whole)


def texts(options: DataOptions) -> Iterator[str]:
    for source in sources.resolve(options):
        for piece in reading.read(source, options, opening.BadLines(options)):
            yield piece.text or ""


def corpus(root: Path | None, size: int, folder: Path) -> DataOptions:
    """Files of about `size` bytes of text: as much of every domain as it takes, under more names
    where it has less."""
    given = DataOptions(root=str(root)) if root is not None else DataOptions()
    resolved = sources.resolve(given)
    share, written = size // len({source.domain for source in resolved}), 0
    for source in resolved:
        path = folder / str(source.domain) / f"{source.split or 'train'}-00000.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for piece in reading.read(source, given, opening.BadLines(given)):
                written += file.write(
                    json.dumps({"text": piece.text}, ensure_ascii=False).encode() + b"\n"
                )
                if file.tell() > share:
                    break
    for turn in range(1, round(size / written)):
        for path in folder.glob("*/train-00000.jsonl"):
            shutil.copyfile(path, path.with_name(f"train-{turn:05d}.jsonl"))
    learned = folder / "tokenizer.json"
    whole = DataOptions(root=str(folder), tokenizer=str(learned))
    parts = [text for n, text in enumerate(texts(whole)) if n % max(written // SAMPLE, 1) == 0]
    learned.write_text(tokenizer.serialise(tokenizer.learn(parts, VOCABULARY)))
    return whole


def measure(given: argparse.Namespace) -> common.Result:
    megabytes = given.megabytes or (8 if given.quick else 300)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        options = corpus(given.root, int(megabytes * 1e6), folder / "large")
        size = sum(len(text.encode()) for text in texts(options))
        quarter = corpus(given.root, int(megabytes * 1e6 / 4), folder / "small")
        costs: dict[str, list[Took]] = {"prepare": [], "encode_batch": [], "encode_batch_fast": []}

        def turn(side: str) -> float:
            if side == "prepare":
                costs[side].append(common.fresh(ours, options, folder / "store"))
                shutil.rmtree(folder / "store")
            else:
                costs[side].append(common.fresh(alone, options, side))
            return costs[side][-1].seconds

        sides = {side: partial(turn, side) for side in costs}
        times = common.alternate(sides, given.rounds or (2 if given.quick else 5), warm_up=0)
        smaller = common.fresh(ours, quarter, folder / "store").peak
    medians = {
        side: Took(*map(statistics.median, zip(*turns, strict=True)))
        for side, turns in costs.items()
    }
    figures: dict[str, Any] = {
        "text_mb": size / 1e6,
        "mb_per_second": {side: size / 1e6 / middle.seconds for side, middle in medians.items()},
        "cpu_seconds": {side: middle.cpu for side, middle in medians.items()},
        "peak_memory_mb": {"all of the text": medians["prepare"].peak, "a quarter of it": smaller},
    }
    for key in ("mb_per_second", "cpu_seconds", "peak_memory_mb"):
        common.table(f"{size / 1e6:.0f} MB of text", ("", key), list(figures[key].items()))
    return common.Result(
        {
            "of_tokenizers_alone": common.ratio(times["encode_batch"], times["prepare"]),
            "of_tokenizers_fast_alone": common.ratio(times["encode_batch_fast"], times["prepare"]),
        },
        figures,
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="text: a folder of domains, as data.root")
    parser.add_argument("--megabytes", type=float, help="of text; default: 300")
    parser.add_argument("--rounds", type=int, help="turns of every side")


if __name__ == "__main__":
    common.main("prepare", __doc__, measure, options)

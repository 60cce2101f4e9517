"""How fast documents are scored: `selection=ngram` over the package data-selection on the same
text, one core each; its kernel on text in memory; the whole of it, from jsonl.zst to a file of
scores, over reading these files alone; and with `--ray` what a task costs on a Ray cluster beyond
its work, over a pool of processes.

Seconds are the processor's, so that others on the machine matter less. The text is that of
`--root`, or else the demonstration's, repeated until it is large enough.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.prepare import corpus, texts
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions
from doremi_train.selection.documents import engines, kernels, parts, tasks
from doremi_train.selection.documents.scorers import halves
from doremi_train.selection.options import SelectionOptions

TARGET = 20  # documents of the first domain
SHARD = 64.0  # MB of text of a usual file, the work of a task
# At once, and tasks that are done already, to see what a task costs beyond its work.
WORKERS, NOTHINGS = (
    2,
    400,
)


def work(data: DataOptions, folder: Path) -> list[tasks.Task]:
    """A task for every file; what they write goes into the folder."""
    numbered = enumerate(sources.resolve(data))
    return [
        tasks.Task(folder, number, source, data, SelectionOptions(method="ngram"))
        for number, source in numbered
    ]


def estimated(all_: list[tasks.Task], target: list[bytes]) -> None:
    """Count the corpus and fit the weights, one column for the target and one for its half, as a
    selection does."""
    for task in all_:
        tasks.count(task)
    columns = {"target": target, "target/half": halves(target)[0]}
    model = tasks.fit(all_[0].options, columns, tasks.summed(all_), {"targets": target})
    tasks.write_arrays(all_[0].folder / "model.npz", model)


def scored(all_: list[tasks.Task]) -> None:
    for task in all_:
        tasks.score(task)


def handled(done: tasks.Task, rounds: int) -> dict[str, list[float]]:
    """Seconds of a worker that a task takes whose work is done already, by engine, in every
    round."""

    def turn(engine: engines.Engine) -> None:
        engine.run(tasks.score, [done] * NOTHINGS, lambda _: None)

    with engines.Processes(WORKERS) as pool, engines.Ray(WORKERS) as ray:
        times = common.alternate(
            {"processes": partial(turn, pool), "ray": partial(turn, ray)}, rounds
        )
    return {
        name: [seconds * WORKERS / NOTHINGS for seconds in took] for name, took in times.items()
    }


class Peer:
    """The package, in a process of its own that answers with seconds."""

    def __init__(self, python: str, folder: Path) -> None:
        script = Path(__file__).parent / "peers" / "ngram.py"
        self._process = subprocess.Popen(
            [python, str(script)], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(folder / "peer.log").open("w"), text=True,
        )  # fmt: skip

    def turn(self) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def laid_out(given: DataOptions, megabytes: float, folder: Path) -> list[str]:
    """Documents of about `megabytes` of the text, written as one jsonl.zst of a domain, in both
    splits."""
    documents, size = [], 0
    for text in texts(given):
        documents.append(text)
        size += len(text.encode())
        if size > megabytes * 1e6:
            break
    content = "".join(
        json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents
    ).encode()
    (folder / "d").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / "d" / f"{split}.jsonl.zst").write_bytes(
            zstandard.ZstdCompressor(3).compress(content)
        )
    return documents


def in_memory(documents: list[str], table: NDArray) -> Callable[[], object]:
    """Split into words and score, in the batches in which files are read."""
    batches, waiting, size = [], list[bytes](), 0
    for text in documents:
        waiting.append(text.encode())
        size += len(waiting[-1])
        if size > parts.BATCH or text is documents[-1]:
            batches.append(kernels.joined(waiting))
            waiting, size = [], 0

    def turn() -> None:
        for text, offsets in batches:
            tokens = kernels.split(text, offsets)
            kernels.score(
                tokens.hashes, tokens.first, table, np.zeros((len(offsets) - 1, table.shape[1]))
            )

    return turn


def measure(given: argparse.Namespace) -> common.Result:
    megabytes = given.megabytes or (8 if given.quick else 60)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        corpus_ = corpus(given.root, int(megabytes * 1e6), folder / "corpus")
        documents = laid_out(corpus_, megabytes, folder / "large")
        few = laid_out(corpus_, 1 if given.quick else 4, folder / "small")
        target = [text.encode() for text in few[:TARGET]]
        large, small = (
            work(DataOptions(embedded=None, root=str(folder / name)), folder / name / "scores")[:1]
            for name in ("large", "small")
        )
        estimated(large, target)

        def whole(all_: list[tasks.Task], fit: bool) -> Callable[[], float]:
            def turn() -> float:
                for path in (all_[0].scores, *([all_[0].counts] if fit else [])):
                    path.unlink(missing_ok=True)
                tasks.load_model.cache_clear()
                tasks.known.cache_clear()
                began = time.process_time()
                if fit:
                    estimated(all_, target)
                scored(all_)
                return time.process_time() - began

            return turn

        def read() -> None:
            for _ in reading.read(large[0].source, large[0].data, opening.BadLines(large[0].data)):
                pass

        sides: dict[str, Callable[[], object]] = {
            "kernel": in_memory(documents, tasks.load_model(large[0].folder)["table"]),
            "end_to_end": whole(large, fit=False),
            "with_fit": whole(large, fit=True),
            "reading": read,
        }
        if given.peer:
            for path, lines in (("target.jsonl", few[:TARGET]), ("raw.jsonl", few)):
                texts_ = "".join(json.dumps({"text": text}) + "\n" for text in lines)
                (folder / "small" / path).write_text(texts_)
            peer = stack.enter_context(contextlib.closing(Peer(given.peer, folder / "small")))
            sides |= {"ours_on_less": whole(small, fit=True), "data_selection": peer.turn}
        else:
            print(
                "data-selection is not measured: --peer names the interpreter of an environment "
                "that has it"
            )
        rounds = given.rounds or (3 if given.quick else 9)
        times = common.alternate(sides, rounds, clock=time.process_time)
        beyond = handled(large[0], rounds) if given.ray else {}
    size, less = (sum(len(text.encode()) for text in side) / 1e6 for side in (documents, few))
    speed = {
        f"{side}_mb_per_s_core": (less if side in ("ours_on_less", "data_selection") else size)
        / statistics.median(took)
        for side, took in times.items()
    }
    common.table(
        f"{size:.0f} MB of text, {less:.0f} beside the package",
        ("", "MB/s and core"),
        list(speed.items()),
    )
    ratios = {"of_reading": common.ratio(times["reading"], times["end_to_end"])}
    if given.peer:
        ratios["over_data_selection"] = common.ratio(times["data_selection"], times["ours_on_less"])
    figures = {"text_mb": size, **speed}
    if beyond:
        figures |= {
            f"{engine}_ms_per_task": 1e3 * statistics.median(took)
            for engine, took in beyond.items()
        }
        bare = SHARD / speed["end_to_end_mb_per_s_core"]
        ray, processes = (
            [bare + seconds for seconds in beyond[engine]] for engine in ("ray", "processes")
        )
        ratios["ray_over_processes"] = common.ratio(ray, processes)
        common.table(
            f"beyond the work of a task, of {bare:.2f} s for {SHARD:.0f} MB",
            ("", "ms"),
            [(engine, figures[f"{engine}_ms_per_task"]) for engine in beyond],
        )
    return common.Result(ratios, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="text: a folder of domains, as data.root")
    parser.add_argument("--megabytes", type=float, help="of text; default: 60")
    parser.add_argument("--rounds", type=int, help="turns of every side")
    parser.add_argument(
        "--ray", action="store_true", help="also what a task costs on Ray (extra ray)"
    )
    parser.add_argument(
        "--peer", metavar="PYTHON", help="interpreter of an environment with data-selection 1.0.3"
    )


if __name__ == "__main__":
    common.main("ngram", __doc__, measure, options)

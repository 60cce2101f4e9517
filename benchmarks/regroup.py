"""How fast documents get domains: from jsonl.zst to a file of each document's cluster, over reading
these files alone, and the passes that draw the sample; with `--encoder` a sentence encoder on as
the same text, of which it gets a little; and how long one start of k-means takes on `--sample`
vectors, which has one thread.

Seconds are the processor's, so that others on the machine matter less. The text is that of
`--root`, or else the demonstration's, repeated until it is large enough.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.ngram import laid_out
from benchmarks.prepare import corpus
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions
from doremi_train.methods import clusters
from doremi_train.selection.documents.baselines import Embedding
from doremi_train.selection.options import SelectionOptions
from doremi_train.selection.regroup import assigning, fit, sampling
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.selection.regroup.task import Task

ENCODED = 64  # documents that the encoder is timed on


def found(task: Task) -> None:
    """Sample, fine clusters and model, as a command makes them."""
    sampling.draw(sampling.Drawing(task, 0))
    sampling.write_draws(task.folder, sampling.drawn([task]))
    sampling.gather(sampling.Drawing(task, 0))
    starts = fit.begun(task.folder, [task], task.options)
    for start in starts:
        fit.start(start)
    fit.finished(task.folder, starts, [], task.options)


def again(path: Path, work: Callable[[], None]) -> Callable[[], float]:
    """Processor seconds of work whose output is removed before."""

    def turn() -> float:
        path.unlink(missing_ok=True)
        began = time.process_time()
        work()
        return time.process_time() - began

    return turn


def fitting(sample: int, options: RegroupOptions, folder: Path) -> float:
    """Seconds of one start on vectors around as many random centres as there are clusters, that
    have a few like them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((options.fine, options.dimensions)).astype(np.float32)
    vectors = np.empty((sample, options.dimensions), np.int16)
    for first in range(0, sample, 2**14):
        rows = vectors[first : first + 2**14]
        noise = random.standard_normal(rows.shape).astype(np.float32)
        rows[:] = clusters.quantized(centres[random.integers(0, options.fine, len(rows))] + noise)
    np.save(folder / "vectors-0.npy", vectors)
    del vectors
    began = time.process_time()
    fit.start(fit.Start(folder, 0, 0, options))
    return time.process_time() - began


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    megabytes = given.megabytes or (8 if given.quick else 60)
    sample = given.sample or (5000 if given.quick else 100_000)
    fine = given.fine or (50 if given.quick else 256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = laid_out(
            corpus(given.root, int(megabytes * 1e6), folder / "corpus"), megabytes, folder / "large"
        )
        data = DataOptions(embedded=None, root=str(folder / "large"))
        options = RegroupOptions(fine=fine, starts=1)
        task = Task(folder / "home", 0, sources.resolve(data)[0], data, options)
        found(task)

        def read() -> None:
            for _ in reading.read(task.source, data, opening.BadLines(data)):
                pass

        sides: dict[str, Callable[[], object]] = {
            "assigning": again(task.parts, lambda: assigning.assign(task)),
            "drawing": again(task.draws, lambda: sampling.draw(sampling.Drawing(task, 0))),
            "reading": read,
        }
        size = sum(len(text.encode()) for text in documents) / 1e6
        sizes = dict.fromkeys(sides, size)
        if given.encoder:
            settings = SelectionOptions(method="embedding", encoder=given.encoder)
            few = [text.encode() for text in documents[:ENCODED]]
            sizes["encoder"] = sum(map(len, few)) / 1e6
            sides["encoder"] = lambda: Embedding(settings).fit({"all": few}, {})
        rounds = given.rounds or (3 if given.quick else 9)
        times = common.alternate(sides, rounds, clock=time.process_time)
        seconds = fitting(sample, options, folder)
    speed = {
        f"{side}_mb_per_s_core": sizes[side] / statistics.median(took)
        for side, took in times.items()
    }
    common.table(
        f"{size:.0f} MB of text, {len(documents)} documents, {fine} fine clusters",
        ("", "MB/s and core"),
        list(speed.items()),
    )
    common.table(f"one start on {sample} vectors", ("", "s"), [("k-means", seconds)])
    ratios = {"of_reading": common.ratio(times["reading"], times["assigning"])}
    if given.encoder:
        each = [took * size / sizes["encoder"] for took in times["encoder"]]
        ratios["over_encoder"] = common.ratio(each, times["assigning"])
    return common.Result(
        ratios, {"text_mb": size, "documents": len(documents), "start_s": seconds, **speed}
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="text: a folder of domains, as data.root")
    parser.add_argument("--megabytes", type=float, help="of text; default: 60")
    parser.add_argument("--rounds", type=int, help="turns of every side")
    parser.add_argument("--sample", type=int, help="vectors of k-means; default: 100000")
    parser.add_argument("--fine", type=int, help="fine clusters; default: 256")
    parser.add_argument("--encoder", help="local transformers folder of a sentence encoder")


if __name__ == "__main__":
    common.main("regroup", __doc__, measure, options)

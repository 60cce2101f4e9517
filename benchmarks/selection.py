"""What a choice of documents is worth: the same tiny model trained for equally many steps on a
tenth of a pool, chosen by every method for a few documents of one domain, and on all of it; the
loss of that domain, and of the others.

The pool holds little of the target's domain, so that a tenth of it has to be found elsewhere. One
tokeniser, and one validation set, for all.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.growth import drawn, plain_session
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.evaluation.statistics import student_t
from doremi_train.methods import cross_entropy
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import place
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.reports import charts
from doremi_train.stages import prepare
from doremi_train.stages.vocabulary import run as made_vocabulary
from doremi_train.storage.runs import Run
from doremi_train.training.task import Position, Task, TrainingOptions
from doremi_train.training.trainer import Trainer

LENGTH, BATCH, VOCABULARY = 64, 16, 1024
SERVED = 10  # documents that stand for the target
LITTLE = 0.2  # of the target's domain, in proportion to the others, is in the pool
EVALUATIONS = 3  # of a run


def texts(root: Path, domain: str, split: str, characters: float) -> Iterator[str]:
    where = DataOptions(embedded=None, root=str(root))
    for source in sources.resolve(where):
        if (source.domain, source.split) == (domain, split):
            for piece in reading.read(source, where, opening.BadLines(where)):
                yield piece.text or ""
                characters -= len(piece.text or "")
                if characters < 0:
                    return


def lines(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def laid_out(root: Path, target: str, characters: int, folder: Path) -> dict[str, Path]:
    """The pool as one domain, the evaluated text as one of each, and the documents that stand for
    the target."""
    domains = sorted(path.name for path in root.iterdir() if path.is_dir())
    pool: list[str] = []
    for domain in domains:
        documents = list(
            texts(root, domain, "train", characters * (LITTLE if domain == target else 1))
        )
        if domain == target:
            after = list(texts(root, domain, "train", np.inf))[len(documents) :]
            lines(folder / "target.jsonl", after[:SERVED])
        pool += documents
        # As a domain has to have some.
        lines(folder / "evaluated" / domain / "train.jsonl", documents[:5])
        lines(
            folder / "evaluated" / domain / "validation.jsonl",
            list(texts(root, domain, "validation", characters / 5)),
        )
    order = np.random.default_rng(0).permutation(len(pool))
    lines(folder / "raw" / "pool" / "train.jsonl", [pool[n] for n in order])
    lines(folder / "raw" / "pool" / "validation.jsonl", pool[:20])
    return {name: folder / name for name in ("raw", "evaluated", "target.jsonl")}


def stores(
    at: dict[str, Path], folder: Path, encoder: str | None
) -> tuple[dict[str, TokenStore], TokenStore]:
    """The training data of every method, and what all are evaluated on."""
    tokenizer = folder / "all" / "prepare" / "tokenizer.json"
    served = [
        f"selection.targets={{t: [{at['target.jsonl']}]}}",
        "selection.workers=1",
        f"store={folder / 'store'}",
    ]
    pool, words = f"data.root={at['raw']}", f"data.tokenizer={tokenizer}"

    def prepared(name: str, *overrides: str) -> TokenStore:
        return prepare.run(plain_session(folder / name, f"store={folder / 'store'}", *overrides))

    by_method = {"all": prepared("all", pool, f"data.vocabulary_size={VOCABULARY}")}
    granular = made_vocabulary(
        plain_session(
            folder / "vocabulary",
            pool,
            *served,
            f"vocabulary.start={tokenizer}",
            "vocabulary.size=3000",
        )
    )
    methods = {
        "random": ["selection=random"],
        "words": ["selection=ngram"],
        "tokens": [
            "selection=ngram",
            "selection.features=tokens",
            f"selection.tokenizer={tokenizer}",
        ],
        "granular": [
            "selection=ngram",
            "selection.features=granular",
            f"selection.vocabulary={granular}",
        ],
        "bm25": ["selection=bm25"],
        "classifier": ["selection=classifier"],
    } | ({"embedding": ["selection=embedding", f"selection.encoder={encoder}"]} if encoder else {})
    for name, method in methods.items():
        by_method[name] = prepared(name, pool, words, *served, *method, "selection.fraction=0.1")
    return by_method, prepared("evaluated", f"data.root={at['evaluated']}", words)


def trained(
    store: TokenStore, evaluated: TokenStore, target: str, seed: int, steps: int, folder: Path
) -> list[tuple[float, float]]:
    """Loss of the target, and mean loss of the other domains, at EVALUATIONS steps; nats per
    token."""
    shape = configs.resolve(
        ModelOptions(**configs.preset("tiny", "model")),
        store.vocabulary_size,
        store.end_of_document,
        LENGTH,
    )
    training = TrainingOptions(
        steps=steps, batch_size=BATCH, sequence_length=LENGTH, learning_rate=4e-3,
        end_learning_rate=4e-4, checkpoint_every=10 * steps,
    )  # fmt: skip
    task = Task(
        label="selection",
        run=Run(folder, "selection", {"seed": seed}),
        objective=cross_entropy,
        objective_options=cross_entropy.Options(weights=(1.0,)),
        store=store,
        seed=seed,
        training=training,
        evaluation=EvaluationOptions(sequences=1, every=10 * steps),
    )
    network = folders.build(shape, seed)
    trainer = Trainer(task, network, place.start(EngineOptions(device="cpu"), "fp32", 60))
    measured = []
    start = cross_entropy.init(1, steps, task.objective_options)
    for step, _ in enumerate(trainer.steps(Position(0, start, np.zeros(1, np.int64))), 1):
        if step % (steps // EVALUATIONS) == 0:
            options = EvaluationOptions(sequences=32)
            domains = losses.measure(network, evaluated, LENGTH, 64, options, torch.device("cpu"))[
                "domains"
            ]
            others = statistics.fmean(
                figures["loss"] for name, figures in domains.items() if name != target
            )
            measured.append((domains[target]["loss"], others))
    return measured


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    seeds, steps = (2, 20) if given.quick else (given.seeds, given.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        at = laid_out(
            given.root, given.target, 100_000 if given.quick else given.characters, folder
        )
        trained_on, evaluated = stores(at, folder, given.encoder)
        losses: dict[str, list[list[tuple[float, float]]]] = {method: [] for method in trained_on}
        for seed in range(seeds):
            for method, store in trained_on.items():
                run = trained(
                    store,
                    evaluated,
                    given.target,
                    seed,
                    steps,
                    folder / "runs" / f"{method}-{seed}",
                )
                losses[method].append(run)
                print(seed, method, run[-1], flush=True)
        sizes = {method: int(store.sizes("train").sum()) for method, store in trained_on.items()}
    figures: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for method, runs in losses.items():
        measured = np.array(runs)  # (seeds, evaluations, target and others)
        gain = measured[:, -1] - np.array(losses["random"])[:, -1]
        figures[method] = {"losses": measured.tolist(), "tokens": sizes[method]}
        cells = [
            f"{mean:.4f} ± {half:.4f}"
            for mean, half in map(student_t, [*measured[:, -1].T.tolist(), *gain.T.tolist()])
        ]
        rows.append((method, f"{sizes[method]:,}", *cells))
    common.table(
        f"loss after {steps} steps of {BATCH * LENGTH} tokens, {seeds} seeds, nats per token",
        ("chosen by", "tokens", given.target, "other domains", "− random", "− random"),
        rows,
    )
    if given.picture:
        at_steps = [(n + 1) * (steps // EVALUATIONS) for n in range(EVALUATIONS)]
        curves = {
            method: charts.Curve(at_steps, np.array(runs)[:, :, 0])
            for method, runs in losses.items()
        }
        title = f"Loss of {given.target}, trained on a tenth chosen by"
        given.picture.write_text(
            drawn(charts.lines(title, "step", "nats per token", curves, settings=True))
        )
    return common.Result({}, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        type=Path,
        required=True,
        help="a folder of domains with train* and validation* files",
    )
    parser.add_argument("--target", default="man_en", help="the domain to serve")
    parser.add_argument(
        "--characters", type=int, default=500_000, help="of each domain in the pool"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--encoder", help="a local sentence encoder, for selection=embedding")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write the target's curves there, as SVG"
    )


if __name__ == "__main__":
    common.main("selection", __doc__, measure, options)

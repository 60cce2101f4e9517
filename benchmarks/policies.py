"""Which policy picks well: a pool of real text with 30 % noise (shuffled characters) and 30 % exact
duplicates, one domain as the target, and its loss against steps, FLOPs and seconds for every
policy, over several seeds.

All begin with the same model, which was trained on the other clean domains: a fresh one spends so
many steps on which tokens are frequent at all that no choice of examples matters.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import common
from doremi_train.data.batches import read
from doremi_train.data.corpus import opening, reading, sources
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import shards, tokenizer, writing
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.evaluation.statistics import paired
from doremi_train.methods import cross_entropy
from doremi_train.model import configs, costs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import place
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.storage.runs import Run
from doremi_train.training import batch_selection
from doremi_train.training.batch_selection import BatchSelectionOptions
from doremi_train.training.step import Picks
from doremi_train.training.task import Position, Task, TrainingOptions
from doremi_train.training.trainer import Trainer

LENGTH, PICKS, CANDIDATES, VOCABULARY = 64, 16, 32, 512
COPIES = 16  # distinct sequences among the duplicates
# Of the target's validation text: what policies see, what is reported.
TARGET_SEQUENCES, EVALUATED = (
    16,
    64,
)
WARM_STEPS, RATE = 800, 3e-3  # the rate is the best of random's, on a seed that is not reported
CURVE = 6  # losses of a run
PUBLISHED = BatchSelectionOptions(
    method="greats", curvature="identity", cosine_cap=None, preconditioned=False, validation_every=1
)
POLICIES = {
    "all": None,  # every candidate is trained on: twice the data a step
    "random": BatchSelectionOptions(method="random"),
    "max_loss": BatchSelectionOptions(method="max_loss"),
    "grad_norm": BatchSelectionOptions(method="grad_norm"),
    "topk": BatchSelectionOptions(method="topk"),
    "greats_published": PUBLISHED,
    "greats": BatchSelectionOptions(method="greats"),
}
# What each of the differences between ours and the published form is worth. The published second
# term is not among them: it is inert, and with it ours without a cap is topk.
PARTS = {
    "random": POLICIES["random"],
    "topk": POLICIES["topk"],
    "greats": POLICIES["greats"],
    "no cap": BatchSelectionOptions(method="greats", cosine_cap=None),
    "plain gradients": BatchSelectionOptions(method="greats", preconditioned=False),
    "fresh validation": BatchSelectionOptions(method="greats", validation_every=1),
    "published": PUBLISHED,
    "published, cap": replace(PUBLISHED, cosine_cap=BatchSelectionOptions().cosine_cap),
    "published, cap, curvature": BatchSelectionOptions(
        method="greats", preconditioned=False, validation_every=1
    ),
}


class Trained(NamedTuple):
    """One run of one policy."""

    steps: list[int]  # of the evaluations
    losses: list[float]  # of the target then, nats per token
    clean: float  # part of the picks that is not noise
    distinct: float  # part of a step's picks that differ, on average
    ratio: float  # penalties over scores
    seconds: list[float]  # of processor, for each step


def pool(root: Path | None, characters: int, folder: Path) -> shards.TokenStore:
    """Clean domains, `noise`, and `copies`: a few sequences over and over, so that many of them
    meet in a batch."""
    where = DataOptions(embedded=None, root=str(root)) if root else DataOptions()
    texts: dict[str, dict[str, list[str]]] = {}
    for source in sources.resolve(where):
        assert source.domain is not None and source.split is not None
        held = texts.setdefault(source.domain, {}).setdefault(source.split, [])
        left = characters if source.split == "train" else characters // 10
        for piece in reading.read(source, where, opening.BadLines(where)):
            held.append(piece.text or "")
            left -= len(held[-1])
            if left < 0:
                break
    words = tokenizer.learn(
        (text for splits in texts.values() for text in splits["train"][:20]), VOCABULARY
    )
    shuffle = random.Random(0)
    noise: dict[str, list[str]] = {"train": [], "validation": []}
    for splits in texts.values():
        for split, pieces in splits.items():
            noise[split] += ["".join(shuffle.sample(text, len(text))) for text in pieces[::3]]
    writer = writing.ShardWriter(folder, np.uint16, member_tokens=1 << 20, members_per_shard=16)
    for domain, splits in [*texts.items(), ("noise", noise)]:
        for split, pieces in splits.items():
            for ids in tokenizer.encode(words, pieces):
                writer.append((split, domain), np.append(ids, 0), True, None)
    whole = np.concatenate(
        [tokenizer.encode(words, [s["train"][-1]])[0][: 4 * LENGTH] for s in texts.values()]
    )
    block = np.resize(whole, COPIES * LENGTH)
    for split in ("train", "validation"):
        writer.append((split, "copies"), np.tile(block, 200), True, None)
    writer.finish()
    (folder / "tokenizer.json").write_text(tokenizer.serialise(words))
    writing.write_manifest(writer.written(), words, 0, 0, 0, {})
    return shards.TokenStore.open(folder)


def mixture(store: shards.TokenStore) -> tuple[float, ...]:
    clean = len(store.domains) - 2
    return tuple(0.3 if name in ("noise", "copies") else 0.4 / clean for name in store.domains)


def warmed(
    store: shards.TokenStore, target: str, steps: int, folder: Path
) -> dict[str, torch.Tensor]:
    """A model that has seen the clean domains but the target."""
    others = [name not in ("noise", "copies", target) for name in store.domains]
    task = _task(store, "start", 0, steps, folder)._replace(
        objective_options=cross_entropy.Options(
            weights=tuple(used / sum(others) for used in others)
        )
    )
    task = task._replace(
        training=replace(task.training, learning_rate=1e-2, end_learning_rate=1e-3)
    )
    trainer = _trainer(task, store, 0)
    for _ in trainer.steps(_begin(task)):
        pass
    return {name: tensor.clone() for name, tensor in trainer.bare.state_dict().items()}


def _task(
    store: shards.TokenStore, name: str, seed: int, steps: int, folder: Path, count: int = PICKS
) -> Task:
    return Task(
        label=name,
        run=Run(folder / f"{name}-{seed}", "policies", {}),
        objective=cross_entropy,
        objective_options=cross_entropy.Options(weights=mixture(store)),
        store=store,
        seed=seed,
        training=TrainingOptions(
            steps=steps,
            batch_size=count,
            sequence_length=LENGTH,
            learning_rate=RATE,
            end_learning_rate=RATE / 10,
            checkpoint_every=10 * steps,
        ),
        # The target's loss is measured here.
        evaluation=EvaluationOptions(sequences=1, every=10 * steps),
    )


def _trainer(task: Task, store: shards.TokenStore, seed: int) -> Trainer:
    shape = configs.resolve(
        ModelOptions(**configs.preset("tiny", "model")),
        store.vocabulary_size,
        store.end_of_document,
        LENGTH,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return Trainer(
            task, folders.build(shape, seed), place.start(EngineOptions(device="cpu"), "fp32", 60)
        )


def _begin(task: Task) -> Position:
    domains = len(task.store.domains)
    start = cross_entropy.init(domains, task.training.steps, task.objective_options)
    return Position(0, start, np.zeros(domains, dtype=np.int64))


def trained(
    store: shards.TokenStore,
    target: str,
    policy: str,
    options: BatchSelectionOptions | None,
    seed: int,
    steps: int,
    start: dict[str, torch.Tensor],
    folder: Path,
) -> Trained:
    k = store.domains.index(target)
    size = int(store.sequences("validation", LENGTH)[k])
    shown = np.arange(EVALUATED) * size // EVALUATED
    free = np.setdiff1d(np.arange(size), shown)
    chosen = free[np.arange(TARGET_SEQUENCES) * len(free) // TARGET_SEQUENCES]
    looked_at, reported = (
        read(store, "validation", np.full(len(s), k), s, LENGTH).tokens for s in (chosen, shown)
    )
    task = _task(store, policy, seed, steps, folder, PICKS if options else CANDIDATES)
    if options:
        task = task._replace(selection=batch_selection.Setting(options, CANDIDATES, looked_at))
    trainer = _trainer(task, store, seed)
    trainer.bare.load_state_dict(start)

    def loss() -> float:
        with torch.no_grad():
            return float(trainer.bare.eval()(reported).mean())

    clean, distinct, seconds, points, losses = [], [], [], [0], [loss()]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.bare.train()
        clock = time.process_time()
        for taken in trainer.steps(_begin(task)):
            seconds.append(time.process_time() - clock)
            position, picked = taken.position, list(_picked(taken.picks, store))
            clean.append(statistics.fmean(name != "noise" for name, _ in picked) if picked else 0.7)
            distinct.append(len(set(picked)) / len(picked) if picked else 1.0)
            if position.step * CURVE // steps > (position.step - 1) * CURVE // steps:
                points.append(position.step)
                losses.append(loss())
                trainer.bare.train()
            clock = time.process_time()

    def lines(name: str) -> list[dict[str, Any]]:
        path = task.run.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return Trained(
        points,
        losses,
        statistics.fmean(clean),
        statistics.fmean(distinct),
        statistics.fmean(
            [abs(line["penalty_to_score"]) for line in lines("batch_selection")] or [0.0]
        ),
        seconds,
    )


def _picked(picks: Picks | None, store: shards.TokenStore) -> Iterator[tuple[str, int]]:
    if picks is None:
        return
    for at in picks.chosen.picked.tolist():
        name = store.domains[picks.candidates.domain[at]]
        sequence = int(picks.candidates.sequence[at])
        yield name, sequence % COPIES if name == "copies" else sequence


def flops(options: BatchSelectionOptions | None, steps: int, shape: costs.Shape) -> list[float]:
    """FLOPs of each step: a forward is 1 a sequence, a backward 2, one for activations alone 1."""
    forward = costs.forward(shape, LENGTH) * LENGTH
    if options is None:
        return [3.0 * CANDIDATES * forward] * steps
    scored = {"random": 0, "max_loss": 1}.get(options.method, 2) * CANDIDATES
    learned = PICKS * (3 if options.method in ("random", "max_loss") else 1)
    looked = 3 * TARGET_SEQUENCES if options.method in ("greats", "topk") else 0
    due = [
        batch_selection.looks_ahead(step, options.validation_every) for step in range(1, steps + 1)
    ]
    return [float(scored + learned + looked * now) * forward for now in due]


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    seeds, steps = range(2 if given.quick else given.seeds), 20 if given.quick else given.steps
    policies = PARTS if given.parts else POLICIES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = pool(given.root, 100_000 if given.quick else 400_000, folder / "data")
        target = given.target or next(
            (name for name in store.domains if "python" in name), store.domains[0]
        )
        start = warmed(store, target, 20 if given.quick else WARM_STEPS, folder)
        runs: dict[str, list[Trained]] = {policy: [] for policy in policies}
        for seed in seeds:
            for policy, chosen in policies.items():
                runs[policy].append(
                    trained(store, target, policy, chosen, seed, steps, start, folder)
                )
                print(seed, policy, runs[policy][-1].losses[-1], flush=True)
        shape = costs.shape(
            configs.resolve(ModelOptions(**configs.preset("tiny", "model")), VOCABULARY, 0, LENGTH)
        )
    figures: dict[str, Any] = {
        policy: {
            "losses": [run.losses for run in of],
            "steps": of[0].steps,
            "clean": statistics.fmean(run.clean for run in of),
            "distinct": statistics.fmean(run.distinct for run in of),
            "penalty_to_score": statistics.fmean(run.ratio for run in of),
            "seconds": np.mean([run.seconds for run in of], axis=0).tolist(),
            "flops": flops(policies[policy], steps, shape),
        }
        for policy, of in runs.items()
    }
    ends = {policy: [losses[-1] for losses in f["losses"]] for policy, f in figures.items()}

    def above(other: str, by_policy: dict[str, list[float]]) -> list[str]:
        gaps = [paired(losses, ends[other]) for losses in by_policy.values()]
        return [f"{gap.mean:+.4f} ± {gap.half:.4f}" if gap.half else "" for gap in gaps]

    def at_equal(key: str) -> dict[str, list[float]]:
        """Losses where what the steps of random cost is spent."""
        budget = sum(figures["random"][key])
        by_policy = {}
        for policy, f in figures.items():
            step = np.interp(budget, np.cumsum([0, *f[key]]), range(steps + 1))
            by_policy[policy] = [
                float(np.interp(step, f["steps"], losses)) for losses in f["losses"]
            ]
        return by_policy

    common.table(
        f"loss of {target} after {steps} steps, {len(seeds)} seeds",
        (
            "policy",
            "loss",
            "above greats",
            "above random",
            "… at equal FLOPs",
            "… at equal seconds",
        ),
        list(
            zip(
                figures,
                [f"{statistics.fmean(losses):.4f}" for losses in ends.values()],
                above("greats", ends),
                above("random", ends),
                above("random", at_equal("flops")),
                above("random", at_equal("seconds")),
                strict=True,
            )
        ),
    )
    keys = ("clean", "distinct", "penalty_to_score")
    common.table(
        "parts of its picks, and what its steps cost over those of random",
        ("policy", *keys, "FLOPs", "seconds"),
        [
            (
                policy,
                *(f[key] for key in keys),
                *(sum(f[k]) / sum(figures["random"][k]) for k in ("flops", "seconds")),
            )
            for policy, f in figures.items()
        ],
    )
    if given.picture:
        picture(given.picture, target, figures)
    return common.Result(
        {f"{policy}_over_random": common.ratio(of, ends["random"]) for policy, of in ends.items()},
        figures,
    )


def picture(path: Path, target: str, figures: dict[str, Any]) -> None:
    """The target's loss against steps, FLOPs and seconds, as SVG: the mean over seeds, and their
    range."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "policies"})
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True)
    for policy, policy_figures in figures.items():
        steps, losses = np.array(policy_figures["steps"]), np.array(policy_figures["losses"])
        spent = (np.cumsum([0, *policy_figures[key]])[steps] for key in ("flops", "seconds"))
        for axis, across in zip(axes, (steps, *spent), strict=True):
            (line,) = axis.plot(across, losses.mean(0), label=policy)
            axis.fill_between(
                across, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15
            )
    for axis, title in zip(axes, ("steps", "FLOPs", "seconds of one core"), strict=True):
        axis.set_xlabel(title)
    axes[0].set_ylabel(f"loss of {target}, nats per token")
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        type=Path,
        help="a folder of domains with train* and validation* files; default: installed text",
    )
    parser.add_argument(
        "--target", help="the domain whose loss counts; default: the first with python in its name"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--parts", action="store_true", help="GREATS and its switches instead of all policies"
    )
    parser.add_argument("--picture", type=Path, help="write the curves there, as SVG")


if __name__ == "__main__":
    common.main("policies", __doc__, measure, options)

"""Every stage, killed before single operations on its files: the same command again leaves the same
bits.

A few operations of each stage are always the same, others come with the day. Which ones is said
where one fails, and KILL_BEFORE=STAGE:12,40-60 (or STAGE:all) takes others.
"""

import datetime
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import killed
from helpers.command import TINY
from helpers.corpus import documents, write_jsonl

from benchmarks import planted_tasks

pytestmark = [pytest.mark.slow, pytest.mark.acceptance]

FIXED, TODAYS = 1, 1  # operations of a stage
AGAIN = 3  # times that the command is given again, at most
CHANCE = 16  # operations that one run does and another does not

SHORT = ("training.steps=6", "training.checkpoint_every=3", "evaluation.every=3")


class Folders:
    """Where a case has what it reads, and what it writes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.read, self.written = root / "read", root / "written"

    @property
    def run(self) -> list[str]:
        return [f"run_dir={self.written}/run", f"store={self.written}/store"]

    def prepared(self) -> list[str]:
        """A command that prepares the corpus in the store, for another run_dir."""
        return [*self.corpus(), "stage=prepare", f"run_dir={self.written}/first"]

    def corpus(self) -> list[str]:
        """Overrides of a small corpus of two domains."""
        for seed, name in enumerate(("abcdefgh", "ijklmnop")):
            texts = list(documents(seed, name, 50, 60_000))
            write_jsonl(self.read / "corpus" / name / "train-0.jsonl", texts[:100])
            write_jsonl(self.read / "corpus" / name / "train-1.jsonl", texts[100:])
        return [f"data.root={self.read}/corpus", *TINY, *SHORT, *self.run]

    def target(self) -> str:
        """A target of the selection: the language of the first domain."""
        write_jsonl(self.read / "target.jsonl", list(documents(0, "abcdefgh", 50, 63_000))[-6:])
        return f"selection.targets={{abc: [{self.read}/target.jsonl]}}"

    def examples(self) -> list[str]:
        """Overrides of a pool of examples, and a model that has learned nothing."""
        planted_tasks.untrained(self.read / "model", width=32)
        planted_tasks.write(self.read / "pool.jsonl", planted_tasks.records(1, 20, 0.2))
        planted_tasks.write(self.read / "held.jsonl", planted_tasks.records(2, 2, 0.0))
        split = f"{{train: [{self.read}/pool.jsonl], validation: [{self.read}/held.jsonl]}}"
        return [
            "stage=finetune", f"data.domains={{pool: {split}}}", "data.embedded=null",
            f"finetune.model={self.read}/model", "training.sequence_length=12",
            "training.batch_size=8", "training.threads=1", "evaluation.sequences=8", *SHORT,
            *self.run,
        ]  # fmt: skip


def prepare(at: Folders) -> list[list[str]]:
    return [[*at.corpus(), "stage=prepare", "data.member_tokens=2000", "data.members_per_shard=3"]]


def poured(at: Folders) -> list[list[str]]:
    """Rare domains become one."""
    overrides = at.corpus()
    for name in ("first", "second"):
        texts = [f"{name} text that is rare, number {n}" for n in range(12)]
        write_jsonl(at.read / "corpus" / name / "train.jsonl", texts)
    more = ["data.least_tokens=1000", "data.rare_into=other", "data.validation_fraction=0.2"]
    return [[*overrides, "stage=prepare", *more]]


def pipeline(at: Folders) -> list[list[str]]:
    return [at.prepared(), at.corpus()]


def cached(at: Folders) -> list[list[str]]:
    """Losses of the reference on disk, tokens weighed by them, rounds and seeds."""
    more = ["reference.losses=cached", "proxy.seeds=2", "proxy.rounds=2"]
    more += ["training.loss_weighting=rho", "main.comparisons=[]", "stage=main"]
    return [at.prepared(), [*at.corpus(), *more]]


def remote(at: Folders) -> list[list[str]]:
    more = ["main.comparisons=[]", "stage=main", f"remote={at.written}/home"]
    return [[*at.corpus(), *more]]


def submit(at: Folders) -> list[list[str]]:
    more = ["stage=proxy", "proxy.seeds=2", "submit.cluster=local", "submit.parallel=1"]
    return [[*at.corpus(), "stage=reference", f"run_dir={at.written}/first"], [*at.corpus(), *more]]


def other(at: Folders) -> list[list[str]]:
    """A configuration that takes a run_dir over from one that was a mistake."""
    mistake = [*at.corpus(), "stage=reference", "training.sequence_length=100000"]
    return [mistake, [*at.corpus(), "stage=reference"]]


def report(at: Folders) -> list[list[str]]:
    """The evaluation and the report of a finished run."""
    return [[*at.corpus(), "stage=main"], [*at.corpus(), "stage=report"]]


def export(at: Folders) -> list[list[str]]:
    given = ["mixture=file", "mixture.weights={abcdefgh: 0.25, ijklmnop: 0.75}"]
    to = ["export.to=webdataset", "export.paths={abcdefgh: /d/a.tar, ijklmnop: /d/b.tar}"]
    return [at.prepared(), [*at.corpus(), "stage=export", *given, *to]]


def swarm(at: Folders) -> list[list[str]]:
    more = ["mixture=swarm", "swarm.runs=3", "swarm.candidates=1", "stage=swarm"]
    return [at.prepared(), [*at.corpus(), *more]]


def compare(at: Folders) -> list[list[str]]:
    more = ["stage=compare", "compare.methods=[doge]", "compare.baselines=[natural]"]
    more += ["compare.seeds=2", "training.steps=4"]
    return [at.prepared(), [*at.corpus(), *more]]


def select(at: Folders) -> list[list[str]]:
    more = ["selection=ngram", at.target(), "selection.documents=20", "selection.workers=1"]
    return [[*at.corpus(), *more, "stage=select"]]


def regroup(at: Folders) -> list[list[str]]:
    more = ["regroup.domains=2", "regroup.starts=2", "regroup.workers=1"]
    return [[*at.corpus(), *more, "stage=regroup"]]


def vocabulary(at: Folders) -> list[list[str]]:
    more = ["vocabulary.size=300", "vocabulary.steps=2", "vocabulary.learned=100"]
    return [[*at.corpus(), at.target(), *more, "stage=vocabulary"]]


def finetune(at: Folders) -> list[list[str]]:
    return [[*at.examples(), "finetune.lora.rank=2"]]


def less(at: Folders) -> list[list[str]]:
    """Warm-up, features, a choice, and training on it."""
    planted_tasks.write(at.read / "amber.jsonl", planted_tasks.records(3, 6, 0.0, ("amber",)))
    more = [f"selection.targets={{amber: [{at.read}/amber.jsonl]}}", "selection.less.epochs=2"]
    more += ["selection.less.features=int8", "finetune.lora.rank=null", "selection.fraction=0.2"]
    more += ["selection.less.baselines=[random]"]
    return [[*at.examples(), "selection=less", *more]]


def classify(at: Folders) -> list[list[str]]:
    dice, root = random.Random(0), at.read / "texts"
    root.mkdir(parents=True)
    for name, count in (("generated", 60), ("real", 40), ("test", 20)):
        lines = []
        for _ in range(count):
            label = dice.choice("ab")
            text = " ".join(f"{label}{dice.randrange(9)}" for _ in range(6))
            lines.append({"text": text, "label": label})
        planted_tasks.write(root / f"{name}.jsonl", lines)
    return [[
        "stage=classify", f"classify.root={root}", f"classify.columns={at.written}/columns",
        "classify.epochs=2", "classify.least_steps=4", "classify.folds=2", "classify.seeds=2",
        "classify.methods=[real, filter, imp]", "training.threads=1", *at.run,
    ]]  # fmt: skip


def fit(at: Folders) -> list[list[str]]:
    dice, path = random.Random(0), at.read / "runs.csv"
    parts = [dice.random() for _ in range(12)]
    lines = [f"{n},{part},{1 - part},{2 + part**2}" for n, part in enumerate(parts)]
    path.write_text("\n".join(["run,a,b,loss", *lines]))
    more = [f"fit.predict={path}", "fit.regressor=saturating", "training.threads=1"]
    return [["stage=fit", f"fit.runs={path}", *more, *at.run]]


CASES: list[Callable[[Folders], list[list[str]]]] = [
    prepare, poured, pipeline, cached, remote, submit, other, report, export, swarm, compare,
    select, regroup, vocabulary, finetune, less, classify, fit,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_stage_that_was_killed_ends_in_the_same_bits(
    case: Callable[[Folders], list[list[str]]], tmp_path: Path
) -> None:
    at, log = Folders(tmp_path), tmp_path / "log"
    at.read.mkdir()
    *before, command = case(at)
    for first in before:
        done = killed.run(first, at.written, tmp_path / "before")
        assert done.code == (2 if case is other else 0), done
    begun = tmp_path / "begun"
    at.written.mkdir(exist_ok=True)
    shutil.copytree(at.written, begun, symlinks=True)
    never = killed.run(command, at.written, log)
    assert never.code == 0, never
    wanted, done_by_it = killed.left(at.written), killed.operations(log)
    faults = []
    for point in points(case.__name__, done_by_it):
        shutil.rmtree(at.written)
        shutil.copytree(begun, at.written, symlinks=True)
        fault = _fault(command, at, tmp_path / f"log-{point}", point, wanted)
        if fault:
            faults.append(f"KILL_BEFORE={case.__name__}:{point} ({done_by_it[point - 1]}): {fault}")
    assert not faults, "\n".join(faults)


def points(name: str, done: list[str]) -> list[int]:
    """Numbers of operations to kill before, of those that were `done`."""
    every = range(1, len(done) + 1)
    kinds = [*{_kind(one): n for n, one in enumerate(done, 1)}.values()]
    stage, _, asked = os.environ.get("KILL_BEFORE", "").partition(":")
    if asked in ("all", "kinds"):
        return [*every] if asked == "all" else kinds
    if stage:
        ends = [part.partition("-") for part in asked.split(",")] if stage == name else []
        return [n for a, _, b in ends for n in range(int(a), int(b or a) + 1) if n in every]
    day = datetime.datetime.now(datetime.UTC).date()
    fixed = random.Random(name).sample(kinds, FIXED)
    return fixed + random.Random(f"{name} {day}").sample(every, TODAYS)


def _kind(operation: str) -> str:
    """An operation without addresses and numbers."""
    return re.sub(r"[0-9a-f]{16}|\d+", "N", operation)


def _fault(command: list[str], at: Folders, log: Path, point: int, wanted: Any) -> str:
    """What is wrong after a kill and the same command again, or nothing."""
    ended = killed.run(command, at.written, log, point)
    done = len(killed.operations(log))
    # Whether a checkpoint in the background is ready when status.json is written anew is chance.
    if ended.code == 0 and done < point - CHANCE:
        return f"it was not killed: there were {done} operations"
    for _ in range(AGAIN):
        again = killed.run(command, at.written, log)
        if again.code == 0:
            break
    else:
        return f"exit {again.code}: {again.err[-1500:]}"
    found = killed.left(at.written)
    differs = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    named = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "different": differs,
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in named.items() if names)

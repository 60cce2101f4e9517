"""One small training in several trainers, killed at random steps and resumed, under a mixture that
changes three times: the draws and the α of our own sampler and method."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import trainers as run
from helpers.command import ROOT, environment

from doremi_train.client import Stream
from doremi_train.client.learned import Learner
from doremi_train.client.losses import sums, token_losses
from doremi_train.data.sampler import Sampler
from doremi_train.methods import doremi

Rows = dict[str, Any]  # {domain: (N, LENGTH) tokens}


def python(trainer: str) -> str:
    """Who has the trainer."""
    if trainer in ("litdata", "megatron", "torchtitan"):
        peers = os.environ.get("DOREMI_PEERS")
        if not peers:
            pytest.skip("DOREMI_PEERS names no Python with the packages that .ci/run installs")
        return peers
    if trainer == "lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed; .ci/run does")
    return sys.executable


def drawn() -> list[list[tuple[int, int]]]:
    """(domain, sequence) of every step, by our own sampler."""
    sizes = np.array([*run.SIZES.values()])
    sampler = Sampler(sizes, tuple(run.SIZES), run.BATCH, 0)
    counts, steps = np.zeros(len(sizes), np.int64), []
    for step in range(run.STEPS):
        start = max(first for first in run.MIXTURES if first <= step)
        draw = sampler.draw(step, np.array([*run.MIXTURES[start].values()]), counts)
        counts = draw.counts
        steps.append([*zip(draw.domain.tolist(), draw.sequence.tolist(), strict=True)])
    return steps


def learned(steps: list[list[tuple[int, int]]], rows: Rows) -> list[dict[str, Any]]:
    """What Algorithm 1 records of every step, and losses (K,), in the plainest loop."""
    table = torch.zeros(run.VOCABULARY, run.VOCABULARY, requires_grad=True)
    optimizer = torch.optim.AdamW([table], **run.ADAM)
    names, lines = [*run.SIZES], []
    state = doremi.init(len(names), run.STEPS, run.OPTIONS)
    for step in steps:
        whole = torch.tensor(np.array([rows[names[k]][n] for k, n in step]))
        domain = torch.tensor([k for k, _ in step])
        tokens, labels = whole[:, :-1], whole[:, 1:]
        losses, _ = token_losses(table[tokens], labels)
        held, _ = token_losses(run.reference(tokens), labels)
        stats = doremi.observe(losses.detach(), held, domain, len(names), run.OPTIONS)
        state = doremi.update(state, stats, run.OPTIONS)
        optimizer.zero_grad()
        (doremi.weigh(state, domain, stats.tokens, run.OPTIONS) * losses).sum().backward()
        torch.nn.utils.clip_grad_norm_([table], run.CLIP)
        optimizer.step()
        seen = sums(losses.detach(), torch.ones_like(losses), domain, len(names))
        lines.append(doremi.record(state, stats) | {"loss": seen.loss})
    return lines


def killed_at(trainer: str) -> list[int]:
    """Two steps, another pair for each trainer."""
    random = np.random.default_rng([*trainer.encode()])
    first, second = sorted(random.choice(np.arange(2, run.STEPS), 2, replace=False).tolist())
    return [first, second]


@pytest.mark.acceptance
@pytest.mark.parametrize("trainer", run.TRAINERS)
def test_the_draws_and_the_weights_are_ours(trainer: str, tmp_path: Path) -> None:
    deaths = killed_at(trainer)
    script = ROOT / "tests" / "helpers" / "trainers.py"
    command = [python(trainer), "-W", "ignore", str(script), trainer, str(tmp_path)]
    done = subprocess.run(
        [*command, *map(str, deaths)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows: Rows = run.rows()
    if trainer == "megatron":  # its datasets shuffle: their order, and the same rows
        order = json.loads((tmp_path / "order.json").read_text())
        assert all(sorted(order[n]) == sorted(rows[n].tolist()) for n in rows)
        rows = {name: np.array(each) for name, each in order.items()}

    steps = drawn()
    seen: dict[int, Any] = {}
    for attempt, death in enumerate([*deaths, run.STEPS]):
        lines = [*map(json.loads, (tmp_path / f"rows-{attempt}.jsonl").read_text().splitlines())]
        assert [step for step, _ in lines] == [*range(lines[0][0], death)]
        assert (lines[0][0] > 0) == (attempt > 0 and deaths[attempt - 1] >= run.SAVED)
        for step, tokens in lines:
            assert seen.setdefault(step, tokens) == tokens  # drawn again, the same
    domains = [*rows.values()]
    for number, step in enumerate(steps):  # a trainer may give its model the last token too
        whole = [domains[k][n].tolist() for k, n in step]
        assert [row[: run.LENGTH - 1] for row in seen[number]] == [row[:-1] for row in whole]

    for k, size in enumerate(run.SIZES.values()):
        mine = [n for step in steps for domain, n in step if domain == k]
        for start in range(0, len(mine), size):
            assert set(Counter(mine[start : start + size]).values()) == {1}
    blocks = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("stream/blocks/*.json"))]
    changes = [b["step"] for a, b in pairwise(blocks) if a["weights"] != b["weights"]]
    assert changes == [8, 12, 20]

    lines = (tmp_path / "stream" / "domain_weights.jsonl").read_text().splitlines()
    assert len(lines) == run.STEPS
    found = [*map(json.loads, lines)]
    wanted = learned(steps, rows)
    for line, ours in zip(found, wanted, strict=True):
        assert [*line["weights"].values()] == pytest.approx(ours["weights"].tolist(), abs=1e-6)
        assert [*line["tokens"].values()] == ours["tokens"].tolist()
    last = [*found[-1]["weights"].values()]
    assert max(last) - min(last) > 0.05

    if trainer in ("transformers", "lightning", "torchtitan"):
        *_, last = wanted
        means = dict(zip(run.SIZES, (last["loss"] / last["tokens"]).tolist(), strict=True))
        logged = json.loads((tmp_path / "losses.json").read_text())
        present = {f"loss/{n}": mean for n, mean in means.items() if mean == mean}
        assert logged == pytest.approx(present, abs=1e-5)
    if trainer in ("lightning", "torchtitan"):
        stream = Stream(run.SIZES, run.BATCH, None, tmp_path / "ours", run.EVERY)
        learner = Learner(stream, "odm", run.STEPS)
        for ours in wanted:
            learner.report(ours["loss"], ours["tokens"].double())
        for path in sorted(stream.folder.glob("blocks/*.json")):
            other = json.loads((tmp_path / "online" / "blocks" / path.name).read_text())
            weights = json.loads(path.read_text())["weights"]
            assert other["weights"] == pytest.approx(weights, abs=1e-6)
        assert max(weights) - min(weights) > 1e-3

"""The command for a GPU, on a CPU: parts that end badly lose only themselves, many models as one
are the same models, and everything runs at a reduced size."""

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.command import ROOT, environment

from benchmarks import common
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import proxies, record, runner, saving, sized
from benchmarks.gpu.stacked import Stacked
from doremi_train.model.language_model import LanguageModel
from doremi_train.storage import checkpoint
from doremi_train.storage import parts as stored

# ── Parts ───────────────────────────────────────────────────────────────────────────

FOUND = """
import json, os, signal, subprocess, sys, time
file = sys.argv[sys.argv.index("--file") + 1]
def found(value):
    line = {"part": PART, "figure": "one", "value": value, "interval": None, "unit": "s"}
    with open(file, "a") as lines:
        lines.write(json.dumps({**line, "goal": None, "met": None}) + "\\n")
"""
PARTS = {
    "sound": "found(1)",
    "raises": "found(2); raise ValueError('no such kernel')",
    "killed": "found(3); os.kill(os.getpid(), signal.SIGKILL)",
    # What it has started must not outlive it.
    "endless": "child = subprocess.Popen(['sleep', '600']); found(child.pid); time.sleep(600)",
    "last": "found(5)",
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[runner.Part]:
    """Processes that end in all ways."""
    for name, body in PARTS.items():
        (tmp_path / f"part_{name}.py").write_text(f"PART = {name!r}\n{FOUND}{body}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    limits = {"endless": 3.0}
    return [runner.Part(name, limits.get(name, 60.0), f"part_{name}") for name in PARTS]


def begin(file: Path) -> None:
    head = {"hardware": "one core", "date": "today", "commit": "", "torch": "", "rehearsal": True}
    record.write(file, head)


def test_a_part_that_ends_badly_loses_only_itself(
    parts: list[runner.Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.jsonl"
    begin(file)
    assert runner.run(parts, 600, file, rehearse=True) == ["raises", "killed", "endless"]
    head, *lines = record.read(file)
    assert head["hardware"] == "one core"
    states = {line["part"]: (line["state"], line["message"]) for line in lines if "state" in line}
    assert states == {
        "sound": ("done", ""),
        "raises": ("failed", "ValueError: no such kernel"),
        "killed": ("killed", "SIGKILL"),
        "endless": ("timed out", "its 3 s were over"),
        "last": ("done", ""),
    }
    values = {line["part"]: line["value"] for line in lines if "figure" in line}
    child = values.pop("endless")
    assert values == {"sound": 1, "raises": 2, "killed": 3, "last": 5}
    assert not Path(f"/proc/{child}").exists() or "sleep" not in _command(child)
    runner.tables(file)
    shown = capsys.readouterr().out
    assert "raises: failed after" in shown and "2 s" in shown and "rehearsal" in shown
    assert "no such kernel" in file.with_suffix(".log").read_text()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # gone meanwhile
        return ""


def test_parts_end_with_the_minutes_given(
    parts: list[runner.Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST", 2.0)
    file = tmp_path / "found.jsonl"
    begin(file)
    began = time.monotonic()
    late = [parts[3]._replace(seconds=60.0), parts[4]]
    assert runner.run(late, 3, file, rehearse=True) == ["endless", "last"]
    assert time.monotonic() - began < 60
    states = [line["state"] for line in record.read(file) if "state" in line]
    assert states == ["timed out", "not started"]


# ── The file ────────────────────────────────────────────────────────────────────────


def test_the_file_keeps_what_was_found_of_the_last_run(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    begin(file)
    record.Record("steps", file, 10, False).figure("batch", 8)
    begin(file)
    of = record.Record("steps", file, 10, False)
    assert of.known("steps", "batch") is None
    of.figure("batch", 16)
    of.figure("ratio", common.Ratio(1.5, 1.4, 1.6), goal=record.at_most(1.36))
    of.figure("utilisation", 0.5, goal=record.at_least(0.5))
    of.not_measured("memory", "is a GPU's", record.at_most(1))
    with file.open("a") as torn:
        torn.write('{"part": "steps", "fig')
    assert of.known("steps", "batch") == 16
    _, _, ratio, utilisation, memory = record.read(file)
    assert (ratio["value"], ratio["interval"], ratio["met"]) == (1.5, [1.4, 1.6], False)
    assert utilisation["met"] is True
    assert (memory["value"], memory["why"], memory["met"]) == (None, "is a GPU's", None)


def test_a_rehearsal_is_held_to_no_goal(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    begin(file)
    record.Record("steps", file, 10, True).figure("ratio", 9.0, goal=record.at_most(1))
    assert record.read(file)[-1]["met"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "gpu.jsonl")])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2 and "--rehearse" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ── Rounds ──────────────────────────────────────────────────────────────────────────


def test_rounds_end_with_the_time_but_for_the_first() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return 3.0  # seconds of its own

    turns = {name: partial(turn, name) for name in "ab"}
    assert sized.rounds(turns, seconds=-1, each=6) == {"a": [0.5], "b": [0.5]}
    assert "".join(order) == "baab"  # one turn of each warms up
    assert sized.rounds(turns, seconds=60, most=3) == {"a": [3.0] * 3, "b": [3.0] * 3}


def test_what_does_not_fit_is_told_from_what_fails() -> None:
    def raising(error: Exception) -> None:
        raise error

    cpu = torch.device("cpu")
    assert sized.fits(cpu, lambda: None)
    assert not sized.fits(cpu, partial(raising, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        sized.fits(cpu, partial(raising, RuntimeError("no such kernel")))


# ── Many models as one ──────────────────────────────────────────────────────────────


def models(count: int) -> list[LanguageModel]:
    return [proxies.built(proxies.SIZES[0], seed, rehearse=True) for seed in range(count)]


def test_many_models_as_one_have_the_losses_and_gradients_of_each() -> None:
    several = [model.double() for model in models(3)]
    for model in several:  # biases and norms begin alike
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    tokens = torch.randint(64, (3, 2, 17))
    stacked = Stacked(several)
    losses = stacked.losses(tokens)
    (losses * torch.linspace(0.5, 2, 16)).sum().backward()
    for number, model in enumerate(several):
        logits = model.inner(input_ids=tokens[number, :, :-1]).logits
        apart = F.cross_entropy(logits.transpose(1, 2), tokens[number, :, 1:], reduction="none")
        torch.testing.assert_close(losses[number], apart.float(), rtol=1e-6, atol=1e-6)
        (apart * torch.linspace(0.5, 2, 16)).sum().backward()
        for name, parameter in model.inner.named_parameters():
            gradient = stacked.parameters[name].grad
            assert gradient is not None and parameter.grad is not None, name
            torch.testing.assert_close(gradient[number], parameter.grad, rtol=1e-5, atol=1e-7)


def test_many_models_as_one_are_clipped_and_trained_as_each() -> None:
    several, tokens = models(3), torch.randint(64, (3, 2, 17))
    assert proxies.difference(several, tokens, steps=5) < 1e-4
    norms = [float(_norm(model, row)) for model, row in zip(several, tokens, strict=True)]
    assert all(norm > proxies.CLIP for norm in norms)  # so that clipping was seen


def _norm(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(tokens).mean().backward()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def test_one_bit_makes_another_checkpoint(tmp_path: Path) -> None:
    def saved(name: str, number: float, step: int = 3, drawn: int = 7) -> stored.Saved:
        values, tensors = stored.divide({"α": torch.tensor([number]).double(), "drawn": drawn})
        tensors = {"model/a": torch.tensor([1.0, number]), "model/b": torch.zeros(2), **tensors}
        path = checkpoint.of_step(tmp_path / name, step)
        pieces = [stored.share(name, tensor, 0, 1) for name, tensor in tensors.items()]
        records = [stored.write(path / stored.part_name(0, 1), pieces)]
        return checkpoint.read(checkpoint.complete(tmp_path / name, step, values, records, 1))

    first = saved("first", 0.5)
    assert saving.equal(first, saved("same", 0.5))
    assert not saving.equal(first, saved("bit", float(np.nextafter(np.float32(0.5), 1))))
    assert not saving.equal(first, saved("step", 0.5, step=4))
    assert not saving.equal(first, saved("drawn", 0.5, drawn=8))


# ── All of it ───────────────────────────────────────────────────────────────────────

ON_A_GPU_ALONE = ("GPU", "memory, batch", "utilisation")


@pytest.mark.acceptance
def test_everything_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "20", "--json", file],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1300, check=False,
    )  # fmt: skip
    log = file.with_suffix(".log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    head, *lines = record.read(file)
    assert head["rehearsal"] and head["hardware"] and head["torch"]
    names = [part.name for part in command.PARTS]
    assert [line["part"] for line in lines if line.get("state") == "done"] == names
    found = {(line["part"], line["figure"]): line["value"] for line in lines if "figure" in line}
    for (part, name), value in found.items():
        assert (value is None) == any(words in name for words in ON_A_GPU_ALONE), (part, name)
        assert value is None or (math.isfinite(value) and value >= 0), (part, name, value)
        assert name in done.stdout, name
    same = [value for (_, name), value in found.items() if "same bits" in name]
    assert same == [True, True]
    apart = {name: value for (_, name), value in found.items() if "off the CPU's" in name}
    assert sum(value is not None for value in apart.values()) == 3
    assert all(value is None or value < 1e-3 for value in apart.values()), apart
    assert found["alpha", "α moved from uniform by"] > 0.02
    differ = [value for (_, name), value in found.items() if "losses differ" in name]
    assert len(differ) == 6 and max(differ) < 1e-3
    for part, name in (
        ("steps", "live over plain"),
        ("compiled", "cached over plain, compiled"),
        ("picks", "sketched over plain on candidates"),
        ("picks", "exact over plain on candidates"),
    ):
        assert found[part, name] > 0

"""Weights in several files: what transformers makes of them, what is read of them, and what is
refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import models
from helpers.command import run_here
from helpers.memory import Allocated, one_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from doremi_train.config import UserError
from doremi_train.data.tokens import tokenizer
from doremi_train.model import configs, folders, weights
from doremi_train.model.configs import ModelOptions
from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import comm, engine
from doremi_train.parallel.place import Place

TOKENIZER = tokenizer.learn(["some text for a small tokeniser"], 300)
SMALL: dict[str, Any] = {
    "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
}  # fmt: skip
KINDS = {
    "llama": SMALL,
    "gpt_neox": SMALL | {"tie_word_embeddings": True},
    # Its experts stand one by one in files, and as one in memory.
    "mixtral": SMALL | {"num_key_value_heads": 2, "num_local_experts": 3},
}


def built(kind: str) -> LanguageModel:
    options = ModelOptions(config={"model_type": kind, **(KINDS | EXPERTS)[kind]})
    config = configs.resolve(options, TOKENIZER.get_vocab_size(), 0, 16)
    return folders.build(config, 0).eval()


def saved(model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE", 30_000)
    folders.save(model, dict(model.named_parameters()), folder, TOKENIZER, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_several_files_and_gives_the_same_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = built(kind)
    saved(model, tmp_path / "parts", monkeypatch)
    model.inner.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    index = json.loads((tmp_path / "parts" / weights.INDEX).read_text())
    right = json.loads((tmp_path / "theirs" / weights.INDEX).read_text())
    assert index["metadata"] == right["metadata"]
    assert index["weight_map"].keys() == right["weight_map"].keys()
    sizes = [path.stat().st_size for path in (tmp_path / "parts").glob("model-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 40_000
    tokens = torch.arange(24).view(2, 12) % TOKENIZER.get_vocab_size()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, model.inner(tokens).logits)
        ours = models.loaded(tmp_path / "parts", TOKENIZER.get_vocab_size())
        assert torch.equal(ours(tokens), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_is_what_transformers_writes(kind: str, tmp_path: Path) -> None:
    model = built(kind)
    folders.save(model, dict(model.named_parameters()), tmp_path / "ours", TOKENIZER, 0)
    model.inner.save_pretrained(tmp_path / "theirs")
    for name in (weights.SINGLE, "config.json", "generation_config.json"):
        ours, theirs = (tmp_path / side / name for side in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


# ── Reading ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of everything that is read of files."""
    sizes: list[int] = []

    class Counted:
        def __init__(self, *given: Any) -> None:
            self._file = safe_open(*given)

        def __enter__(self) -> Any:
            self._open = self._file.__enter__()
            return self

        def __exit__(self, *given: Any) -> None:
            self._file.__exit__(*given)

        def keys(self) -> Any:
            return self._open.keys()

        def get_tensor(self, name: str) -> Any:
            sizes.append(self._open.get_tensor(name).numel())
            return self._open.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            part = self._open.get_slice(name)

            class Part:
                def get_shape(self) -> Any:
                    return part.get_shape()

                def __getitem__(self, rows: slice) -> Any:
                    sizes.append(part[rows].numel())
                    return part[rows]

            return Part()

    monkeypatch.setattr(weights, "safe_open", Counted)
    return sizes


@pytest.mark.parametrize(("files", "strategy"), [(1, "fsdp2"), (3, "fsdp2"), (3, "zero3")])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_reads_what_it_keeps_and_nothing_else(
    rank: int,
    files: int,
    strategy: str,
    read: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = built("llama")
    if files == 1:
        folders.save(model, dict(model.named_parameters()), tmp_path, TOKENIZER, 0)
    else:
        saved(model, tmp_path, monkeypatch)
    place = Place(strategy, torch.device("cpu"), False, {})
    with one_of(4, rank):
        divided = folders.load(tmp_path, TOKENIZER.get_vocab_size(), "reference.path")
        assert divided.source is not None and not read
        with Allocated() as allocated:
            if strategy == "zero3":  # DeepSpeed's own divides flat: as a reference beside it
                parts = [comm.part(p) for p in engine.frozen(place, divided).parameters()]
            else:
                parts = engine.build(place, divided, OptimizerOptions()).parts()
        own = sum(part.numel() for part in parts)
        assert sum(read) == own
        assert own < sum(p.numel() for p in model.parameters()) / 3
        assert allocated.most < 4 * (own + 2 * max(read)) + 4096
        for part, whole in zip(parts, model.parameters(), strict=True):
            size = -(-len(whole) // 4)
            assert torch.equal(part, whole[rank * size : (rank + 1) * size])
        if strategy == "zero3":
            divided(torch.zeros(1, 5, dtype=torch.int64))
            assert all(map(comm.in_parts, divided.parameters()))  # again


FEW = {"num_local_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": KINDS["mixtral"],
    "qwen3_moe": SMALL | FEW | {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_stand_one_by_one_in_files_are_put_together_as_they_are_asked_for(
    kind: str, read: list[int], tmp_path: Path
) -> None:
    model = built(kind)
    model.inner.save_pretrained(tmp_path)
    model.inner.config.save_pretrained(tmp_path)
    found = folders.opened(tmp_path, "finetune.model")
    assert found is not None and not read
    for name, tensor in model.inner.named_parameters():
        assert torch.equal(found.source(name), tensor), name
        assert torch.equal(found.source(name, slice(1, 3)), tensor[1:3]), name
        assert sum(read) <= 2 * tensor.numel()  # no other tensor
        read.clear()


# ── Refused ─────────────────────────────────────────────────────────────────────────


def missing(folder: Path) -> None:
    (folder / "model-00002-of-00006.safetensors").unlink()


def torn(folder: Path) -> None:
    file = folder / "model-00002-of-00006.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def of_another(folder: Path) -> None:
    """Another file of the same model."""
    other = folder / "model-00003-of-00006.safetensors"
    shutil.copy(other, folder / "model-00002-of-00006.safetensors")


def foreign(folder: Path) -> None:
    shutil.copy(
        folder / "model-00002-of-00006.safetensors", folder / "model-00002-of-00009.safetensors"
    )


def of_another_shape(folder: Path) -> None:
    file = folder / "model-00002-of-00006.safetensors"
    save_file({k: v[:5].clone() for k, v in load_file(file).items()}, file, {"format": "pt"})


def outside(folder: Path) -> None:
    file = folder / weights.INDEX
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../model-00002-of-00006.safetensors")
    file.write_text(json.dumps(index))


SPOILT = {
    missing: r"model-00002-of-00006.safetensors is missing",
    torn: r"model-00002-of-00006.safetensors",
    of_another: r"model-00002-of-00006.safetensors is not the file of its index: it (lacks|has) ",
    foreign: r"model-00002-of-00009.safetensors is not in its index",
    of_another_shape: r"model-00002-of-00006.safetensors.*of another shape",
    outside: r"has no weight_map of files in the folder",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("parts") / "model"
    with pytest.MonkeyPatch.context() as patch:
        saved(built("llama"), folder, patch)
    assert (folder / "model-00002-of-00006.safetensors").exists()
    yield folder


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_not_of_the_model_is_named(spoil: Any, parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(parts, folder)
    spoil(folder)
    for take in (folders.read, folders.opened):
        if spoil is of_another_shape and take is folders.opened:
            assert take(folder, "reference.path") is None  # what it may mean, transformers knows
            continue
        with pytest.raises(UserError, match=SPOILT[spoil]) as error:
            take(folder, "reference.path")
        assert f"reference.path={folder}" in str(error.value)


def test_it_ends_the_command_with_code_2(parts: Path, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(parts, folder)
    missing(folder)
    outcome = run_here(
        *tiny, f"run_dir={tmp_path / 'run'}", "stage=reference", f"reference.path={folder}"
    )
    assert outcome.code == 2 and "model-00002-of-00006.safetensors is missing" in outcome.err
    assert "Traceback" not in outcome.err

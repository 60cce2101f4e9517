"""The benchmarks of the data run, and what they claim beside times holds: what is counted, opened
and mapped."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.benchmarks import run

from benchmarks import growth, loader
from doremi_train.data.batches import Batches
from doremi_train.data.tokens.shards import OPEN_MAPS, TokenStore
from doremi_train.stages import plan


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 domains, 20 shards each, of which none is there."""
    return loader.wide_store(tmp_path_factory.mktemp("wide"), 1000, 20, linked=False)


_seen: list[tuple[str, str]] | None = None  # (event, path) while a test listens


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None and event in ("open", "os.listdir", "os.scandir"):
        _seen.append((event, str(arguments[0])))


def test_opening_reads_the_index_and_lists_nothing(wide: Path) -> None:
    global _seen
    sys.addaudithook(_listen)
    _seen = []
    try:
        store = TokenStore.open(wide)
        assert store.sequences("train", 64).sum() == 1000 * 20 * ((1 << 16) // 64 - 1)
        seen = [(event, path) for event, path in _seen if path.startswith(str(wide))]
    finally:
        _seen = None
    assert sorted(seen) == [
        ("open", str(wide / "index.npy")),
        ("open", str(wide / "manifest.json")),
    ]


def test_open_maps_are_bounded_whatever_is_read(tmp_path: Path) -> None:
    store = TokenStore.open(loader.wide_store(tmp_path, 40, 10))
    weights, counts = torch.full((40,), 1 / 40, dtype=torch.float64), np.zeros(40, np.int64)
    shards = set()
    with Batches(store, 1024, 40, [slice(0, 40)], 0) as batches:
        for step in range(25):
            micro = batches.get(step, weights, counts).micro[0]
            counts = counts + 1
            shards |= set(zip(micro.domain.tolist(), (micro.sequence // 63).tolist(), strict=True))
    assert len(shards) > OPEN_MAPS
    maps = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    assert 0 < len(maps) <= OPEN_MAPS


def test_delivered_proportions_are_within_counting_error(tmp_path: Path) -> None:
    """Of batches as a trainer gets them, against α, after every step; unlike random draws, which
    stray by √t."""
    store = TokenStore.open(loader.wide_store(tmp_path, 7, 1))
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(7)))
    counts, delivered = np.zeros(7, np.int64), np.zeros(7)
    with Batches(store, 32, 16, [slice(0, 10), slice(10, 16)], 0) as batches:
        for step in range(500):
            batch = batches.get(step, weights, counts)
            counts = batch.draw.counts
            delivered += sum(np.bincount(micro.domain, minlength=7) for micro in batch.micro)
            assert np.abs(delivered - (step + 1) * 16 * weights.numpy()).max() < 4, step


def test_the_plan_reads_the_store_as_often_for_many_domains(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sizes = [], TokenStore.sizes
    monkeypatch.setattr(
        TokenStore, "sizes", lambda store, split: calls.append(split) or sizes(store, split)
    )
    found = plan._domains(
        growth.plain_session(tmp_path), TokenStore.open(wide), None, small_runs=True
    )
    assert len(found) == 1000 and 0 < len(calls) < 20


@pytest.mark.acceptance
def test_loader(tmp_path: Path) -> None:
    """This environment has some of the other libraries; those it has not are named."""
    found = run("loader", tmp_path, "--peers", sys.executable)
    assert {"of_memmap_gather", "over_webdataset", "over_webdataset_one_worker"} <= found[
        "ratios"
    ].keys()
    start_up, proportions = found["figures"]["start_up"], found["figures"]["proportions"]
    assert start_up["shards"] == 10_000 and start_up["open_maps"] <= start_up["most_open_maps"]
    assert proportions["largest_error_in_sequences"] < 4
    small, large = found["figures"]["memory_mb"].values()
    assert large < 1.1 * small


@pytest.mark.acceptance
def test_prepare(tmp_path: Path) -> None:
    found = run("prepare", tmp_path, "--megabytes", "2", "--rounds", "1")
    assert found["ratios"].keys() == {"of_tokenizers_alone", "of_tokenizers_fast_alone"}
    assert 1 < found["figures"]["text_mb"] < 5  # whole documents of whatever this machine has


@pytest.mark.acceptance
def test_growth(tmp_path: Path) -> None:
    found = run("growth", tmp_path, "--pictures", str(tmp_path))["figures"]
    assert found.keys() == {*growth.AXES, "documents"}
    for name, parts in found.items():
        drawn = (tmp_path / f"growth-{name}.svg").read_text()
        assert (
            drawn.startswith("<svg")
            and len(drawn) < 60_000
            and all(part in drawn for part in parts)
        )
        assert "mathdefault" not in drawn  # numbers, not markup
    memory = {part: values["exponent_of_memory"] for part, values in found["domains"].items()}
    assert max(memory.values()) < 1.2, json.dumps(memory)


@pytest.mark.acceptance
def test_regroup(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    pytest.importorskip("sklearn")
    found = run("regroup", tmp_path, "--megabytes", "2", "--rounds", "2", "--sample", "1000")
    assert found["ratios"].keys() == {"of_reading"}
    assert found["figures"]["assigning_mb_per_s_core"] > 0 and found["figures"]["start_s"] > 0


@pytest.mark.acceptance
def test_ngram(tmp_path: Path, alone_with_ray: None) -> None:
    pytest.importorskip("numba")
    peer = os.environ.get("DATA_SELECTION_PYTHON")
    beside = ("--peer", peer) if peer else ()
    ray = ("--ray",) if importlib.util.find_spec("ray") else ()
    found = run("ngram", tmp_path, "--megabytes", "2", "--rounds", "2", *beside, *ray)
    sides = (
        {"of_reading"}
        | ({"over_data_selection"} if beside else set())
        | ({"ray_over_processes"} if ray else set())
    )
    assert sides == found["ratios"].keys()
    assert {"kernel_mb_per_s_core", "end_to_end_mb_per_s_core"} <= found["figures"].keys()

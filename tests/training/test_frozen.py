"""The cache of the reference's losses: α as with a live reference, computed once, shared, refused
where it is wrong."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import LONG, Command, environment, run_here
from helpers.corpus import write_jsonl
from helpers.processes import lines, read, same_bits, same_numbers

from doremi_train.config import UserError
from doremi_train.data.batches import Batches, MicroBatch
from doremi_train.data.batches import read as read_batch
from doremi_train.data.sampler import Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.stages.runs import reference_losses
from doremi_train.training import frozen
from doremi_train.training.frozen import Cached, Live, Table

LENGTH = 32  # of conftest's TINY
ROW = 2 * LENGTH + 4  # bytes: float16 and a checksum
CPU = torch.device("cpu")
CACHED = "reference.losses=cached"


# ── Parts ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def data(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    run_dir = tmp_path_factory.mktemp("data")
    assert run_here(*tiny, f"run_dir={run_dir}", "stage=prepare").code == 0
    return TokenStore.open((run_dir / "prepare").resolve())


@pytest.fixture
def table(data: TokenStore, tmp_path: Path) -> Table:
    return Table(tmp_path, data, frozen.recipe("a model", data, LENGTH, "fp32"))


class Counted(Live):
    """The real model, and the sequences that it was run on."""

    def __init__(self, data: TokenStore, seed: int = 0) -> None:
        config = {
            "model_type": "gpt_neox",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        }
        options = ModelOptions(config=config | {"num_attention_heads": 2})
        shape = configs.resolve(options, data.vocabulary_size, data.end_of_document, LENGTH)
        super().__init__(folders.build(shape, seed), CPU)
        self.seen: list[tuple[int, int]] = []

    def losses(self, micro: MicroBatch) -> torch.Tensor:
        self.seen += zip(micro.domain.tolist(), micro.sequence.tolist(), strict=True)
        return super().losses(micro)


def micro_batch(data: TokenStore, *where: tuple[int, int]) -> MicroBatch:
    domain, sequence = np.array(where, np.int64).reshape(-1, 2).T
    return read_batch(data, "train", domain, sequence, LENGTH)


def test_a_stored_loss_is_near_never_zero_and_says_when_it_is_not_a_number() -> None:
    exact = torch.tensor(
        [[0.0, -1e-9, 1e-7, 0.3, 3.0, 11.0, 1e6], [torch.nan, torch.inf, -torch.inf, 1, 1, 1, 1]]
    )
    found = frozen.rounded(exact)
    assert found.dtype == np.float16 and (found != 0).all()
    assert np.abs(found[0, :3]).max() < 1e-4 and found[0, -1] == 65504
    assert (np.abs(found[0, 3:6] / exact[0, 3:6].numpy() - 1) < 2**-11).all()
    assert np.isnan(found[1, 0]) and found[1, 1] == np.inf and found[1, 2] == -np.inf
    assert frozen.there(found).all()


def test_rows_and_sequences_are_the_same_thing(data: TokenStore, table: Table) -> None:
    sizes = data.sequences("train", LENGTH)
    domain = np.repeat(np.arange(3), sizes)
    sequence = np.concatenate([np.arange(size) for size in sizes])
    rows = table.rows(domain, sequence)
    assert rows.tolist() == list(range(len(table)))
    for found, expected in zip(table.sequences(rows), (domain, sequence), strict=True):
        assert (found == expected).all()


def test_a_table_takes_room_for_what_is_written_and_is_seen_by_others(
    data: TokenStore, table: Table
) -> None:
    assert table.path.stat().st_blocks == 0 and table.path.stat().st_size == ROW * len(table)
    other = Table(table.path.parents[2], data, read(table.path.with_name("recipe.json")))
    rows = np.array([0, 7, len(table) - 1])
    values = np.arange(1, 1 + 3 * LENGTH, dtype=np.float16).reshape(3, LENGTH)
    table.write(rows, values)
    assert (other.read(rows) == values).all() and frozen.there(other.read(rows)).all()
    assert not frozen.there(other.read(np.array([1, 6, 8]))).any()
    assert table.path.stat().st_blocks * 512 <= 3 * 4096


def test_only_what_is_missing_is_computed_and_once(data: TokenStore, table: Table) -> None:
    live = Counted(data)
    first, more = [(0, 3), (2, 5), (0, 4)], [(1, 1), (0, 3), (1, 1), (0, 9)]
    cached = Cached(table, lambda: live, CPU)
    exact = live.losses(micro_batch(data, *first, *more))
    live.seen.clear()
    found = [cached.losses(micro_batch(data, *where)) for where in (first, more)]
    assert sorted(live.seen) == [(0, 3), (0, 4), (0, 9), (1, 1), (2, 5)]
    assert torch.cat(found).dtype == torch.float32
    assert torch.cat(found).numpy() == pytest.approx(exact.numpy(), rel=2**-10)
    again = Cached(table, lambda: pytest.fail("the model was loaded"), CPU)
    for where, expected in zip((first, more), found, strict=True):
        # Also what was just computed was rounded.
        assert torch.equal(again.losses(micro_batch(data, *where)), expected)
    assert (
        again.losses(micro_batch(data)).shape == live.losses(micro_batch(data)).shape == (0, LENGTH)
    )


@pytest.mark.parametrize("damage", ["torn", "flipped", "of another row"])
def test_a_damaged_row_is_computed_again(damage: str, data: TokenStore, table: Table) -> None:
    live, where = Counted(data), [(0, 0), (0, 1), (1, 0)]
    whole = Cached(table, lambda: live, CPU).losses(micro_batch(data, *where))
    with table.path.open("r+b") as file:
        if damage == "torn":
            file.seek(ROW + 40)
            file.write(bytes(6))
        elif damage == "flipped":
            file.seek(ROW + 40)
            byte = file.read(1)[0]
            file.seek(ROW + 40)
            file.write(bytes([byte ^ 1]))
        else:  # its losses, without its checksum
            other = file.read(2 * LENGTH)
            file.seek(ROW)
            file.write(other)
    live.seen.clear()
    found = Cached(table, lambda: live, CPU).losses(micro_batch(data, *where))
    assert live.seen == [(0, 1)] and frozen.there(table.read(np.array([1]))).all()
    assert found.numpy() == pytest.approx(whole.numpy(), rel=2**-9)


def test_what_another_wrote_after_the_batch_was_read_ahead_is_taken(
    data: TokenStore, table: Table
) -> None:
    ahead = micro_batch(data, (0, 0), (1, 0))
    mine = Cached(table, lambda: pytest.fail("the model was loaded"), CPU)
    ahead = ahead._replace(reference=mine.stored(ahead.domain.numpy(), ahead.sequence.numpy()))
    written = Cached(table, lambda: Counted(data), CPU).losses(ahead._replace(reference=None))
    assert not frozen.there(ahead.reference.numpy()).any()
    assert torch.equal(mine.losses(ahead), written)


def test_a_loss_that_is_not_finite_is_seen_and_not_stored(data: TokenStore, table: Table) -> None:
    live, where = Counted(data), micro_batch(data, (0, 0), (0, 1))
    live._model.register_forward_hook(
        lambda _, tokens, out: out.where(torch.arange(len(out))[:, None] != 1, torch.nan)
    )
    found = Cached(table, lambda: live, CPU).losses(where)
    assert found[0].isfinite().all() and found[1].isnan().all()
    assert frozen.there(table.read(np.array([0, 1]))).tolist() == [True, False]


def test_loading_the_model_leaves_random_numbers_alone(data: TokenStore, table: Table) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Cached(table, lambda: Counted(data, seed=8), CPU).losses(micro_batch(data, (0, 0)))
    assert torch.equal(torch.rand(2), expected)


def test_rows_are_read_ahead_with_their_batch(data: TokenStore, table: Table) -> None:
    cached = Cached(table, lambda: Counted(data), CPU)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    with Batches(
        data, LENGTH, 8, [slice(0, 3), slice(3, 8)], seed=0, stored=cached.stored
    ) as batches:
        batch = batches.get(0, uniform, np.zeros(3, dtype=np.int64))
        assert [micro.reference.shape for micro in batch.micro] == [(3, LENGTH), (5, LENGTH)]
        computed = [cached.losses(micro) for micro in batch.micro]
        again = batches._read(0, uniform.numpy(), np.zeros(3, dtype=np.int64))
        for micro, expected in zip(again.micro, computed, strict=True):
            assert torch.equal(micro.reference.float(), expected)


@pytest.mark.parametrize("key", ["reference", "data", "tokenizer", "sequence_length", "precision"])
def test_anything_else_has_an_address_of_its_own(key: str, data: TokenStore, table: Table) -> None:
    recipe = read(table.path.with_name("recipe.json"))
    other = recipe | {key: 16 if key == "sequence_length" else "other"}
    assert Table(table.path.parents[2], data, other).path.parent != table.path.parent
    assert Table(table.path.parents[2], data, recipe).path == table.path


@pytest.mark.parametrize("damage", ["another", "torn", "short"])
def test_what_is_not_of_this_recipe_is_refused(damage: str, data: TokenStore, table: Table) -> None:
    said = table.path.with_name("recipe.json")
    recipe = read(said)
    if damage == "another":
        said.write_text(json.dumps(recipe | {"reference": "other"}))
    elif damage == "torn":
        said.write_text(said.read_text()[:20])
    else:
        os.truncate(table.path, 64)
    with pytest.raises(UserError, match=r"reference.losses=cached: .*; delete .*computes it again"):
        Table(table.path.parents[2], data, recipe)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_an_error_that_names_the_file(table: Table) -> None:
    rows, values = np.array([0, 1, 2]), np.ones((3, LENGTH), dtype=np.float16)
    with files_end_at(ROW + 10), pytest.raises(OSError, match="losses.f16") as caught:
        table.write(rows, values)
    assert caught.value.errno == errno.EFBIG
    assert frozen.there(table.read(rows)).tolist() == [True, False, False]


# ── The command ─────────────────────────────────────────────────────────────────────


@contextmanager
def without_reference() -> Iterator[None]:
    """Whoever needs the model fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_losses, "live", lambda *_: pytest.fail("the reference was loaded"))
        yield


def proxy(*overrides: str) -> None:
    outcome = run_here(*overrides, "stage=proxy")
    assert outcome.code == 0, outcome


def trace(run_dir: Path, column: str = "weights") -> np.ndarray:
    return np.array(
        [list(line[column].values()) for line in lines(run_dir / "proxy" / "domain_weights.jsonl")]
    )


def tables(store: Path) -> list[Path]:
    return sorted((store / "losses").iterdir())


@pytest.mark.slow
def test_weights_are_those_of_a_live_reference(
    tiny: list[str], store: Path, tmp_path: Path
) -> None:
    for where in ("live", "cached"):
        proxy(*tiny, *LONG, f"run_dir={tmp_path / where}", f"reference.losses={where}")
    live, cached = trace(tmp_path / "live"), trace(tmp_path / "cached")
    assert 0 < np.abs(live - cached).max() < 1e-3
    excess = [trace(tmp_path / where, "excess_loss") for where in ("live", "cached")]
    assert 0 < np.abs(excess[0] - excess[1]).max() < 1e-3
    recipes = [
        read((tmp_path / where / "proxy").resolve() / "recipe.json") for where in ("live", "cached")
    ]
    assert recipes[1] == recipes[0] | {"reference_losses": "cached"}
    assert not list((tmp_path / "cached" / "proxy").resolve().glob("**/*.pending"))


@pytest.mark.slow
def test_a_sweep_computes_every_loss_once(fresh: list[str], tmp_path: Path) -> None:
    proxy(*fresh, CACHED, f"run_dir={tmp_path / 'one'}")
    with without_reference():
        for change in (
            "proxy.step_size=0.1",
            "proxy.smoothing=0.01",
            "training.micro_batch_size=3",
        ):
            proxy(
                *fresh,
                CACHED,
                f"run_dir={tmp_path / change.replace('=', '-')}",
                change,
                "training.log_every=3",
            )
    assert len(tables(tmp_path / "store")) == 1


@pytest.mark.slow
def test_what_is_computed_ahead_is_all_that_the_proxies_of_all_seeds_read(
    fresh: list[str], tmp_path: Path
) -> None:
    overrides = [
        *fresh,
        CACHED,
        f"run_dir={tmp_path / 'run'}",
        "proxy.seeds=2",
        "training.batch_size=384",
    ]
    outcome = run_here(*overrides, "stage=reference")
    assert outcome.code == 0, outcome
    assert read(tmp_path / "run" / "reference" / "status.json")["state"] == "finished"
    with without_reference():
        assert run_here(*overrides, "stage=reference").code == 0  # nothing is computed twice
        proxy(*overrides)
    # And nothing more: what seeds drew, each once, of a domain that they pass over and of others.
    store = TokenStore.open((tmp_path / "run" / "prepare").resolve())
    drawn = set()
    for seed in (0, 1_000_000):
        sampler = Sampler(store.sequences("train", LENGTH), store.domains, 384, seed)
        counts = np.zeros(3, dtype=np.int64)
        for step in range(12):
            draw = sampler.draw(step, np.full(3, 1 / 3), counts)
            counts = draw.counts
            drawn |= set(zip(draw.domain.tolist(), draw.sequence.tolist(), strict=True))
    (folder,) = tables(tmp_path / "store")
    table = Table(tmp_path / "store", store, read(folder / "recipe.json"))
    rows = np.flatnonzero(frozen.there(table.read(np.arange(len(table)))))
    assert set(zip(*(part.tolist() for part in table.sequences(rows)), strict=True)) == drawn
    assert (counts > store.sequences("train", LENGTH)).tolist() == [True, False, False]
    assert (
        f"{len(drawn)} sequences" in outcome.out
        and f"{len(drawn)} of them computed now" in outcome.out
    )


def test_a_part_of_every_domain_is_computed_ahead_too(fresh: list[str], tmp_path: Path) -> None:
    overrides = [
        *fresh,
        CACHED,
        f"run_dir={tmp_path / 'run'}",
        "proxy.match_repetition=true",
        "main.tokens=100000",
    ]
    assert run_here(*overrides, "stage=reference").code == 0
    with without_reference():
        proxy(*overrides)


@pytest.mark.slow
def test_draws_from_the_weights_are_cached_as_they_come(fresh: list[str], tmp_path: Path) -> None:
    overrides = [*fresh, CACHED, "proxy.objective=resample"]
    outcome = run_here(*overrides, f"run_dir={tmp_path / 'one'}", "stage=reference")
    assert outcome.code == 0 and "not computed ahead" in outcome.out, outcome
    assert not (tmp_path / "store" / "losses").exists()
    proxy(*overrides, f"run_dir={tmp_path / 'one'}")
    with without_reference():
        proxy(*overrides, f"run_dir={tmp_path / 'two'}", "training.log_every=3")
    live = [*fresh, "proxy.objective=resample", f"run_dir={tmp_path / 'live'}"]
    proxy(*live)
    assert np.abs(trace(tmp_path / "two") - trace(tmp_path / "live")).max() < 1e-3


@pytest.mark.slow
def test_a_score_without_a_reference_needs_none(fresh: list[str], tmp_path: Path) -> None:
    overrides = [*fresh, "proxy.score=hardest"]
    with without_reference():
        for where in ("live", "cached"):
            run_dir = f"run_dir={tmp_path / where}"
            assert (
                run_here(*overrides, run_dir, f"reference.losses={where}", "stage=reference").code
                == 0
            )
            proxy(*overrides, run_dir, f"reference.losses={where}")
    assert (tmp_path / "live" / "proxy").resolve() == (tmp_path / "cached" / "proxy").resolve()
    assert not (tmp_path / "store" / "losses").exists()


@pytest.mark.slow
def test_every_round_has_its_own(fresh: list[str], tmp_path: Path) -> None:
    proxy(
        *fresh, CACHED, f"run_dir={tmp_path / 'run'}", "proxy.rounds=2", "proxy.round_tolerance=0"
    )
    said = [read(folder / "recipe.json")["reference"] for folder in tables(tmp_path / "store")]
    models = [
        tmp_path / "run" / name / "model" for name in ("reference", "proxy/round-2/reference")
    ]
    assert sorted(said) == sorted(folders.folder_fingerprint(folder) for folder in models)


@pytest.mark.slow
def test_other_data_has_its_own(fresh: list[str], corpus: Path, tmp_path: Path) -> None:
    proxy(*fresh, CACHED, f"run_dir={tmp_path / 'one'}")
    for domain in ("plain", "rich", "digits"):
        texts = [
            json.loads(line)["text"]
            for line in (corpus / domain / "train.jsonl").read_text().splitlines()
        ]
        write_jsonl(tmp_path / "changed" / domain / "train.jsonl", [texts[0] + "a", *texts[1:]])
    path = (tmp_path / "one" / "reference" / "model").resolve()
    tokenizer = (tmp_path / "one" / "prepare").resolve() / "tokenizer.json"
    changed = [
        f"data.root={tmp_path / 'changed'}",
        f"data.tokenizer={tokenizer}",
        "data.vocabulary_size=null",
    ]
    changed = [*changed[:2], f"reference.path={path}"]
    proxy(*fresh, CACHED, f"run_dir={tmp_path / 'two'}", *changed)
    one, two = (read(folder / "recipe.json") for folder in tables(tmp_path / "store"))
    assert one["reference"] == two["reference"] and one["tokenizer"] == two["tokenizer"]
    assert one["data"] != two["data"]


@pytest.mark.slow
def test_a_changed_recipe_ends_with_a_message(fresh: list[str], tmp_path: Path) -> None:
    proxy(*fresh, CACHED, f"run_dir={tmp_path / 'one'}")
    (folder,) = tables(tmp_path / "store")
    said = folder / "recipe.json"
    said.write_text(said.read_text().replace('"fp32"', '"bf16"'))
    again = [*fresh, CACHED, f"run_dir={tmp_path / 'two'}", "proxy.step_size=0.1"]
    outcome = run_here(*again, "stage=proxy")
    assert outcome.code == 2 and str(said) in outcome.err and "Traceback" not in outcome.err, (
        outcome
    )
    assert run_here(*again, "stage=plan").code == 2
    for path in (said, folder / "losses.f16"):
        path.unlink()
    proxy(*again)


@pytest.mark.slow
def test_a_full_disk_is_named_and_filling_continues_when_there_is_room(
    fresh: list[str], tmp_path: Path
) -> None:
    assert run_here(*fresh, f"run_dir={tmp_path / 'live'}", "stage=reference").code == 0
    overrides = [*fresh, CACHED, f"run_dir={tmp_path / 'run'}", "training.steps=12"]
    # No room to begin the file, and then none for its rows.
    for path in (
        "losses",
        "losses/*/losses.f16",
    ):
        with files_end_at(50_000):
            full = run_here(*overrides, "stage=reference")
        assert full.code == 1 and "no room left" in full.err and "losses.f16" in full.err, full
        assert read(tmp_path / "run" / "reference" / "status.json")["state"] == "failed"
        (file,) = (tmp_path / "store").glob("losses/*/losses.f16")
        if path == "losses":
            assert file.stat().st_size == 0
            store = TokenStore.open((tmp_path / "run" / "prepare").resolve())
            Table(tmp_path / "store", store, read(file.with_name("recipe.json")))
    assert run_here(*overrides, "stage=reference").code == 0
    with without_reference():
        proxy(*overrides)


# ── The plan ────────────────────────────────────────────────────────────────────────


def planned(*overrides: str) -> Any:
    outcome = run_here(*overrides, "stage=plan")
    assert outcome.code == 0, outcome
    run_dir = next(Path(o.removeprefix("run_dir=")) for o in overrides if o.startswith("run_dir="))
    return read(run_dir / "plan.json") | {"printed": outcome.out}


@pytest.mark.slow
def test_the_plan_counts_every_loss_that_is_missing_once(fresh: list[str], tmp_path: Path) -> None:
    many = ["training.batch_size=128", "proxy.seeds=2"]
    overrides = [*fresh, CACHED, f"run_dir={tmp_path / 'run'}", *many]
    live = planned(*fresh, f"run_dir={tmp_path / 'live'}", *many)
    new = planned(*overrides)
    assert not (tmp_path / "store" / "losses").exists()  # looking ahead changes nothing
    F = (live["stages"]["proxy/round-1/seed-0"]["flops"] - live["stages"]["reference"]["flops"]) / (
        12 * 128 * LENGTH
    )
    plain = new["stages"]["reference"]["flops"]
    seeds = [new["stages"][f"proxy/round-1/seed-{seed}"] for seed in (0, 1)]
    computed = [(seed["flops"] - plain) / (F * LENGTH) for seed in seeds]  # sequences
    sizes = [domain["training_sequences"] for domain in new["domains"].values()]
    reads = [min(1, domain["proxy_epochs"]) for domain in new["domains"].values()]
    assert computed[0] == pytest.approx(
        sum(size * part for size, part in zip(sizes, reads, strict=True))
    )
    assert computed[1] == pytest.approx(
        sum(n * part * (1 - part) for n, part in zip(sizes, reads, strict=True))
    )
    assert (
        new["reference_losses"]["missing"]
        == new["reference_losses"]["sequences"]
        == round(sum(computed))
    )
    assert new["reference_losses"]["bytes"] == live["reference_losses"]["bytes"]
    assert all(seed["memory"]["reference"] > 0 for seed in seeds)
    assert "reference losses, cached:" in new["printed"]

    assert run_here(*overrides, "stage=reference").code == 0
    there = planned(*overrides)
    assert there["reference_losses"]["missing"] == 0 and "all there" in there["printed"]
    for seed in (0, 1):
        stage = there["stages"][f"proxy/round-1/seed-{seed}"]
        assert stage["flops"] == pytest.approx(plain) and stage["memory"]["reference"] == 0
    assert there["accumulation"]["exact_over_lagged"] == 1
    other = planned(
        *fresh,
        CACHED,
        f"run_dir={tmp_path / 'other'}",
        "training.batch_size=128",
        "proxy.step_size=0.1",
    )
    assert other["reference_losses"]["missing"] == 0


def test_the_plan_knows_that_a_score_needs_no_reference(fresh: list[str], tmp_path: Path) -> None:
    found = planned(*fresh, f"run_dir={tmp_path / 'run'}", "proxy.score=hardest")
    assert found["stages"]["proxy"]["flops"] == found["stages"]["reference"]["flops"]
    assert (
        found["stages"]["proxy"]["memory"]["reference"] == 0 and found["reference_losses"] is None
    )


# ── Processes ───────────────────────────────────────────────────────────────────────


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("ahead", "engine"), [(False, "ddp"), (False, "fsdp2"), (True, "zero3")],
    ids=["lazily", "lazily, divided", "ahead, divided"],
)  # fmt: skip
def test_two_processes_fill_one_cache_and_give_the_numbers_of_one(
    ahead: bool, engine: str, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    more = [
        CACHED,
        "training.batch_size=9",
        "training.micro_batch_size=2",
        "main.comparisons=[]",
        "stage=main",
    ]
    alone = [*fresh, *more, f"store={tmp_path / 'alone'}", f"run_dir={tmp_path / 'one'}"]
    assert run_here(*alone).code == 0
    together = [*fresh, *more, f"engine={engine}", f"run_dir={tmp_path / 'two'}"]
    if ahead:
        outcome = doremi(*together, "stage=reference", processes=2)
        assert outcome.code == 0 and "96 of them computed now" in outcome.out.replace(
            "108", "96"
        ), outcome
        written = [
            path.stat().st_mtime_ns for path in (tmp_path / "store").glob("losses/*/losses.f16")
        ]
    outcome = doremi(*together, processes=2)
    assert outcome.code == 0, outcome
    same_numbers(tmp_path / "one", tmp_path / "two")
    if ahead:  # the proxies wrote nothing
        assert written == [
            path.stat().st_mtime_ns for path in (tmp_path / "store").glob("losses/*/losses.f16")
        ]
    with without_reference():  # what two processes wrote serves one
        proxy(*fresh, *more[:3], f"run_dir={tmp_path / 'three'}", "proxy.step_size=0.1")


@pytest.mark.acceptance
def test_a_divided_reference_gives_what_a_whole_one_gives_to_the_same_bits(
    fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    """Beside a model that is whole, as beside divided ones in test_engines."""
    more = ["training.batch_size=9", "training.micro_batch_size=2"]
    for sharded in ("true", "false"):
        at = [f"store={tmp_path / sharded}", f"run_dir={tmp_path / sharded}/run"]
        outcome = doremi(
            *fresh, *more, *at, f"reference.sharded={sharded}", "stage=proxy", processes=2
        )
        assert outcome.code == 0, outcome
    traces = [trace(tmp_path / sharded / "run", "excess_loss") for sharded in ("true", "false")]
    assert (traces[0] == traces[1]).all()


@pytest.mark.acceptance
def test_seeds_as_jobs_read_one_cache(fresh: list[str], doremi: Command, tmp_path: Path) -> None:
    overrides = [*fresh, CACHED, f"run_dir={tmp_path / 'run'}", "proxy.seeds=2"]
    assert doremi(*overrides, "stage=reference").code == 0
    (file,) = (tmp_path / "store").glob("losses/*/losses.f16")
    written = file.stat().st_mtime_ns
    outcome = doremi(*overrides, "stage=proxy", "submit.cluster=local")
    assert outcome.code == 0 and "is job" in outcome.out, outcome
    assert tables(tmp_path / "store") == [file.parent] and file.stat().st_mtime_ns == written


KILLED = """
import os, signal, sys
really, written, limit = os.pwrite, 0, int(sys.argv[1])

def pwrite(*arguments):
    global written
    written += 1
    if written > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*arguments)

os.pwrite = pwrite
from doremi_train import __main__
sys.argv = ["doremi-train", *sys.argv[2:]]
__main__.main()
"""


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "rows", [3, 80, 301]
)  # before the first checkpoint; between two steps; within a step
def test_killed_among_the_rows_of_a_step_it_continues_to_the_same_bits(
    rows: int, prepared: list[str], tmp_path: Path
) -> None:
    overrides = [
        *prepared,
        CACHED,
        "stage=main",
        "main.comparisons=[]",
        "training.micro_batch_size=4",
    ]
    never, run_dir = tmp_path / "never", tmp_path / "run"
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").symlink_to((tmp_path / "store" / "data").resolve())
    assert run_here(*overrides, f"store={other}", f"run_dir={never}").code == 0
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(rows), *overrides, f"run_dir={run_dir}"],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    assert not (run_dir / "proxy" / "result.json").exists()
    outcome = run_here(*overrides, f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    same_bits(never, run_dir)

"""One, two and four processes × DDP, FSDP2, ZeRO × micro-batches × exact and lagged: the same
weights and losses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import engines
from helpers.command import environment, run_here

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import folders, language_model, weights

pytestmark = pytest.mark.acceptance

ENGINES = [
    (1, "auto"),
    *((world, name) for world in (2, 4) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
]
Trajectory = dict[str, Any]


@pytest.fixture(scope="module")
def data(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store."""
    folder = tmp_path_factory.mktemp("data")
    assert run_here(*tiny, f"run_dir={folder / 'prepare'}", "stage=prepare").code == 0
    return (folder / "prepare" / "prepare").resolve()


@pytest.fixture(scope="module")
def launch(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], dict[str, Trajectory]]:
    """`launch(world, engine)` trains every case in one start of the processes; gives trace and
    metrics by case. The case "moved" continues what the launch before left."""
    folder = tmp_path_factory.mktemp("engines")
    store = TokenStore.open(data)
    reference = folders.build(engines.shape(store), 0)
    tensors = dict(reference.named_parameters())
    folders.save(reference, tensors, folder / "reference", store.tokenizer(), store.end_of_document)
    known: dict[tuple[int, str], dict[str, Trajectory]] = {}

    def train(world: int, name: str) -> dict[str, Trajectory]:
        if (world, name) not in known:
            out = folder / f"{name}-{world}"
            before = [folder / f"{name}-{world}" for world, name in known][-1:] or [out]
            start = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(world),
            ]
            command = [sys.executable] if world == 1 else start
            done = subprocess.run(
                [
                    *command,
                    str(Path(engines.__file__)),
                    name,
                    str(out),
                    str(data),
                    str(folder / "reference"),
                    str(before[0]),
                ],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=550,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
            wanted = "single, 1 process " if world == 1 else f"{name}, {world} processes "
            assert wanted in done.stdout, done.stdout
            known[world, name] = {case: read(out / case) for case in engines.cases(world)}
            known[world, name][engines.SAVED] |= of_the_model(out / engines.SAVED)
        return known[world, name]

    return train


def read(case: Path) -> Trajectory:
    (folder,) = case.glob("runs/proxy-*")
    return {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("domain_weights", "metrics", "evaluations")
    } | {"exchanges": json.loads((case / "exchanges.json").read_text())}


def of_the_model(case: Path) -> Trajectory:
    """The folder that was saved, and the bits of its tensors at birth and at the end."""
    bits = {name: json.loads((case / f"{name}.json").read_text()) for name in ("birth", "trained")}
    return {"model": case / "model", **bits}


def largest(a: list[Any], b: list[Any], column: str) -> float:
    """The largest difference of a column of dicts over all steps; the draws must be the same."""
    assert [line["tokens"] for line in a] == [line["tokens"] for line in b]
    return max(
        abs(x[column][k] - y[column][k]) for x, y in zip(a, b, strict=True) for k in x[column]
    )


def compare(one: Trajectory, other: Trajectory, weights: float = 1e-6, loss: float = 1e-4) -> None:
    assert largest(one["domain_weights"], other["domain_weights"], "weights") < weights
    assert largest(one["domain_weights"], other["domain_weights"], "excess_loss") < 10 * weights
    for name, column in (("metrics", "loss"), ("evaluations", "mean_loss")):
        for x, y in zip(one[name], other[name], strict=True):
            assert x["step"] == y["step"]
            if x[column] is None:  # nothing was learned since the line before
                assert y[column] is None
            else:
                assert abs(x[column] - y[column]) < loss


@pytest.mark.parametrize(("world", "name"), ENGINES)
def test_every_engine_and_cut_gives_the_numbers_of_one_process(
    world: int, name: str, launch: Any
) -> None:
    alone, these = launch(1, "auto"), launch(world, name)
    for case in engines.cases(world):
        # `lagged` with one micro-batch is no special case: it weighs with α of the step before,
        # however it is cut.
        of = (
            "lagged-1"
            if case.startswith("lagged")
            else "exact-1"
            if case.startswith(("exact", "fused", "moved"))
            else case
        )
        compare(alone[of], these[case], *((5e-3, 5e-3) if case == "bf16" else ()))
    assert these["resumed"]["domain_weights"] == these["exact-1"]["domain_weights"]  # bit for bit
    assert these["resumed"]["evaluations"] == these["exact-1"]["evaluations"]


@pytest.mark.parametrize(("world", "name"), ENGINES)
def test_a_model_is_born_with_the_same_bits_everywhere(
    world: int, name: str, launch: Any, data: Path
) -> None:
    shape = engines.shape(TokenStore.open(data))
    whole = language_model.tensors_of(folders.build(shape, engines.SEED))
    assert launch(world, name)[engines.SAVED]["birth"] == engines.digests_of(dict(whole))


@pytest.mark.parametrize(("world", "name"), ENGINES)
def test_a_model_saved_in_parts_is_the_trained_one(world: int, name: str, launch: Any) -> None:
    from transformers import AutoModelForCausalLM

    these = launch(world, name)[engines.SAVED]
    folder = these["model"]
    files = [path.stat().st_size for path in folder.glob("model-*.safetensors")]
    assert len(files) > 3 and (folder / weights.INDEX).exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    found = {f"inner.{name}": tensor for name, tensor in loaded.named_parameters()}
    assert engines.digests_of(found) == these["trained"]
    of_one = launch(1, "auto")[engines.SAVED]["model"] / "config.json"
    assert (folder / "config.json").read_text() == of_one.read_text()


def test_a_step_exchanges_one_sum_of_two_floats_a_domain_and_one(launch: Any) -> None:
    """Whatever the number of micro-batches. Beside it there are the logged loss (2 and 1), here at
    every step, and at the end one evaluation, of the same size as a step's, and whether parameters
    are finite, of the size of a logged loss."""
    domains = 3
    for case in ("exact-1", "exact-4", "lagged-4"):
        exchanges = launch(2, "fsdp2")[case]["exchanges"]
        assert sorted(exchanges) == [3] * (engines.STEPS + 1) + [2 * domains + 1] * (
            engines.STEPS + 1
        )


def test_the_cases_are_not_all_the_same(launch: Any) -> None:
    """α of this batch or of the one before is a difference that the comparison above would see."""
    alone = launch(1, "auto")
    assert (
        largest(alone["exact-1"]["domain_weights"], alone["lagged-1"]["domain_weights"], "weights")
        > 1e-5
    )
    assert (
        largest(alone["exact-1"]["domain_weights"], alone["bf16"]["domain_weights"], "weights")
        > 1e-6
    )
    # Other sums: the same bits would mean it never was.
    assert alone["exact-1"]["metrics"] != alone["fused"]["metrics"]


def test_a_batch_that_is_not_finite_is_left_out_on_all_processes(launch: Any) -> None:
    for world, name in ((1, "auto"), (2, "fsdp2")):
        trace = launch(world, name)["broken"]["domain_weights"]
        step = engines.CASES["broken"].broken_step
        assert trace[step]["weights"] == trace[step - 1]["weights"] != trace[step + 1]["weights"]
        assert [line["step"] for line in trace if line.get("skipped")] == [step + 1]
        losses = {line["step"]: line["loss"] for line in launch(world, name)["broken"]["metrics"]}
        assert [number for number, loss in losses.items() if loss is None] == [step + 1]

"""The configurations under launch/ start what they say, and a launch that would be something else
is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.command import ROOT, Command, environment, run_here

CONFIGS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
GOT = {
    "cpu": "ddp, 2 processes on cpu (gloo), fp32: DistributedDataParallel, AdamW",
    "ddp": "ddp, 2 processes on cpu (gloo), fp32: DistributedDataParallel, AdamW",
    "fsdp2": "fsdp2, 2 processes on cpu (gloo), fp32: FSDPLanguageModel, AdamW",
    "zero1": "zero1, 2 processes on cpu (gloo), fp32: DeepSpeedEngine, DeepSpeedZeroOptimizer",
    "zero2": "zero2, 2 processes on cpu (gloo), fp32: DeepSpeedEngine, DeepSpeedZeroOptimizer",
    "zero3": "zero3, 2 processes on cpu (gloo), fp32: "
    "DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3",
}


def accelerate(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    given = {
        name: value for name, value in environment().items() if name != "ACCELERATE_USE_CPU"
    } | more
    return subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGS} == GOT.keys()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.acceptance
def test_a_configuration_starts_what_it_says(config: Path, tiny: list[str], tmp_path: Path) -> None:
    overrides = [
        *tiny,
        f"store={tmp_path / 'store'}",
        f"run_dir={tmp_path / 'run'}",
        "stage=reference",
    ]
    # As a killed compilation of DeepSpeed leaves it.
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    start = ["--config_file", str(config), "-m", "doremi_train"]
    done = accelerate(*start, *overrides, TORCH_EXTENSIONS_DIR=str(lock.parents[1]))
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = "reference              " + GOT[config.stem]
    assert done.stdout.splitlines().count(wanted) == 1, done.stdout
    result = json.loads((tmp_path / "run" / "reference" / "result.json").read_text())
    assert result["engine"] == GOT[config.stem] and result["steps"] == 12


@pytest.mark.slow
def test_a_launch_of_two_that_would_run_one_is_refused(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, f"run_dir={tmp_path / 'run'}", "stage=prepare"]
    done = accelerate("--cpu", "--num_processes", "2", "-m", "doremi_train", *overrides)
    assert (
        "several processes and started one" in done.stderr
        and "launch/accelerate/cpu.yaml" in done.stderr
    )
    assert done.returncode != 0 and not (tmp_path / "run").exists()


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
REFUSED: list[tuple[dict[str, str], list[str], list[str]]] = [
    ({"WORLD_SIZE": "2"}, [], ["WORLD_SIZE=2", "RANK", "MASTER_ADDR", "torchrun"]),
    ({"WORLD_SIZE": "two"}, [], ["WORLD_SIZE=two", "a number from 1", "torchrun"]),
    ({"WORLD_SIZE": "2", "RANK": "2"}, [], ["RANK=2", "from 0 to 1"]),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "x"}, [], ["MASTER_PORT=x", "65535"]),
    (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        [],
        ["mixed_precision bf16", "training.precision=fp32"],
    ),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["training.precision=bf16"], ["mixed_precision fp16"]),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], ["dynamo", "engine.compile=true"]),
    (FSDP | {"FSDP_VERSION": "1"}, [], ["fsdp_version: 1", "fsdp_version: 2"]),
    (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, [], ["fsdp_offload_params: true"]),
    (
        FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
        [],
        ["fsdp_reshard_after_forward: false", "engine=ddp"],
    ),
    (FSDP, ["engine=zero2"], ["engine.strategy=zero2", "asks for fsdp2"]),
    (FSDP, [], ["engine.strategy=fsdp2", "torchrun"]),  # one process that was started alone
    (ZERO, ["engine=ddp"], ["engine.strategy=ddp", "asks for zero2"]),
    (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, [], ["ZeRO stage 0", "1, 2, 3"]),
    ({}, ["engine=zero2", "engine.deepspeed=nowhere.json"], ["engine.strategy=zero2"]),
]


@pytest.mark.parametrize(
    ("given", "overrides", "fragments"), REFUSED, ids=lambda value: " ".join(map(str, value))
)
def test_what_was_asked_for_and_would_not_be_got_is_refused(
    given: dict[str, str],
    overrides: list[str],
    fragments: list[str],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    outcome = run_here(*tiny, f"run_dir={tmp_path / 'run'}", "stage=plan", *overrides)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert all(fragment in outcome.err for fragment in fragments), outcome.err
    assert not (tmp_path / "run").exists()


SETTINGS: list[tuple[str, dict[str, object], list[str]]] = [
    ("zero2", {"zero_optimization": {"stage": 3}}, ["stage 3", "zero2"]),
    ("zero2", {"train_batch_size": 8}, ["train_batch_size=8", "training.batch_size"]),
    ("zero1", {"bf16": {"enabled": True}}, ["bf16", "training.precision"]),
    ("zero3", {"zero_optimization": {"stage": 3, "overlap_comm": True}}, ["overlap_comm"]),
    (
        "zero3",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        ["offload_param"],
    ),
]


@pytest.mark.parametrize(("strategy", "settings", "fragments"), SETTINGS, ids=str)
def test_deepspeed_s_file_may_not_say_what_the_trainer_decides(
    strategy: str, settings: dict[str, object], fragments: list[str], tmp_path: Path
) -> None:
    from doremi_train.config import UserError
    from doremi_train.parallel import launcher

    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        launcher.read_deepspeed(str(file), strategy)
    assert all(fragment in str(error.value) for fragment in [*fragments, str(file)])


def test_deepspeed_s_files_are_read(tmp_path: Path) -> None:
    from doremi_train.parallel import launcher

    for stage in (1, 2, 3):
        settings = launcher.read_deepspeed(
            str(ROOT / "launch" / "deepspeed" / f"zero{stage}.json"), f"zero{stage}"
        )
        assert settings["zero_optimization"]["stage"] == stage
        named = yaml.safe_load((ROOT / "launch" / "accelerate" / f"zero{stage}.yaml").read_text())
        assert (
            named["deepspeed_config"]["deepspeed_config_file"]
            == f"launch/deepspeed/zero{stage}.json"
        )


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_adafactor_is_refused_where_matrices_are_cut(strategy: str) -> None:
    import torch

    from doremi_train.config import UserError
    from doremi_train.model.optim import OptimizerOptions
    from doremi_train.parallel import engine
    from doremi_train.parallel.place import Place

    place = Place(strategy, torch.device("cpu"), False, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="training.optimizer=adafactor.*engine=ddp"):
        engine.build(place, torch.nn.Linear(2, 2), OptimizerOptions(optimizer="adafactor"))  # type: ignore[arg-type]


@pytest.mark.acceptance
@pytest.mark.parametrize(("processes", "engine"), [(1, "auto"), (2, "ddp"), (2, "fsdp2")])
def test_compiled_is_the_same_run(
    processes: int, engine: str, tiny: list[str], fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    overrides = ["stage=proxy", "training.checkpoint_every=5", "model.config.num_hidden_layers=1"]
    assert run_here(*tiny, *overrides, f"run_dir={tmp_path / 'plain'}").code == 0
    # The proxy alone: compiling takes most of the time.
    overrides += [
        f"reference.path={tmp_path / 'plain/reference/model'}",
        f"engine={engine}",
        "engine.compile=true",
    ]
    outcome = doremi(*fresh, *overrides, f"run_dir={tmp_path / 'compiled'}", processes=processes)
    assert outcome.code == 0, outcome
    assert ", compiled, fp32: " in outcome.out, outcome.out
    plain, compiled = (
        [
            json.loads(line)
            for line in (tmp_path / name / "proxy" / "domain_weights.jsonl")
            .read_text()
            .splitlines()
        ]
        for name in ("plain", "compiled")
    )
    for a, b in zip(plain, compiled, strict=True):
        assert a["weights"] == pytest.approx(b["weights"], abs=1e-6)
    # Other kernels: the same bits would mean it never compiled.
    assert plain[-1]["weights"] != compiled[-1]["weights"]

"""`selection=less` as a command: its steps, what it leaves out and refuses, and what it finds on
planted tasks."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.command import Command, start

from benchmarks import planted_tasks
from benchmarks.planted_tasks import TASKS, records, write
from doremi_train import files
from doremi_train.data import instructions
from doremi_train.data.chat import Encoder
from doremi_train.data.corpus import formats
from doremi_train.data.corpus.opening import Source
from doremi_train.data.options import DataOptions, Split
from doremi_train.model import optim
from doremi_train.model.optim import OptimizerOptions

pytest.importorskip("numba", reason="the baselines by words need the extra select")

TINY = (
    "stage=select", "selection=less", "data.embedded=null", "finetune.lora.rank=null",
    "training.threads=1", "training.sequence_length=12", "training.batch_size=8",
    "training.learning_rate=0.001", "selection.less.epochs=2", "evaluation.sequences=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, a pool of 100 examples with a few odd ones, and two targets, one with two
    subtasks."""
    folder = tmp_path_factory.mktemp("less")
    planted_tasks.untrained(folder / "model", width=32)
    pool = records(1, 20, 0.2)
    pool.insert(3, {"prompt": "a b", "completion": ""})  # no token that carries a loss
    pool.insert(5, dict(pool[4], task="copy"))
    pool.append(
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    )
    for example in pool:  # words that no tokeniser knows and a terminal could take for markup
        if "prompt" in example:
            example["prompt"] = re.sub(r"\b[ab]\b", "[/INST]", example["prompt"])
    write(folder / "pool.jsonl", pool)
    write(folder / "held.jsonl", records(2, 2, 0.0))
    write(folder / "amber.jsonl", records(3, 6, 0.0, ("amber",)))
    parts = [
        dict(line, subtask=f"part {n % 2}") for n, line in enumerate(records(4, 5, 0.0, ("birch",)))
    ]
    write(folder / "birch.jsonl", parts)
    return folder


def overrides(folder: Path, **changes: str) -> list[str]:
    split = f"{{train: [{folder}/pool.jsonl], validation: [{folder}/held.jsonl]}}"
    given = {
        "finetune.model": f"{folder}/model",
        "data.domains": f"{{pool: {split}}}",
        "selection.targets": f"{{amber: [{folder}/amber.jsonl], birch: [{folder}/birch.jsonl]}}",
        "store": f"{folder}/store",
    } | changes
    return [*TINY, *(f"{key}={value}" for key, value in given.items())]


@pytest.fixture(scope="module")
def chosen(folder: Path, command: Command) -> Path:
    run_dir = folder / "run"
    outcome = command(*overrides(folder), f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    assert (
        "1 without a token that carries a loss" in outcome.out
        and "pool.jsonl, line 4" in outcome.out
    )
    assert "1 copies of others" in outcome.out and "[/INST]" in outcome.out
    return run_dir


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_choice_is_lines_of_the_pool_for_every_target_and_method(
    folder: Path, chosen: Path
) -> None:
    pool = lines(folder / "pool.jsonl")
    result = json.loads((chosen / "select/result.json").read_text())
    assert result["examples"] == 102 and result["without_loss"]["examples"] == 1
    assert result["targets"]["birch"]["subtasks"] == {"part 0": 3, "part 1": 2}
    for target in ("amber", "birch"):
        for method in ("less", "random", "bm25", "ngram", "rds", "rds_plus", "all"):
            found = lines(chosen / "select" / target / f"{method}.jsonl")
            assert len(found) == (102 if method == "all" else 5)
            assert all(line in pool and line.get("completion") != "" for line in found)
    scores = pq.read_table(chosen / "select/birch/scores.parquet").to_pydict()
    best = np.argsort([-s for s in scores["score"]], kind="stable")[:6]
    assert {scores["line"][n] for n in best if scores["copy_of"][n] == n} >= {
        line for line, taken in zip(scores["line"], scores["less"], strict=True) if taken
    }
    assert not any(taken for n, taken in enumerate(scores["less"]) if scores["copy_of"][n] != n)
    page = (chosen / "report.html").read_text()
    assert all(
        word in page for word in ("Highest influence", "Lowest influence", "in rds_plus", "<svg")
    )


def test_weights_of_checkpoints_are_the_mean_rates_of_the_recorded_schedule(chosen: Path) -> None:
    warm = json.loads((chosen / "warmup/result.json").read_text())
    recipe = json.loads((chosen / "warmup/recipe.json").read_text())
    metrics = {
        line["step"]: line["learning_rate"] for line in lines(chosen / "warmup/metrics.jsonl")
    }
    assert warm["examples"] == 6 and recipe["epoch"] == 1 and len(warm["learning_rates"]) == 2
    schedule = {
        key: recipe["training"][key]
        for key in ("learning_rate", "end_learning_rate", "schedule", "warmup")
    }
    expected = [optim.learning_rate(step, 2, OptimizerOptions(**schedule)) for step in (1, 2)]
    assert warm["learning_rates"] == pytest.approx(expected, rel=1e-12)
    assert metrics[2] == pytest.approx(warm["learning_rates"][1])
    assert len(list((chosen / "warmup/epochs").glob("step-*/manifest.json"))) == 2


def test_leftovers_of_kills_are_passed_over_and_cleared(
    folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, link = tmp_path / "store", os.link

    def killed(*arguments: Any) -> None:
        if "manifest" in str(arguments[0]):
            raise KeyboardInterrupt
        link(*arguments)

    again = [*overrides(folder, store=store), f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        command(*again)
    monkeypatch.undo()
    (warm,) = store.glob("runs/warmup-*")
    left = [
        warm / "checkpoints/step-000000010.32484.partial",
        files.aside_of(warm / "checkpoints/step-000000010"),
        files.aside_of(warm / "epochs/step-000000010"),
        files.aside_of(next(store.glob("data/instructions-*/")) / "manifest.json"),
    ]
    for path in left:
        path.write_bytes(b"half")
    files.aside_of(tmp_path / "run/warmup").symlink_to("nowhere")
    outcome = command(*again)
    assert outcome.code == 0, outcome
    assert not [*tmp_path.rglob("*.partial")]
    kept = [path.name for path in (warm / "epochs").iterdir()]
    assert sorted(kept) == ["step-000000001", "step-000000002"]


def test_what_is_there_is_not_computed_again_and_what_is_missing_is(
    folder: Path, chosen: Path, command: Command, tmp_path: Path
) -> None:
    store = folder / "store"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.npy")}
    shards = [path for path in before if "shard-" in path.name]
    assert len(shards) == 2  # one for each checkpoint
    shards[0].unlink()
    result = (chosen / "select/result.json").read_text()
    shutil.rmtree((chosen / "select").resolve())  # a choice that a kill took away
    assert command(*overrides(folder), f"run_dir={chosen}").code == 0
    assert (chosen / "select/result.json").read_text() == result
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == shards[:1]


@pytest.mark.slow
def test_kept_features_serve_later_targets_and_agree_with_direct_scores(
    folder: Path, chosen: Path, command: Command, tmp_path: Path
) -> None:
    kept = (
        "selection.less.features=int8",
        "selection.less.dimension=131072",
        "selection.less.baselines=[]",
    )
    first = command(
        *overrides(folder, **{"selection.targets": "null"}), *kept, f"run_dir={tmp_path}/first"
    )
    assert first.code == 0 and "features are in the store" in first.out
    features = list((folder / "store/selection").glob("*/epoch-*/shard-*.npy"))
    wide = {
        path: path.stat().st_mtime_ns
        for path in features
        if np.load(path, mmap_mode="r").dtype == np.int8
    }
    assert len(wide) == 2
    assert command(*overrides(folder), *kept, f"run_dir={tmp_path}/second").code == 0
    assert {path: path.stat().st_mtime_ns for path in wide} == wide
    exact, projected = (
        np.array(pq.read_table(path / "select/birch/scores.parquet")["score"])
        for path in (chosen, tmp_path / "second")
    )
    assert np.corrcoef(exact, projected)[0, 1] > 0.9


@pytest.mark.acceptance
def test_two_processes_score_as_one(folder: Path, chosen: Path, tmp_path: Path) -> None:
    """Under torchrun, with a store of its own."""
    started = start(
        *overrides(folder, store=f"{tmp_path}/store"), f"run_dir={tmp_path}/run", processes=2
    )
    out, err = started.communicate(timeout=240)
    assert started.returncode == 0, out + err
    for target in ("amber", "birch"):
        one, two = (
            pq.read_table(path / f"select/{target}/scores.parquet")
            for path in (chosen, tmp_path / "run")
        )
        assert one.drop(["score"]) == two.drop(["score"])
        np.testing.assert_allclose(one["score"], two["score"], rtol=1e-3, atol=1e-9)


def test_finetune_trains_on_a_choice(
    folder: Path, chosen: Path, command: Command, tmp_path: Path
) -> None:
    steps = (
        "stage=finetune",
        "selection.train=birch",
        "training.steps=3",
        f"run_dir={tmp_path}/run",
    )
    outcome = command(*overrides(folder), *steps)
    assert outcome.code == 0, outcome
    told = json.loads((tmp_path / "run/finetune/result.json").read_text())["data"]["examples"]
    assert told == {"birch": {"train": 5, "validation": 5}}


def test_a_record_of_the_pool_is_read_once_and_tokenised_once_up_to_training(
    folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the one reader of JSON lines and the one encoder, in an empty store."""
    read: Counter[str] = Counter()
    tokenised: Counter[str] = Counter()
    objects, encoded = formats.objects, Encoder.encoded

    def counted_objects(source: Source, *rest: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, record in objects(source, *rest):
            read[f"{source.url}, line {number}"] += 1
            yield number, record

    def counted_encoded(self: Encoder, record: dict[str, Any], place: str) -> Any:
        tokenised[place] += 1
        return encoded(self, record, place)

    monkeypatch.setattr(formats, "objects", counted_objects)
    monkeypatch.setattr(Encoder, "encoded", counted_encoded)
    steps = ("stage=finetune", "selection.train=birch", "training.steps=1")
    run_dir = f"run_dir={tmp_path}/run"
    assert command(*overrides(folder, store=f"{tmp_path}/store"), *steps, run_dir).code == 0
    pool = {
        f"{folder}/pool.jsonl, line {n}": 1 for n in range(1, len(lines(folder / "pool.jsonl")) + 1)
    }
    assert {place: n for place, n in read.items() if "pool.jsonl" in place} == pool
    assert {place: n for place, n in tokenised.items() if "pool.jsonl" in place} == pool
    assert not any(str(tmp_path) in place for place in (read | tokenised))  # nor the choice again


@pytest.mark.parametrize("method", ["less", "random", "all"])
def test_examples_of_a_choice_are_prepared_as_its_file_would_be(
    folder: Path, chosen: Path, command: Command, tmp_path: Path, method: str
) -> None:
    """The same address and the same bytes, so the same run."""
    more = (f"selection.less.train_on={method}", "selection.train=birch", "training.steps=1")
    outcome = command(*overrides(folder), "stage=finetune", *more, f"run_dir={tmp_path}/run")
    assert outcome.code == 0, outcome
    file = (chosen / "select" / "birch" / f"{method}.jsonl").resolve()
    where = DataOptions(
        embedded=None, domains={"birch": Split((str(file),), (f"{folder}/birch.jsonl",))}
    )
    encoder = Encoder(f"{folder}/model", "finetune.model")
    alone = instructions.prepare(where, encoder, 12, tmp_path / "alone")
    there = folder / "store" / "data" / alone.name
    assert sorted(path.name for path in alone.iterdir()) == sorted(p.name for p in there.iterdir())
    for path in alone.iterdir():
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ("selection.targets={amber: [nowhere.jsonl]}",),
            ("selection.targets.amber", "nowhere.jsonl"),
        ),
        (("training.optimizer=adafactor",), ("training.optimizer=adafactor", "adamw")),
        (
            ("selection.less.train_on=bm25", "selection.less.baselines=[]"),
            ("train_on=bm25", "baselines"),
        ),
        (("selection.tokens={pool: 5}",), ("selection.tokens", "one budget")),
        (("finetune.model=null",), ("finetune.model", "missing")),
        (("stage=main", "selection.train=amber"), ("selection=less", "stage=finetune")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_message(
    folder: Path, command: Command, tmp_path: Path, changes: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = command(
        *overrides(folder, store=f"{tmp_path}/store"), f"run_dir={tmp_path}/run", *changes
    )
    assert outcome.code == 2 and all(word in outcome.err for word in words), outcome


@pytest.mark.parametrize("where", ["pool", "amber"])
@pytest.mark.parametrize(
    "line", ['{"prompt": "a b"}', '{"prompt": 3, "completion": "a"}', '{"messages": []}']
)
def test_a_malformed_record_is_named(
    folder: Path, command: Command, tmp_path: Path, where: str, line: str
) -> None:
    for name in ("pool", "held", "amber", "birch"):
        shutil.copy(folder / f"{name}.jsonl", tmp_path)
    with (tmp_path / f"{where}.jsonl").open("a") as file:
        file.write(line + "\n")
    count = len((tmp_path / f"{where}.jsonl").read_text().splitlines())
    outcome = command(
        *overrides(tmp_path, **{"finetune.model": f"{folder}/model"}), f"run_dir={tmp_path}/run"
    )
    assert outcome.code == 2 and f"{where}.jsonl, line {count}" in outcome.err, outcome


# Another trainer's warm-up


@pytest.fixture(scope="module", params=[False, True], ids=["full", "LoRA"])
def elsewhere(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, Any]:
    """A folder with what transformers' Trainer left after each of two epochs, and that trainer."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    if request.param:
        peft = pytest.importorskip("peft")
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, options)
    ids = np.random.default_rng(0).integers(1, 13, (8, 10)).tolist()
    out = folder / f"elsewhere-{request.param}"
    arguments = TrainingArguments(
        str(out), num_train_epochs=2, per_device_train_batch_size=4, save_strategy="epoch",
        logging_steps=1, report_to="none", use_cpu=True, learning_rate=1e-3, disable_tqdm=True,
        weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
    )
    trainer.train()
    return out, trainer


def test_checkpoints_of_transformers_trainer_are_read_by_name(
    folder: Path,
    elsewhere: tuple[Path, Any],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from doremi_train.stages.choice import warmup

    out, trainer = elsewhere
    seen: list[Any] = []
    opened = warmup._opened
    monkeypatch.setattr(warmup, "_opened", lambda *given: seen.append(opened(*given)) or seen[-1])
    folders = f"selection.less.checkpoints=[{out}/checkpoint-2,{out}/checkpoint-4]"
    store = f"{tmp_path}/store"
    outcome = command(
        *overrides(folder, store=store),
        folders,
        "selection.less.baselines=[]",
        f"run_dir={tmp_path}/run",
    )
    assert outcome.code == 0, outcome
    moments, states = seen[-1].moments, trainer.optimizer.state
    theirs = {
        f"inner.{name.removeprefix('base_model.model.')}": states[p]
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    assert moments.keys() == theirs.keys()
    for name, state in theirs.items():
        np.testing.assert_array_equal(moments[name].first, state["exp_avg"])
        assert moments[name].step == 4
    rates = warmup._given(None, [out / "checkpoint-2", out / "checkpoint-4"]).rates  # type: ignore[arg-type]
    logged = [
        line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line
    ]
    assert rates == pytest.approx([np.mean(logged[:2]), np.mean(logged[2:])])
    outcome = command(
        *overrides(folder, store=store), folders.replace("-2", "-3"), f"run_dir={tmp_path}/other"
    )
    assert outcome.code == 2 and "checkpoint-3" in outcome.err


# Recovery


@pytest.mark.acceptance
def test_planted_tasks_are_recovered_where_words_say_nothing(
    command: Command, tmp_path: Path
) -> None:
    """The best 5 % of a pool of five tasks, a fifth of it noise: right answers of the target's own
    task."""
    found = planted_tasks.recovered(
        command, tmp_path, planted_tasks.pretrained(command, tmp_path / "base", 64)
    )
    for target in TASKS:
        assert found[target]["less"] >= 0.9, found
        assert max(found[target]["bm25"], found[target]["ngram"]) < 0.5, found


@pytest.mark.acceptance
def test_a_half_as_wide_model_chooses_for_another(command: Command, tmp_path: Path) -> None:
    """LESS-T."""
    scorer = planted_tasks.pretrained(command, tmp_path / "scorer", 32)
    base = planted_tasks.untrained(tmp_path / "base", 64)
    found = planted_tasks.recovered(
        command, tmp_path, base, f"selection.scorer_model={scorer}", "selection.less.baselines=[]"
    )
    assert all(found[target]["less"] >= 0.8 for target in TASKS), found

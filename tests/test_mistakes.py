"""A user's mistake gives exit code 2, one message and no traceback, whatever it is: configurations
with other values and files with other bytes are drawn, and what was found so stands below by name.

What is found only while training may give exit code 1 with a message. Whatever else a command
raises would be a traceback, and fails the test.
"""

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import bench as benches
from helpers import spoiled
from helpers.command import TINY, run_here
from helpers.mistakes import (
    BASES,
    Answer,
    Change,
    answer,
    base,
    changed,
    changes,
    checked,
    names_something,
    plausible,
)
from helpers.spoiled import CASES
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from doremi_train.config import UserError
from doremi_train.data.chat import Encoder
from doremi_train.data.corpus import sidecar
from doremi_train.data.corpus.sources import resolve
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import launcher
from doremi_train.storage import runs

TODAY = int(datetime.date.today().strftime("%Y%m%d"))  # the seed of what is drawn at length


def few(examples: int) -> settings:
    """The same examples at every run."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def many(examples: int) -> Callable[[Any], Any]:
    """Other examples every day."""

    def decorate(test: Any) -> Any:
        return seed(TODAY)(
            settings(
                max_examples=examples, deadline=None, database=None, print_blob=True,
                suppress_health_check=list(HealthCheck),
            )(test)
        )  # fmt: skip

    return decorate


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benches.make(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def here(bench: Path) -> Iterator[Path]:
    """A bench of one test's own, as the working directory."""
    with benches.copied(bench) as folder:
        yield folder


def one_message(said: Answer) -> None:
    assert said.code in (0, 1, 2), said
    if said.code:
        assert said.message.strip() and "Traceback" not in said.message, said
        assert names_something(said.message) and len(said.message) < 5000, said


# Of every kind of stage one that is composed at each run.
VARIED = ("pipeline", "evaluate", "export", "swarm", "ngram", "classify", "less")

# ── Configurations ──────────────────────────────────────────────────────────────────


def whole(name: str, mistakes: list[Change], store: Path) -> Answer:
    """What a command of a spoiled configuration answers, on the bench it stands in."""
    return answer(changed(base(name) | {"run_dir": "run", "store": str(store)}, mistakes))


def started_elsewhere(mistakes: list[Change]) -> bool:
    """Whether other processes would be started, in which these mistakes are the same."""
    return any(key in ("submit", "submit.cluster", "selection.engine") for key, _ in mistakes)


def check_only(bench: Path, name: str, mistakes: list[Change]) -> None:
    with contextlib.chdir(bench):  # nothing is written
        one_message(checked(changed(base(name), mistakes)))


def check_whole(bench: Path, store: Path, name: str, mistakes: list[Change]) -> None:
    if started_elsewhere(mistakes):
        return
    with benches.copied(bench):
        one_message(whole(name, mistakes, store))


@pytest.mark.slow
@few(200)
@given(name=st.sampled_from(VARIED), mistakes=changes())
def test_a_spoiled_configuration_is_taken_or_refused(
    bench: Path, name: str, mistakes: list[Change]
) -> None:
    check_only(bench, name, mistakes)


@pytest.mark.slow
@few(16)
@given(name=st.sampled_from(("prepare", "plan")), mistakes=plausible())
def test_a_command_of_a_spoiled_configuration_works_or_says_why_not(
    bench: Path, store: Path, name: str, mistakes: list[Change]
) -> None:
    check_whole(bench, store, name, mistakes)


@pytest.mark.acceptance
@many(2000)
@given(name=st.sampled_from([*BASES]), mistakes=changes())
def test_many_spoiled_configurations(bench: Path, name: str, mistakes: list[Change]) -> None:
    print(f"seed {TODAY}")
    check_only(bench, name, mistakes)


@pytest.mark.acceptance
@many(60)
@given(name=st.sampled_from([*BASES]), mistakes=plausible(large=False))
def test_many_commands(bench: Path, store: Path, name: str, mistakes: list[Change]) -> None:
    print(f"seed {TODAY}: {name} {mistakes}")
    check_whole(bench, store, name, mistakes)


OVERRIDES = (
    "~stage", "~run_dir", "~store", "~tracking", "~selection=1_000", "~swarm.kl", "stage=[plan]",
    "stage=null", "hydra.run.dir=/proc/nowhere", "data.root='\udcff'", "data.root=${missing}",
    "data.root=???", "data.only={", "training.steps=1e999", "training.steps=choice(1,2)",
    "+data.domains={1: {train: [x]}}", "seed=${seed}", "model=💥", "data.text_key=\t",
)  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES)
def test_what_the_command_line_may_hold(override: str, here: Path, store: Path) -> None:
    """It begins before a configuration is there: Hydra and OmegaConf judge too."""
    run = [*TINY, *BASES["prepare"], "run_dir=run", f"store={store}"]
    outcome = run_here(*run, override)
    one_message(Answer(outcome.code, outcome.err))
    assert outcome.code in (0, 2) and outcome.err.count("doremi-train: ") == bool(outcome.code)


# What was found so, and what is said of it now.
FOUND: list[tuple[str, str, Any, str]] = [
    ("plan", "training", "fast", r"training='fast': .*an object"),
    ("plan", "data", None, r"data=None: .*an object"),
    ("plan", "stage", ["plan"], r"stage=\['plan'\]: unknown; allowed: pipeline"),
    ("plan", "data.root", "a\ud800", r"data\.root='a\\ud800': .* no UTF-8; .*rename"),
    ("export", "export.paths", "deep.json", r"export\.paths=deep\.json: not a JSON file .*recurs"),
    ("export", "export.paths", "list.json", r"export\.paths=list\.json: must hold a JSON object"),
    ("export", "export.path", "corpus", r"export\.path='corpus': .*check path"),
    ("plan", "run_dir", "weights.json", r"run_dir='weights\.json': .*check path"),
    ("plan", "store", "weights.json/in", r"store='weights\.json/in': .*check path"),
    ("plan", "run_dir", "\0", r"run_dir='\\x00': .*check path"),
    ("plan", "training.sequence_length", 2**53, r"training\.sequence_length=9007.*less than 9007"),
    ("plan", "training.adam_betas", [], r"training\.adam_betas=\[\]: too few values; [^;]*$"),
    ("plan", "training.adam_betas", [0.9], r"training\.adam_betas=\[0\.9\]: too few values"),
    ("plan", "training.timeout", 1e300, r"training\.timeout=1e\+300: .*less than or equal"),
    ("plan", "training.threads", 2**31, r"training\.threads=2147483648: .*equal to 4096"),
    ("plan", "data.text_key", "é" * 9000, r"data\.text_key='é+(.|\n)* … "),
    ("classify", "classify.methods", [], r"classify\.methods=\[\]: .*name one way"),
    ("classify", "classify.columns", "\0", r"classify\.columns=.*give another"),
    ("random", "selection.tokens", 7, r"selection\.tokens=7: nothing was chosen"),
    ("reference", "reference.path", "a" * 3000, r"reference\.path=a"),
    ("vocabulary", "vocabulary.learned", 2**40, r"vocabulary\.learned=.*equal to 10000000"),
    ("vocabulary", "vocabulary.words", 2**40, r"vocabulary\.words=.*equal to 64"),
    ("search", "swarm.runs", 2**40, r"swarm\.runs=.*equal to 1000000"),
    ("prepare", "data.vocabulary_size", 2**40, r"data\.vocabulary_size=.*equal to 10000000"),
    ("reference", "model.config.attention_dropout", 2, r"model.*dropout probability"),
    ("doge", "target.files", ["nowhere"], r"target\.files='nowhere'"),
    ("greats", "batch_selection.validation", ["nowhere"], r"batch_selection\.validation='nowhere'"),
    ("swarm", "swarm.frozen", "deep.json", r"swarm\.frozen=deep\.json: not a JSON file"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    FOUND,
    ids=[f"{key}={value!a:.20}" for _, key, value, _ in FOUND],
)
def test_a_configuration_that_gave_a_traceback_is_one_message(
    name: str, key: str, value: Any, said: str, here: Path, store: Path
) -> None:
    found = whole(name, [(key, value)], store)
    one_message(found)
    assert found.code == 2
    with pytest.raises(UserError, match=said):
        raise UserError(found.message)


def test_a_number_that_needs_more_memory_than_there_is_ends_the_run(
    here: Path, store: Path
) -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)
    assert runs.out_of_memory(cpu.value) and not runs.out_of_memory(RuntimeError("another"))
    found = whole("reference", [("training.batch_size", 2**50)], store)
    assert found.code == 1 and "out of memory" in found.message, found
    one_message(found)


def test_a_classifier_that_was_trained_to_nothing_is_told(here: Path, store: Path) -> None:
    found = whole("classify", [("classify.weight_decay", 1e300)], store)
    one_message(found)
    assert found.code == 1 and "not finite" in found.message, found


# ── Files ───────────────────────────────────────────────────────────────────────────

Spoiled = tuple[tuple[str, Callable[[Path], None]], tuple[Any, ...]]
SPOILED: st.SearchStrategy[Spoiled] = st.sampled_from(CASES).flatmap(
    lambda case: st.tuples(st.just(case), spoiled.spoils(case[0]))
)


def check_file(bench: Path, case: Spoiled) -> None:
    (name, reader), how = case
    with benches.copied(bench):
        spoiled.spoil(Path(name), how)
        try:
            reader(Path(name))
        except UserError as error:
            one_message(Answer(2, str(error)))


@pytest.mark.slow
@few(160)
@given(case=SPOILED)
def test_a_spoiled_file_is_read_or_refused(bench: Path, case: Spoiled) -> None:
    check_file(bench, case)


@pytest.mark.acceptance
@many(700)
@given(case=SPOILED)
def test_many_spoiled_files(bench: Path, case: Spoiled) -> None:
    print(f"seed {TODAY}")
    check_file(bench, case)


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_a_sound_file_is_read(name: str, here: Path) -> None:
    """What is spoiled is read where it is not."""
    dict(CASES)[name](Path(name))


def refused(work: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        work()


def test_a_model_folder_that_cannot_be_read_is_named(here: Path) -> None:
    (here / "model/config.json").write_text("3")
    for use in (folders.folder_fingerprint, lambda path: folders.read(path, "reference.path")):
        refused(lambda use=use: use(Path("model")), r"model: .*; give a folder with a model")
    (here / "model/config.json").write_text('{"model_type": ["llama"]}')
    shape = ModelOptions(path="model")
    refused(lambda: configs.resolve(shape, 300, 0, 32), r"model_type=\['llama'\]: must be a causal")


def test_a_tokeniser_whose_settings_fail_when_it_is_used_is_named(here: Path) -> None:
    file = here / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": {"": 1}}))
    refused(lambda: Encoder("model", "finetune.model"), r"finetune\.model=model: .*; give a model")


@pytest.mark.parametrize(
    ("start", "said"), [([0, None], "a row without row, start, end"), (["0", "x"], "'x'")]
)
def test_a_sidecar_with_other_columns_is_named(start: list[Any], said: str, here: Path) -> None:
    table = pq.read_table("sidecar.parquet")
    at = table.column_names.index("start")
    pq.write_table(table.set_column(at, "start", pa.array(start)), "sidecar.parquet")
    given = spoiled.options(root="corpus", embedded=None, selection="sidecar.parquet")
    sources = resolve(given)
    refused(
        lambda: [sidecar.Selected(given, sources, source) for source in sources],
        rf"data\.selection=sidecar\.parquet: .*{said}.*; give a sidecar of stage=select",
    )


@pytest.mark.parametrize("zero", [["x"], 3, {"offload_param": "cpu"}])
def test_settings_of_deepspeed_of_another_structure_are_named(zero: Any, here: Path) -> None:
    Path("deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
    refused(
        lambda: launcher.read_deepspeed("deepspeed.json", "zero2"),
        r"engine\.deepspeed=deepspeed\.json: zero_optimization=.* must be a JSON object",
    )

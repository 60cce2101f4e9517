"""Every mistake ends with exit code 2 and one message naming key, value and remedy, and leaves
nothing half-done."""

import gzip
import json
import os
import re
import time
from pathlib import Path

import pytest
import zstandard
from helpers.command import TINY, Command, Outcome, run_here
from helpers.corpus import documents, write_jsonl

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore


def refused(outcome: Outcome, *fragments: str) -> None:
    """Exit code 2, and one message with all the fragments."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("doremi-train: ") and outcome.err.count("doremi-train: ") == 1, (
        outcome.err
    )
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, f"{fragment!r} is not in: {outcome.err}"


def nothing_half_written(folder: Path) -> None:
    """What looks like a result is none of: half a file, a manifest, weights, a model, a page."""
    left = {path.name for path in folder.rglob("*")} if folder.exists() else set()
    assert not [name for name in left if name.endswith(".partial")]
    assert not left & {
        "manifest.json",
        "weights.json",
        "result.json",
        "evaluation.json",
        "report.html",
        "model",
    }


def texts(seed: int = 1, characters: int = 20_000) -> list[str]:
    return list(documents(seed, "abcdefgh", 50, characters))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A corpus of two small domains that a test may spoil."""
    write_jsonl(tmp_path / "own" / "good" / "train.jsonl", texts(1))
    write_jsonl(tmp_path / "own" / "other" / "train.jsonl", texts(2))
    return tmp_path / "own"


# ── Values ──────────────────────────────────────────────────────────────────────────

VALUES = [
    # overrides, what the message names
    (["training.stepz=3"], ["training.stepz", "--help"]),
    (["+training.stepz=3"], ["training.stepz", "unknown key", "remove it"]),
    (["nonsense=1"], ["nonsense", "--help"]),
    (["no equals sign"], ["--help"]),
    (["model=enormous"], ["model/enormous", "tiny"]),
    (["main.model=enormous"], ["main.model=enormous", "allowed", "tiny"]),
    (["model.config.model_type=bert_for_cats"], ["bert_for_cats", "llama"]),
    (["+model.config.hiden_size=3"], ["model.config.hiden_size", "gpt_neox"]),
    (["mixture=regret"], ["mixture/regret", "doremi"]),
    (["mixture.method=regret"], ["mixture=regret", "allowed", "doremi"]),
    (["reference.mixture=regret"], ["reference.mixture=regret", "allowed", "natural"]),
    (["main.comparisons=[regret]"], ["main.comparisons=regret", "allowed", "baseline"]),
    (["stage=brew"], ["stage=brew", "allowed", "pipeline"]),
    (["training.steps=-3"], ["training.steps=-3", "greater than 0"]),
    (["training.steps=0"], ["training.steps=0", "greater than 0"]),
    (["training.steps=1.5"], ["training.steps=1.5", "integer"]),
    (["training.steps=many"], ["training.steps='many'", "integer"]),
    (["seed=-1"], ["seed=-1", "greater than or equal to 0"]),
    (["proxy.step_size=inf"], ["proxy.step_size", "inf", "finite"]),
    (["proxy.step_size=nan"], ["proxy.step_size", "nan", "finite"]),
    (["proxy.step_size=-1"], ["proxy.step_size", "-1", "greater than"]),
    (["proxy.smoothing=1.0"], ["proxy.smoothing=1.0", "less than 1"]),
    (["proxy.smoothing=-0.1"], ["proxy.smoothing=-0.1", "greater than or equal to 0"]),
    (["proxy.smoothing=nan"], ["proxy.smoothing", "nan"]),
    (["proxy.clip=batch"], ["proxy.clip='batch'", "token", "domain"]),
    (["proxy.seeds=0"], ["proxy.seeds=0", "greater than 0"]),
    (["training.learning_rate=inf"], ["training.learning_rate", "inf", "finite"]),
    (["engine.processes=2"], ["engine.processes=2", "1 work together", "torchrun"]),
    (["engine=fsdp2"], ["engine.strategy=fsdp2", "torchrun", "engine=auto"]),
    (["engine.deepspeed=zero2.json"], ["engine.deepspeed=zero2.json", "engine=zero1"]),
    (["mixture=file"], ["mixture.path", "mixture=file"]),
    (["mixture.path=weights.json"], ["mixture.path=weights.json", "mixture=file"]),
    (["data.tokenizer=nowhere.json"], ["data.tokenizer='nowhere.json'", "train"]),
    (["data.end_of_document='<stop>'"], ["data.end_of_document='<stop>'"]),
    (["reference.path=nowhere"], ["reference.path=nowhere", "model folder"]),
    (["reference.path=nowhere", "proxy.rounds=2"], ["reference.path=nowhere", "proxy.rounds=1"]),
    (["run_dir=''"], ["run_dir"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), VALUES, ids=[" ".join(o) for o, _ in VALUES])
def test_a_wrong_value(
    overrides: list[str], fragments: list[str], tiny: list[str], tmp_path: Path
) -> None:
    refused(run_here(*tiny, f"run_dir={tmp_path / 'run'}", *overrides), *fragments)
    nothing_half_written_in_run(tmp_path / "run")


def nothing_half_written_in_run(folder: Path) -> None:
    """As above, for a run in the shared store: its links lead to finished work of other tests."""
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left <= {"config.yaml", "plan.json", "prepare", "reference", "proxy", "pipeline"}, left
    for stage in ("proxy", "pipeline"):  # how it ended, and nothing else
        assert {path.name for path in folder.glob(f"{stage}/*")} <= {".lock", "status.json"}


def test_a_missing_value_of_a_required_key(tiny: list[str], tmp_path: Path) -> None:
    refused(
        run_here(*tiny, f"run_dir={tmp_path}", "training.steps=null"),
        "training.steps=None",
        "integer",
    )


def test_every_wrong_key_is_in_the_one_message(tiny: list[str], tmp_path: Path) -> None:
    outcome = run_here(
        *tiny, f"run_dir={tmp_path}", "training.steps=-1", "proxy.smoothing=2", "seed=-1"
    )
    refused(outcome, "training.steps=-1", "proxy.smoothing=2", "seed=-1")


# ── Data ────────────────────────────────────────────────────────────────────────────


def prepare(root: Path, *more: str) -> Outcome:
    return run_here(
        *TINY, f"data.root={root}", f"run_dir={root.parent / 'run'}", "stage=prepare", *more
    )


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(prepare(tmp_path / "nowhere"), "data.root", str(tmp_path / "nowhere"))
    nothing_half_written(tmp_path / "run")


def test_a_folder_without_domains(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    refused(prepare(tmp_path / "bare"), "data.root", str(tmp_path / "bare"))


@pytest.mark.parametrize(
    "content", ["", "\n", '{"text": ""}\n'], ids=["no byte", "no line", "no text"]
)
def test_an_empty_domain(own: Path, content: str) -> None:
    (own / "void").mkdir()
    (own / "void" / "train.jsonl").write_text(content)
    refused(prepare(own), "void")
    nothing_half_written(own.parent / "run")


def test_a_domain_without_files(own: Path) -> None:
    (own / "void").mkdir()
    refused(prepare(own), "void", "train")


def test_a_domain_smaller_than_one_sequence(own: Path) -> None:
    write_jsonl(own / "short" / "train.jsonl", ["abc"])
    write_jsonl(own / "short" / "validation.jsonl", texts(9))
    run = own.parent / "run"
    refused(
        run_here(*TINY, f"data.root={own}", f"run_dir={run}"), "short", "training.sequence_length"
    )
    assert not (run / "weights.json").exists() and not list(run.rglob("model"))


def test_a_validation_split_smaller_than_one_sequence(own: Path) -> None:
    write_jsonl(own / "good" / "validation.jsonl", ["abc"])
    refused(
        run_here(*TINY, f"data.root={own}", f"run_dir={own.parent / 'run'}"), "good", "validation"
    )


def test_a_broken_line_is_named_and_skipped_when_allowed(own: Path) -> None:
    file = own / "good" / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], '{"text": "cut', *lines[2:]]) + "\n")
    refused(prepare(own), f"{file}", "line 3", "data.max_bad_lines")
    nothing_half_written(own.parent / "run")
    assert prepare(own, "data.max_bad_lines=1").code == 0
    assert (
        json.loads((own.parent / "run" / "prepare" / "manifest.json").read_text())["bad_lines"] == 1
    )


def test_invalid_utf8(own: Path) -> None:
    (own / "good" / "train.txt").write_bytes(b"fine so far \xff\xfe and then not")
    refused(prepare(own), "train.txt", "UTF-8")
    nothing_half_written(own.parent / "run")


@pytest.mark.parametrize("ending", ["zst", "gz"])
def test_a_truncated_file(own: Path, ending: str) -> None:
    plain = (own / "good" / "train.jsonl").read_bytes()
    packed = zstandard.compress(plain) if ending == "zst" else gzip.compress(plain)
    (own / "good" / f"train-2.jsonl.{ending}").write_bytes(packed[: len(packed) // 2])
    refused(prepare(own), f"train-2.jsonl.{ending}")
    nothing_half_written(own.parent / "run")


def test_a_wrong_text_key(own: Path) -> None:
    refused(prepare(own, "data.text_key=body"), "data.text_key='body'", "text")


def test_an_unknown_ending(own: Path) -> None:
    (own / "good" / "train.docx").write_bytes(b"no text")
    refused(prepare(own), "train.docx", ".jsonl")


@pytest.mark.parametrize("url", ["pipe:cat /etc/hostname", "shell:ls"])
def test_a_url_that_runs_a_command(url: str, own: Path) -> None:
    marker = own.parent / "ran"
    source = f"{url} | tee {marker}"
    outcome = run_here(
        *TINY, f"run_dir={own.parent / 'run'}", f"data.domains={{a:{{train:['{source}']}}}}"
    )
    refused(outcome, "data.domains")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("gone", [False, True], ids=["changed", "gone"])
def test_a_finished_run_needs_its_sources_no_more(own: Path, tmp_path: Path, gone: bool) -> None:
    run = [*TINY, f"data.root={own}", f"run_dir={tmp_path / 'run'}", "mixture=natural"]
    run += ["training.steps=4", "main.comparisons=[uniform]"]
    assert run_here(*run).code == 0
    before = (tmp_path / "run/evaluation.json").read_bytes()
    if gone:
        own.rename(tmp_path / "archived")
    else:
        write_jsonl(own / "good" / "train.jsonl", texts(7))
    said = "no such folder" if gone else "changed files: good/train.jsonl"
    for stage in ("report", "evaluate", "pipeline", "export"):
        export = ["export.to=doremi"] if stage == "export" else []
        outcome = run_here(*run, f"stage={stage}", *export)
        assert outcome.code == 0 and outcome.out.count(said) == 1, outcome
    assert (tmp_path / "run/evaluation.json").read_bytes() == before
    refused(run_here(*run, "stage=prepare"), said)


@pytest.mark.acceptance
def test_a_comparison_needs_no_sources_once_they_are_prepared(own: Path, tmp_path: Path) -> None:
    run = [*TINY, f"data.root={own}", f"run_dir={tmp_path / 'run'}", "training.steps=2"]
    assert run_here(*run, "stage=prepare").code == 0
    own.rename(tmp_path / "archived")
    compare = ["stage=compare", "compare.methods=[odm]", "compare.baselines=[natural]"]
    outcome = run_here(*run, *compare, "compare.seeds=1")
    assert outcome.code == 0 and outcome.out.count("no such folder") == 1, outcome
    assert (tmp_path / "run/compare/compare.json").exists()


def test_a_changed_source_in_the_same_run_dir(own: Path) -> None:
    assert prepare(own).code == 0
    file = own / "good" / "train.jsonl"
    file.write_text(file.read_text() + '{"text": "one more"}\n')
    os.utime(file, (time.time() + 5, time.time() + 5))
    refused(
        prepare(own),
        f"run_dir={own.parent / 'run'}",
        "changed files: good/train.jsonl",
        "another run_dir",
    )


# ── Weights and references ──────────────────────────────────────────────────────────

WEIGHTS = [
    ({"plain": 0.5, "rich": 0.3, "digits": 0.1, "moon": 0.1}, ["unknown domain 'moon'", "plain"]),
    ({"plain": 0.5, "rich": 0.5}, ["no weight for digits", "write 0"]),
    ({"plain": 1.2, "rich": -0.3, "digits": 0.1}, ["'rich' is -0.3"]),
    ({"plain": "half", "rich": 0.3, "digits": 0.1}, ["'plain' is 'half'"]),
    ({"plain": 0.5, "rich": 0.3, "digits": 0.1}, ["sum to 0.9", "mixture.normalize=true"]),
    ({"plain": 0, "rich": 0, "digits": 0}, ["sum to 0"]),
    ([0.5, 0.5], ["must hold"]),
    (None, ["not a JSON file"]),
]


@pytest.mark.parametrize(("weights", "fragments"), WEIGHTS, ids=[f[0] for _, f in WEIGHTS])
def test_a_wrong_weights_file(
    weights: object, fragments: list[str], tiny: list[str], tmp_path: Path
) -> None:
    file, run = tmp_path / "weights.json", tmp_path / "run"
    file.write_text("{" if weights is None else json.dumps(weights))
    refused(
        run_here(*tiny, f"run_dir={run}", "mixture=file", f"mixture.path={file}"),
        "mixture.path",
        *fragments,
    )
    nothing_half_written_in_run(run)


def test_a_missing_weights_file(tiny: list[str], tmp_path: Path) -> None:
    refused(
        run_here(*tiny, f"run_dir={tmp_path}", "mixture=file", "mixture.path=/nowhere.json"),
        "/nowhere.json",
    )


def test_a_reference_of_another_vocabulary(tiny: list[str], own: Path, tmp_path: Path) -> None:
    assert run_here(*tiny, f"run_dir={tmp_path / 'one'}", "stage=reference").code == 0
    model = tmp_path / "one" / "reference" / "model"
    other = [f"data.root={own}", "data.vocabulary_size=280", f"run_dir={tmp_path / 'two'}"]
    refused(
        run_here(*TINY, *other, f"reference.path={model}"), f"reference.path={model}", "300", "280"
    )
    assert not (tmp_path / "two" / "weights.json").exists()


# ── One run_dir, one configuration ──────────────────────────────────────────────────


def test_another_configuration_in_the_same_run_dir(tiny: list[str], tmp_path: Path) -> None:
    assert run_here(*tiny, f"run_dir={tmp_path}", "stage=prepare").code == 0
    before = (tmp_path / "config.yaml").read_bytes()
    outcome = run_here(
        *tiny, f"run_dir={tmp_path}", "stage=prepare", "seed=7", "proxy.step_size=0.5"
    )
    refused(
        outcome,
        f"run_dir={tmp_path}",
        "seed: 0 there, 7 now",
        "proxy.step_size: 1.0 there, 0.5 now",
        "another",
    )
    assert (tmp_path / "config.yaml").read_bytes() == before
    # How to compute is free; what to compute is not.
    free = ["training.micro_batch_size=4", "training.checkpoint_every=3", "stage=plan"]
    assert run_here(*tiny, f"run_dir={tmp_path}", *free).code == 0


@pytest.mark.parametrize(
    "mistake",
    [
        ["data.tokenizer=nowhere.json"],
        ["data.validation_fraction=0.000001"],
        ["main.model=nowhere"],
        ["training.sequence_length=60000"],
        ["reference.path=nowhere"],
        ["stage=select", "selection=random", "selection.documents=1000000"],
    ],
    ids=" ".join,
)
def test_a_run_dir_in_which_a_mistake_computed_nothing(
    mistake: list[str], own: Path, tmp_path: Path
) -> None:
    run = [*TINY, f"data.root={own}", f"run_dir={tmp_path}"]
    targets = [f"selection.targets={{t: ['{next(own.glob('*/train.jsonl'))}']}}"]
    chosen = [*targets, "selection.workers=1"] if "stage=select" in mistake else []
    wrong = run_here(*run, *chosen, *mistake)
    assert wrong.code == 2 and (tmp_path / "config.yaml").exists(), wrong
    outcome = run_here(*run, "seed=1", "stage=reference")
    assert outcome.code == 0, outcome
    refused(run_here(*run, *chosen, *mistake), "holds a run with another configuration")


def test_a_run_dir_of_a_version_that_knew_fewer_keys(own: Path, tmp_path: Path) -> None:
    run = [*TINY, f"data.root={own}", f"run_dir={tmp_path}", "stage=prepare"]
    assert run_here(*run).code == 0
    path = tmp_path / "config.yaml"
    assert "  least_tokens: 0\n" in path.read_text()
    path.write_text(path.read_text().replace("  least_tokens: 0\n", ""))
    refused(run_here(*run, "data.least_tokens=7"), "data.least_tokens: 0 there, 7 now")
    assert run_here(*run).code == 0


def test_a_run_dir_where_another_command_is_at_work(own: Path, tmp_path: Path) -> None:
    run = [*TINY, f"data.root={own}", f"run_dir={tmp_path}", "stage=prepare"]
    refused(run_here(*run, "data.tokenizer=nowhere.json"), "nowhere.json")
    with files.at_work(tmp_path):
        refused(run_here(*run), "data.tokenizer: 'nowhere.json' there, 'train' now")
    assert run_here(*run).code == 0


# ── Sources on the command line ─────────────────────────────────────────────────────


def test_domains_on_the_command_line(corpus: Path, tmp_path: Path) -> None:
    domains = ",".join(
        f"{name}:{{train:['{corpus}/{name}/*.jsonl']}}" for name in ("plain", "rich")
    )
    outcome = run_here(*TINY, f"run_dir={tmp_path}", "stage=plan", f"data.domains={{{domains}}}")
    assert outcome.code == 0, outcome
    assert list(json.loads((tmp_path / "plan.json").read_text())["domains"]) == ["plain", "rich"]


@pytest.mark.slow
def test_a_long_tail_of_domains_is_left_out(tmp_path: Path) -> None:
    file, common = tmp_path / "all.jsonl", [*TINY, "data.domain_key=site", "stage=prepare"]
    records = [{"text": text, "site": f"big{i % 2}"} for i, text in enumerate(texts(5, 60_000))]
    records[20:20] = [{"text": f"the only one of {n}", "site": f"rare{n}"} for n in range(9)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    common += [f"data.files=['{file}']", f"store={tmp_path / 'store'}"]
    refused(run_here(*common, f"run_dir={tmp_path / '0'}"), "rare0", "data.least_tokens")
    for number, how in enumerate(("data.only=[big0,big1]", "data.least_tokens=100"), 1):
        outcome = run_here(*common, how, f"run_dir={tmp_path / str(number)}")
        assert outcome.code == 0, outcome
    assert "9 domains of fewer than data.least_tokens=100 tokens are left out" in outcome.out
    assert len(list((tmp_path / "store/data").glob("*/manifest.json"))) == 1
    pour = ["data.least_tokens=100", "data.rare_into=other", "data.validation_fraction=0.2"]
    for _ in range(2):  # made, and there
        outcome = run_here(*common, *pour, f"run_dir={tmp_path / '5'}")
        assert outcome.code == 0, outcome
        assert "9 domains of fewer than data.least_tokens=100 tokens are poured" in outcome.out
    store = TokenStore.open(tmp_path / "5/prepare")
    assert store.domains == ("big0", "big1", "other")
    assert store.documents("train")[2] + store.documents("validation")[2] == 9
    refused(
        run_here(*common, "data.rare_into=other", f"run_dir={tmp_path / '6'}"),
        "data.rare_into=other", "data.least_tokens=100000",
    )  # fmt: skip
    for all_of_it in (["data.only=[big0,rare0]"], []):  # also where the store is there
        again = run_here(*common, *all_of_it, f"run_dir={tmp_path / '3'}")
        refused(again, "rare0", "no validation document")
    refused(
        run_here(*common, "data.least_tokens=9999999", f"run_dir={tmp_path / '4'}"),
        "data.least_tokens=9999999", "lower it",
    )  # fmt: skip


def test_one_stream_split_by_a_key_of_its_records(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    records = [
        {"text": text, "meta": {"set": f"set {i % 2}"}} for i, text in enumerate(texts(5, 60_000))
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = [
        f"data.files=['{file}']",
        "data.domain_key=meta.set",
        f"run_dir={tmp_path / 'run'}",
    ]
    outcome = run_here(*TINY, "stage=plan", *overrides)
    assert outcome.code == 0, outcome
    assert list(json.loads((tmp_path / "run" / "plan.json").read_text())["domains"]) == [
        "set 0",
        "set 1",
    ]
    refused(run_here(*TINY, *overrides[:1], f"run_dir={tmp_path / 'two'}"), "data.domain_key")


# ── The command itself ──────────────────────────────────────────────────────────────


def test_help_shows_stages_groups_and_examples(command: Command) -> None:
    outcome = command("--help")
    assert outcome.code == 0
    for wanted in (
        "stage=",
        "prepare",
        "Examples",
        "accelerate launch",
        "Groups",
        "model: ",
        "280m",
        "proxy:",
    ):
        assert wanted in outcome.out


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(
    doremi: Command, tiny: list[str], tmp_path: Path
) -> None:
    refused(doremi(*tiny, f"run_dir={tmp_path}", "training.steps=-1"), "training.steps=-1")


@pytest.mark.slow
def test_a_mistake_on_two_processes_is_said_once(
    doremi: Command, tiny: list[str], tmp_path: Path
) -> None:
    outcome = doremi(
        *tiny, f"run_dir={tmp_path}", "training.batch_size=1", "stage=plan", processes=2
    )
    assert outcome.code == 2
    assert outcome.err.count("doremi-train: ") == 1 and "training.batch_size=1" in outcome.err


def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(
    tiny: list[str], tmp_path: Path
) -> None:
    overrides = [
        *tiny,
        f"store={tmp_path / 'store'}",
        f"run_dir={tmp_path / 'run'}",
        "stage=reference",
    ]
    outcome = run_here(*overrides, "training.learning_rate=1e30", "training.warmup=0.0")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    found = re.search(
        r"not finite at step (\d+), domain (.*) \(its sequences in this batch: \{'.*\}\)",
        outcome.err,
    )
    assert (
        found
        and 1 < int(found[1]) < 12
        and set(found[2].split(", ")) <= {"digits", "plain", "rich"}
    ), outcome.err
    assert all(
        remedy in outcome.err for remedy in ("training.learning_rate", "training.on_nonfinite=skip")
    )
    status = json.loads((tmp_path / "run" / "reference" / "status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["message"]


@pytest.mark.parametrize(
    ("rate", "said"),
    [("1e30", "the held-out loss is not finite"), ("1e45", "parameters are not finite")],
)
def test_a_model_that_no_left_out_batch_helps_ends_the_run_with_the_step(
    rate: str, said: str, tiny: list[str], tmp_path: Path
) -> None:
    """Its losses are not finite although, or because, its parameters are."""
    outcome = run_here(
        *tiny, f"store={tmp_path / 'store'}", f"run_dir={tmp_path / 'run'}", "stage=reference",
        f"training.learning_rate={rate}", "training.warmup=0.0", "training.on_nonfinite=skip",
    )  # fmt: skip
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome
    assert re.search(rf"reference: .*{said} at step \d+", outcome.err), outcome.err
    assert "lower training.learning_rate" in outcome.err

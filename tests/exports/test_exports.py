"""Export: exact sums, no zeros, the right unit, every form there and back. What every target keeps
is in helpers.exports_contract; what is drawn, in test_draws."""

import ast
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import exports_contract
from helpers.command import Command, run_here
from helpers.exports_contract import PATHS, WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st

from doremi_train.config import UserError
from doremi_train.exports import convert
from doremi_train.exports.formats import FORMATS

finite = st.floats(0, 1e6, allow_nan=False)
several = st.dictionaries(st.sampled_from("abcdefgh"), finite, min_size=1).filter(
    lambda w: sum(w.values()) > 1e-6
)


@given(several, st.lists(st.floats(1, 1e6), min_size=8, max_size=8))
@settings(deadline=None, max_examples=100)
def test_decimals_sum_to_exactly_one_and_none_is_zero(
    given: dict[str, float], means: list[float]
) -> None:
    for tokens in (None, dict(zip("abcdefgh", means, strict=True))):
        drawn = convert.shares(given, tokens)
        assert sum(Decimal(repr(part)) for part in drawn.values()) == 1
        assert all(part > 0 for part in drawn.values()) and set(drawn) <= {
            k for k, v in given.items() if v
        }
        exact = {name: value / (tokens[name] if tokens else 1) for name, value in given.items()}
        for name in given:  # less than one of the parts that are shared out
            assert (
                abs(drawn.get(name, 0) - exact[name] / math.fsum(exact.values()))
                < 1.0001e-12 + 1e-15
            )


def test_the_largest_remainder_gets_what_rounding_leaves() -> None:
    third = convert.shares({"a": 1, "b": 1, "c": 1}, None)
    assert sorted(third.values()) == [0.333333333333, 0.333333333333, 0.333333333334]
    assert convert.shares({"a": 1.0, "b": 1e-14}, None) == {"a": 1.0}


def test_documents_are_drawn_in_inverse_proportion_to_their_length() -> None:
    drawn = convert.shares({"a": 0.5, "b": 0.5}, {"a": 100.0, "b": 400.0})
    assert drawn == {"a": 0.8, "b": 0.2}
    assert convert.weights(drawn, {"a": 100.0, "b": 400.0}) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("to", FORMATS)
def test_every_target_keeps_the_contract(to: str) -> None:
    exports_contract.check(to)


HALF = convert.shares({"a": 0.3, "b": 0.7}, None)
AT = {"a": "/d/a", "b": "/d/b"}
FORMS: dict[str, Any] = {
    "nemo": ["0.3", "/d/a", "0.7", "/d/b"],
    "gpt_neox": {"train-data-paths": ["/d/a", "/d/b"], "train-data-weights": [0.3, 0.7]},
    "mosaicml_streaming": {
        "streams": {
            "a": {"local": "/d/a", "proportion": 0.3},
            "b": {"local": "/d/b", "proportion": 0.7},
        },
        "shuffle": True,
    },
    "olmo_core": {
        "sources": [
            {
                "source_name": "a",
                "target_ratio": 0.3,
                "paths": ["/d/a"],
                "max_repetition_ratio": 1.0,
            },
            {
                "source_name": "b",
                "target_ratio": 0.7,
                "paths": ["/d/b"],
                "max_repetition_ratio": 3.0,
            },
        ]
    },
    "levanter": {"data": {"train_weights": {"/d/a": 0.3, "/d/b": 0.7}, "mixture_block_size": 2048}},
    "lingua": {"data": {"sources": {"/d/a": 0.3, "/d/b": 0.7}}},
    "energon": {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {
            "train": {"blend": [{"weight": 0.3, "path": "/d/a"}, {"weight": 0.7, "path": "/d/b"}]}
        },
    },
    "maxtext": {"a": {"path": "/d/a", "weight": 0.3}, "b": {"path": "/d/b", "weight": 0.7}},
    "llama_factory": {
        "dataset": "/d/a,/d/b",
        "mix_strategy": "interleave_over",
        "interleave_probs": "0.3,0.7",
    },
    "doremi": {
        "train_domain_weights": {"/d/a": 0.3, "/d/b": 0.7},
        "eval_domain_weights": {"/d/a": 0.3, "/d/b": 0.7},
    },
}


@pytest.mark.parametrize("to", FORMS)
def test_the_form_is_the_trainer_s(to: str) -> None:
    # JSON is YAML too.
    assert yaml.safe_load(convert.write(to, HALF, AT, {"a": 0.2, "b": 2.5})) == FORMS[to]


def test_the_form_of_megatron_and_nanotron() -> None:
    assert convert.write("megatron", HALF, AT, {}) == "0.3 /d/a\n0.7 /d/b\n"
    stage = yaml.safe_load(convert.write("nanotron", HALF, AT, {}))["data_stages"][0]
    assert stage["data"]["dataset"] == {
        "dataset_folder": ["/d/a", "/d/b"],
        "dataset_weights": [0.3, 0.7],
    }


def test_a_schedule_goes_to_those_who_can_follow_one() -> None:
    later = convert.shares({"a": 0.6, "b": 0.4}, None)
    schedule = [(0, HALF), (100, later)]
    levanter = yaml.safe_load(convert.write("levanter", HALF, AT, {}, schedule))["data"][
        "train_weights"
    ]
    assert levanter == [[0, {"/d/a": 0.3, "/d/b": 0.7}], [100, {"/d/a": 0.6, "/d/b": 0.4}]]
    stages = yaml.safe_load(convert.write("nanotron", HALF, AT, {}, schedule))["data_stages"]
    assert [stage["start_training_step"] for stage in stages] == [1, 101]  # it counts from 1
    assert len({stage["name"] for stage in stages}) == 2
    assert [stage["data"]["dataset"]["dataset_weights"] for stage in stages] == [
        [0.3, 0.7],
        [0.6, 0.4],
    ]


@pytest.mark.parametrize(
    "to",
    [  # but for LLaMA-Factory, whose numbers are one text
        to
        for to, form in FORMATS.items()
        if form.ending in ("yaml", "yml") and to != "llama_factory"
    ],
)
def test_yaml_numbers_are_numbers_even_where_they_are_tiny(to: str) -> None:
    def leaves(value: Any) -> list[Any]:
        inner = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, list)
            else None
        )
        return [value] if inner is None else [leaf for entry in inner for leaf in leaves(entry)]

    assert 3e-7 in leaves(
        yaml.safe_load(convert.write(to, convert.shares(WEIGHTS, None), PATHS, {}))
    )


OTHERS = [
    ("megatron", "30 /d/a 70 /d/b"),
    ("megatron", '{"train": ["0.3", "/d/a", "0.7", "/d/b"], "valid": [], "test": []}'),
    ("megatron", '{"train": "3 /d/a 7 /d/b"}'),
    ("nemo", "[30, /d/a, 70, /d/b]"),
    ("gpt_neox", '{"train_data_paths": ["/d/a", "/d/b"], "train_data_weights": [3, 7]}'),
    ("levanter", "train_weights: {a: 3, b: 7}"),
    ("levanter", "data: {train_weights: [[0, {a: 3, b: 7}]]}"),
    ("energon", "splits: {train: {blend: [{weight: 3, path: /d/a}, {weight: 7, path: /d/b}]}}"),
    ("llama_factory", "{dataset: 'a, b', interleave_probs: '0.3, 0.7', cutoff_len: 9}"),
    ("maxtext", '{"a": {"path": "elsewhere", "weight": 3}, "b": {"path": "x", "weight": 7}}'),
]


@pytest.mark.parametrize(("to", "text"), OTHERS)
def test_what_others_wrote_is_read(to: str, text: str) -> None:
    found = convert.read(to, text, ["a", "b", "c"], AT, "x")
    assert (found["a"] / found["b"], found["c"]) == (pytest.approx(3 / 7), 0)


WRONG = [
    ("megatron", "30 /d/a 70", "not of the form of mixture.format=megatron"),
    ("megatron", "a b", "could not convert"),
    ("megatron", "1 /d/a 2 /d/a", "there twice"),
    ("megatron", "1 /d/z", "'/d/z' is neither a domain nor in export.paths; the data has a, b"),
    ("nemo", "{", "not of the form"),
    ("gpt_neox", "train-data-paths: [/d/a]", "train-data-weights"),
    ("gpt_neox", "[1]", "not of the form"),
    ("nanotron", "data_stages: [{}, {}]", "it has 2 stages"),
    ("levanter", "train_weights: [[0, {a: 1}], [9, {b: 1}]]", "it has 2 stages"),
    ("lingua", "", "not of the form"),
    ("energon", "splits: {train: {path: /d/a}}", "not of the form"),
    ("energon", "splits: {train: {blend: [{blend: [], weight: 1}]}}", "path"),
    ("llama_factory", "{dataset: 'a,b', interleave_probs: '1'}", "not of the form"),
    ("maxtext", '{"a": 0.3}', "not of the form"),
    ("datasets", "x = 1", "no SOURCES"),
    ("datasets", "SOURCES = {", "not of the form"),
    ("datasets", "SOURCES = __import__('os')", "not of the form"),
    ("doremi", "[]", "not of the form"),
]


@pytest.mark.parametrize(("to", "text", "named"), WRONG)
def test_a_text_of_another_form_is_named(to: str, text: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        convert.read(to, text, ["a", "b"], AT, "mixture.path=x")
    assert named in str(error.value) and str(error.value).startswith("mixture.path=x: ")


@pytest.mark.parametrize(
    ("to", "paths", "named"),
    [
        ("nemo", {"a": "/d/a", "b": "/d/a"}, "a and b both have '/d/a'"),
        ("lingua", {"a": "b"}, "a and b both have 'b'"),
        (
            "megatron",
            {"a": "/d/a b", "b": "/d/b"},
            "export.paths.a='/d/a b': Megatron splits at spaces",
        ),
        (
            "webdataset",
            {"a": "/d/a#1.tar", "b": "/d/b"},
            "export.paths.a='/d/a#1.tar': webdataset cuts a path at ?, # and ;",
        ),
    ],
)
def test_a_path_that_cannot_be_is_named(to: str, paths: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match="export.paths") as error:
        convert.write(to, HALF, paths, {})
    assert named in str(error.value)


@pytest.mark.parametrize("to", [to for to, form in FORMATS.items() if form.ending == "py"])
def test_python_modules_are_python(to: str) -> None:
    names = [
        node.name
        for node in ast.parse(convert.write(to, HALF, AT, {})).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert "mixture" in names


# The stage


@pytest.fixture(scope="module")
def exported(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Overrides of a run with given weights, one of them zero, and its run_dir."""
    run_dir = tmp_path_factory.mktemp("exported") / "run"
    given = ["mixture=file", "mixture.weights={plain: 0.25, rich: 0.75, digits: 0}", "stage=export"]
    overrides = [*tiny, f"run_dir={run_dir}", *given]
    outcome = run_here(
        *overrides, "export.to=webdataset", "export.paths={plain: /d/plain.tar, rich: /d/rich.tar}"
    )
    assert outcome.code == 0, outcome
    assert "mixture_webdataset.py" in outcome.out and "draws documents" in outcome.out, outcome.out
    assert "left out, as their weight is zero: digits" in outcome.out
    return overrides, run_dir


def test_the_stage_makes_the_mixture_and_says_where_it_comes_from(
    exported: tuple[list[str], Path],
) -> None:
    _, run_dir = exported
    artefact = json.loads((run_dir / "weights.json").read_text())
    beside = json.loads((run_dir / "export" / "mixture_webdataset.py.provenance.json").read_text())
    assert beside["weights"] == artefact["weights"] == {"plain": 0.25, "rich": 0.75, "digits": 0}
    assert beside["provenance"] == artefact["provenance"] and beside["epochs"] == artefact["epochs"]
    assert {"data", "tokenizer", "seed"} <= beside["provenance"].keys()
    assert (beside["draws"], beside["left_out"]) == ("documents", ["digits"])
    manifest = json.loads((run_dir / "prepare" / "manifest.json").read_text())["domains"]
    counts = {name: entry["train"] for name, entry in manifest.items()}
    means = {name: count["tokens"] / count["documents"] for name, count in counts.items()}
    assert beside["tokens_per_document"] == pytest.approx(means)
    text = (run_dir / "export" / "mixture_webdataset.py").read_text()
    drawn = convert.read(
        "webdataset", text, [*means], {"plain": "/d/plain.tar", "rich": "/d/rich.tar"}, ""
    )
    assert drawn["plain"] / drawn["rich"] == pytest.approx(
        0.25 / means["plain"] / (0.75 / means["rich"])
    )
    assert not (run_dir / "proxy").exists() and not (run_dir / "main").exists()
    assert json.loads((run_dir / "export" / "status.json").read_text())["state"] == "finished"


def test_other_trainers_and_places_in_the_same_run_dir(
    exported: tuple[list[str], Path], command: Command, tmp_path: Path
) -> None:
    overrides, _ = exported
    file = tmp_path / "new" / "blend.txt"
    paths = "export.paths={plain: /d/plain, rich: /d/rich}"
    assert command(*overrides, "export.to=megatron", f"export.path={file}", paths).code == 0
    assert file.read_text() == "0.25 /d/plain\n0.75 /d/rich\n"
    assert file.with_name("blend.txt.provenance.json").exists()
    assert (
        command(*overrides, "export.to=lingua", "export.unit=sequences", f"export.path={file}").code
        == 0
    )
    assert yaml.safe_load(file.read_text()) == {"data": {"sources": {"plain": 0.25, "rich": 0.75}}}
    outcome = command(*overrides, "export.to=gpt_neox", paths)
    assert "GPT-NeoX: it wants all three: add valid-data-paths and test-data-paths" in outcome.out


def test_a_trainer_s_file_is_the_mixture_of_another_run(
    exported: tuple[list[str], Path], tiny: list[str], command: Command, tmp_path: Path
) -> None:
    _, run_dir = exported
    written = run_dir / "export" / "mixture_webdataset.py"
    given = ["mixture=file", f"mixture.path={written}", "mixture.format=webdataset"]
    paths = "export.paths={plain: /d/plain.tar, rich: /d/rich.tar}"
    file = tmp_path / "out.json"
    outcome = command(
        *tiny,
        f"run_dir={tmp_path / 'run'}",
        *given,
        paths,
        "stage=export",
        "export.to=doremi",
        f"export.path={file}",
    )
    assert outcome.code == 0, outcome
    artefact = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert artefact["weights"] == pytest.approx(
        {"plain": 0.25, "rich": 0.75, "digits": 0}, abs=1e-9
    )
    again = ["mixture=file", f"mixture.path={file}", "mixture.format=doremi"]
    content = json.loads(file.read_text())
    # As export.paths names them.
    assert content["train_domain_weights"].keys() == {
        "/d/plain.tar",
        "/d/rich.tar",
        "digits",  # whose weight is zero
    }
    assert (
        command(
            *tiny,
            f"run_dir={tmp_path / 'again'}",
            *again,
            paths,
            "stage=export",
            "export.to=lingua",
        ).code
        == 0
    )


ALLOWED = f"allowed: {', '.join(FORMATS)}"
REFUSED = [
    ([], ["export.to=None", ALLOWED]),
    (["export.to=pax"], ["export.to=pax: unknown", ALLOWED]),
    (["mixture.format=pax"], ["mixture.format=pax: unknown", ALLOWED]),
    (
        ["mixture.format=nemo", "export.to=lingua"],
        ["mixture.format=nemo", "mixture.path, which is missing"],
    ),
    (["export.to=nemo"], ["export.paths", "no path for plain, rich", "export.to=nemo"]),
    (
        ["export.to=nemo", "export.paths={plane: /d}"],
        ["export.paths", "unknown domain 'plane'", "plain"],
    ),
    (
        ["export.to=nemo", "export.paths={plain: 's3://me:hush@b/x'}"],
        ["export.paths.plain", "s3://***@b/x"],
    ),
    (["export.to=nemo", "export.unit=tokens"], ["export.unit='tokens'", "sequences", "documents"]),
    (
        ["export.to=lingua", "mixture.path=x.json"],
        ["mixture.path=x.json", "mixture.weights", "one of them"],
    ),
]


@pytest.mark.parametrize(
    ("more", "fragments"), REFUSED, ids=[" ".join(more) or "no target" for more, _ in REFUSED]
)
def test_a_mistake_is_one_message(
    more: list[str], fragments: list[str], exported: tuple[list[str], Path], command: Command
) -> None:
    outcome = command(*exported[0], *more)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert all(fragment in outcome.err for fragment in fragments) and "hush" not in outcome.err, (
        outcome.err
    )


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ("{plain: 1}", "no weight for digits, rich"),
        ("{plain: 0.5, rich: 0.4, digits: 0}", "sum to 0.9, not 1"),
    ],
)
def test_given_weights_are_checked(
    weights: str, named: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    given = ["mixture=file", f"mixture.weights={weights}", "stage=export", "export.to=lingua"]
    outcome = command(*tiny, f"run_dir={tmp_path / 'run'}", *given)
    assert outcome.code == 2 and "mixture.weights: " in outcome.err and named in outcome.err

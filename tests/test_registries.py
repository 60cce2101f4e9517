"""Every entry of every registry keeps its contract.

A registry is a dict literal, name → module, class, function or a row of them, and an entry is all
that a new way to do the thing needs; so are the files of a group of conf/ and the words that a key
allows. `CONTRACTS` names for each of them the one test that every entry passes. What that test runs
on is compared with the registry: an entry without a case fails, and so does a registry without a
contract.

K domains, B sequences, T tokens a sequence, P parts of a corpus, C columns (targets).
"""

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
import yaml
from helpers.corpus import documents
from helpers.examples import of_registries
from helpers.sources import TEXTS, one, options, pieces, refused, texts, write_as
from scipy.stats import spearmanr
from torch import Tensor

from doremi_train.config import conf_dir
from doremi_train.data.corpus import formats as corpus_formats
from doremi_train.data.corpus.sources import resolve
from doremi_train.methods import (
    HEURISTICS,
    OBJECTIVES,
    ONLINE,
    cross_entropy,
    doge,
    doremi,
    dro,
    heuristics,
    importance,
    online,
    regressors,
    swarm,
)
from doremi_train.model import configs
from doremi_train.model.configs import ModelOptions
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel.launcher import Strategy
from doremi_train.selection import options as selection_options
from doremi_train.selection.options import SelectionOptions
from doremi_train.stages import STAGES
from doremi_train.stages.mixtures import WAYS
from doremi_train.trackers import TrackingOptions
from doremi_train.training.batch_selection import BatchSelectionOptions

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "doremi_train"


def allowed(options: type, key: str) -> tuple[str, ...]:
    """The words of a Literal field."""
    return get_args(inspect.get_annotations(options, eval_str=True)[key])


def group(name: str) -> tuple[str, ...]:
    """The files of a folder of conf/."""
    return tuple(sorted(path.stem for path in (conf_dir() / name).glob("*.yaml")))


def published() -> tuple[str, ...]:
    """The files of conf/mixture that bring weights along."""
    folder = conf_dir() / "mixture"
    read = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")}
    return tuple(name for name, content in read.items() if content.get("weights"))


# ── What every registry promises ────────────────────────────────────────────────────


class Contract(NamedTuple):
    """The test that every entry passes."""

    test: str  # its name, and before it the file below tests/, where it is not this one
    argument: str = "name"  # of the test: its values are names of entries, or begin with one
    apart: Collection[str] = ()  # entries that do nothing, or are one of the others: no case


CONTRACTS = {
    "doremi_train.methods.OBJECTIVES": Contract("test_contract_of_an_objective"),
    "doremi_train.methods.ONLINE": Contract("test_contract_of_an_online_mixture"),
    "doremi_train.methods.HEURISTICS": Contract("test_contract_of_a_heuristic"),
    "doremi_train.methods.regressors.REGRESSORS": Contract("test_contract_of_a_regressor"),
    "doremi_train.exports.formats.FORMATS": Contract(
        "exports/test_exports.py::test_every_target_keeps_the_contract", "to"
    ),
    "doremi_train.data.corpus.formats.READERS": Contract("test_contract_of_a_reader", "ending"),
    "doremi_train.selection.documents.registry.METHODS": Contract("test_contract_of_a_scorer"),
    "doremi_train.selection.documents.registry.FEATURES": Contract(
        "test_contract_of_a_scorer", "features"
    ),
    "doremi_train.selection.documents.describe.FORMATS": Contract("test_contract_of_chosen_text"),
    "doremi_train.evaluation.downstream.FORMS": Contract(
        "evaluation/test_downstream.py::test_a_definition_reads_the_user_s_files", "form"
    ),
    "doremi_train.trackers._BACKENDS": Contract(
        "test_trackers.py::test_tracking_leaves_the_process_as_it_was", "backend"
    ),
    "doremi_train.stages.STAGES": Contract("test_contract_of_a_stage"),
    "doremi_train.stages.mixtures.WAYS": Contract(
        "stages/mixtures/test_ways.py::test_contract_of_a_way"
    ),
}

# Choices that stand elsewhere than in a dict: their names, and the contract.
CHOICES: dict[str, tuple[Collection[str], Contract]] = {
    "conf/model": (group("model"), Contract("test_contract_of_a_preset", apart=["custom"])),
    "conf/data": (
        group("data"),
        Contract(
            "data/corpus/test_corpora.py::test_the_published_layout_is_prepared",
            apart=["installed", "planted"],  # made here: test_installed, test_planted
        ),
    ),
    "conf/mixture, with weights": (
        published(),
        Contract("data/corpus/test_corpora.py::test_published_weights_are_of_these_domains"),
    ),
    "conf/experiment": (
        group("experiment"),
        Contract(
            "test_experiments.py::test_a_recipe_is_one_command_with_its_picture",
            apart=["importance", "compare", "target", "continue"],  # test_classify, …, test_start
        ),
    ),
    "conf/batch_selection": (
        group("batch_selection"),
        Contract("methods/test_greats.py::test_every_policy_trains", "policy", apart=["none"]),
    ),
    "engine.strategy": (
        get_args(Strategy),
        Contract(
            "parallel/test_engines.py::test_every_engine_and_cut_gives_the_numbers_of_one_process"
        ),
    ),
    "training.optimizer": (
        allowed(OptimizerOptions, "optimizer"),
        Contract(
            "model/test_optim.py::test_frozen_parameters_are_left_out_and_a_step_lowers_the_loss",
            "optimizer",
        ),
    ),
    "training.schedule": (
        allowed(OptimizerOptions, "schedule"),
        Contract("model/test_optim.py::test_warmup_is_linear_and_ends_at_the_peak", "schedule"),
    ),
}

# Dicts of functions or rows that are no choice of ways to do a thing.
NO_CHOICE = {
    "doremi_train.data.corpus.installed._DOMAINS": "which are there is the machine's to say; "
    "tests/data/corpus/test_installed.py goes over those",
    "doremi_train.storage.urls.LIMITS": "what clients of outside call a limit of time; "
    "tests/storage/test_steady.py goes over them",
    "doremi_train.data.corpus.planted._DOMAINS": "rows of one recipe; "
    "tests/stages/test_report_findings.py goes over all of them",
}


@pytest.mark.parametrize("registry", [name for name in CONTRACTS if "._" not in name])
def test_every_registry_has_an_example_that_runs(registry: str) -> None:
    module = registry.rpartition(".")[0]
    (test,) = (test for test in of_registries(module) if test.name == registry)
    assert test.examples, f"{registry}: no example in the string below it"
    assert doctest.DocTestRunner().run(test).failed == 0


def cases(contract: Contract) -> set[str]:
    """The entries on which a test of the contract runs."""
    file, _, name = contract.test.rpartition("::")
    test = getattr(loaded(TESTS / file), name) if file else globals()[name]
    found = set()
    for mark in test.pytestmark:
        names = mark.args[0] if mark.name == "parametrize" else ()
        names = re.split(r", *", names) if isinstance(names, str) else list(names)
        for value in mark.args[1] if contract.argument in names else ():
            row = value.values if isinstance(value, type(pytest.param())) else value
            of = row[names.index(contract.argument)] if isinstance(row, tuple) else row
            found.add(str(of).split()[0])
    return found


def loaded(path: Path) -> ModuleType:
    """A file of tests as a module."""
    spec = importlib.util.spec_from_file_location(f"cases_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def value_of(registry: str) -> Any:
    module, _, name = registry.rpartition(".")
    if module.startswith("doremi_train.selection.documents."):
        pytest.importorskip("numba")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("registry", [*CONTRACTS, *CHOICES])
def test_every_entry_has_a_case(registry: str) -> None:
    if registry in CHOICES:
        names, contract = CHOICES[registry]
    else:
        names, contract = value_of(registry).keys(), CONTRACTS[registry]
    assert set(contract.apart) <= set(names), "what is left apart is not there any more"
    missing = set(names) - set(contract.apart) - cases(contract)
    assert not missing, (
        f"{registry}: no case for {', '.join(sorted(missing))}; add one to the parameters "
        f"`{contract.argument}` of {contract.test}"
    )


def is_entry(value: Any) -> bool:
    """A function, class or module, or a row that holds one or has named fields."""
    row = isinstance(value, tuple)
    return (
        callable(value)
        or isinstance(value, ModuleType)
        or (row and (hasattr(value, "_fields") or any(map(is_entry, value))))
    )


def registries(path: Path) -> list[str]:
    """The dicts of entries that a file defines under a name in capitals."""
    module = ".".join(["doremi_train", *path.relative_to(PACKAGE).with_suffix("").parts])
    module = module.removesuffix(".__init__")
    named = [
        target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
        and target.id == target.id.upper()
        and any(isinstance(part, ast.Dict | ast.DictComp) for part in ast.walk(node))
    ]
    found = []
    for name in named:
        value = value_of(f"{module}.{name}")
        if isinstance(value, Mapping) and any(map(is_entry, value.values())):
            found.append(f"{module}.{name}")
    return found


def test_every_registry_has_a_contract() -> None:
    found = {name for path in sorted(PACKAGE.rglob("*.py")) for name in registries(path)}
    missing = found - CONTRACTS.keys() - NO_CHOICE.keys()
    assert not missing, f"{', '.join(sorted(missing))}: add a contract to CONTRACTS"
    assert NO_CHOICE.keys() <= found and {"doremi_train.methods.OBJECTIVES"} <= found


def test_what_an_entry_is() -> None:
    assert all(map(is_entry, (len, int, ast, ("a", len), Contract("x"))))
    assert not any(map(is_entry, ("a", 1, ("a", "b"), {"a": len})))


ASKED = {  # what a key allows, and what there is
    "swarm.regressor": (allowed(swarm.Options, "regressor"), regressors.REGRESSORS),
    "tracking.backend": (allowed(TrackingOptions, "backend"), group("tracking")),
    "engine.strategy": (get_args(Strategy), group("engine")),
    "batch_selection.method": (
        (*allowed(BatchSelectionOptions, "method"), "greats_published"),
        group("batch_selection"),
    ),
    "selection.method": (("none", "less", *selection_options.METHODS), group("selection")),
    "mixture.method": (
        (*WAYS, *published(), "doremi_auto", "doremi_steady"),  # the last are ways with settings
        group("mixture"),
    ),
}


@pytest.mark.parametrize("key", ASKED)
def test_what_a_key_allows_is_what_there_is(key: str) -> None:
    asked, there = ASKED[key]
    assert set(asked) == set(there)


def test_what_selection_allows_is_what_there_is() -> None:
    pytest.importorskip("numba")
    from doremi_train.selection.documents import describe, registry

    assert set(selection_options.METHODS) == registry.METHODS.keys()
    assert set(allowed(SelectionOptions, "features")) == registry.FEATURES.keys()
    assert set(allowed(SelectionOptions, "write")) == {"none", *describe.FORMATS}


# ── Objectives ──────────────────────────────────────────────────────────────────────

K, B, T, STEPS = 3, 9, 5, 10
HALF: dict[str, Any] = {"prior": (0.5, 0.25, 0.25), "high": (0.9, 0.9, 0.9)}
PRIOR = (0.5, 0.25, 0.25)
OBJECTIVE_CASES: list[tuple[str, Any]] = [
    ("cross_entropy", cross_entropy.Options(weights=PRIOR)),
    ("doge", doge.Options()),
    ("ado", online.Options(**HALF)),
    ("odm", online.Options(**HALF)),
    ("dro", dro.Options(**HALF, target_losses=(1.0, 1.0, 1.0), every=2)),
    *(
        ("doremi", doremi.Options(objective=how, score=score))  # type: ignore[arg-type]
        for how in ("weight", "resample")
        for score in ("excess", "hardest", "easiest")
    ),
    ("doremi", doremi.Options(step_size="auto", warmup="auto")),
    ("doremi", doremi.Options(settled=1e-9)),
    *(
        ("importance", importance.Options(policy=policy, weights=PRIOR))
        for policy in allowed(importance.Options, "policy")
    ),
]


def random_batch(seed: int, present: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """losses (B, T), reference (B, T) in nats, domain (B,) of which the first `present` occur."""
    generator = torch.Generator().manual_seed(seed)
    losses, reference = torch.rand(2, B, T, generator=generator, dtype=torch.float64) * 6
    return losses, reference, torch.arange(B) % present


def same(a: Any, b: Any) -> None:
    """The same bits in every field."""
    assert type(a) is type(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize(
    ("name", "options"),
    OBJECTIVE_CASES,
    ids=[f"{n}-{getattr(o, 'policy', getattr(o, 'score', ''))}" for n, o in OBJECTIVE_CASES],
)
def test_contract_of_an_objective(name: str, options: Any) -> None:
    objective = OBJECTIVES[name]
    state = objective.init(K, STEPS, options)
    same(state, objective.init(K, STEPS, options))
    for step in range(STEPS):
        present = K - step % 2  # every other batch lacks a domain
        losses, reference, domain = random_batch(step, present)
        losses.requires_grad_()
        rows = [slice(0, 2), slice(2, 2), slice(2, B)]  # a process may have no row at all

        # The law: sums of parts add up to those of the whole.
        parts = [objective.observe(losses[r], reference[r], domain[r], K, options) for r in rows]
        whole = objective.observe(losses, reference, domain, K, options)
        for field, *some in zip(whole, *parts, strict=True):
            assert len(field) == K and field.dtype == torch.float64 and not field.requires_grad
            torch.testing.assert_close(sum(some), field, rtol=0, atol=1e-12)
        assert whole.tokens.tolist() == [T * int((domain == k).sum()) for k in range(K)]

        # A state is a value of tensors: left as it was, and its successor the same on every rank
        # and after a way through lists of numbers.
        before = type(state)(*(part.clone() for part in state))
        again = type(state)(*(torch.tensor(p.tolist(), dtype=p.dtype) for p in state))
        following = objective.update(state, whole, options)
        same(state, before)
        same(following, objective.update(again, whole, options))
        for old, new in zip(state, following, strict=True):
            assert old.shape == new.shape and old.dtype == new.dtype and not new.requires_grad
        state = following

        mixture = objective.sampling(state, options)
        assert mixture.shape == (K,) and mixture.dtype == torch.float64
        assert float(mixture.sum()) == pytest.approx(1) and bool((mixture >= 0).all())

        # Weights are finite, not below 0 and those of a mean: the loss keeps the scale of nats.
        by_token = (losses, reference) if objective.token_wise else ()
        weights = objective.weigh(state, domain, whole.tokens, options, *by_token)
        assert weights.shape == (B, T if objective.token_wise else 1)
        assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())
        if present == K:
            assert float(weights.detach().expand(B, T).sum()) == pytest.approx(1)
        for r in rows:
            own = objective.weigh(
                state, domain[r], whole.tokens, options, *(part[r] for part in by_token)
            )
            torch.testing.assert_close(own, weights[r], rtol=1e-12, atol=0)

        for column in objective.record(state, whole).values():
            assert column.shape in ((K,), ()) and bool(torch.isfinite(column).all())
    learned = objective.result(state)
    assert (learned is None) == (name in ("cross_entropy", "importance"))
    if learned is not None:
        assert_mixture(learned)
    assert isinstance(options, objective.Options)  # type: ignore[arg-type]


def assert_mixture(weights: Tensor, domains: int = K) -> None:
    """(K,) float64 on the simplex."""
    assert weights.shape == (domains,) and weights.dtype == torch.float64
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12) and bool((weights >= 0).all())


@pytest.mark.parametrize("name", ONLINE)
def test_contract_of_an_online_mixture(name: str) -> None:
    """It begins at the prior, is what its record says, and results in what was drawn."""
    objective: Any = ONLINE[name]
    assert issubclass(objective.Options, online.Options)
    (options,) = (options for case, options in OBJECTIVE_CASES if case == name)
    state = objective.init(K, STEPS, options)
    assert objective.sampling(state, options).tolist() == pytest.approx(PRIOR)
    drawn = torch.zeros(K, dtype=torch.float64)
    for step in range(STEPS):
        losses, _, domain = random_batch(step, K - step % 2)
        stats = objective.observe(losses, None, domain, K, options)
        state, drawn = objective.update(state, stats, options), drawn + stats.tokens
        assert torch.equal(
            objective.record(state, stats)["weights"], objective.sampling(state, options)
        )
    torch.testing.assert_close(objective.result(state), drawn / drawn.sum())


# ── Mixtures from sizes, and regressors ─────────────────────────────────────────────


@pytest.mark.parametrize("name", HEURISTICS)
def test_contract_of_a_heuristic(name: str) -> None:
    """A mixture of any sizes, the same for the same sizes in any order, and of one domain all."""
    given = heuristics.Options()
    for sizes in ([100, 900, 9000], [7, 7, 7, 7], [1, 10**12], [5]):
        tokens = torch.tensor(sizes)
        for budget in (1.0, 0.5 * sum(sizes), given.max_epochs * sum(sizes)):
            weights = HEURISTICS[name](tokens, budget, given)
            assert_mixture(weights, len(sizes))
            turned = HEURISTICS[name](tokens.flip(0), budget, given)
            torch.testing.assert_close(turned, weights.flip(0), rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("name", regressors.REGRESSORS)
def test_contract_of_a_regressor(name: str) -> None:
    """Losses (R, M) of mixtures (R, K), finite, the same again, and in the order of the truth."""
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    generator = np.random.default_rng(0)
    points, others = generator.dirichlet(np.ones(K), 40), generator.dirichlet(np.ones(K), 15)

    def truth(mixtures: np.ndarray) -> np.ndarray:
        return 2 + np.exp(mixtures @ np.array([[-1.0, 0.5], [0.0, -1.5], [1.0, 0.0]]))

    for losses in (truth(points), truth(points)[:, :1]):
        fit = regressors.REGRESSORS[name](points, losses)
        predicted = fit.predict(others)
        assert predicted.shape == (15, losses.shape[1]) and np.isfinite(predicted).all()
        again = regressors.REGRESSORS[name](points, losses).predict(others)
        np.testing.assert_array_equal(predicted, again)
        for column, true in zip(predicted.T, truth(others).T, strict=False):
            assert spearmanr(column, true).statistic > 0.7


# ── Text in and out ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", corpus_formats.READERS)
def test_contract_of_a_reader(ending: str, tmp_path: Path) -> None:
    """The same texts from a file of every ending; one that holds something else is named."""
    write_as(tmp_path / "root" / "a", ending)
    given = options(root=str(tmp_path / "root"))
    read = pieces(given)
    if ending == ".bin":  # tokens, here bytes of the texts
        assert [bytes(piece.tokens.tolist()).decode() for piece in read] == TEXTS
    else:
        assert [piece.text for piece in read] == TEXTS
    assert {(piece.domain, piece.split, piece.last) for piece in read} == {("a", None, True)}
    assert all(source.size > 0 and source.version for source in resolve(given))
    path = tmp_path / f"wrong{ending}"
    path.write_bytes(b"\xff\xfe something else\n" * 100)
    if ending == ".bin":
        path.with_suffix(".idx").write_bytes(b"something else")
    refused(lambda: one(path), str(path.with_suffix("")))


@pytest.mark.parametrize("name", ["jsonl.zst", "parquet", "webdataset"])
def test_contract_of_chosen_text(name: str, tmp_path: Path) -> None:
    """What is written is a source of the same texts."""
    pytest.importorskip("numba")
    from doremi_train.selection.documents import describe

    path = tmp_path / f"train-00000.{'tar' if name == 'webdataset' else name}"
    with describe.FORMATS[name](path) as write:
        for number, text in enumerate(TEXTS):
            write(f"{number:016x}", text)
    assert texts(one(path)) == TEXTS


# ── Scorers of documents ────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Method or features → what it needs beside its name."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from doremi_train.data.tokens import tokenizer as tokenizers
    from doremi_train.methods import vocabulary
    from doremi_train.selection.documents import granular

    folder = tmp_path_factory.mktemp("needed")
    backend = tokenizers.learn(documents(1, "abcdefgh", 50, 20_000), 300)
    backend.save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>").save_pretrained(
        folder / "encoder"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=300, num_attention_heads=2, **shape)).save_pretrained(
        folder / "encoder"
    )
    granular.save(folder / "vocabulary.json", [*vocabulary.BYTES, b"ab", b" ab", b" c d"])
    return {
        "embedding": {"encoder": str(folder / "encoder")},
        "tokens": {"tokenizer": str(folder / "tokenizer.json")},
        "granular": {"vocabulary": str(folder / "vocabulary.json")},
    }


@pytest.mark.parametrize(
    ("name", "features"),
    [*((name, "words") for name in selection_options.METHODS), ("ngram", "tokens"),
     ("ngram", "granular")],
)  # fmt: skip
def test_contract_of_a_scorer(name: str, features: str, needed: dict[str, dict[str, Any]]) -> None:
    """Sums add up; scores (P, C) are finite, and the same however a corpus is divided and whoever
    computes them."""
    pytest.importorskip("numba")
    from doremi_train.selection.documents.registry import METHODS
    from doremi_train.selection.documents.scorers import BUCKETS, whole

    given = needed.get(name, {}) | needed.get(features, {})
    settings = SelectionOptions(method=name, features=features, **given)  # type: ignore[arg-type]
    corpus = [text.encode() for text in documents(2, "abcdefgh", 60, 20_000)]
    targets = {
        "a": [text.encode() for text in documents(3, "abcd", 20, 2000)],
        "b": [text.encode() for text in documents(4, "efgh", 20, 2000)],
    }
    halves = whole(corpus[:30]), whole(corpus[30:])
    first, second, both = (METHODS[name](settings).sums() for _ in range(3))
    scorer = METHODS[name](settings)
    for batch, sums in zip((*halves, whole(corpus)), (first, second, both), strict=True):
        scorer.observe(batch, sums)
    together = scorer.together(first, second)
    assert together.keys() == both.keys()
    assert all(np.array_equal(together[key], both[key]) for key in both)
    words = scorer.words(both)
    assert words is None or words.shape == (BUCKETS,)

    model = scorer.fit(targets, both)
    scores = scorer.score(whole(corpus), model)
    assert scores.shape == (len(corpus), len(targets)) and np.isfinite(scores).all()
    other = METHODS[name](settings)  # made anew from arrays alone
    divided = np.concatenate([other.score(batch, model) for batch in halves])
    np.testing.assert_allclose(divided, scores, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(other.score(whole(corpus), model), scores)
    tokens = scorer.tokens(whole(corpus))
    assert tokens.shape == (len(corpus),) and (tokens > 0).all()


# ── Models and stages ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in group("model") if name != "custom"])
def test_contract_of_a_preset(name: str) -> None:
    """A causal model with tied embeddings and whole heads; one named by a size has about
    that, with the paper's vocabulary."""
    config = configs.resolve(ModelOptions(**configs.preset(name, "model")), 256_000, 0, 1024)
    assert config["hidden_size"] % config["num_attention_heads"] == 0
    total, body = configs.parameters(config)
    assert total == body + 256_000 * config["hidden_size"]
    if size := re.fullmatch(r"(\d+)([mb])", name):
        assert total == pytest.approx(int(size[1]) * {"m": 1e6, "b": 1e9}[size[2]], rel=0.35)


@pytest.mark.parametrize("name", STAGES)
def test_contract_of_a_stage(name: str) -> None:
    """A module with a docstring and `run(session)`, and a line in the table of stages."""
    module = importlib.import_module(f"doremi_train.stages.{STAGES[name].module}")
    run: Callable[..., Any] = module.run
    required = [p.name for p in inspect.signature(run).parameters.values() if p.default is p.empty]
    assert required == ["session"] and module.__doc__
    page = (TESTS.parent / "docs" / "pipeline.md").read_text()
    assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE)

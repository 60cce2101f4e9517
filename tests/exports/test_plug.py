"""An export target that is added in a test, to see how much of the house has to be told of it.

One place has to be touched: its entry in `FORMATS` of doremi_train/exports/formats.py, here in ten
lines. The command, its messages, the contract test, and the table in docs/export.md (written anew
by `python tests/helpers/pages.py`) follow from the entry.
"""

import ast
import json
from pathlib import Path

import pytest
from helpers import exports_contract, pages
from helpers.command import Command

import doremi_train
from doremi_train.exports.form import Format
from doremi_train.exports.formats import FORMATS

# seqio's: the pairs that a mixture is registered with.
PLUG = Format(
    trainer="seqio",
    file="JSON pairs, for `MixtureRegistry.add(name, pairs)`",
    draws="documents",
    because="`Mixture.get_dataset` samples examples of its tasks, which are packed afterwards",
    ending="json",
    write=lambda sources: json.dumps([[source.path, source.weight] for source in sources]),
    read=lambda text: dict(json.loads(text)),
    paths=False,
)
GIVEN = {"plain": 0.25, "rich": 0.75, "digits": 0.0}


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FORMATS, "plug", PLUG)
    return "plug"


def test_a_target_is_one_entry(
    plug: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    """It is written by the command, and read back as the mixture of another run."""
    weights = f"mixture.weights={{{', '.join(f'{k}: {v}' for k, v in GIVEN.items())}}}"
    run_dir = tmp_path / "run"
    outcome = command(
        *tiny, f"run_dir={run_dir}", "mixture=file", weights, "stage=export", "export.to=plug"
    )
    assert outcome.code == 0 and "draws documents" in outcome.out, outcome
    file = run_dir / "export" / "mixture_plug.json"
    drawn = dict(json.loads(file.read_text()))
    beside = json.loads(file.with_name("mixture_plug.json.provenance.json").read_text())
    assert (beside["to"], beside["draws"], beside["left_out"]) == ("plug", "documents", ["digits"])
    means = beside["tokens_per_document"]
    assert drawn["plain"] / drawn["rich"] == pytest.approx(
        GIVEN["plain"] / means["plain"] / (GIVEN["rich"] / means["rich"])
    )

    back = tmp_path / "back"
    read = ["mixture=file", f"mixture.path={file}", "mixture.format=plug"]
    outcome = command(*tiny, f"run_dir={back}", *read, "stage=export", "export.to=plug")
    assert outcome.code == 0, outcome
    artefact = json.loads((back / "weights.json").read_text())
    assert artefact["weights"] == pytest.approx(GIVEN, abs=1e-9)
    assert dict(json.loads((back / "export" / "mixture_plug.json").read_text())) == pytest.approx(
        drawn, abs=1e-9
    )


@pytest.mark.parametrize("key", ["export.to", "mixture.format"])
def test_it_is_among_what_is_allowed(
    key: str, plug: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    outcome = command(*tiny, f"run_dir={tmp_path / 'run'}", f"{key}=pax", "stage=prepare")
    assert outcome.code == 2 and f"{key}=pax: unknown; allowed: " in outcome.err
    assert outcome.err.split("allowed: ")[1].split()[-1] == plug


def test_it_keeps_the_contract(plug: str) -> None:
    exports_contract.check(plug)


def test_it_is_in_the_table(plug: str) -> None:
    table = pages.table_of_exports()
    assert f"| `plug` | seqio | {PLUG.file} | documents: {PLUG.because} |" in table
    assert (
        "need no `export.paths`: `levanter`, `llama_factory`, `lingua`, `doremi`, `plug`." in table
    )
    page = pages.ROOT / "docs" / "export.md"
    assert page.read_text() != pages.generated()[page]  # so the page would be stale


def test_no_other_file_knows_a_target_by_name() -> None:
    """Names that mean something else too are left out: a way, a package, a kind of data, a kind of
    model; and the trainers that have an adapter in client/."""
    names = set(FORMATS) - {"doremi", "datasets", "webdataset", "gpt_neox"}
    package = Path(doremi_train.__file__).parent
    adapters = set((package / "client").glob("*.py"))
    for path in set(package.rglob("*.py")) - adapters - {package / "exports" / "formats.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Constant) or node.value not in names, (
                f"{path}:{node.lineno} knows {node.value}"
            )

"""Every way to a mixture keeps its contract, and one that is added in a test needs one entry.

The plug below is a way of ten lines. What had to be told of it: `WAYS`, and nothing else. The
command takes it, the plan and the run ask it, the report shows its words, errors and the table in
docs/mixtures.md name it. A way of the project is that module, its entry, a file
conf/mixture/NAME.yaml (so that `mixture=NAME` is a group's option), and its tests; keys of its own
are a dataclass in stages/options.py.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import pages
from helpers.command import Command, run_here
from helpers.processes import read
from torch import Tensor, tensor

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.mixture import Mixture
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import WAYS
from doremi_train.stages.runs.ahead import Pipeline
from doremi_train.stages.session import Session

NEEDS = {
    "file": ["mixture.weights={plain: 0.5, rich: 0.25, digits: 0.25}"],
    "target": ["objective.metrics={plain: 1, rich: 3}"],
}
SMALL = ["main.comparisons=[]", "swarm.runs=4", "evaluation.every=12"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_contract_of_a_way(name: str, tiny: list[str], command: Command, tmp_path: Path) -> None:
    """It says how it comes about; what it foretells is what it runs; its weights are a mixture."""
    assert re.fullmatch(r"[A-Z].+\.", WAYS[name].HOW)
    overrides = [*tiny, *SMALL, f"mixture.method={name}", *NEEDS.get(name, [])]
    overrides += [f"run_dir={tmp_path / 'run'}", f"store={tmp_path / 'store'}"]
    assert command(*overrides, "stage=plan").code == 0
    foretold = read(tmp_path / "run" / "plan.json")["stages"]
    assert command(*overrides, "stage=main").code == 0
    mixture = read(tmp_path / "run" / "weights.json")
    assert mixture["method"] == name
    assert abs(sum(mixture["weights"].values()) - 1) < 1e-9
    assert min(mixture["weights"].values()) >= 0
    made = {path.parent.resolve() for path in (tmp_path / "store").glob("runs/*/model")}
    linked = {(tmp_path / "run" / run).resolve() for run in foretold}
    assert made == {folder for folder in linked if (folder / "model").exists()}
    assert command(*overrides, "stage=plan").code == 0
    after = read(tmp_path / "run" / "plan.json")["stages"]
    assert {run["state"] for run in after.values()} <= {"done", "same"}


def test_the_domains_that_count_alone(tiny: list[str], tmp_path: Path) -> None:
    """In the objective's shares; what would be more than mixture.max_epochs is of the others, by
    size; and where all count alike there are none."""
    given = [*tiny, "stage=main", "mixture=target", "main.comparisons=[]", "training.steps=1"]
    given += ["main.tokens=400000"]
    counted = "objective.metrics={plain: 1, rich: 3}"
    mixtures, passes = [], []
    for most in (1000, 2):
        run_dir = tmp_path / str(most)
        more = [counted, f"mixture.max_epochs={most}", f"run_dir={run_dir}"]
        assert run_here(*given, *more).code == 0
        written = read(run_dir / "weights.json")
        mixtures.append(written["weights"])
        passes.append(written["epochs"])
    assert mixtures[0] == pytest.approx({"plain": 0.25, "rich": 0.75, "digits": 0})
    assert passes[0]["rich"] > 2
    assert passes[1] == pytest.approx({"plain": 2, "rich": 2, "digits": passes[1]["digits"]})
    assert 0 < passes[1]["digits"] < 2
    refused = run_here(*given, f"run_dir={tmp_path / 'even'}")
    assert refused.code == 2 and "objective is for no domain more than" in refused.err


def run(session: Session) -> Mixture:
    store = prepare.run(session)
    return Mixture("plug", store.named(ahead(session, store, Pipeline(session))))


def ahead(session: Session, store: TokenStore, pipeline: Pipeline) -> Tensor:
    by_name = sorted(store.domains)
    return tensor([2.0 ** -(1 + by_name.index(name)) for name in store.domains]).double() / 0.875


PLUG = SimpleNamespace(HOW="Half for the first domain by name, and so on.", run=run, ahead=ahead)


def test_a_way_is_added_in_one_place(
    tiny: list[str], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WAYS, "plug", PLUG)
    overrides = [*tiny, *SMALL, f"run_dir={tmp_path / 'run'}"]
    outcome = command(*overrides, "mixture.method=plug")
    assert outcome.code == 0, outcome
    weights = read(tmp_path / "run" / "weights.json")
    assert weights["method"] == "plug"
    assert list(weights["weights"].values()) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    plan = read(tmp_path / "run" / "plan.json")
    assert set(plan["stages"]) == {"main"}
    assert plan["domains"]["digits"]["final_epochs"]["learned"] > 0
    wrong = command(*overrides, "mixture.method=magic")
    assert wrong.code == 2
    assert wrong.err.strip().endswith("unknown; allowed: " + ", ".join(WAYS))
    assert "| `plug` | Half for the first domain by name, and so on. |" in pages.table_of_ways()

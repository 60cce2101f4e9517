"""A small corpus of generated text, a store that tests share as users' runs do, and the command."""

import fcntl
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import forked, parsed
from helpers.command import LONG, TINY, Command, Outcome, environment, run_here
from helpers.corpus import documents, write_jsonl
from hypothesis import settings

parsed.keep()
# A machine with other work may take a second for what takes a millisecond.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Files with a test of minutes, or with many of half a minute, the longest first. Begun last, one of
# them would be worked on by one process while the others have nothing left to do.
LONG_FILES = (
    "test_slurm", "test_planted", "test_killed", "test_engines", "test_recovery", "test_launch",
    "test_acceptance", "test_benchmarks", "test_start", "test_gpu", "test_mistakes", "test_data",
    "test_submit", "test_documents", "test_faults", "test_classify", "test_fit", "test_regroup",
    "test_plan", "test_pipeline",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would order files by their number of tests


@pytest.hookimpl(trylast=True)  # what is not asked for is gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which workers are to begin them."""
    tests = Counter(item.path for item in items)
    rank = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: (rank.get(item.path.stem, len(rank)), -tests[item.path], item.path))


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """What is imported by now is never collected, and looked through no more: a command collects
    garbage of its own accord, for a third of a second where all libraries are loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_repetition() -> Iterator[None]:
    """A plan tries a micro-step twice, and not nine times: how long it takes is not asked here."""
    from doremi_train.model import costs  # here, since whoever hands out the files needs no torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "_REPETITIONS", 1)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of 200, 100 and 50 kB: few words, many words, and digits."""
    root = tmp_path_factory.mktemp("corpus")
    write_jsonl(root / "plain" / "train.jsonl", documents(1, "abcdefgh", 50, 200_000))
    write_jsonl(
        root / "rich" / "train.jsonl", documents(2, "abcdefghijklmnopqrstuvwxyz", 3000, 100_000)
    )
    write_jsonl(root / "digits" / "train.jsonl", documents(3, "0123456789", 200, 50_000))
    return root


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, as by users' runs: the corpus is prepared once, and equal models are trained
    once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def tiny(corpus: Path, store: Path) -> list[str]:
    """Overrides of a whole pipeline on the small corpus, in a shared store."""
    return [f"data.root={corpus}", f"store={store}", *TINY]


def apart(tiny: list[str], store: Path, folder: Path) -> list[str]:
    """Overrides with a store in `folder`, where only the data is there already."""
    assert run_here(*tiny, f"run_dir={folder / 'first'}", "stage=prepare").code == 0
    own = folder / "store"
    own.mkdir()
    (own / "data").symlink_to(store / "data")
    return [*tiny, f"store={own}"]


@pytest.fixture
def fresh(tiny: list[str], store: Path, tmp_path: Path) -> list[str]:
    """Overrides with a store of its own, where only the data is there already."""
    return apart(tiny, store, tmp_path)


@pytest.fixture(scope="module")
def module_fresh(
    tiny: list[str], store: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The same, shared by the tests of a module."""
    return apart(tiny, store, tmp_path_factory.mktemp("apart"))


@pytest.fixture
def prepared(fresh: list[str]) -> list[str]:
    """The same, of a longer run."""
    return [*fresh, *LONG]


@pytest.fixture(scope="session")
def uninterrupted(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    outcome = run_here(*tiny, *LONG, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]")
    assert outcome.code == 0, outcome
    return run_dir


@pytest.fixture
def alone_with_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No other worker of this run has a Ray meanwhile: whoever names no cluster joins the one that
    was started on this machine."""
    with (tmp_path_factory.getbasetemp().parent / "ray.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def command() -> Command:
    """`command(*overrides)` runs the command in this process. Errors that are not the user's are
    raised."""
    return run_here


@pytest.fixture(scope="session")
def doremi() -> Command:
    """`doremi(*overrides, processes=1, cwd=…)` runs the command in processes of its own, to its
    end."""

    def run(
        *overrides: str, processes: int = 1, timeout: float = 900, cwd: Path | None = None
    ) -> Outcome:
        return Outcome(
            *forked.ended(forked.ranks(processes, overrides, environment(), cwd), timeout)
        )

    return run

"""What a machine lacks, forbids or breaks is a message or a way round: the lines of the table in
docs/faults.md on limits of a machine."""

import errno
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import forked, limits
from helpers.command import ROOT, TINY, environment, run_here
from helpers.corpus import documents, write_jsonl
from helpers.processes import read
from helpers.sources import options

from doremi_train import command, config
from doremi_train.data.tokens.prepare import prepare
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.storage import runs
from doremi_train.storage.runs import Run

# ── Open files ──────────────────────────────────────────────────────────────────────


def test_many_shards_need_few_open_files(corpus: Path, tmp_path: Path) -> None:
    small = {"vocabulary_size": 300, "tokenizer_sample": 50_000}
    cut = {"member_tokens": 1024, "members_per_shard": 1}
    folder = prepare(options(root=str(corpus), **small, **cut), tmp_path)
    assert len(list(folder.glob("train/*/*.tar"))) > 100
    opened = len(list(Path("/proc/self/fd").iterdir()))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def whole() -> list[np.ndarray]:
        store = TokenStore.open(folder)
        counts = store.sequences("train", 32)
        return [
            store.gather("train", np.full(count, domain), np.arange(count), 32)
            for domain, count in enumerate(counts.tolist())
        ]

    free = whole()
    for left in (1000, 6):  # so many that it keeps within a part of them; fewer than that
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + left, before[1]))
        try:
            found = whole()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for one, two in zip(free, found, strict=True):
            np.testing.assert_array_equal(one, two)


def test_too_few_open_files_are_named() -> None:
    error = command._unusable(OSError(errno.EMFILE, "Too many open files", "x"), {})
    assert isinstance(error, runs.Unusable) and "ulimit -n" in str(error)


# ── Places that cannot be used ──────────────────────────────────────────────────────


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A file, and a folder that nothing can be written to."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(stat.S_IRUSR | stat.S_IXUSR)
    return {"file": tmp_path / "file", "closed": tmp_path / "closed"}


@pytest.mark.parametrize("at", ["file", "file/below", "closed"])
@pytest.mark.parametrize("key", ["run_dir", "store"])
def test_an_unusable_place_is_named_by_its_key(
    key: str, at: str, places: dict[str, Path], tiny: list[str], tmp_path: Path
) -> None:
    first, _, rest = at.partition("/")
    place = places[first] / rest
    with limits.modes_hold():
        outcome = run_here(*tiny, "stage=prepare", f"run_dir={tmp_path / 'run'}", f"{key}={place}")
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert f"{key}=" in outcome.err and str(place) in outcome.err


@pytest.mark.parametrize("name", ["prepare", "reference/status.json/x", "config.yaml/x"])
def test_what_stands_in_the_place_of_ours_is_named(
    name: str, tiny: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("a user's")
    outcome = run_here(*tiny, "stage=reference", f"run_dir={tmp_path / 'run'}", "seed=36")
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert (
        "run_dir" in outcome.err and f"{tmp_path / 'run'}/{name.partition('/')[0]}" in outcome.err
    )
    assert re.search("move (it )?away", outcome.err)
    assert path.read_text() == "a user's"


# ── Output that nobody reads ────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize(("more", "code"), [((), 0), (("training.step=3",), 2)])
def test_training_goes_on_where_nobody_reads_what_it_says(
    more: tuple[str, ...], code: int, fresh: list[str], tmp_path: Path
) -> None:
    overrides = [*fresh, "stage=reference", f"run_dir={tmp_path / 'run'}", *more]
    started = forked.ranks(1, overrides, environment(), before=limits.nobody_reads)
    found, *_ = forked.ended(started, 300)
    assert found == code
    if not code:
        assert read(tmp_path / "run" / "reference" / "status.json")["state"] == "finished"


# ── Encodings and names ─────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_names_beyond_ascii_and_of_our_files_under_a_c_locale(tmp_path: Path) -> None:
    """In an interpreter of its own, which takes the locale's encoding when it begins."""
    names = ["größe 語", "result.json", "status.json"]
    for seed, name in enumerate(names):
        write_jsonl(tmp_path / "in" / name / "train.jsonl", documents(seed, "abcdefgh", 50, 30_000))
    run_dir = tmp_path / "läuft"
    small = [*TINY, "data.validation_fraction=0.1"]
    given = [*small, f"data.root={tmp_path / 'in'}", f'run_dir="{run_dir}"', "stage=proxy"]
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "doremi_train", *given],
        env=environment() | narrow, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and rb"\u03b1_ref" in done.stdout
    weights = read(run_dir / "proxy" / "result.json")["weights"]
    assert sorted(weights) == sorted(names)
    again = run_here(*given)
    assert again.code == 0 and "is in the store already" in again.out, again


@pytest.mark.slow
def test_names_beyond_latin_1_under_a_latin_1_locale(tmp_path: Path) -> None:
    for seed, name in enumerate(["größe", "語"]):
        write_jsonl(tmp_path / "in" / name / "train.jsonl", documents(seed, "abcdefgh", 50, 30_000))
        (tmp_path / "in" / name / f"other.{seed}").touch()  # is named as not read
    given = [f"data.root={tmp_path / 'in'}", f'run_dir="{tmp_path}/läuft"', "stage=prepare"]
    (tmp_path / "locale").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "doremi_train", *TINY, "data.validation_fraction=0.1", *given],
        env=environment() | limits.latin_1(tmp_path / "locale"), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "größe".encode("latin-1") in done.stdout and rb"\u8a9e" in done.stdout
    manifest = read(tmp_path / "läuft" / "prepare" / "manifest.json")
    assert [*manifest["domains"]] == ["größe", "語"]


# ── Copies ──────────────────────────────────────────────────────────────────────────


def test_a_copy_without_links_is_read_and_continued(tiny: list[str], tmp_path: Path) -> None:
    given = [*tiny, "stage=reference", "seed=36"]
    first, copy = tmp_path / "first", tmp_path / "copy"
    assert run_here(*given, f"run_dir={first}", f"store={first}/store").code == 0
    for store in (copy / "store", tmp_path / "another"):  # where its runs are, and are not
        shutil.copytree(first, copy)  # cp -rL
        assert not (copy / "reference").is_symlink()
        outcome = run_here(*given, f"run_dir={copy}", f"store={store}")
        assert outcome.code == 0 and "is in the store already" in outcome.out, outcome
        assert (copy / "reference").is_symlink() and (copy / "prepare").is_symlink()
        name = "reference/model/model.safetensors"
        assert (copy / name).read_bytes() == (first / name).read_bytes()
        assert runs.damaged((copy / "reference").resolve(), full=True) is None
        shutil.rmtree(copy)


def test_a_copy_of_what_is_not_finished_keeps_its_checkpoints(tmp_path: Path) -> None:
    run = Run(tmp_path / "store", "kind", {"a": 1})
    copy = tmp_path / "run" / "reference"
    step = "checkpoints/step-000000007/manifest.json"
    run.begin()
    (run.folder / "metrics.jsonl").write_text("none")
    for name in ("recipe.json", step, "metrics.jsonl"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("seven")
    with pytest.raises(config.UserError, match="move it away"):  # it is of something else
        (copy / "recipe.json").write_text('{"a": 2}')
        run.take_over(copy)
    (copy / "recipe.json").write_text('{"a": 1}')
    run.take_over(copy)
    assert not copy.exists() and not list((tmp_path / "run").iterdir())
    assert [(run.folder / name).read_text() for name in (step, "metrics.jsonl")] == ["seven"] * 2


# ── A store that others may only read ───────────────────────────────────────────────


@pytest.mark.slow
def test_a_finished_store_of_another_user_serves_readers(tiny: list[str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    given = [*tiny, f"store={store}"]
    assert run_here(*given, "stage=proxy", f"run_dir={tmp_path / 'first'}").code == 0
    for path in [store, *store.rglob("*")]:
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    with limits.modes_hold():
        outcome = run_here(*given, "stage=proxy", f"run_dir={tmp_path / 'second'}")
        assert outcome.code == 0 and outcome.out.count("in the store already") == 2, outcome
        assert run_here(*given, "stage=verify", f"run_dir={tmp_path / 'third'}").code == 0
        more = run_here(*given, "stage=reference", "seed=36", f"run_dir={tmp_path / 'fourth'}")
    assert more.code == 2 and f"store={store}" in more.err and "Permission denied" in more.err
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    one, two = (tmp_path / name / "proxy" / "result.json" for name in ("first", "second"))
    assert one.read_bytes() == two.read_bytes()


# ── What libraries need of a machine ────────────────────────────────────────────────


@pytest.mark.slow
def test_loops_are_compiled_where_nothing_can_be_kept(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="extra `select` brings it")
    package = tmp_path / "package" / "doremi_train"
    shutil.copytree(
        ROOT / "doremi_train", package, ignore=lambda _, names: {"__pycache__"} & {*names}
    )
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    program = (
        "import sys; from doremi_train.selection.documents import kernels as k; k.require_numba();"
        "print(k.__file__, k.mix(k.START))"
    )
    env = environment() | {"PYTHONPATH": str(package.parent), "HOME": str(tmp_path)}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": "/dev/null/no"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env, cwd="/", capture_output=True, text=True, check=False,
        preexec_fn=limits.bound_by_modes,
    )  # fmt: skip
    tmp_path.chmod(0o755)
    package.parent.chmod(0o755)
    for folder in package.parent.rglob("*/"):
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(package))


@pytest.mark.slow
def test_one_worker_does_it_without_shared_memory(tmp_path: Path) -> None:
    program = (
        "from doremi_train.selection.documents.engines import Processes\n"
        "with Processes(2) as pool: pool.run(print, ['one', 'two'], lambda done: None)"
    )
    done = subprocess.run(
        limits.without_shared_memory([sys.executable, "-c", program]),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "selection.workers=2: only one can work here" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["one", "two"]

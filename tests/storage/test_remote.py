"""Storage on a real S3 server: sources, token shards and runs there, on networks that fail."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zstandard
from helpers import s3
from helpers.command import LONG, Command, run_here, start
from helpers.processes import checkpoints, ended, lines, reached, reaped, same_bits, wait_for
from helpers.sources import TEXTS, jsonl, one, options, refused, texts, write_as

from doremi_train import files
from doremi_train.config import UserError
from doremi_train.data.tokens.prepare import prepare
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.storage import steady
from doremi_train.storage.mirror import Mirror
from doremi_train.storage.runs import set_status
from doremi_train.training import checkpoints as checkpoints_of_a_run

pytest.importorskip("s3fs", reason="extra `test` brings it")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3.server(tmp_path_factory.mktemp("s3") / "log") as url:
        yield url


@pytest.fixture(autouse=True)
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """s3://… of a new bucket, for this process and those it starts."""
    for name, value in {**s3.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(steady, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(steady, "LONGEST_WAIT", 0.1)
    s3.forget()
    name = f"b{abs(int.from_bytes(os.urandom(4), 'big'))}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def network(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[str, str], str]], Any]]:
    """`network(verdict)` puts a bad network before the server; see `s3.BadNetwork`."""
    opened = []

    def put(verdict: Callable[[str, str], str]) -> s3.BadNetwork:
        bad = s3.BadNetwork(endpoint, verdict)
        bad.__enter__()
        opened.append(bad)
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad.url)
        s3.forget()
        return bad

    yield put
    s3.forget()
    for bad in opened:
        bad.__exit__()


def first(times: int, method: str, key: str, verdict: str) -> Callable[[str, str], str]:
    """The first requests of this method for a path that holds `key` go wrong."""
    left = [times]

    def judge(asked: str, path: str) -> str:
        if asked == method and key in path and left[0] > 0:
            left[0] -= 1
            return verdict
        return "pass"

    return judge


def upload(folder: Path, url: str) -> None:
    fs = fsspec.filesystem("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.put_file(str(path), f"{url}/{path.relative_to(folder).as_posix()}")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ── Sources ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "ending", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet", ".tar", ".txt"]
)
def test_every_format_is_read_from_s3_as_from_a_file(
    ending: str, bucket: str, tmp_path: Path
) -> None:
    write_as(tmp_path / "x", ending)
    upload(tmp_path / "x", bucket)
    assert texts(one(f"{bucket}/*{ending}")) == texts(one(tmp_path / "x" / f"*{ending}")) != []


def test_prepared_from_s3_and_from_files_is_the_same(
    corpus: Path, bucket: str, tmp_path: Path
) -> None:
    upload(corpus, f"{bucket}/corpus")
    given: dict[str, Any] = {"vocabulary_size": 300, "tokenizer_sample": 50_000}
    local = prepare(options(root=str(corpus), **given), tmp_path / "local")
    there = prepare(options(root=f"{bucket}/corpus", **given), tmp_path / "there")
    assert local.name != there.name  # versions are times here and ETags there
    manifests = [read(folder / "manifest.json") for folder in (local, there)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    for path in [*local.rglob("*.tar"), local / "index.npy", local / "tokenizer.json"]:
        assert path.read_bytes() == (there / path.relative_to(local)).read_bytes()


def test_a_missing_bucket_and_a_missing_key_are_named(bucket: str) -> None:
    refused(
        one("s3://no-such-bucket-here/x.jsonl"),
        "s3://no-such-bucket-here/x.jsonl",
        "data.domains.a.train",
    )
    refused(one(f"{bucket}/nothing.jsonl"), f"{bucket}/nothing.jsonl", "no such file")
    refused(one(f"{bucket}/*.jsonl"), f"{bucket}/*.jsonl", "matches none")
    refused(options(root=f"{bucket}/corpus"), f"{bucket}/corpus", "no such folder")


# ── A network that fails ──────────────────────────────────────────────────────────────────────────


# Some 4 MB that hardly compress: a file of it takes several requests of BLOCK bytes.
LINES = [hashlib.sha512(bytes([n % 251, n // 251])).hexdigest() for n in range(30_000)]
BLOCK = 300_000


@pytest.mark.parametrize(
    ("ending", "verdict"),
    [
        (".jsonl", "fail"),
        (".jsonl", "drop"),
        (".jsonl", "cut"),
        (".jsonl.zst", "cut"),
        (".jsonl.gz", "fail"),
    ],
)
def test_a_read_that_fails_goes_on_where_it_was(
    ending: str,
    verdict: str,
    bucket: str,
    network: Any,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = jsonl(LINES)
    packed = {
        ".jsonl": data,
        ".jsonl.zst": zstandard.compress(data),
        ".jsonl.gz": gzip.compress(data),
    }[ending]
    fsspec.filesystem("s3").pipe_file(f"{bucket}/x{ending}", packed)
    monkeypatch.setattr("s3fs.S3FileSystem.default_block_size", BLOCK)
    monkeypatch.setattr(steady, "CHUNK", BLOCK)
    asked = [0]

    def judge(
        method: str, path: str
    ) -> str:  # in the middle too, and twice in a row: the client itself may ask again
        if method != "GET" or f"x{ending}" not in path:
            return "pass"
        asked[0] += 1
        return verdict if asked[0] % 4 in (2, 3) else "pass"

    network(judge)
    assert texts(one(f"{bucket}/x{ending}")) == LINES
    said = capsys.readouterr().out.splitlines()
    assert said and all(
        f"{bucket}/x{ending}: " in line and "trying again in" in line for line in said
    ), said


@pytest.mark.parametrize("verdict", ["fail", "drop"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_looking_for_files_is_tried_again(
    method: str, verdict: str, bucket: str, network: Any
) -> None:
    """A server that fails is not a server without files."""
    fs = fsspec.filesystem("s3")
    for name in ("a/train.jsonl", "b/train-0.jsonl", "b/train-1.jsonl"):
        fs.pipe_file(f"{bucket}/corpus/{name}", jsonl(TEXTS))
    for given, number in (
        (options(root=f"{bucket}/corpus"), 3),
        (one(f"{bucket}/corpus/*/*.jsonl"), 3),
    ):
        network(first(3, method, "", verdict))
        assert texts(given) == TEXTS * number


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "PATIENCE", 6.0)
    monkeypatch.setattr(steady, "ATTEMPTS", 3)


def test_a_body_that_stops_goes_on_where_it_was(
    bucket: str, network: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/x.jsonl", jsonl(LINES))
    monkeypatch.setattr("s3fs.S3FileSystem.default_block_size", BLOCK)
    monkeypatch.setattr(steady, "CHUNK", BLOCK)
    asked = [0]

    def judge(method: str, path: str) -> str:
        asked[0] += method == "GET" and "x.jsonl" in path
        return "stop" if asked[0] in (3, 4) and method == "GET" else "pass"

    network(judge)
    assert texts(one(f"{bucket}/x.jsonl")) == LINES
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("nothing came for 6 s" in line for line in said), said


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_service_that_falls_silent_is_asked_again(
    method: str, bucket: str, network: Any, impatient: None
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/corpus/a/train.jsonl", jsonl(TEXTS))
    network(first(1, method, "", "silent"))
    assert texts(options(root=f"{bucket}/corpus")) == TEXTS


def test_an_upload_that_is_not_taken_is_tried_again_and_named(
    bucket: str, network: Any, capsys: Any, tmp_path: Path, impatient: None
) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    (tmp_path / "large").write_bytes(bytes(20_000_000))  # more than sockets hold
    network(first(1, "PUT", "small", "silent"))
    mirror = Mirror(f"{bucket}/there")
    mirror.push(tmp_path, ["small"])
    assert capsys.readouterr().out.count("there/small: ReadTimeoutError") == 1
    assert mirror.read("small") == bytes(1000)
    network(first(10**6, "PUT", "large", "deaf"))
    mirror = Mirror(f"{bucket}/there")
    with pytest.raises(UserError, match="there/large: failed 3 times"):
        mirror.push(tmp_path, ["large"])
    assert capsys.readouterr().out.count("trying again in") == 2


def test_at_the_end_of_all_attempts_the_command_says_so(
    corpus: Path, bucket: str, network: Any, tmp_path: Path
) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/a/train.jsonl", jsonl(LINES[:100]))
    bad = network(first(10**6, "GET", "train.jsonl", "fail"))
    outcome = run_here(f"data.root={bucket}", f"run_dir={tmp_path / 'run'}", "stage=prepare")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert (
        f"{bucket}/a/train.jsonl: failed {steady.ATTEMPTS} times, the last time with" in outcome.err
    )
    assert outcome.out.count("trying again in") == steady.ATTEMPTS - 1
    assert (
        sum("train.jsonl" in path for method, path in bad.asked if method == "GET")
        == steady.ATTEMPTS
    )


def test_what_is_forbidden_is_not_tried_again(
    bucket: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    s3.forget()
    refused(one(f"{bucket}/x.jsonl"), f"{bucket}/x.jsonl", "redentials")
    assert "trying again" not in capsys.readouterr().out


def test_an_object_that_changes_while_it_is_read_is_refused(
    bucket: str, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{bucket}/x.jsonl", jsonl(LINES))
    monkeypatch.setattr("s3fs.S3FileSystem.default_block_size", BLOCK)
    monkeypatch.setattr(steady, "CHUNK", BLOCK)
    asked = [0]

    def judge(method: str, path: str) -> str:
        if method == "GET" and "x.jsonl" in path:
            asked[0] += 1
            return "fail" if asked[0] == 2 else "pass"
        return "pass"

    network(judge)
    wait = steady.time.sleep
    other = fsspec.filesystem("s3")
    monkeypatch.setattr(
        "doremi_train.storage.steady.time.sleep",
        lambda s: (other.pipe_file(f"{bucket}/x.jsonl", jsonl(LINES[1:])), wait(s)),
    )
    refused(one(f"{bucket}/x.jsonl"), "x.jsonl: changed while it was read")


# ── Token shards in a second home ─────────────────────────────────────────────────────────────────


def test_only_the_shards_that_are_touched_are_fetched(
    corpus: Path, bucket: str, tmp_path: Path
) -> None:
    given = options(
        root=str(corpus),
        vocabulary_size=300,
        tokenizer_sample=50_000,
        member_tokens=2_000,
        members_per_shard=2,
    )
    made = prepare(given, tmp_path / "here", mirror=Mirror(f"{bucket}/data"))
    there = s3.files(f"{bucket}/data/{made.name}".removeprefix("s3://"))
    assert {Path(name).name for name in there} >= {
        "manifest.json",
        "index.npy",
        "tokenizer.json",
        "checksums.json",
    }
    elsewhere = prepare(given, tmp_path / "there", mirror=Mirror(f"{bucket}/data"))
    assert not list(elsewhere.rglob("*.tar"))
    half = files.aside_of(elsewhere / "train" / "digits" / "00000.tar")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"left by a kill")
    mirror = Mirror(f"{bucket}/data").at(made.name)
    one_, two = TokenStore.open(made), TokenStore.open(elsewhere, mirror)
    assert elsewhere.name == made.name and two.fingerprint == one_.fingerprint
    domain, sequence = np.array([0, 0, 2]), np.array([0, 1, 5])
    expected = one_.gather("train", domain, sequence, 32)
    assert (two.gather("train", domain, sequence, 32) == expected).all()
    fetched = {path.relative_to(elsewhere).as_posix() for path in elsewhere.rglob("*.tar")}
    assert fetched == {"train/digits/00000.tar", "train/rich/00000.tar"}
    for name in fetched:
        assert (elsewhere / name).read_bytes() == (made / name).read_bytes()
    assert not list(elsewhere.rglob("*.partial"))
    with pytest.raises(UserError, match="may be in `remote`"):  # the cache without its home
        TokenStore.open(elsewhere).gather("train", np.array([1]), np.array([0]), 32)


def test_a_damaged_shard_there_is_refused(corpus: Path, bucket: str, tmp_path: Path) -> None:
    given = options(root=str(corpus), vocabulary_size=300, tokenizer_sample=50_000)
    made = prepare(given, tmp_path / "here", mirror=Mirror(f"{bucket}/data"))
    mirror = Mirror(f"{bucket}/data").at(made.name)
    elsewhere = prepare(given, tmp_path / "there", mirror=Mirror(f"{bucket}/data"))
    fs = fsspec.filesystem("s3")
    data = bytearray((made / "train/digits/00000.tar").read_bytes())
    for damaged, what in ((data[:-10], "bytes where"), (bytes(5000) + data[5000:], "checksum")):
        fs.pipe_file(f"{mirror.url}/train/digits/00000.tar", bytes(damaged))
        with pytest.raises(UserError, match=f"train/digits/00000.tar has .*{what}"):
            TokenStore.open(elsewhere, mirror).gather("train", np.array([0]), np.array([0]), 32)
    assert not (elsewhere / "train/digits/00000.tar").exists()


def test_an_upload_that_stopped_goes_on(
    corpus: Path, bucket: str, tmp_path: Path, network: Any
) -> None:
    given = options(root=str(corpus), vocabulary_size=300, tokenizer_sample=50_000)
    network(first(10**6, "PUT", "validation/plain", "fail"))
    with pytest.raises(UserError, match=f"failed {steady.ATTEMPTS} times"):
        prepare(given, tmp_path / "here", mirror=Mirror(f"{bucket}/data"))
    bad = network(lambda method, path: "pass")
    made = prepare(given, tmp_path / "here", mirror=Mirror(f"{bucket}/data"))
    put = [path for method, path in bad.asked if method == "PUT"]
    assert any("validation/plain" in path for path in put) and not any(
        "train/digits" in path for path in put
    )
    assert "manifest.json" in put[-1]
    names = {name.split("/", 3)[-1] for name in s3.files(f"{bucket}/data".removeprefix("s3://"))}
    assert {path.relative_to(made).as_posix() for path in made.rglob("*.tar")} < names


def test_several_processes_fetch_at_once(corpus: Path, bucket: str, tmp_path: Path) -> None:
    given = options(root=str(corpus), vocabulary_size=300, tokenizer_sample=50_000)
    made = prepare(given, tmp_path / "here", mirror=Mirror(f"{bucket}/data"))
    elsewhere = prepare(given, tmp_path / "there", mirror=Mirror(f"{bucket}/data"))
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom doremi_train.data.tokens.shards "
        "import TokenStore\nfrom doremi_train.storage.mirror import Mirror\nstore = "
        "TokenStore.open(sys.argv[1], Mirror(sys.argv[2]))\nprint(store.gather('train', "
        "np.array([0, 1, 2]), np.array([0, 0, 0]), 32).sum())"
    )
    command = [sys.executable, "-c", code, str(elsewhere), f"{bucket}/data/{made.name}"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outs = [process.communicate(timeout=60) for process in both]
    expected = (
        TokenStore.open(made).gather("train", np.array([0, 1, 2]), np.array([0, 0, 0]), 32).sum()
    )
    assert [out.strip() for out, _ in outs] == [str(expected)] * 2, outs
    assert not list(elsewhere.rglob("*.partial"))


# ── Runs in a second home ─────────────────────────────────────────────────────────────────────────


def test_another_machine_finds_everything_done(
    tiny: list[str], bucket: str, tmp_path: Path
) -> None:
    given = [f"remote={bucket}/doremi", *tiny]

    def machine(name: str) -> list[str]:
        return [*given, f"store={tmp_path / name / 'store'}", f"run_dir={tmp_path / name / 'run'}"]

    one_ = run_here(*machine("one"))
    assert one_.code == 0, one_.err
    two = run_here(*machine("two"))
    assert two.code == 0, two.err
    names = [
        "weights.json",
        "evaluation.json",
        "proxy/domain_weights.jsonl",
        "main/model/model.safetensors",
    ]
    for name in (*names, "reference/metrics.jsonl", "main/recipe.json", "main/result.json"):
        assert (tmp_path / "one/run" / name).read_bytes() == (
            tmp_path / "two/run" / name
        ).read_bytes(), name
    assert two.out.count("is in the store already") >= 4 and "tok/s" not in two.out
    assert read(tmp_path / "two/run/main/status.json")["state"] == "finished"
    left = s3.files(f"{bucket}/doremi/runs".removeprefix("s3://"))
    assert left and not [
        name for name in left if "checkpoints" in name or name.endswith((".lock", ".partial"))
    ]


@pytest.fixture(scope="module")
def uninterrupted(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    outcome = run_here(*tiny, *LONG, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]")
    assert outcome.code == 0, outcome
    return run_dir


def killed_at(overrides: list[str], run_dir: Path, stage: str, step: int) -> None:
    process = start(*overrides, f"run_dir={run_dir}")
    with reaped(process):
        wait_for(lambda: reached(run_dir / stage, step), process)
        process.kill()
        assert ended(process).code == -signal.SIGKILL


@pytest.mark.acceptance
@pytest.mark.parametrize("stage", ["reference", "proxy"])
def test_killed_and_its_disk_gone_it_continues_from_the_remote(
    stage: str, tiny: list[str], uninterrupted: Path, bucket: str, tmp_path: Path
) -> None:
    overrides = [
        *tiny,
        *LONG,
        f"store={tmp_path / 'store'}",
        f"remote={bucket}",
        "stage=main",
        "main.comparisons=[]",
    ]
    killed_at(overrides, tmp_path / "one", stage, 21)
    done = lines(tmp_path / "one" / stage / "metrics.jsonl")  # with times, so none is as another
    for folder in ("store", "one"):
        shutil.rmtree(tmp_path / folder)
    outcome = run_here(*overrides, f"run_dir={tmp_path / 'two'}")
    assert outcome.code == 0, outcome
    assert f": continues from {bucket}/runs/" in outcome.out
    # The checkpoint of the last step may not have come there.
    kept = sum(line["step"] <= 14 for line in done)
    assert lines(tmp_path / "two" / stage / "metrics.jsonl")[:kept] == done[:kept] and kept
    same_bits(uninterrupted, tmp_path / "two")


@pytest.mark.acceptance
def test_a_torn_checkpoint_there_is_passed_over(
    tiny: list[str], uninterrupted: Path, bucket: str, tmp_path: Path
) -> None:
    overrides = [
        *tiny,
        *LONG,
        f"store={tmp_path / 'store'}",
        f"remote={bucket}",
        "stage=main",
        "main.comparisons=[]",
    ]
    killed_at(overrides, tmp_path / "one", "reference", 28)
    for folder in ("store", "one"):
        shutil.rmtree(tmp_path / folder)
    fs = fsspec.filesystem("s3")
    runs = s3.files(f"{bucket}/runs".removeprefix("s3://"))
    there = sorted(name.rpartition("/")[0] for name in runs if name.endswith("/manifest.json"))
    # The last two, and one more where the kill came before the oldest was removed.
    assert len(there) in (
        2,
        3,
    )
    part = f"{there[-1]}/part-00000-of-00001.safetensors"
    fs.pipe_file(part, fs.cat_file(part)[:-1000])
    outcome = run_here(*overrides, f"run_dir={tmp_path / 'two'}")
    assert outcome.code == 0, outcome
    assert (
        f"{there[-1]}: torn or corrupt" in outcome.out
        and f"continues from s3://{there[-2]}" in outcome.out
    )
    same_bits(uninterrupted, tmp_path / "two")


@pytest.mark.acceptance
def test_a_newer_checkpoint_here_stays(
    tiny: list[str], uninterrupted: Path, bucket: str, tmp_path: Path
) -> None:
    overrides = [*tiny, *LONG, f"store={tmp_path / 'store'}", "stage=main", "main.comparisons=[]"]
    killed_at([*overrides, f"remote={bucket}"], tmp_path / "one", "reference", 14)
    killed_at(
        overrides, tmp_path / "one", "reference", checkpoints(tmp_path / "one/reference")[-1] + 14
    )
    outcome = run_here(*overrides, f"run_dir={tmp_path / 'one'}", f"remote={bucket}")
    assert outcome.code == 0, outcome
    assert "continues from" not in outcome.out
    same_bits(uninterrupted, tmp_path / "one")


def test_what_was_finished_without_a_remote_goes_there_later(
    tiny: list[str], doremi: Command, tmp_path: Path
) -> None:
    """And the second home may be a folder."""
    home = tmp_path / "home"
    overrides = [*tiny, f"store={tmp_path / 'store'}", "stage=reference"]
    assert run_here(*overrides, f"run_dir={tmp_path / 'one'}").code == 0
    (run,) = (tmp_path / "store" / "runs").glob("language_model-*")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, at_work = (
        home / "runs" / run.name / f".result.json.{socket.gethostname()}-{process}.partial"
        for process in (dead.pid, os.getppid())
    )
    left.parent.mkdir(parents=True)
    for path in (left, at_work):
        path.touch()
    assert run_here(*overrides, f"run_dir={tmp_path / 'one'}", f"remote={home}").code == 0
    assert at_work.exists() and not left.exists()
    at_work.unlink()
    # Killed before it removed what has served there.
    served = home / "runs" / run.name / "checkpoints" / "step-000000006" / "manifest.json"
    served.parent.mkdir(parents=True)
    served.touch()
    set_status(run, "running")
    assert run_here(*overrides, f"run_dir={tmp_path / 'one'}", f"remote={home}").code == 0
    assert not served.exists()
    shutil.rmtree(tmp_path / "store")
    outcome = run_here(*overrides, f"run_dir={tmp_path / 'two'}", f"remote={home}")
    assert outcome.code == 0 and "is in the store already" in outcome.out, outcome
    assert (tmp_path / "two/reference/model/model.safetensors").exists()
    assert not list(home.rglob("*.partial"))


@pytest.mark.acceptance
def test_two_processes_share_a_remote(
    tiny: list[str], doremi: Command, bucket: str, tmp_path: Path
) -> None:
    overrides = [*tiny, f"remote={bucket}", "stage=reference"]
    assert (
        run_here(
            *overrides, f"store={tmp_path / 'one'}", f"run_dir={tmp_path / 'a'}", "stage=prepare"
        ).code
        == 0
    )
    outcome = doremi(
        *overrides, f"store={tmp_path / 'two'}", f"run_dir={tmp_path / 'b'}", processes=2
    )
    assert outcome.code == 0, outcome
    there = s3.files(f"{bucket}/runs".removeprefix("s3://"))
    assert any(name.endswith("result.json") for name in there)


def test_a_remote_that_fails_for_a_while_ends_no_training(
    tiny: list[str],
    bucket: str,
    network: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fails while a checkpoint is sent, and answers again before the next one; and then it
    fails for good when the run is finished."""
    monkeypatch.setattr(steady, "ATTEMPTS", 2)
    monkeypatch.setattr(checkpoints_of_a_run, "_SENT_AGAIN", 0.02)
    given = [*tiny, f"remote={bucket}", f"store={tmp_path / 'store'}", "stage=reference"]
    given += [f"run_dir={tmp_path / 'run'}", "training.checkpoint_every=4"]
    bad = network(first(5, "PUT", "checkpoints/step-000000004", "fail"))
    passing, answers = bad.verdict, [True]

    def judge(method: str, path: str) -> str:
        if method == "PUT" and path.endswith("/result.json"):
            answers[0] = False
        return passing(method, path) if answers[0] else "fail"

    bad.verdict = judge
    failed = run_here(*given)
    part = r"runs/language_model-\w+/checkpoints/step-000000004/part-00000-of-00001.safetensors"
    assert re.search(rf"{bucket}/{part}: failed 2 times.*; training goes on, and", failed.out)
    assert failed.code == 1 and "Traceback" not in failed.err, failed
    assert re.search(rf"{bucket}/runs/language_model-\w+/result.json: failed 2 times", failed.err)
    assert read(tmp_path / "run" / "reference" / "status.json")["state"] == "failed"
    asked = [path for method, path in bad.asked if method == "PUT" and "step-000000004" in path]
    # It went there in the end; or the next one was due before, and went.
    later = any(m == "PUT" and "checkpoints/step-000000008/manifest" in p for m, p in bad.asked)
    passed_over = later and "is not in its second home; the next one will be" in failed.out
    assert passed_over or any(path.endswith("manifest.json") for path in asked)
    answers[0], bad.verdict = True, passing
    done = run_here(*given)
    assert done.code == 0 and "is in the store already" in done.out, done
    there = s3.files(f"{bucket}/runs".removeprefix("s3://"))
    assert any(name.endswith("result.json") for name in there)
    assert not any("checkpoints" in name for name in there)


@pytest.mark.acceptance
def test_a_remote_that_fails_for_half_a_minute_ends_nothing(
    tiny: list[str], bucket: str, network: Any, tmp_path: Path
) -> None:
    """By the clock, with the waits that everybody has, from the moment at which the first
    checkpoint is sent: training goes on meanwhile, and all comes there."""
    given = [*tiny, f"remote={bucket}", f"store={tmp_path / 'store'}", "stage=reference"]
    given += [f"run_dir={tmp_path / 'run'}", "training.checkpoint_every=6", "training.steps=12"]
    began = list[float]()

    def failing(method: str, path: str) -> str:
        if not began and not (method == "PUT" and "/checkpoints/" in path):
            return "pass"
        began.append(time.monotonic())
        return "fail" if began[-1] - began[0] < 30 else "pass"

    bad = network(failing)
    process = start(*given)
    with reaped(process):
        done = ended(process)
    assert done.code == 0 and "Traceback" not in done.err, done
    assert began[-1] - began[0] >= 30 and len(bad.asked) > 10
    assert f"{bucket}/runs/language_model-" in done.out and "trying again in" in done.out
    there = s3.files(f"{bucket}/runs".removeprefix("s3://"))
    assert any(name.endswith("/result.json") for name in there)
    assert not any("checkpoints" in name for name in there)


def test_a_missing_bucket_ends_before_any_work(tiny: list[str], tmp_path: Path) -> None:
    outcome = run_here(
        *tiny,
        "remote=s3://no-such-bucket-here/x",
        f"store={tmp_path / 'store'}",
        f"run_dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2 and "remote='s3://no-such-bucket-here/x'" in outcome.err, outcome
    assert not list((tmp_path / "store").rglob("*"))


def test_a_missing_package_is_named(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    outcome = run_here(*tiny, "remote=s3://bucket/x", f"run_dir={tmp_path / 'run'}")
    assert (
        outcome.code == 2
        and "remote='s3://bucket/x'" in outcome.err
        and "pip install 's3fs'" in outcome.err
    )

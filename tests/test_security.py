"""Nothing that is read may run code, and no secret is written or shown."""

import json
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import command, forked
from helpers.command import TINY, run_here
from helpers.corpus import documents, write_jsonl

from doremi_train import __main__
from doremi_train.config import UserError
from doremi_train.console import shown
from doremi_train.redaction import redact, unveil, veil

# ── Secrets ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("s3://AKIA:se/cr+et=@bucket/x.jsonl", "s3://***@bucket/x.jsonl"),
        ("https://user:pa@ss@host:8080/a@b", "https://***@host:8080/a@b"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://h/x.jsonl?sv=1&sig=a%2Bb&se=2", "https://h/x.jsonl?sv=1&sig=***&se=2"),
        ("https://h/x?X-Amz-Date=1&X-Amz-Signature=f00#y", "https://h/x?X-Amz-Date=***&X-Amz-Signature=***#y"),
        ("'https://h/x?token=abc' is not there", "'https://h/x?token=***' is not there"),
        ("https://h/x?access_token=a&api_key=b&AWSAccessKeyId=c", "https://h/x?access_token=***&api_key=***&AWSAccessKeyId=***"),
        ("[https://a:b@h/x,ftp://c:d@h/y]", "[https://***@h/x,ftp://***@h/y]"),
        ("https://h/x?key=1&tokens_per_shard=3", "https://h/x?key=***&tokens_per_shard=3"),
        ("https://h/x?code=a&auth=b;jwt=c&pwd=d", "https://h/x?code=***&auth=***;jwt=***&pwd=***"),
        ("https://h/x?auth_code=a&sas=b&Session-Id=c", "https://h/x?auth_code=***&sas=***&Session-Id=***"),
        ("ftp://h/x,https://c:d@h/y?pass=e,https://h/z", "ftp://h/x,https://***@h/y?pass=***,https://h/z"),
        ("abfs://user:pass@account/x", "abfs://***@account/x"),
        ("pipe:curl -u ann:hush https://h/x", "pipe:curl -u *** https://h/x"),
        ("pipe:curl --user=ann:hush -sS https://b:c@h/x", "pipe:curl --user=*** -sS https://***@h/x"),
        ('pipe:curl -H "Authorization: Bearer hush" h/x', 'pipe:curl -H "Authorization: ***" h/x'),
        ("pipe:MY_SECRET_KEY=hush aws s3 cp x -", "pipe:MY_SECRET_KEY=*** aws s3 cp x -"),
        ("pipe:wget --http-password 'hush' -O - h/x", "pipe:wget --http-password '***' -O - h/x"),
        ("https://h/x?pw=a&pass%77ord=b&bearer=c&hmac=d#access_token=e", "https://h/x?pw=***&pass%77ord=***&bearer=***&hmac=***#access_token=***"),
        ("pipe:sshpass -p hush ssh h cat x | zcat", "pipe:sshpass -p *** ssh h cat x | zcat"),
    ],
)  # fmt: skip
def test_secrets_in_urls_are_not_shown(given: str, shown: str) -> None:
    assert redact(given) == shown == redact(shown)
    assert redact({"a": [given, {"b": given}], "c": 1}) == {"a": [shown, {"b": shown}], "c": 1}
    assert str(UserError(given)) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            'pipe:curl -u "ann:hu sh" --oauth2-bearer mum h',
            'pipe:curl -u "***" --oauth2-bearer *** h',
        ),
        (
            "pipe:curl -s -b 'a=hush' -H 'Cookie: b=hu sh; c=mum' h",
            "pipe:curl -s -b '***' -H 'Cookie: ***' h",
        ),
        (
            'pipe:curl -H \'Authorization: Digest a="b", response="hush"\' h',
            "pipe:curl -H 'Authorization: ***' h",
        ),
        (
            "pipe:gpg --passphrase='hu sh' -d x | mysql db -phush",
            "pipe:gpg --passphrase='***' -d x | mysql db -p***",
        ),
        (
            "pipe:unzip -P hush -p x.zip; 7z x -phush -so x.7z",
            "pipe:unzip -P *** -p x.zip; 7z x -p*** -so x.7z",
        ),
        (
            "pipe:lftp -u ann,hush h -e x; openssl enc -d -k hush -in x",
            "pipe:lftp -u *** h -e x; openssl enc -d -k *** -in x",
        ),
    ],
)
def test_secrets_in_commands_are_not_shown(given: str, shown: str) -> None:
    assert redact(given) == shown == redact(shown)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/x",
        "http://h:8080/a@b",
        "a@b.org",
        "https://h/x?monkeys=1&tokens_per_shard=3&encoding=code",
        "abfs://container@account.dfs.core.windows.net/x",
        "data.text_key=text data.tokenizer=train mixture.key=a",
        "pipe:zcat /data/keys/x.gz | sort -u -k 2",
        "pipe:gsutil cat gs://b/x-*.jsonl",
        "pipe:curl -sb0 h | sort -k 2 -u a,b | 7z e -si -so | unzip -p x.zip | mysql -p db",
        "https://h/x#part=2",
        "train.txt?x",
        "k: v@w",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.fixture
def environment() -> Iterator[None]:
    """What a test puts into the environment is gone after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before


def test_what_the_environment_keeps_secret_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "hush-hush/1")
    monkeypatch.setenv("STORE_PATH", "/data/stores")
    assert redact("refused hush-hush/1 in /data/stores") == "refused *** in /data/stores"


@pytest.mark.usefixtures("environment")
def test_what_is_veiled_holds_no_secret_and_comes_back() -> None:
    given = {"a": ["https://ann:hu/sh@h/x?token=mum", 3], "b": "pipe:curl -u ann:hu/sh h"}
    veiled = veil(given)
    assert not re.search("hu/sh|mum", json.dumps(veiled)) and veil(veiled) == veiled
    assert unveil(veiled) == given
    assert redact(veiled) == redact(given)


class Quiet(SimpleHTTPRequestHandler):
    """Files over HTTP, whoever asks."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """host:port of a server of the files in `tmp_path/web`."""
    pytest.importorskip("aiohttp", reason="extra `test` brings it")
    write_jsonl(tmp_path / "web" / "x.jsonl", documents(1, "abcdefgh", 50, 40_000))
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "web")
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def everything(folder: Path) -> Iterator[Path]:
    """Files below, links followed, and their names."""
    for base, _, names in os.walk(folder, followlinks=True):
        yield from (Path(base) / name for name in names)


@pytest.mark.slow
def test_secrets_stand_nowhere_and_another_one_is_the_same_run(web: str, tmp_path: Path) -> None:
    def run(password: str, name: str = "x.jsonl", stage: str = "reference") -> Any:
        url = f"http://ann:{password}@{web}/{name}?token={password}2"
        domains = f"data.domains={{a: {{train: ['{url}']}}}}"
        return run_here(
            *TINY,
            domains,
            f"run_dir={tmp_path / 'run'}",
            f"stage={stage}",
            "data.validation_fraction=0.1",
        )

    first, second = run("hush"), run("mum")
    assert first.code == 0 and second.code == 0, (first.err, second.err)
    assert "in the store already" in second.out
    gone = run("hush", "y.jsonl", "prepare")
    assert gone.code == 2 and "***@" in gone.err and "token=***" in gone.err
    failed = run_here(*TINY, f"data.root=http://ann:hush@{web}/no", f"run_dir={tmp_path / 'other'}")
    assert failed.code == 2 and "***@" in failed.err
    for outcome in (first, second, gone, failed):
        assert not re.search("hush|mum", outcome.out + outcome.err)
    read = 0
    for path in [*everything(tmp_path / "run"), *everything(tmp_path / "other")]:
        if path.suffix not in (".tar", ".safetensors"):
            read += 1
            assert not re.search(b"hush|mum", path.read_bytes()), path
    assert read > 10
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["domains"]["a"]["train"] == [f"http://***@{web}/x.jsonl?token=***"]
    request = json.loads((tmp_path / "run" / "prepare" / "manifest.json").read_text())["request"]
    assert list(request["sources"]["files"]) == [f"http://***@{web}/x.jsonl?token=***"]


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_a_marked_password_is_found_nowhere(web: str, tmp_path: Path) -> None:
    """In a URL that was given, and in one from the environment; of a sweep, of runs in processes of
    their own, and of commands that Hydra or a stage refuses."""
    mark = "Marked-4711"
    os.environ["WEB_LOGIN"] = f"ann:{mark}"

    def domains(login: str, name: str = "x.jsonl") -> str:
        return f"data.domains={{a: {{train: ['http://{login}@{web}/{name}?code={mark}']}}}}"

    common = [*TINY, "data.validation_fraction=0.1", f"store={tmp_path / 'store'}"]
    common += ["training.steps=4", "evaluation.every=4"]
    given, kept = domains(f"ann:{mark}"), domains("${oc.env:WEB_LOGIN}")
    jobs = ["proxy.seeds=2", "submit.cluster=local", "submit.parallel=2", "stage=proxy"]
    done = [
        run_here(
            "-m", *common, given, f"run_dir={tmp_path / 'sweep'}", "stage=prepare", "seed=91,92"
        ),
        run_here(*common, kept, f"run_dir={tmp_path / 'kept'}", *jobs, "tracking=wandb"),
    ]
    refused = [
        run_here(*common, domains(f"ann:{mark}", "no.jsonl"), f"run_dir={tmp_path / 'no'}"),
        run_here(*common, given.replace("}", ""), f"run_dir={tmp_path / 'hydra'}"),
        run_here(*common, given, f"run_dir={tmp_path / 'key'}", "proxy.step=1"),
    ]
    assert [outcome.code for outcome in done + refused] == [0, 0, 2, 2, 2], done + refused
    assert (tmp_path / "sweep" / "multirun.yaml").exists() and [*tmp_path.rglob("*_submitted.pkl")]
    assert [*tmp_path.rglob("*.wandb")]  # where its client logs too
    for outcome in done + refused:
        assert mark not in outcome.out + outcome.err
    for path in everything(tmp_path):
        if path.parent != tmp_path / "web":
            assert mark.encode() not in path.read_bytes() and mark not in str(path), path


@pytest.mark.acceptance
def test_a_marked_password_is_not_in_what_a_launcher_or_a_client_keeps(
    web: str, tmp_path: Path
) -> None:
    """A sweep that Hydra's launcher sends to processes, as it does to Slurm, of which one fails;
    with what the clients of services log, warn of and raise."""
    mark, store = "Marked-4712", f"store={tmp_path / 'store'}"
    env = command.environment() | {"PYTHONWARNINGS": "always", "FSSPEC_LOGGING_LEVEL": "DEBUG"}
    env |= {"WEB_LOGIN": f"ann:{mark}", "AWS_SECRET_ACCESS_KEY": f"{mark}/key"}
    env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}

    def domains(login: str, name: str = "x.jsonl") -> str:
        return f"data.domains={{a: {{train: ['http://{login}@{web}/{name}?code={mark}']}}}}"

    def start(*overrides: str) -> list[forked.Forked]:
        given = [*overrides, *TINY, "data.validation_fraction=0.1", "stage=prepare"]
        return forked.ranks(1, given, env, cwd=tmp_path)

    sweep = ["-m", "hydra/launcher=submitit_local", "seed=93,94", store]
    started = [
        start(*sweep, domains(f"ann:{mark}"), f"run_dir={tmp_path / 'given'}"),
        start(*sweep, domains("${oc.env:WEB_LOGIN}"), f"run_dir={tmp_path / 'kept'}"),
        start(*sweep, domains(f"ann:{mark}", "no.jsonl"), f"run_dir={tmp_path / 'no'}"),
        start("data.root=s3://bucket/x", f"run_dir={tmp_path / 's3'}"),
        start(domains(f"ann:{mark}"), f"remote=http://ann:{mark}@{web}", f"run_dir={tmp_path}/r"),
    ]
    done = [forked.ended(processes, 300) for processes in started]
    assert [code for code, *_ in done[:2]] == [0, 0], done
    assert all(code in (1, 2) for code, *_ in done[2:]), done
    for run in ("given", "kept", "no"):
        assert [*(tmp_path / run).rglob("*.pkl")] and [*(tmp_path / run).rglob("*_log.*")], run
        assert (tmp_path / run / "multirun.yaml").exists()
    for _, out, err in done:
        assert mark not in out + err
    for path in everything(tmp_path):
        if path.parent != tmp_path / "web":
            assert mark.encode() not in path.read_bytes() and mark not in str(path), path


def test_a_bug_s_traceback_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("https://ann:hush@h/x\x1b[2J")
    except KeyError as error:
        __main__._bug(KeyError, error, error.__traceback__)
    said = capsys.readouterr().err
    assert "https://***@h/x" in said and "hush@" not in said and "Traceback" in said


def test_credentials_in_an_object_store_s_url_are_refused_unseen(tmp_path: Path) -> None:
    for key in ("remote", "data.root"):
        outcome = run_here(*TINY, f"{key}='s3://AKIA:hush@bucket/x'", f"run_dir={tmp_path / key}")
        assert (
            outcome.code == 2
            and f"{key}='s3://***@bucket/x'" in outcome.err
            and "AWS_ACCESS_KEY_ID" in outcome.err
        )
        assert "hush" not in outcome.out + outcome.err


# ── Commands ────────────────────────────────────────────────────────────────────────


KEYS = {
    "data.root": ["data.root='{}'"],
    "data.domains": ["data.domains={{a:{{train:['{}']}}}}"],
    "data.files": ["data.files=['{}']", "data.domain_key=x"],
    "data.tokenizer": ["data.tokenizer='{}'"],
    "remote": ["remote='{}'"],
    "reference.path": ["reference.path='{}'"],
    "mixture.path": ["mixture=file", "mixture.path='{}'"],
    "model.path": ["model=custom", "model.path='{}'"],
}
COMMANDS = (
    "pipe:touch ran",
    "simplecache::pipe:touch ran",
    "exec://touch ran",
    "filecache::exec://x;touch ran",
    "sh:touch ran",
)


@pytest.mark.parametrize("url", COMMANDS)
@pytest.mark.parametrize("key", KEYS)
def test_no_key_runs_a_command(
    key: str, url: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = tiny[1:] if key.startswith("data.") and key != "data.tokenizer" else tiny
    given = [o for o in given if not (key == "model.path" and o.startswith("model."))]
    outcome = run_here(
        *given,
        *(part.format(url) for part in KEYS[key]),
        f"run_dir={tmp_path / 'run'}",
        "stage=main",
    )
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert key.split()[0] in outcome.err and url.replace("//", "/") in outcome.err.replace(
        "//", "/"
    )
    assert not list(tmp_path.rglob("ran"))


def test_remote_takes_no_command_even_where_data_may(tiny: list[str], tmp_path: Path) -> None:
    outcome = run_here(
        *tiny, "remote='pipe:ls'", "data.allow_pipe=true", f"run_dir={tmp_path / 'run'}"
    )
    assert outcome.code == 2 and "remote='pipe:ls': refused" in outcome.err


# ── Pickles and foreign code ────────────────────────────────────────────────────────


class Bomb:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Overrides of a reference run, and its run_dir once it has finished."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    overrides = [
        *tiny,
        f"store={run_dir}/store",
        "seed=78",
        f"run_dir={run_dir}",
        "stage=reference",
    ]
    outcome = run_here(*overrides)
    assert outcome.code == 0, outcome.err
    return overrides, run_dir


def test_a_pickle_is_no_checkpoint(trained: tuple[list[str], Path], tmp_path: Path) -> None:
    overrides, run_dir = trained
    run = (run_dir / "reference").resolve()
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    (run / "checkpoints").mkdir()
    bomb = run / "checkpoints" / "step-000000004.pt"
    torch.save({"step": 4, "model": Bomb(tmp_path / "ran")}, bomb)
    try:
        outcome = run_here(*overrides)
    finally:
        bomb.unlink()
        (run / "result.json").write_bytes(result)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert bomb.name in outcome.err and "older version" in outcome.err and "delete" in outcome.err
    assert not (tmp_path / "ran").exists()
    torch.load(_saved(Bomb(tmp_path / "ran"), tmp_path), weights_only=False)  # the bomb is one
    assert (tmp_path / "ran").exists()


def _saved(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "bomb.pt")
    return folder / "bomb.pt"


def test_a_model_as_a_pickle_is_refused(
    trained: tuple[list[str], Path], tiny: list[str], tmp_path: Path
) -> None:
    _, run_dir = trained
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(
        (run_dir / "reference" / "model" / "config.json").read_bytes()
    )
    torch.save(Bomb(tmp_path / "ran"), folder / "pytorch_model.bin")
    outcome = run_here(
        *tiny, f"reference.path={folder}", f"run_dir={tmp_path / 'run'}", "stage=proxy"
    )
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert f"reference.path={folder}" in outcome.err
    assert "only safetensors" in outcome.err and "save_pretrained" in outcome.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["gpt_neox", "strange"])
def test_code_that_comes_with_a_model_is_not_run(
    kind: str, trained: tuple[list[str], Path], tiny: list[str], tmp_path: Path
) -> None:
    _, run_dir = trained
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (run_dir / "reference" / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": kind,
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    outcome = run_here(
        *tiny, f"reference.path={folder}", f"run_dir={tmp_path / 'run'}", "stage=proxy"
    )
    assert outcome.code == (0 if kind == "gpt_neox" else 2) and "Traceback" not in outcome.err, (
        outcome
    )
    assert not (tmp_path / "ran").exists()


# ── The report ──────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = set[str](), ""
        self.attributes = set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attributes)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_names_of_domains_are_text_on_a_terminal_in_the_report_and_in_paths(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)</script>",
        "\"><img src=x onerror=alert('2')>",
        "../../up/$x^2$ & {{ 7 * 7 }} {% raw %}",
        "[/INST] \x1b[31m\u202e\nreport: [red]:x:",
    ]
    letters = ["abcdefgh", "ijklmnop", "qrstuvw", "0123456789"]
    records = [
        {"text": text, "set": name}
        for seed, name in enumerate(names)
        for text in documents(seed, letters[seed], 50, 40_000)
    ]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = [
        f"data.files=['{file}']",
        "data.domain_key=set",
        f"run_dir={tmp_path / 'in' / 'run'}",
    ]
    outcome = run_here(
        *TINY, *overrides, "main.comparisons=[uniform]", "data.validation_fraction=0.1"
    )
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "in" / "run" / "report.html").read_text()
    page = Page(text)
    assert "svg" in page.tags and not page.tags & {"script", "img", "iframe", "object"}
    assert not [name for name in page.attributes if name.startswith("on")]
    for name in names:
        assert shown(name, kept="\n") in page.text and f" {shown(name)} " in outcome.out
        assert name in json.loads((tmp_path / "in" / "run" / "weights.json").read_text())["weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "in"]
    assert not [path for path in tmp_path.rglob("*") if path.name == "up"]

"""Remotes that fall silent: each attempt ends, goes on at the byte where it was, is said, and the
last one named; what comes slowly is waited for."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.sources import jsonl, one, refused, texts
from helpers.web import PIECES, Web, listening

from doremi_train.config import UserError
from doremi_train.storage import steady
from doremi_train.storage.mirror import Mirror

pytest.importorskip("aiohttp", reason="extra `test` brings it")
pytestmark = pytest.mark.slow

# Some 8 MB: more than one block of fsspec's HTTP (5 MB) and of WebHDFS (4 MB).
LINES = [hashlib.sha512(str(n).encode()).hexdigest() for n in range(50_000)]
FILES = {"/x.jsonl": jsonl(LINES), "/": b'<a href="x.jsonl">x</a>'}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "PATIENCE", 3.0)
    monkeypatch.setattr(steady, "SLOWEST", 1 << 24)
    monkeypatch.setattr(steady, "MANY", 1)
    monkeypatch.setattr(steady, "FIRST_WAIT", 0.01)


def bodies(web: Web) -> list[int]:
    """First bytes of the requests for content."""
    return [
        int((re.search(r"offset=(\d+)", path) or [0, start])[1])
        for method, path, start in web.asked
        if method == "GET" and "x.jsonl" in path and "GETFILESTATUS" not in path
    ]


@pytest.mark.parametrize("protocol", ["http", "webhdfs"])
@pytest.mark.parametrize("verdict", ["stop", "silent"])
def test_a_body_that_stops_is_continued_where_it_was(
    protocol: str, verdict: str, capsys: Any
) -> None:
    stalled = []

    def judge(number: int, method: str, path: str) -> str:
        content = method == "GET" and "x.jsonl" in path and "GETFILESTATUS" not in path
        # The second block, twice.
        if content and len(bodies(web)) > 1 and len(stalled) < 2:
            stalled.append(number)
            return verdict
        return "pass"

    with Web(FILES, judge) as web:
        assert texts(one(f"{protocol}://{web.host}/x.jsonl")) == LINES
        asked = bodies(web)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(stalled) == 2
    assert all("/x.jsonl: " in line and "trying again in" in line for line in said), said
    assert asked[0] == 0 and all(place >= 1 << 20 for place in asked[1:]), asked


@pytest.mark.parametrize("protocol", ["http", "webhdfs"])
@pytest.mark.parametrize("verdict", ["stop", "silent"])
def test_a_body_that_never_comes_is_named(
    protocol: str, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(steady, "ATTEMPTS", 3)

    def judge(number: int, method: str, path: str) -> str:
        return verdict if method == "GET" and "GETFILESTATUS" not in path else "pass"

    with Web(FILES, judge) as web:
        refused(one(f"{protocol}://{web.host}/x.jsonl"), "/x.jsonl: failed 3 times", "for 3")
    assert capsys.readouterr().out.count("trying again in") == 2


@pytest.mark.parametrize("path", ["x.jsonl", "*.jsonl"])
@pytest.mark.parametrize("protocol", ["http", "webhdfs", "ftp"])
def test_a_remote_that_never_answers_is_no_absence(
    protocol: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady, "ATTEMPTS", 2)
    with listening() as silent, pytest.raises(UserError) as error:
        texts(one(f"{protocol}://127.0.0.1:{silent.port}/{path}"))
    message = str(error.value)
    assert path in message and "no such file" not in message
    assert "failed 2 times" in message or "cannot be reached" in message


def test_looking_for_files_is_tried_again_where_it_stopped() -> None:
    with Web(FILES, lambda number, *_: "silent" if number in (1, 2, 5) else "pass") as web:
        assert texts(one(f"http://{web.host}/*.jsonl")) == LINES


@pytest.mark.parametrize("protocol", ["http", "webhdfs"])
def test_what_comes_slowly_is_waited_for(
    protocol: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A block takes longer than the time without a byte. Of WebHDFS' client only a whole block is
    seen, which has its own time."""
    monkeypatch.setattr(steady, "PATIENCE", 4.0)
    if protocol == "webhdfs":
        monkeypatch.setattr(steady, "SLOWEST", 1 << 18)
    files = {"/x.jsonl": jsonl(LINES[:5000])}

    def judge(number: int, method: str, path: str) -> str:
        return "pass" if "GETFILESTATUS" in path else "trickle"

    with Web(files, judge, pause=0.5) as web:
        assert PIECES * 0.5 > steady.PATIENCE
        assert texts(one(f"{protocol}://{web.host}/x.jsonl")) == LINES[:5000]
    assert capsys.readouterr().out == ""


def test_an_upload_that_is_not_taken_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(steady, "ATTEMPTS", 2)
    (tmp_path / "x").write_bytes(bytes(1000))
    with listening() as silent:
        mirror = Mirror(f"webhdfs://127.0.0.1:{silent.port}/there")
        with pytest.raises(UserError, match="there/x: failed 2 times.*nothing was taken"):
            mirror.push(tmp_path, ["x"])
    assert capsys.readouterr().out.count("trying again in") == 1

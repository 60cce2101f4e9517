"""What is shown is text, whatever stands in it; and progress as lines, where no terminal shows a
bar."""

import contextlib
import io
from pathlib import Path

import pytest
from rich.table import Table

from doremi_train import command, console
from doremi_train.reports import charts
from doremi_train.reports.page import write_page

# Markup of a terminal, names of emoji, what steers a terminal, forged lines, marks of direction.
HOSTILE = ["[/INST] a", "[red]b[/]", ":warning: c", "\x1b[2Jd\x9b1m", "e\r\nf\x00", "g\u202e\ud800"]
SHOWN = [
    "[/INST] a", "[red]b[/]", ":warning: c", r"\x1b[2Jd\x9b1m", r"e\r\nf\x00", r"g\u202e\ud800",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [*zip(HOSTILE, SHOWN, strict=True)])
def test_lines_tables_and_errors_are_text(
    text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    console.say(text, table)
    with console.Bar(text, 4) as bar:
        bar.update(4)
    command.say(f"key={text}: wrong")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == expected and out.count(expected) == 6
    assert err.split("doremi-train: key=")[1].replace("\n  ", r"\n") == f"{expected}: wrong\n"


def test_a_terminal_s_bar_takes_labels_and_notes_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console._out, "_force_terminal", True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), console.Bar("[/INST]\x1b[2J", 4, show=True) as bar:
        bar.update(2, "[/x]\x07")
        console.say("[/y]")
    for text in (r"[/INST]\x1b[2J", r"[/x]\x07", "[/y]"):
        assert text in out.getvalue()


def test_a_message_s_further_lines_pass_for_no_line_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.say("domain a\ndoremi-train: all is well")
    assert capsys.readouterr().err == "doremi-train: domain a\n  doremi-train: all is well\n"


def test_what_a_terminal_cannot_write_ends_no_run() -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with contextlib.redirect_stdout(terminal):
        table = Table("größe – 日本")
        table.add_row("α")
        console.say("größe – 日本", table)
    terminal.seek(0)
    text = terminal.read()
    assert text.startswith(r"größe \u2013 \u65e5\u672c") and r"\u03b1" in text


@pytest.mark.parametrize(("text", "expected"), [*zip(HOSTILE, SHOWN, strict=True)])
def test_pages_and_charts_show_the_same_text(text: str, expected: str, tmp_path: Path) -> None:
    points = [charts.Point(1.0), charts.Point(2.0)]
    name = text.encode("utf-8", "replace").decode()  # files hold no half characters
    chart = charts.rows(name, name, [name, "other"], {name: points, "more": points})
    page = tmp_path / "report.html"
    section = {"title": text, "said": [text], "columns": [text], "rows": [[text]], "chart": chart}
    write_page(
        page,
        "compare.html.jinja",
        title=text,
        sections=[section],
        seeds=1,
        failures=[],
        unit=text,
    )
    written = page.read_text()
    assert not set(written) & set("\x00\x07\r\x1b\x9b\u202e")
    body = written[: written.index("<svg")] + written[written.index("</svg>") :]
    assert body.count(expected.replace(r"\n", "\n")) >= 4


def test_lines_have_rate_and_time_left_as_soon_as_something_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Bar("proxy", 4000) as bar:
        for seconds, done in ((60, 0), (61, 500), (120, 1000), (3720, 2000)):
            now[0] = float(seconds)
            bar.update(done, "loss 3")
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "proxy 0% 0 tok/s loss 3 after 0:01:00",  # how long it takes is not known yet
        "proxy 25% 8.33 tok/s loss 3 0:06:00 left, after 0:02:00",
        "proxy 50% 0.538 tok/s loss 3 1:02:00 left, after 1:02:00",
        "proxy done in 1:02:00",
    ]


def test_a_bar_over_all_counts_the_runs_of_its_runs() -> None:
    with console.Bar("compare", 1000, show=False) as compare:
        compare.update(100)
        swarm = console.Part(compare, "swarm")
        for number, seen in ((0, [140, 200]), (1, [240, 300])):
            run = console.Part(swarm, f"run-{number}")
            for done, expected in zip((40, 100), seen, strict=True):
                run.update(done)
                assert compare.done == expected

"""Progress as lines, where no terminal shows a bar."""

import pytest

from doremi_train import console


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

"""The report: verdicts, settings of a sweep, and the page as a browser shows it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.browser import Browser
from helpers.command import TINY, run_here
from helpers.corpus import documents, write_jsonl
from helpers.processes import read
from PIL import Image

from doremi_train.data.tokens.shards import SCHEMA
from doremi_train.evaluation import results
from doremi_train.reports import charts, sweep_charts
from doremi_train.reports.run_page import overall
from doremi_train.stages.report import _read


def run_of(folder: Path, width: int, seed: int, gain: float = 0.5, **more: float | str) -> Path:
    """What the report reads of one run: a wider model is better, and a later seed worse."""
    shape = {
        "model_type": "gpt2",
        "vocab_size": 50,
        "n_positions": 8,
        "n_embd": width,
        "n_layer": 1,
        "n_head": 1,
    }
    config = {
        "seed": seed,
        "run_dir": str(folder),
        "model": {"config": {"n_embd": width, "n_head": 1}},
        "proxy": more,
    }
    config["reference"] = {"mixture": "natural"}
    main = 4 - width / 100 + seed / 1000
    losses = {"main": main, "baseline": main + gain + seed / 5000, "uniform": 4.25}
    domains = {"a": 0.1, "b": -0.1}
    figures = {
        name: {
            "mean_loss": loss,
            "worst_loss": loss + 1,
            "domains": {domain: {"loss": loss + more_} for domain, more_ in domains.items()},
        }
        for name, loss in losses.items()
    }
    (folder / "reference" / "model").mkdir(parents=True)
    (folder / "reference" / "model" / "config.json").write_text(json.dumps(shape))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "evaluation.json").write_text(json.dumps(figures))
    weights = {"a": 0.25 + seed / 100, "b": 0.75 - seed / 100}
    (folder / "weights.json").write_text(
        json.dumps({"method": "doremi", "weights": weights, "interval": None})
    )
    return folder


# ── Verdicts ──────────────────────────────────────────────────────────────────────────────────────


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    (setting,) = _read([run_of(tmp_path / "0", 16, 0)])
    text = results.verdict(setting)
    assert "With one seed" in text and "One seed, no interval" in text and "±" not in text
    assert (
        "0.5000 better than natural (baseline)" in text
        and "0.4100 better than uniform" in text
        and "no better" not in text
    )


def test_no_better_is_said(tmp_path: Path) -> None:
    (setting,) = _read([run_of(tmp_path / "0", 16, 0, gain=-0.1)])
    assert "0.1000 worse than natural (baseline)" in results.verdict(setting)
    assert "so no better than natural (baseline)." in results.verdict(setting)


@pytest.mark.parametrize(
    ("gain", "word", "remedy"),
    [
        (0.5, "better than natural (baseline) (by +0.5", False),
        (-0.5, "worse than natural (baseline) (by -0.4", True),
        (-0.0002, "not distinguishable from natural (baseline) (by +0.0000 ± 0.0005", True),
    ],
)
def test_seeds_give_an_interval_and_equals_are_said(
    tmp_path: Path, gain: float, word: str, remedy: bool
) -> None:
    (setting,) = _read([run_of(tmp_path / str(seed), 16, seed, gain) for seed in range(3)])
    text = results.verdict(setting)
    assert "Over 3 runs the learned mixture is" in text and word in text
    assert ("Natural (baseline) would serve as well." in text) == remedy


def test_models_that_are_one_run_are_one_column(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "0", 16, 0)
    figures = read(folder / "evaluation.json")
    figures |= {"natural": figures["baseline"], "reference": figures["baseline"]}
    (folder / "evaluation.json").write_text(json.dumps(figures))
    (setting,) = _read([folder])
    assert setting.models == {
        "main": "learned",
        "baseline": "natural (baseline)",
        "uniform": "uniform",
    }


# ── Settings of a sweep ───────────────────────────────────────────────────────────────────────────


def test_runs_are_grouped_by_what_varies_beside_the_seed(tmp_path: Path) -> None:
    small, large = _read([run_of(tmp_path / f"{w}-{s}", w, s) for w in (32, 16) for s in (0, 1, 2)])
    assert [len(small.results), len(large.results)] == [3, 3] and small.size < large.size
    assert small.label == f"proxy={small.size:,} parameters"
    losses, weights = sweep_charts.compare([small, large])
    assert (
        all(f" {name}" in losses for name in ("learned", "natural (baseline)", "uniform"))
        and " main" not in losses
    )
    assert " a" in weights and " b" in weights
    assert len(re.findall(r'id="[^"]*(FillBetween|PolyCollection)', losses)) == 3, (
        "a band for each curve"
    )
    assert overall([small, large]).startswith(
        "6 runs of 2 settings; the lowest mean loss is that of proxy="
    )


def test_other_keys_make_curves_of_their_own(tmp_path: Path) -> None:
    made = [run_of(tmp_path / f"{w}-{e}", w, 0, step_size=e) for w in (16, 32) for e in (0.1, 1.0)]
    settings = _read(made)
    assert [setting.varying["proxy.step_size"] for setting in settings] == [0.1, 1.0] * 2
    assert "learned (proxy.step_size=0.1)" in sweep_charts.compare(settings)[0]


def test_words_make_a_row_each(tmp_path: Path) -> None:
    settings = _read(
        [run_of(tmp_path / score, 16, 0, score=score) for score in ("excess", "hardest")]
    )
    losses, weights = sweep_charts.compare(settings)
    assert "proxy.score=excess" in losses and "proxy.score=hardest" in weights


def prepared(run: Path, tokenizer: str, documents: int = 9, domains: str = "ab") -> Path:
    """The run with data of its own: 2 bytes a token of the first tokeniser, 4 of another."""
    split = {"documents": documents, "bytes": 1000}
    manifest = {
        "schema": SCHEMA,
        "tokenizer": {"fingerprint": tokenizer},
        "domains": {name: {"validation": split} for name in domains},
    }
    (run / "prepare").mkdir()
    (run / "prepare" / "manifest.json").write_text(json.dumps(manifest))
    file = run / "evaluation.json"
    figures = json.loads(file.read_text())
    for model in figures.values():
        model["domains"] = {name: model["domains"].get(name, {"loss": 4}) for name in domains}
        for domain in model["domains"].values():
            length = 2 if tokenizer == "one" else 4
            domain["bits_per_byte"] = domain["loss"] / np.log(2) / length
    file.write_text(json.dumps(figures))
    return run


def test_across_tokenisers_bits_per_byte_are_compared(tmp_path: Path) -> None:
    runs = [
        prepared(run_of(tmp_path / name, 16, 0, gain, step_size=gain), name)
        for name, gain in (("one", 0.5), ("two", 0.4))
    ]
    settings = _read(runs)
    (two,), (one,) = (setting.losses("main") for setting in settings)
    assert one == pytest.approx(2 * two)  # the same nats per token
    said = overall(settings)
    assert "the lowest mean loss is that of proxy.step_size=0.4 (" in said
    assert "bits per byte" in said and "nats" not in said
    for chart in sweep_charts.compare(settings)[:1]:
        assert "bits per byte" in chart and "nats" not in chart
    same = [prepared(run_of(tmp_path / f"{n}", 16, 0, n, step_size=n), "one") for n in (1, 2)]
    assert "nats per token" in overall(_read(same))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"domains": "abc"}, "their domains differ: c is not in all of them"),
        ({"domains": "acd"}, "their domains differ: b, c and d are not in all of them"),
        ({"documents": 10}, "the validation text of a and b differs"),
    ],
)
def test_what_has_no_common_measure_is_not_compared(
    tmp_path: Path, other: dict[str, object], why: str
) -> None:
    first = prepared(run_of(tmp_path / "0", 16, 0, step_size=0.1), "one")
    second = prepared(run_of(tmp_path / "1", 32, 0, step_size=1.0), "one", **other)  # type: ignore[arg-type]
    said = overall(_read([first, second]))
    assert f"2 settings, which are not compared, for {why}. " in said
    assert "the lowest" not in said and said.count("With one seed the learned mixture") == 2


@pytest.mark.slow
def test_a_sweep_over_domains_shows_each_setting_alone(corpus: Path, tmp_path: Path) -> None:
    run = (*TINY, f"data.root={corpus}", f"store={tmp_path / 'store'}", "training.steps=2")
    for number, only in enumerate(("null", "[plain,rich]")):
        folder = f"run_dir={tmp_path / 'sweep' / str(number)}"
        outcome = run_here(*run, f"data.only={only}", "mixture=uniform", folder)
        assert outcome.code == 0, outcome
    outcome = run_here("stage=report", f"run_dir={tmp_path / 'sweep'}")
    assert outcome.code == 0, outcome
    why = "which are not compared, for their domains differ: digits is not in all of them"
    assert why in " ".join(outcome.out.split())
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert why in page and "Mean validation loss of each setting" not in page
    assert all(f"data.only={only}" in page for only in ("None", "[&#39;plain"))


def test_seeds_alone_are_one_setting(tmp_path: Path) -> None:
    (setting,) = _read([run_of(tmp_path / str(seed), 16, seed) for seed in (0, 1)])
    assert setting.label == "" and len(setting.results) == 2


@pytest.mark.parametrize("widths", [(16,), (16, 32)])
def test_the_page_of_a_sweep_has_every_setting(
    widths: tuple[int, ...], corpus: Path, tmp_path: Path
) -> None:
    for width in widths:
        for seed in (0, 1):
            run_of(tmp_path / "sweep" / f"{width}-{seed}", width, seed)
    outcome = run_here(f"data.root={corpus}", "stage=report", f"run_dir={tmp_path / 'sweep'}")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count("<details>") == (len(widths) if len(widths) > 1 else 0)
    assert page.count("Over 2 runs the learned mixture is better than natural (baseline)") >= len(
        widths
    )
    assert not (tmp_path / "sweep" / "config.yaml").exists(), (
        "a report over runs claims no configuration"
    )


# ── Charts ────────────────────────────────────────────────────────────────────────────────────────


def test_a_chart_takes_its_colours_from_the_page_and_its_names_as_text() -> None:
    drawn = charts.lines(
        "t",
        "x",
        "y",
        {"<b>_$x$": charts.Curve([1, 2], [[1.0, 2.0]]), "_hidden": charts.Curve([1], [[1.0]])},
    )
    assert "var(--ink)" in drawn and "#010203" not in drawn
    assert "&lt;b&gt;_$x$" in drawn and "_hidden" in drawn and "<b>" not in drawn
    assert drawn == charts.lines(
        "t",
        "x",
        "y",
        {"<b>_$x$": charts.Curve([1, 2], [[1.0, 2.0]]), "_hidden": charts.Curve([1], [[1.0]])},
    )


def test_charts_of_one_page_share_no_identifier() -> None:
    curves = {"a": charts.Curve([1, 2], [[1.0, 2.0]])}
    one, two = (
        set(re.findall(r'\bid="([^"]+)"', charts.lines(t, "x", "y", curves)))
        for t in ("one", "two")
    )
    assert one and not one & two


def test_smoothing_is_the_mean_of_the_window() -> None:
    values = np.random.default_rng(0).normal(size=(2, 50, 3))
    found = charts.smooth(values, 5)
    assert np.allclose(found[:, 10], values[:, 8:13].mean(1)) and np.allclose(
        found[:, 0], values[:, :3].mean(1)
    )
    assert np.array_equal(charts.smooth(values, 1), values)


# ── In a browser ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def page(corpus: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("report") / "run"
    seeds = ["proxy.seeds=2", "main.tokens=100000"]
    outcome = run_here(*TINY, *seeds, f"data.root={corpus}", f"store={store}", f"run_dir={run_dir}")
    assert outcome.code == 0, outcome.err
    return run_dir / "report.html"


PARTS = (
    "The mixture",
    "How it came about",
    "What it gained",
    "Validation loss per domain",
    "What the domains are",
    "Domain weights α (mean of 2 proxies",
    "Effective number of domains",
    "Excess loss over the reference",
    "Learning curves",
    "How far ahead of natural (baseline)",
    "Loss per domain against natural (baseline)",
    "final loss of natural (baseline)",
    "epochs in the final run",
)


@pytest.mark.slow
def test_a_browser_shows_every_part(page: Path, browser: Browser) -> None:
    shown = browser(page, "dump-dom")
    for part in PARTS:
        assert part in shown, part
    assert shown.count("<svg") == 7 and shown.count('class="sample"') == 3
    assert 'class="verdict"' in shown and "With one seed the learned mixture" in shown
    assert {f"<td>{name}</td>" for name in ("digits", "plain", "rich")} <= set(
        re.findall(r"<td>\w+</td>", shown)
    )
    assert re.findall(r"\d\.\d{4} – \d\.\d{4}", shown), (
        "the weights have intervals over the proxy's seeds"
    )
    outside = re.findall(r'(?:src|href|action)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import', shown)
    assert not outside, "nothing is fetched"


@pytest.mark.slow
def test_a_browser_shows_it_light_and_dark_and_prints_it(
    page: Path, browser: Browser, tmp_path: Path
) -> None:
    for name, number in (("light", 1), ("dark", 0)):
        flags = (
            f"screenshot={tmp_path / name}.png",
            "window-size=1000,1400",
            f"blink-settings=preferredColorScheme={number}",
        )
        browser(page, *flags)
    light, dark = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("light", "dark")
    )
    assert light[2, 2] > 250 and dark[2, 2] < 40
    assert light.min() < 60 and dark.max() > 200, "and text on it"
    # The chart's region has ink too: its words take the page's colours.
    for picture in (
        light,
        dark,
    ):
        region = picture[700:1300, 60:940].astype(int)
        assert (abs(region - int(picture[2, 2])) > 120).mean() > 0.002
    browser(page, f"print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_a_domain_named_like_a_script_is_harmless(
    page: Path, browser: Browser, tmp_path: Path
) -> None:
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    folder = run_of(tmp_path / "0", 16, 0)
    for name in ("weights.json", "evaluation.json"):
        text = (folder / name).read_text().replace('"a"', json.dumps(evil))
        (folder / name).write_text(text)
    (folder / "findings.json").write_text(
        json.dumps([{"kind": "noise", "domains": [evil], "message": evil, "value": 1}])
    )
    run_of(tmp_path / "1", 16, 1)
    shutil.copytree(folder, tmp_path / "sweep" / "0")
    assert run_here("stage=report", f"run_dir={tmp_path / 'sweep'}").code == 0
    shown = browser(tmp_path / "sweep" / "report.html", "dump-dom")
    assert "owned" in shown and "<title>doremi-train" in shown
    assert "<script" not in shown and "<img" not in shown


@pytest.mark.slow
def test_a_selection_shows_what_was_chosen_beside_what_was_not(
    browser: Browser, tmp_path: Path
) -> None:
    pytest.importorskip("numba")
    evil = '<script>document.title = "owned"</script><img src=x onerror=alert(1)> '
    for name, letters in ("plain", "hijklmno"), ("<b>mixed", "nopqrst"):
        write_jsonl(
            tmp_path / "raw" / name / "train.jsonl",
            [evil + text for text in documents(2, letters, 200, 10_000)],
        )
    target = write_jsonl(tmp_path / "target.jsonl", list(documents(3, "nopqrst", 200, 2000)))
    outcome = run_here(
        "stage=select", f"data.root={tmp_path / 'raw'}", "selection=ngram",
        f"run_dir={tmp_path / 'run'}",
        f"selection.targets={{t: [{target}]}}", "selection.workers=1", "selection.overlap=null",
    )  # fmt: skip
    assert outcome.code == 0 and "report: " in outcome.out, outcome
    run_of(tmp_path / "sweep" / "0", 16, 0)
    shutil.copytree((tmp_path / "run" / "select").resolve(), tmp_path / "sweep" / "0" / "select")
    assert run_here("stage=report", f"run_dir={tmp_path / 'sweep'}").code == 0
    for page in (tmp_path / "run" / "select" / "report.html", tmp_path / "sweep" / "report.html"):
        shown = browser(page, "dump-dom")
        for part in (
            "effective sample size",
            "of plain top-k",
            "nats less KL",
            ": lengths",
            ": where the tokens",
        ):
            assert part in shown, part
        assert shown.count('<div class="sample"><pre>') == 6, "three pairs"
        assert "<title>doremi-train" in shown and "<script" not in shown and "<img" not in shown
        assert "<b>mixed" not in shown and "&lt;b&gt;mixed" in shown
    assert "Which documents were chosen" in shown


def test_page_and_terminal_begin_with_the_headline(corpus: Path, tmp_path: Path) -> None:
    for seed, step in enumerate((40, 60)):
        folder = run_of(tmp_path / "sweep" / str(seed), 16, seed)
        figures = read(folder / "evaluation.json")
        figures["main"] |= {"steps": 100, "steps_to": {"baseline": step, "uniform": 100}}
        (folder / "evaluation.json").write_text(json.dumps(figures))
        stages = {"proxy": ("proxy", 3.0), "main": ("main", 10.0)}
        plan = {n: {"kind": kind, "whole_flops": flops} for n, (kind, flops) in stages.items()}
        (folder / "plan.json").write_text(json.dumps({"stages": plan, "warnings": []}))
    outcome = run_here(f"data.root={corpus}", "stage=report", f"run_dir={tmp_path / 'sweep'}")
    assert outcome.code == 0, outcome.err
    said = (
        "The learned mixture reaches natural's final loss in 50 ± 127 % of the steps. That is 50 % "
        "of the FLOPs where small runs are left out, and 80 % with all included"
    )
    printed = " ".join(outcome.out.split())
    page = (tmp_path / "sweep" / "report.html").read_text().replace("&#39;", "'")
    for text in (printed, page):
        assert said in text and text.index(said) < text.index("Over 2 runs the learned mixture is")
    assert printed.index(said) < printed.index("The mixture, and validation loss")

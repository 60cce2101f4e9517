"""The page to steer by, as a browser computes it: the same as in Python, and names are text."""

import csv
import html
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from helpers import regmix
from helpers.browser import Browser
from helpers.command import run_here

from doremi_train import console
from doremi_train.methods import steering
from doremi_train.methods.box import Box, Floats
from doremi_train.methods.saturating import Saturating

EVIL = "</script><script>document.title='owned'</script>"
DOMAINS = ["web", EVIL, "<img src=x onerror=document.title='owned'>", 'a "b" & \u2028c']
METRICS = ["code", "<!-- a:b " + EVIL, "accuracy"]


def table(path: Path) -> Path:
    """Runs of four domains: two losses, and an accuracy that is missing in some."""
    random = np.random.default_rng(0)
    weights = random.dirichlet(np.ones(4), 40)
    first, second, third = (np.exp(-2 * weights[:, k] ** 0.6) for k in (0, 1, 2))
    values = np.stack([1 + first + 0.2 * third, 2 + second + 0.3 * first, 0.9 - third / 2], axis=1)
    values += 0.005 * random.standard_normal(values.shape)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *DOMAINS, *METRICS])
        for n, (weight, value) in enumerate(zip(weights, values, strict=True)):
            writer.writerow([n, *weight, *value[:2], value[2] if n > 4 else ""])
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steer")
    outcome = run_here(
        "stage=fit", f"fit.runs={table(folder / 'runs.csv')}", f"run_dir={folder / 'run'}",
        "fit.regressor=saturating", "objective.metrics={code: 1, accuracy: -1}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return folder / "run" / "fit" / "report.html"


class Data(NamedTuple):
    """What is in the page."""

    given: dict[str, Any]
    law: Saturating
    within: Box

    @classmethod
    def of(cls, page: Path) -> "Data":
        found = re.search(r'id="steering">(.*?)</script>', page.read_text(), re.DOTALL)
        assert found
        given = json.loads(found[1])
        fields = [torch.tensor(given["law"][name]).double() for name in Saturating._fields]
        return cls(given, Saturating(*fields), Box(*map(np.array, (given["low"], given["high"]))))

    def steered(
        self, start: str, better: dict[str, float], held: list[str], tolerance: float
    ) -> Floats:
        mixture, names = np.array(self.given["starts"][start]), self.given["metrics"]
        wanted = steering.wish(
            self.law.predict(mixture[None])[0],
            np.array([better.get(name, 0.0) for name in names]),
            np.array([name in held for name in names]),
            tolerance,
        )
        return steering.steer(self.law, mixture, wanted, self.within)


def shown(dom: str) -> dict[str, float]:
    """The steered mixture on the page."""
    found = re.search(r'<pre id="weights">(.*?)</pre>', dom, re.DOTALL)
    assert found
    return json.loads(html.unescape(found[1]))


def compare(
    browser: Browser, page: Path, start: str, better: dict[str, float], held: list[str]
) -> str:
    """The page's solution against Python's; what the page says."""
    pairs = [("start", start), ("tolerance", "0.004")]
    pairs += [("raise", f"{name}:{amount}") for name, amount in better.items()]
    pairs += [("hold", name) for name in held or [""]]
    dom = browser(page, "dump-dom", at="#" + urlencode(pairs))
    data, found = Data.of(page), shown(dom)
    pairs = zip(data.given["parts"], data.steered(start, better, held, 0.004), strict=True)
    expected = {name: part * weight for parts, weight in pairs for name, part in parts}
    assert found == pytest.approx(expected, abs=1e-6)
    said = re.search(r'id="said"[^>]*>(.*?)</p>', dom, re.DOTALL)
    assert said
    return html.unescape(said[1])


@pytest.mark.slow
def test_the_page_s_solution_is_python_s(page: Path, browser: Browser) -> None:
    first, second, third = METRICS
    said = compare(browser, page, "natural", {first: 0.02}, [second])
    assert said.startswith("Granted by the law")
    said = compare(browser, page, "natural", {first: 0.02, third: 0.01}, [])
    assert said.startswith("Granted by the law")
    said = compare(browser, page, "proposed", {second: 9.0}, [first, third])
    assert said.startswith(f"Only in part: {second} gets better by 0.") and "of the 9.0000" in said
    said = compare(browser, page, "proposed", {}, METRICS)
    assert said == "Nothing is asked for: this is the proposed mixture."


@pytest.mark.slow
def test_names_are_text_in_a_real_browser(page: Path, browser: Browser) -> None:
    dom = browser(page, "dump-dom")
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title and title[1].startswith("doremi-train: ")
    assert dom.count("<script") == 2 and "<img" not in dom
    assert list(shown(dom)) == DOMAINS, "the script ran, and every name is whole"
    assert dom.count('class="sort"') == 1 + len(METRICS) + len(DOMAINS)
    assert dom.count('class="point"') == 11 and dom.count('class="run"') == 40


CLICKS = """<script>
const buttons = [...document.querySelectorAll(".sort")];
const button = (text) => buttons.find((one) => one.textContent === text);
button("code").click();
button("web").click();
button("web").click();
const slider = document.querySelector("#wishes input");
slider.value = slider.max / 4;
slider.dispatchEvent(new Event("input"));
show();
</script>"""


@pytest.mark.slow
def test_a_click_sorts_and_a_slider_steers(page: Path, browser: Browser, tmp_path: Path) -> None:
    text = re.sub(r"<meta http-equiv.*?>", "", page.read_text())
    clicked = tmp_path / "clicked.html"
    clicked.write_text(text.replace("</body>", CLICKS + "</body>"))
    dom = browser(clicked, "dump-dom")
    heat = dom[dom.index('id="effects"') : dom.index("</table>", dom.index('id="effects"'))]
    rows = [
        [float(value) for value in re.findall(r'data-value="(.*?)"', row)]
        for row in heat.split("<tr>")[2:]
    ]
    heads = [html.unescape(one) for one in re.findall(r'class="sort">(.*?)</button>', heat)]
    effects = json.loads((page.parent / "fit.json").read_text())["effects"]
    content = {console.shown(name): effect for name, effect in effects.items()}
    metrics, domains = heads[1 : 1 + len(METRICS)], heads[1 + len(METRICS) :]
    assert rows == [[content[name][metric][0] for metric in metrics] for name in domains]
    code = [row[metrics.index("code")] for row in rows]
    web = rows[domains.index("web")]
    assert code == sorted(code) and web == sorted(web, reverse=True)
    assert "Granted by the law" in dom


@pytest.mark.slow
def test_the_page_says_all_without_a_script(page: Path) -> None:
    text = page.read_text()
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    heat = body[body.index('id="effects"') : body.index("</table>", body.index('id="effects"'))]
    assert heat.count("data-value=") == len(DOMAINS) * len(METRICS) and heat.count("± ") == 12
    assert "<script" not in body + heat and html.unescape(heat).count(EVIL) == 2
    assert "more is better" in body and "The sliders and the front need JavaScript" in body
    content = json.loads((page.parent / "fit.json").read_text())
    assert set(content["effects"]) == set(DOMAINS)
    assert all(len(row) == len(METRICS) for row in content["effects"].values())


@pytest.mark.acceptance
def test_of_a_swarm_s_runs_too(tiny: list[str], tmp_path: Path, browser: Browser) -> None:
    runs = ("mixture=swarm", "swarm.runs=4", "swarm.candidates=1", "training.steps=6", "seed=98")
    outcome = run_here(*tiny, *runs, "stage=swarm", f"run_dir={tmp_path}")
    assert outcome.code == 0, outcome
    (tmp_path / "old.json").write_text('{"digits": 0.9, "rich": 0.1}')
    frozen = [f"swarm.frozen={tmp_path / 'old.json'}", f"run_dir={tmp_path / 'frozen'}"]
    assert run_here(*tiny, *runs, "stage=swarm", *frozen).code == 0
    for folder in (tmp_path, tmp_path / "frozen"):
        for start in ("chosen", "natural"):
            compare(browser, folder / "steer.html", start, {"rich": 0.01}, ["plain"])


@pytest.mark.acceptance
@regmix.needed
def test_on_regmix_s_runs_too(tmp_path: Path, browser: Browser) -> None:
    pair = ",".join(
        str(regmix.FOLDER / f"train_{what}_1m.csv") for what in ("mixture", "pile_loss")
    )
    asked = ["stage=fit", f"fit.runs=[{pair}]", "fit.regressor=saturating"]
    assert run_here(*asked, f"run_dir={tmp_path}").code == 0
    page = tmp_path / "fit" / "report.html"
    names = Data.of(page).given["metrics"]
    for start, better, held in (
        ("natural", {names[0]: 0.05, names[3]: 0.03}, names),
        ("proposed", {names[4]: 0.1}, names[:4]),
        ("proposed", {names[7]: 5.0}, names),
    ):
        compare(browser, page, start, better, held)

"""Pages to steer by on paper: nothing of a wide or long map is cut off."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import Browser

from doremi_train.methods.box import Box
from doremi_train.methods.saturating import saturating
from doremi_train.methods.steering import Part, Steerable
from doremi_train.reports import steer_page
from doremi_train.reports.steer_page import Given

LONG = "harness_task_with_a_name_that_goes_on_and_on_and_on_as_they_do/acc_norm_none"
# What of the page is beyond its width, or in a box that scrolls.
MEASURE = """<script>
const edge = document.documentElement.clientWidth + 0.5;
const cells = [...document.querySelectorAll("th, td, pre, svg, p")];
const beyond = cells.filter((one) => one.getBoundingClientRect().right > edge);
const boxes = [...document.querySelectorAll(".box, pre")];
const hidden = boxes.filter((one) => getComputedStyle(one).overflow !== "visible");
const wide = [...document.querySelectorAll("#effects td")].filter(
  (one) => one.scrollWidth > one.clientWidth + 1);
document.title = [cells.length, beyond.length, hidden.length, wide.length].join(" ");
</script>"""


def given(domains: int, metrics: int) -> Given:
    random = np.random.default_rng(0)
    points = random.dirichlet(np.ones(domains), 30)
    values = 2 + np.exp(-points @ random.gamma(1, 2, (domains, metrics)))
    laws = [saturating(points[n:], values[n:]) for n in (0, 5, 9)]
    natural, numbers = points.mean(0), np.arange(metrics)
    return Given(
        [f"domain_number_{k}" for k in range(domains)],
        [LONG, *(f"task_{m}/bits_per_byte" for m in range(1, metrics))],
        np.zeros(metrics, bool),
        Steerable(laws[0], [Part(numbers, laws[0], laws[1:])]),
        Box(np.zeros(domains), points.max(0)),
        {"chosen": points[0], "natural": natural},
        dict(zip(("chosen", "natural"), laws[0].predict(points[:2]), strict=True)),
        values,
        [{f"domain_number_{k}": 1.0} for k in range(domains)],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("domains", "metrics"), [(40, 10), (9, 32)])
def test_a_printed_map_is_whole(
    domains: int, metrics: int, browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "steer.html"
    steer_page.write(page, given(domains, metrics), "a run", "the verdict", "saturating")
    browser(page, f"print-to-pdf={tmp_path / 'page.pdf'}")
    pdf = (tmp_path / "page.pdf").read_bytes()
    sizes = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    lying = [float(wide) > float(high) for wide, high in sizes]
    assert len(lying) >= 2 and any(lying) == (metrics > 14) and not all(lying)
    # The same rules on a screen as wide as the paper.
    text = re.sub(r"<meta http-equiv.*?>", "", page.read_text())
    screen = tmp_path / "screen.html"
    text = text.replace("@media print", "@media all")
    screen.write_text(text.replace("</body>", MEASURE + "</body>"))
    width = 980 if metrics > 14 else 690  # 26 and 18 cm
    dom = browser(screen, "dump-dom", f"window-size={width},1000")
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title
    cells, beyond, hidden, wide = map(int, title[1].split())
    assert cells > domains * metrics and (beyond, hidden, wide) == (0, 0, 0)

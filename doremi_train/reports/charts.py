"""Charts as SVG markup for a page: drawn by matplotlib, coloured by the page's own CSS, so that
they follow its light, dark and printed form. The same bytes for the same data.

A curve is a mean over S seeds with a band from the lowest to the highest; with one seed the band
has no width.
"""

import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from doremi_train.console import short, shown

# Mid tones, which can be read on white and on near black.
COLORS = (
    "#3b7dd8", "#e07b39", "#3f9c57", "#d1495b", "#8f6bbf",
    "#1d9aa1", "#b5892a", "#c06090", "#7d8a2e", "#8a6652",
)  # fmt: skip
_GREY = "#8b919c"
# Matplotlib needs colours: these stand for the page's, and are put back as CSS variables.
_INK, _SOFT, _LINE = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)"}


class Curve(NamedTuple):
    """y over x for every seed."""

    x: ArrayLike  # (N,)
    y: ArrayLike  # (S, N)
    color: str | None = None  # None: the next one; "grey": drawn behind, and not named
    dashed: bool = False


class Mark(NamedTuple):
    """A dotted line across the chart with a word to it."""

    text: str
    x: float | None = None
    y: float | None = None


class Point(NamedTuple):
    """A value with the ends of its interval, on the row of a name."""

    value: float
    low: float | None = None
    high: float | None = None


class Cloud(NamedTuple):
    """Places in the plane, each of a size."""

    places: Sequence[Sequence[float]]  # (N, 2)
    sizes: Sequence[float]  # (N,) of any unit


def lines(
    title: str,
    x: str,
    y: str,
    curves: Mapping[str, Curve],
    marks: Sequence[Mark] = (),
    settings: bool = False,
    logarithmic: bool = False,
    powers: bool = False,
) -> str:
    """Curves over steps; `settings`: x is a few values that were tried, each with a point, and a
    tick of its own; `logarithmic`: so is the scale of x; `powers`: that of y too, so that a power
    of x is a line."""
    with _figure(4.0) as (axes, markup):
        colors = itertools.cycle(COLORS)
        for name, curve in curves.items():
            values = np.asarray(curve.y, dtype=float)  # (S, N)
            grey = curve.color == "grey"
            color = _GREY if grey else curve.color or next(colors)
            # A space in front: matplotlib hides names that begin with an underscore.
            axes.plot(
                curve.x,
                values.mean(0),
                linestyle="--" if curve.dashed else "-",
                marker="o" if settings else None,
                label="_" if grey else f" {name}",
                linewidth=0.9 if grey else 1.8,
                alpha=0.45 if grey else 1,
                zorder=1 if grey else 2,
                markersize=5,
                color=color,
            )
            if len(values) > 1 and not grey:
                axes.fill_between(
                    curve.x,
                    values.min(0),
                    values.max(0),
                    color=color,
                    alpha=0.18,
                    linewidth=0,
                    zorder=1,
                )
        if settings:
            if logarithmic:
                axes.set_xscale("log")
            ticks = sorted(
                {float(value) for curve in curves.values() for value in np.asarray(curve.x)}
            )
            axes.set_xticks(ticks, [short(value) for value in ticks])
            axes.minorticks_off()
        for mark in marks:
            _mark(axes, mark)
        if powers:
            axes.set_yscale("log")
            # Matplotlib's own is mathematical markup.
            axes.yaxis.set_major_formatter(lambda value, _: short(value))
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.margins(x=0.03 if settings else 0)
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return markup[0]


def rows(
    title: str,
    x: str,
    names: Sequence[str],
    points: Mapping[str, Sequence[Point]],
    colors: Mapping[str, str] | None = None,
    zero: bool = False,
) -> str:
    """A row for each name, with a point of each kind on it; `zero`: a line at 0, from which the
    points are told."""
    with _figure(1.3 + 0.3 * len(names)) as (axes, markup):
        height = np.arange(len(names))[::-1]
        following = itertools.cycle(COLORS)
        spread = np.linspace(0.16, -0.16, len(points)) if len(points) > 1 else [0.0]
        for offset, (kind, series) in zip(spread, points.items(), strict=True):
            color = (colors or {}).get(kind) or next(following)
            values = np.array([point.value for point in series], dtype=float)
            ends = np.array(
                [
                    (
                        point.value if point.low is None else point.low,
                        point.value if point.high is None else point.high,
                    )
                    for point in series
                ],
                dtype=float,
            ).reshape(-1, 2)
            axes.hlines(
                height + offset, ends[:, 0], ends[:, 1], color=color, linewidth=2.2, alpha=0.5
            )
            axes.plot(values, height + offset, "o", markersize=6, color=color, label=f" {kind}")
        if len(points) > 1 and not zero:
            values = np.array([[point.value for point in series] for series in points.values()])
            axes.hlines(height, values.min(0), values.max(0), color=_LINE, linewidth=3, zorder=0)
        axes.set_yticks(height, [f" {_clip(name)}" for name in names])
        axes.set(title=title, xlabel=x)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="both")
        if zero:
            axes.axvline(0, color=_SOFT, linewidth=1.2)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return markup[0]


def clouds(title: str, groups: Mapping[str, Cloud]) -> str:
    """Places in the plane, a disc each, whose area is its size; those of a name in one colour."""
    largest = max((size for cloud in groups.values() for size in cloud.sizes), default=0) or 1
    following = itertools.cycle(COLORS)
    shapes = itertools.cycle("os^Dv")
    with _figure(5.0) as (axes, markup):
        for number, (name, cloud) in enumerate(groups.items()):
            color = next(following)
            if number % len(COLORS) == 0:  # the colours begin anew
                shape = next(shapes)
            axes.scatter(
                [place[0] for place in cloud.places],
                [place[1] for place in cloud.places],
                s=[10 + 190 * size / largest for size in cloud.sizes],
                color=color,
                marker=shape,
                alpha=0.6,
                linewidth=0,
                label=f" {_clip(name)}",
            )
        axes.set(title=title, xticks=[], yticks=[])
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        for handle in legend.legend_handles:
            handle.set_sizes([40])
    return markup[0]


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Running mean over `width` steps of the last but one axis, (…, T, K) → (…, T, K); shorter at
    both ends."""
    if width <= 1:
        return values
    total = np.cumsum(np.concatenate([np.zeros_like(values[..., :1, :]), values], axis=-2), axis=-2)
    steps = np.arange(values.shape[-2])
    first, last = (
        np.maximum(steps - width // 2, 0),
        np.minimum(steps + width // 2 + 1, values.shape[-2]),
    )
    return (total[..., last, :] - total[..., first, :]) / (last - first)[:, None]


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; the list holds the markup when the block ends."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    style: Any = {
        # Names of domains are text: no mathtext between dollar signs, no glyph outlines.
        "svg.hashsalt": "doremi", "svg.fonttype": "none", "text.parse_math": False,
        "text.color": _INK, "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
        "axes.edgecolor": _LINE, "grid.color": _LINE,
        "axes.facecolor": "none", "figure.facecolor": "none",
        "axes.titlelocation": "left", "axes.titlesize": 12,
        "axes.titleweight": "bold", "axes.titlepad": 12,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.axisbelow": True,
        "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 9,
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8.6, height), layout="constrained")
        markup: list[str] = []
        yield axes, markup
        buffer = io.StringIO()
        with warnings.catch_warnings():  # the reader's own font draws what ours has no glyph for
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
            # The canvas draws once, where savefig lays out in a first drawing that nobody sees.
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    title = axes.get_title(loc="left")
    # Matplotlib escapes markup in names, and leaves control characters.
    markup.append(_themed(shown(buffer.getvalue(), kept="\n"), title))


def _themed(text: str, title: str) -> str:
    """The svg element alone, with the page's colours and identifiers that no other chart of the
    page has."""
    text = text[text.index("<svg") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    prefix = re.sub(r"\W", "-", title)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)


def _mark(axes: Any, mark: Mark) -> None:
    how: Any = {"color": _SOFT, "linewidth": 1.1, "linestyle": ":"}
    if mark.y is not None:
        axes.axhline(mark.y, **how)
        axes.annotate(
            f" {mark.text}",
            (1, mark.y),
            xycoords=("axes fraction", "data"),
            va="bottom",
            ha="right",
            fontsize=9,
        )
    if mark.x is not None:
        axes.axvline(mark.x, **how)
        axes.annotate(
            f" {mark.text}", (mark.x, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9
        )


def _clip(name: str, characters: int = 40) -> str:
    return name if len(name) <= characters else name[: characters - 1] + "…"

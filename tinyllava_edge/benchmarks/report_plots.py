"""Pareto plots, drawn once by matplotlib: as PNG for a README, and as inline SVG that follows the page's colours.

SVG rather than a plotting library in JavaScript: a few kB instead of megabytes, sharp in print, no script.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.stats import Interval
from tinyllava_edge.benchmarks.summary import ALLOWED_LOSS, BuildSummary, Summary
from tinyllava_edge.errors import DependencyError
from tinyllava_edge.files import new_file

SERIES = 6  # colours for LLM types; they repeat beyond that
PAPER = {
    "ink": "#1d2430",
    "soft": "#5f6b7a",
    "grid": "#e3e7ec",
    "page": "#ffffff",
    "band": "#e6f2ec",
    "good": "#1a7f4b",
} | {f"series{k}": color for k, color in enumerate(("#0b63c5", "#c2500a", "#6b3fa0", "#00796b", "#a0154e", "#7a6200"))}
# stand-ins that matplotlib writes into the SVG; each becomes var(--name), so that light and dark follow the page
STAND_INS = {name: f"#fe{k:02x}{k:02x}" for k, name in enumerate(PAPER)}
MARKERS, GLYPHS = ("o", "D", "s", "^", "v", "P"), "○◇□△▽✚"
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Point:
    """One build in a plot."""

    label: str
    """build name"""
    llm: str
    """LLM type: its colour"""
    vision: str
    """vision precision: its marker"""
    x: Interval
    """cost"""
    y: Interval
    """accuracy in percent"""
    chosen: bool
    """whether it is the one to ship"""


@dataclass(frozen=True)
class Plot:
    """Accuracy over one cost."""

    name: str
    """short name, part of ids in the SVG"""
    x_label: str
    """axis title with unit"""
    points: tuple[Point, ...]
    """builds that have both numbers"""
    reference: float | None
    """reference accuracy in percent"""


@dataclass(frozen=True)
class Key:
    """What colours and marks mean, the same in every plot of a report."""

    colors: Mapping[str, str]
    """LLM type → colour name in PAPER"""
    markers: Mapping[str, str]
    """vision precision → matplotlib's marker"""
    glyphs: Mapping[str, str]
    """vision precision → the marker as a character"""

    @classmethod
    def of(cls, plot: Plot) -> Key:
        """Colours and marks in order of first appearance."""
        llms = dict.fromkeys(point.llm for point in plot.points)
        visions = list(dict.fromkeys(point.vision for point in plot.points))
        places = {vision: k % len(MARKERS) for k, vision in enumerate(visions)}
        return cls(
            {llm: f"series{k % SERIES}" for k, llm in enumerate(llms)},
            {vision: MARKERS[k] for vision, k in places.items()},
            {vision: GLYPHS[k] for vision, k in places.items()},
        )


def plots(summary: Summary) -> list[Plot]:
    """The plots that the measurements allow: accuracy over TTFT, over size, and over peak memory."""
    axes: tuple[tuple[str, str, Callable[[BuildSummary], Interval | None]], ...] = (
        ("ttft", "time to first token, ms (median)", lambda b: b.ttft),
        ("size", "size on disk, MB", lambda b: _exact(b.bytes)),
        ("memory", "peak memory, MB", lambda b: _exact(b.memory.get("peak_rss"))),
    )
    reference = summary.reference.accuracy if summary.reference else None
    level = None if reference is None else 100 * reference.estimate
    found = []
    for name, label, cost in axes:
        costs = [(build, cost(build)) for build in summary.builds if build.accuracy]
        points = tuple(_point(build, x, build.build == summary.decision.build) for build, x in costs if x)
        if points:
            found.append(Plot(name, label, points, level))
    return found


def frontier(points: Sequence[Point]) -> list[Point]:
    """Builds that no other build beats in both cost and accuracy, by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x.estimate, -p.y.estimate)):
        if not best or point.y.estimate > best[-1].y.estimate:
            best.append(point)
    return best


def write_png(found: Sequence[Plot], target: Path) -> None:
    """All plots side by side on white, for a README."""
    figure = _figure(4.2 * len(found), 4.0)
    for axes, plot in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _draw(axes, plot, PAPER)
    _legend(figure, found[0])
    with new_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


def svg(plot: Plot) -> str:
    """One plot as an `<svg>` element: text stays text, colours are the page's variables, hovering a point names it."""
    import matplotlib as mpl

    figure = _figure(4.2, 3.6)
    _draw(figure.subplots(), plot, STAND_INS)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _page_colors(_with_titles(buffer.getvalue().decode(), plot))


def _draw(axes: Any, plot: Plot, theme: Mapping[str, str]) -> None:
    key = Key.of(plot)
    colors = {llm: theme[name] for llm, name in key.colors.items()}
    _frame(axes, plot, theme)
    best = frontier(plot.points)
    axes.plot(
        [p.x.estimate for p in best],
        [p.y.estimate for p in best],
        drawstyle="steps-post",
        color=theme["soft"],
        lw=1,
        zorder=2,
    )
    for number, point in enumerate(plot.points):
        x, y, color = point.x, point.y, colors[point.llm]
        axes.errorbar(
            x.estimate,
            y.estimate,
            xerr=[[max(0.0, x.estimate - x.low)], [max(0.0, x.high - x.estimate)]],
            yerr=[[max(0.0, y.estimate - y.low)], [max(0.0, y.high - y.estimate)]],
            ecolor=color,
            elinewidth=1,
            capsize=2,
            alpha=0.55,
            fmt="none",
            zorder=3,
        )
        if point.chosen:
            axes.plot(x.estimate, y.estimate, "o", ms=15, mfc="none", mec=theme["good"], mew=1.6, zorder=4)
        axes.plot(
            x.estimate,
            y.estimate,
            key.markers[point.vision],
            ms=7,
            color=color,
            mec=theme["page"],
            mew=0.8,
            zorder=5,
            gid=f"{plot.name}-{number}",
        )
    _label(axes, [p for p in plot.points if p.chosen or p in best], theme)


def _frame(axes: Any, plot: Plot, theme: Mapping[str, str]) -> None:
    """Axes, grid, the reference's accuracy and the band that a build may fall into."""
    axes.margins(x=0.18)
    axes.locator_params(axis="x", nbins=5)
    axes.set_facecolor("none")
    axes.set_xlabel(plot.x_label, color=theme["ink"], size=9.5)
    axes.set_ylabel("accuracy, %", color=theme["ink"], size=9.5)
    axes.tick_params(colors=theme["soft"], labelsize=9, length=3)
    axes.grid(color=theme["grid"], lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme["soft"])
    low, high = min(p.y.low for p in plot.points), max(p.y.high for p in plot.points)
    if plot.reference is not None:
        low, high = min(low, plot.reference - ALLOWED_LOSS), max(high, plot.reference)
        axes.axhspan(plot.reference - ALLOWED_LOSS, plot.reference, color=theme["band"], lw=0, zorder=0)
        axes.axhline(plot.reference, color=theme["good"], lw=1, ls=(0, (4, 3)), zorder=1)
    room = 0.1 * max(high - low, 0.5)
    axes.set_ylim(low - room, high + room)


def _label(axes: Any, points: Sequence[Point], theme: Mapping[str, str]) -> None:
    """Names beside the points, alternately below and above so that neighbours don't collide."""
    for number, point in enumerate(sorted(points, key=lambda p: p.x.estimate)):
        below = number % 2 == 0
        axes.annotate(
            _short(point.label),
            (point.x.estimate, point.y.estimate),
            textcoords="offset points",
            xytext=(7, -13 if below else 8),
            size=8.5,
            color=theme["ink"],
            weight="bold" if point.chosen else "normal",
            parse_math=False,
            zorder=6,
        )


def _legend(figure: Any, plot: Plot) -> None:
    """One key below all plots."""
    from matplotlib.lines import Line2D

    key = Key.of(plot)
    handles = [
        Line2D([], [], ls="", marker="o", ms=6, color=PAPER[name], label=_short(llm))
        for llm, name in key.colors.items()
    ]
    handles += [
        Line2D([], [], ls="", marker=marker, ms=6, mfc="none", mec=PAPER["soft"], label=f"{_short(vision)} vision")
        for vision, marker in key.markers.items()
    ]
    ring = Line2D([], [], ls="", marker="o", ms=11, mfc="none", mec=PAPER["good"], label="ship this")
    handles.append(ring)
    if plot.reference is not None:
        name = f"reference {plot.reference:.1f} %, {ALLOWED_LOSS:g} point below"
        handles.append(Line2D([], [], color=PAPER["good"], lw=1, ls=(0, (4, 3)), label=name))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handletextpad=0.3,
        columnspacing=1.4,
        labelcolor=PAPER["ink"],
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(text: str) -> str:
    """A name that can't push the axes out of the figure; the whole of it is in the mark's title."""
    return text if len(text) <= 24 else text[:23] + "…"


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("matplotlib is not installed", "pip install 'tinyllava-edge[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _with_titles(text: str, plot: Plot) -> str:
    """Give the marks of each build a `<title>`, which browsers show on hover and screen readers read."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(text)
    for node in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(node)
    groups = {node.get("id"): node for node in root.iter(f"{{{_SVG}}}g")}
    for number, point in enumerate(plot.points):
        title = ET.Element(f"{{{_SVG}}}title")
        unit = plot.x_label.split(",")[1].split()[0]
        title.text = (
            f"{point.label}: {point.y.estimate:.1f} % ({point.y.low:.1f} to {point.y.high:.1f}), "
            f"{point.x.estimate:.1f} {unit}"
        )
        groups[f"{plot.name}-{number}"].insert(0, title)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", f"accuracy over {plot.x_label}")
    return ET.tostring(root, encoding="unicode")


def _page_colors(text: str) -> str:
    for name, stand_in in STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    # quotes around the font list would be matplotlib's default; the page's own font reads better
    return re.sub(r"font: (?:(bold|700) )?([\d.]+px)[^;\"]*", r"font: \1 \2 var(--font)", text)


def _point(build: BuildSummary, cost: Interval, chosen: bool) -> Point:
    vision, _, llm = build.build.partition("+")
    y = build.accuracy or Interval(0.0, 0.0, 0.0)
    return Point(build.build, llm, vision, cost, Interval(100 * y.estimate, 100 * y.low, 100 * y.high), chosen)


def _exact(value: int | None) -> Interval | None:
    return None if value is None else Interval(value / 1e6, value / 1e6, value / 1e6)

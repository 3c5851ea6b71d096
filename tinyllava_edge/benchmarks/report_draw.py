"""Pareto plots, drawn once by matplotlib: as PNG for a README, and as inline SVG that follows the page's colours.

SVG rather than a plotting library in JavaScript: a few kB instead of megabytes, sharp in print, no script.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.report_plots import Key, Plot, Point, frontier
from tinyllava_edge.errors import DependencyError
from tinyllava_edge.files import new_file

PAPER = {
    "ink": "#1d2430",
    "soft": "#5f6b7a",
    "grid": "#e3e7ec",
    "page": "#ffffff",
    "band": "#e6f2ec",
    "good": "#167a46",
    "bad": "#b3261e",
} | {f"series{k}": color for k, color in enumerate(("#0b63c5", "#c2500a", "#6b3fa0", "#00796b", "#a0154e", "#7a6200"))}
# stand-ins that matplotlib writes into the SVG; each becomes var(--name), so that light and dark follow the page
STAND_INS = {name: f"#fe{k:02x}{k:02x}" for k, name in enumerate(PAPER)}
COLUMNS = 3  # plots in a row of the PNG
_SVG = "http://www.w3.org/2000/svg"
# places of a name beside its mark: points to the right and up, and how the text is aligned
_PLACES = (
    (7, -13, "left"),
    (7, 8, "left"),
    (-7, -13, "right"),
    (-7, 8, "right"),
    (0, -21, "center"),
    (0, 15, "center"),
)


def write_png(found: Sequence[Plot], target: Path) -> None:
    """All plots on white, for a README."""
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(4.2 * columns, 3.6 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    key = Key.of(found)
    for axes, plot in zip(grid, found, strict=False):
        _draw(axes, plot, PAPER, key)
        if plot.target:
            axes.set_title(short(plot.target), color=PAPER["ink"], size=9.5, loc="left", parse_math=False)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    _legend(figure, found, key)
    with new_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


def svg(plot: Plot, key: Key | None = None) -> str:
    """One plot as an `<svg>` element: text stays text, colours are the page's variables, hovering a point names it."""
    figure = new_figure(4.2, 3.6)
    _draw(figure.subplots(), plot, STAND_INS, key or Key.of([plot]))
    unit = plot.x_label.split(",")[1].split()[0]
    titles = [
        f"{p.label}: {p.y.estimate:.1f} % ({p.y.low:.1f} to {p.y.high:.1f}), {number(p.x.estimate)} {unit}"
        + (f" ({number(p.x.low)} to {number(p.x.high)})" if p.x.low < p.x.high else "")
        for p in plot.points
    ]
    return svg_text(figure, plot.name, titles, f"accuracy over {plot.x_label}")


def svg_text(figure: Any, name: str, titles: Sequence[str], label: str) -> str:
    """A drawn figure as SVG for the page; marks with gid `{name}-{k}` get the k-th title, for hover and readers."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(buffer.getvalue().decode())
    for node in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(node)
    groups = {node.get("id"): node for node in root.iter(f"{{{_SVG}}}g")}
    for k, text in enumerate(titles):
        title = ET.Element(f"{{{_SVG}}}title")
        title.text = text
        groups[f"{name}-{k}"].insert(0, title)
    used = {*re.findall(r"#([\w-]+)", buffer.getvalue().decode()), *(f"{name}-{k}" for k in range(len(titles)))}
    for node in root.iter():  # matplotlib gives every group a name, the same ones in every plot of a page
        if node.get("id", "") not in used:
            node.attrib.pop("id", None)
    for side in ("width", "height"):
        root.attrib.pop(side, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return _page_colors(ET.tostring(root, encoding="unicode"))


def new_figure(width: float, height: float) -> Any:
    """An empty figure in inches. Raises DependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("matplotlib is not installed", "pip install 'tinyllava-edge[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def dress(axes: Any, theme: Mapping[str, str]) -> None:
    """The look that all plots of a report share."""
    axes.set_facecolor("none")
    axes.tick_params(colors=theme["soft"], labelsize=9, length=3)
    axes.grid(color=theme["grid"], lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme["soft"])


def short(text: str) -> str:
    """A name that can't push the axes out of the figure; the whole of it is in the mark's title."""
    return text if len(text) <= 24 else text[:23] + "…"


def number(value: float) -> str:
    """A cost for people: at least three digits, at most one decimal from 10 on."""
    return f"{value:.3g}" if abs(value) < 10 else f"{value:,.1f}"


def _draw(axes: Any, plot: Plot, theme: Mapping[str, str], key: Key) -> None:
    _frame(axes, plot, theme)
    best = frontier(plot.points)
    line = {"drawstyle": "steps-post", "color": theme["soft"], "lw": 1, "zorder": 2}
    axes.plot([p.x.estimate for p in best], [p.y.estimate for p in best], **line)
    for k, point in enumerate(plot.points):
        x, y, color = point.x, point.y, theme[key.colors[point.llm]]
        xerr = [[max(0.0, x.estimate - x.low)], [max(0.0, x.high - x.estimate)]]
        yerr = [[max(0.0, y.estimate - y.low)], [max(0.0, y.high - y.estimate)]]
        bars = {"ecolor": color, "elinewidth": 1, "capsize": 2, "alpha": 0.55, "fmt": "none", "zorder": 3}
        axes.errorbar(x.estimate, y.estimate, xerr=xerr, yerr=yerr, **bars)
        if point.chosen:
            axes.plot(x.estimate, y.estimate, "o", ms=15, mfc="none", mec=theme["good"], mew=1.6, zorder=4)
        mark = {"ms": 7, "color": color, "mec": theme["page"], "mew": 0.8, "zorder": 5, "gid": f"{plot.name}-{k}"}
        axes.plot(x.estimate, y.estimate, key.markers[point.vision], **mark)
    _label(axes, [p for p in plot.points if p.chosen or p in best], plot.points, theme)


def _frame(axes: Any, plot: Plot, theme: Mapping[str, str]) -> None:
    """Axes, grid, the reference's accuracy, the band that a build may fall into, and the budget's limit."""
    dress(axes, theme)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(plot.x_label, color=theme["ink"], size=9.5)
    axes.set_ylabel("accuracy, %", color=theme["ink"], size=9.5)
    left, right = min(p.x.low for p in plot.points), max(p.x.high for p in plot.points)
    if plot.limit is not None and plot.limit <= right + 2 * (right - left):  # a limit far away would squeeze the rest
        left, right = min(left, plot.limit), max(right, plot.limit)
        axes.axvline(plot.limit, color=theme["bad"], lw=1, ls=(0, (1, 2)), zorder=1)
    room = 0.18 * ((right - left) or abs(right) or 1.0)
    axes.set_xlim(left - room, right + room)
    low, high = min(p.y.low for p in plot.points), max(p.y.high for p in plot.points)
    if plot.reference is not None:
        low, high = min(low, plot.reference - plot.allowed), max(high, plot.reference)
        axes.axhspan(plot.reference - plot.allowed, plot.reference, color=theme["band"], lw=0, zorder=0)
        axes.axhline(plot.reference, color=theme["good"], lw=1, ls=(0, (4, 3)), zorder=1)
    room = 0.1 * max(high - low, 0.5)
    axes.set_ylim(low - room, high + room)


def _label(axes: Any, points: Sequence[Point], marks: Sequence[Point], theme: Mapping[str, str]) -> None:
    """Names beside the points, each where it covers the fewest marks and names; boxes are estimated, in points."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    wide, tall = 235.0, 200.0  # of the axes, near enough

    def place(point: Point) -> tuple[float, float]:
        return wide * (point.x.estimate - left) / (right - left), tall * (point.y.estimate - low) / (high - low)

    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(place, marks)]
    for point in sorted(points, key=lambda p: (not p.chosen, p.x.estimate)):
        text = short(point.label)
        x, y = place(point)
        width = 4.9 * len(text)
        best: tuple[float, tuple[float, float, float, float], int, int, str] | None = None
        for rank, (right_of, up, align) in enumerate(_PLACES):
            start = x + right_of - {"left": 0.0, "right": width, "center": width / 2}[align]
            box = (start, y + up - 1, start + width, y + up + 9)
            outside = max(0.0, -box[0]) + max(0.0, box[2] - wide) + max(0.0, -box[1]) + max(0.0, box[3] - tall - 8)
            cost = 3 * outside + sum(_overlap(box, other) for other in taken) + rank
            if best is None or cost < best[0]:
                best = (cost, box, right_of, up, align)
        if best is None:
            continue
        taken.append(best[1])
        axes.annotate(
            text,
            (point.x.estimate, point.y.estimate),
            textcoords="offset points",
            xytext=(best[2], best[3]),
            ha=best[4],
            size=8.5,
            color=theme["ink"],
            weight="bold" if point.chosen else "normal",
            parse_math=False,
            zorder=6,
        )


def _overlap(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> float:
    """Area that two boxes share."""
    return max(0.0, min(one[2], two[2]) - max(one[0], two[0])) * max(0.0, min(one[3], two[3]) - max(one[1], two[1]))


def _legend(figure: Any, found: Sequence[Plot], key: Key) -> None:
    """One key below all plots."""
    from matplotlib.lines import Line2D

    def mark(label: str, **look: Any) -> Any:
        return Line2D([], [], label=label, **{"ls": "", "ms": 6, **look})

    handles = [mark(short(llm), marker="o", color=PAPER[name]) for llm, name in key.colors.items()]
    handles += [
        mark(f"{short(vision)} vision", marker=marker, mfc="none", mec=PAPER["soft"])
        for vision, marker in key.markers.items()
    ]
    if any(point.chosen for plot in found for point in plot.points):
        handles.append(mark("ship this", marker="o", ms=11, mfc="none", mec=PAPER["good"]))
    if (level := found[0].reference) is not None:
        name = f"reference {level:.1f} %, {found[0].allowed:g} point below"
        handles.append(mark(name, color=PAPER["good"], lw=1, ls=(0, (4, 3))))
    if any(plot.limit is not None for plot in found):
        handles.append(mark("budget", color=PAPER["bad"], lw=1, ls=(0, (1, 2))))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 3 * min(COLUMNS, len(found))),
        frameon=False,
        fontsize=9,
        handletextpad=0.3,
        columnspacing=1.4,
        labelcolor=PAPER["ink"],
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _page_colors(text: str) -> str:
    for name, stand_in in STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    # quotes around the font list would be matplotlib's default; the page's own font reads better
    return re.sub(r"font: (?:(bold|700) )?([\d.]+px)[^;\"]*", r"font: \1 \2 var(--font)", text)

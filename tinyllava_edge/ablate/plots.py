"""The paper's comparisons as figures: bars with intervals, seeds as points; PNG for READMEs, SVG for the page.

Which axis is compared in panels of which other axis follows the paper: language models per tower (Figure 4), towers
per language model (5), connectors (6), data (7) and recipes (8) per language model. Figure 9's question, whether a
smaller model beats a larger one, is the overview over parameters.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DependencyError
from ..files import new_file
from .compare import Ablation, CellScore
from .grid import AXES

COLORS = ("#0b63c5", "#c2500a", "#6b3fa0", "#00796b", "#a0154e", "#7a6200")
INK, SOFT, GRID_COLOR = "#1d2430", "#5f6b7a", "#e3e7ec"
TITLES = {
    "llm": ("language models", "Figure 4"),
    "tower": ("vision encoders", "Figure 5"),
    "connector": ("connectors", "Figure 6"),
    "data": ("data mixtures", "Figure 7"),
    "recipe": ("training recipes", "Figure 8"),
}
PANELS = {"llm": "tower", "tower": "llm", "connector": "llm", "data": "llm", "recipe": "llm"}
SHORT = 26  # characters of a label
MAX_GROUPS = 8  # groups of bars in a row of a figure


@dataclass(frozen=True)
class Figure:
    """One comparison."""

    name: str
    """short, for file names"""
    title: str
    """for people"""
    draw: Callable[[], Any]
    """→ matplotlib's Figure"""


def figures(ablation: Ablation) -> list[Figure]:
    """Every axis with more than one entry, and the overview where there are at least two cells."""
    found = []
    for axis in ("llm", "tower", "connector", "data", "recipe"):
        if len(ablation.levels[axis]) > 1:
            what, paper = TITLES[axis]
            found.append(Figure(axis, f"Ablation of {what} (paper: {paper})", _drawing(ablation, axis)))
    if len(ablation.cells) > 1:
        found.append(Figure("overall", "All cells over their size (paper: Figure 9)", lambda: _overall(ablation)))
    return found


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure for READMEs; the same results give the same bytes."""
    with new_file(path) as temporary:
        figure.draw().savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def svg(figure: Figure) -> str:
    """A figure for inlining; ids are its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": figure.name, "svg.fonttype": "none"}):
        figure.draw().savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _drawing(ablation: Ablation, axis: str) -> Callable[[], Any]:
    return lambda: _bars(ablation, axis)


def _bars(ablation: Ablation, axis: str) -> Any:
    """Panels by PANELS[axis], groups of bars by task and everything else, one bar per entry of the axis."""
    panel_axis = PANELS[axis]
    panels = ablation.levels[panel_axis]
    rest = [a for a in AXES if a not in (axis, panel_axis) and len(ablation.levels[a]) > 1]
    groups = [
        (task, combination)
        for task in ablation.tasks
        for combination in itertools.product(*(ablation.levels[a] for a in rest))
    ]
    rows = -(-len(groups) // MAX_GROUPS)
    width = min(11.0, max(5.0, 1.6 + 1.5 * min(len(groups), MAX_GROUPS) * len(panels)))
    figure = _figure(width, 3.4 * rows + 0.4)
    grid = figure.subplots(rows, len(panels), squeeze=False, sharey="row")
    for row in range(rows):
        part = groups[row * MAX_GROUPS : (row + 1) * MAX_GROUPS]
        reached: list[float] = []
        for column, panel in enumerate(panels):
            axes = grid[row][column]
            _style(axes)
            for number, level in enumerate(ablation.levels[axis]):
                for place, (task, combination) in enumerate(part):
                    wanted = {**dict(zip(rest, combination, strict=True)), axis: level, panel_axis: panel}
                    cells = [c for c in ablation.cells if all(c.axes[a] == v for a, v in wanted.items())]
                    for cell in cells[:1]:
                        reached += _bar(axes, place, number, len(ablation.levels[axis]), cell, task)
            labels = ["\n".join([*([task] if len(ablation.tasks) > 1 else []), *names]) for task, names in part]
            axes.set_xticks(range(len(part)), [_short(label) for label in labels], fontsize=8, parse_math=False)
            axes.set_xlim(-0.6, len(part) - 0.4)
            axes.set_title(_short(panel), fontsize=10, color=INK, parse_math=False)
            if column == 0:
                axes.set_ylabel(_unit(ablation), fontsize=9, color=INK)
        _limits(grid[row], reached)
    _legend(figure, [_short(level) for level in ablation.levels[axis]])
    return figure


def _bar(axes: Any, place: int, number: int, count: int, cell: CellScore, task: str) -> list[float]:
    """Draw one bar; returns the values that the axis must hold."""
    if task not in cell.scores:
        return []
    step = 0.8 / count
    x = place + (number - (count - 1) / 2) * step
    color = COLORS[number % len(COLORS)]
    axes.bar(x, cell.score(task), 0.88 * step, color=color, alpha=0.82, zorder=2)
    reached = [cell.score(task), *cell.scores[task].values()]
    if (interval := cell.interval(task)) is not None:
        reached += [interval.low, interval.high]
        error = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
        axes.errorbar(x, interval.estimate, error, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=4)
    seeds = cell.scores[task]
    if len(seeds) > 1:
        spread = [x + 0.5 * step * (k / (len(seeds) - 1) - 0.5) for k in range(len(seeds))]
        axes.plot(spread, list(seeds.values()), "o", ms=4, mfc="white", mec=INK, mew=0.9, zorder=5)
    return reached


def _limits(row: Sequence[Any], reached: Sequence[float]) -> None:
    """Bars from zero, unless everything lies in the upper part, where only the difference can be seen."""
    if not reached:
        return
    low, high = min(reached), max(reached)
    room = max(0.08 * (high - low), 1.0)
    cut = low > 0.6 * high
    row[0].set_ylim(max(0.0, low - 2 * room) if cut else min(0.0, low), high + room)
    if cut:
        row[0].set_ylabel(f"{row[0].get_ylabel()} (not from 0)", fontsize=9, color=INK)


def _overall(ablation: Ablation) -> Any:
    """Every cell: score over parameters, one panel per task."""
    figure = _figure(10.0, max(2.6, 0.34 * len(ablation.cells) + 1.2))
    grid = figure.subplots(1, len(ablation.tasks), squeeze=False, sharey=True)
    cells = sorted(ablation.cells, key=lambda cell: (cell.parameters, cell.score(ablation.tasks[0])))
    shown = [axis for axis in AXES if len(ablation.levels[axis]) > 1] or ["recipe"]
    labels = [f"{_short(' · '.join(cell.axes[axis] for axis in shown), 44)}  {size(cell.parameters)}" for cell in cells]
    for column, task in enumerate(ablation.tasks):
        axes = grid[0][column]
        _style(axes, along="x")
        for y, cell in enumerate(cells):
            if task not in cell.scores:
                continue
            color = COLORS[1] if cell.name == ablation.baseline else COLORS[0]
            interval = cell.interval(task)
            if interval is not None:
                axes.plot([interval.low, interval.high], [y, y], color=color, lw=2, alpha=0.6, zorder=2)
            seeds = list(cell.scores[task].values())
            if len(seeds) > 1:
                axes.plot(seeds, [y] * len(seeds), "o", ms=4, mfc="white", mec=INK, mew=0.8, zorder=3)
            axes.plot([cell.score(task)], [y], "D", ms=6, color=color, zorder=4)
        axes.set_yticks(range(len(cells)), labels, fontsize=8, parse_math=False)
        axes.set_title(_short(task), fontsize=10, color=INK, parse_math=False)
        axes.set_xlabel(ablation.units.get(task, "%"), fontsize=9, color=INK)
    _legend(figure, ["cell", "baseline"])
    return figure


def size(parameters: int) -> str:
    """`6.4 M`, `1.4 B`."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _unit(ablation: Ablation) -> str:
    units = {ablation.units.get(task, "%") for task in ablation.tasks}
    title = ablation.tasks[0] if len(ablation.tasks) == 1 else "score"
    return f"{title}, {' or '.join(sorted(units))}"


def _style(axes: Any, along: str = "y") -> None:
    axes.grid(axis=along, color=GRID_COLOR, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=8)


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS[k % len(COLORS)], alpha=0.82, label=name) for k, name in enumerate(names)]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(text: str, most: int = SHORT) -> str:
    lines = [line if len(line) <= most else line[: most - 1] + "…" for line in text.split("\n")]
    return "\n".join(lines)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise DependencyError("matplotlib is not installed", "pip install 'tinyllava-edge[report]'") from error
    return Canvas(figsize=(width, height), layout="constrained")

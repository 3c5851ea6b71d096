"""Two runs as one drawing: per build the ratio of the times, B over A, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.report_draw import PAPER, STAND_INS, dress, new_figure, short, svg_text
from tinyllava_edge.benchmarks.side_by_side import TIMED, Change, SideBySide
from tinyllava_edge.benchmarks.summary_types import WHOLE
from tinyllava_edge.files import new_file


def timed(found: SideBySide) -> list[tuple[Change, str]]:
    """What there is to draw: a line per build and whole time."""
    return [(change, stage) for change in found.changes for stage in WHOLE if stage in change.times]


def ratio_svg(found: SideBySide) -> str:
    """The drawing for the page; hovering a mark names its build. Raises DependencyError without matplotlib."""
    rows = timed(found)
    figure = _figure(found, STAND_INS)
    titles = [f"{change.label}, {TIMED[stage]}: {change.times[stage].verdict}" for change, stage in rows]
    return svg_text(figure, "ratio", titles, "times of B over A, build by build")


def write_png(found: SideBySide, target: Path) -> None:
    """The same on white, for a README."""
    with new_file(target) as temporary:
        _figure(found, PAPER).savefig(temporary, format="png", dpi=160, metadata={"Software": None})


def _figure(found: SideBySide, theme: Mapping[str, str]) -> Any:
    rows = timed(found)
    figure = new_figure(6.4, 0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    dress(axes, theme)
    axes.axvline(0, color=theme["soft"], lw=1)
    for k, (change, stage) in enumerate(rows):
        one = change.times[stage]
        middle, low, high = (100 * (ratio - 1) for ratio in (one.ratio.estimate, one.ratio.low, one.ratio.high))
        look = theme["soft"] if not one.distinguishable else theme["bad"] if middle > 0 else theme["good"]
        xerr = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axes.errorbar(middle, k, xerr=xerr, ecolor=look, elinewidth=1.4, capsize=3, fmt="none", zorder=3)
        fill = look if one.distinguishable else theme["page"]
        axes.plot(middle, k, "o" if stage == "ttft_ms" else "s", ms=6, mfc=fill, mec=look, zorder=4, gid=f"ratio-{k}")
    names = [f"{short(change.label)}, {TIMED[stage]}" for change, stage in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", colors=theme["ink"], length=0)
    axes.set_xlabel("change of the time from A to B, % (right: slower)", color=theme["ink"], size=9.5)
    return figure

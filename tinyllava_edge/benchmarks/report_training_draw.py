"""Curves of training as drawings for the page: the raw values faint, their means strong, one colour per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllava_edge.benchmarks.report_draw import STAND_INS, dress, new_figure, number, svg_text
from tinyllava_edge.benchmarks.report_plots import SERIES
from tinyllava_edge.train.curves import Training, smooth, thin

POINTS = 600  # of a drawn line
WINDOWS = 20  # smoothed values are means over this part of a run


@dataclass(frozen=True)
class Axis:
    """One drawing's axes."""

    name: str
    """part of ids in the SVG"""
    x: str
    """figure of the log on the horizontal axis"""
    y: str
    """figure on the vertical axis"""
    x_label: str
    """axis title"""
    y_label: str
    """axis title with unit"""
    smoothed: bool = True
    """whether means are drawn over the raw values"""
    log_x: bool = False
    """logarithmic steps"""


AXES = (
    Axis("loss", "step", "loss", "step", "loss, nats per answer token"),
    Axis("lr", "step", "lr", "step", "learning rate", smoothed=False),
    Axis("tokens", "seconds", "tokens_per_s", "time, s", "tokens/s"),
)
LOGARITHMIC = Axis("log", "step", "loss", "step, logarithmic", "loss, nats per answer token", log_x=True)


def colors(found: Sequence[Training]) -> dict[str, str]:
    """Run → colour of the page, in the order of the files; colours repeat after SERIES runs."""
    return {run: f"series{k % SERIES}" for k, run in enumerate(dict.fromkeys(one.run for one in found))}


def figures(found: Sequence[Training], key: Mapping[str, str], name: str) -> dict[str, Any]:
    """One stage: `drawings`; `more`, the loss over logarithmic steps; the smoothing `window`; the `key` to the colours.

    Raises DependencyError without matplotlib.
    """
    drawings = [_svg(found, key, axis, f"{name}-{axis.name}") for axis in AXES if _has(found, axis)]
    more = _svg(found, key, LOGARITHMIC, f"{name}-log") if _has(found, LOGARITHMIC) else ""
    steps = max((len(one.log) for one in found), default=0)
    own = {one.run: key[one.run] for one in found}
    return {"drawings": drawings, "more": more, "window": window(steps), "key": own if len(key) > 1 else {}}


def window(steps: int) -> int:
    """Steps that a smoothed value is the mean of: a twentieth of the run, an odd number."""
    return 2 * (steps // (2 * WINDOWS)) + 1


def _has(found: Sequence[Training], axis: Axis) -> bool:
    return any(len(one.series(axis.x, axis.y)[0]) > 1 for one in found)


def _svg(found: Sequence[Training], key: Mapping[str, str], axis: Axis, name: str) -> Any:
    from tinyllava_edge.benchmarks.report import inline

    figure = new_figure(4.2, 3.1)
    axes = figure.subplots()
    dress(axes, STAND_INS)
    titles: list[str] = []
    for one in found:
        x, y = one.series(axis.x, axis.y)
        if len(x) < 2:
            continue
        look = {"color": STAND_INS[key[one.run]], "solid_joinstyle": "round"}
        strong = smooth(y, window(len(y))) if axis.smoothed else y
        if axis.smoothed and strong != y:
            axes.plot(*thin(x, y, POINTS), lw=0.7, alpha=0.35, zorder=2, **look)
        axes.plot(*thin(x, strong, POINTS), lw=1.6, zorder=3, gid=f"{name}-{len(titles)}", **look)
        titles.append(f"{one.run}: {axis.y_label} {number(y[0])} at first, {number(strong[-1])} at last")
    _frame(axes, axis, found)
    return inline(svg_text(figure, name, titles, f"{axis.y_label} over {axis.x_label}"))


def _frame(axes: Any, axis: Axis, found: Sequence[Training]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(axis.x_label, color=STAND_INS["ink"], size=9.5)
    axes.set_ylabel(axis.y_label, color=STAND_INS["ink"], size=9.5)
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 10 else f"{value:g}")
    if axis.log_x:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis.x == "step"))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain)
    if axis.y != "loss":
        axes.set_ylim(bottom=0)

"""Everything drawn: table in Markdown, one PNG per comparison, one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.results import Sample
from ..files import write_text
from .compare import Ablation, Difference, summarise
from .plots import figures, svg, write_png
from .table import AXIS_NAMES, difference, markdown, p_value, score, seeds, verdict_rule

TABLE, PAGE = "ABLATION.md", "ablation.html"

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ablation: {{ a.cells | length }} cells</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-size: .85rem; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e3e7ec; white-space: nowrap; }
.better { color: #1a7f4b; font-weight: 600; } .worse { color: #a0154e; font-weight: 600; }
.baseline { background: #e6f2ec; } .note { color: #5f6b7a; font-size: .85rem; }
svg { width: 100%; height: auto; } figure { margin: 0; overflow-x: auto; } figure svg { min-width: 30rem; }
code { background: #f3f5f7; padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } .scroll { overflow: visible; } }
</style>
</head>
<body>
<h1>Ablation: {{ a.cells | length }} cells</h1>
<p><code>{{ a.facts.command }}</code></p>
<p class="note">Scores are means over seeds {{ a.seeds | join(", ") }}. Intervals (95 %) and tests are over pictures,
on the same questions; p is adjusted by Holm. {{ rule }} Open circles are seeds.</p>
<h2>What each axis does</h2>
<div class="scroll"><table>
<tr><th>axis</th><th>from</th><th>to</th><th>task</th><th>difference, points</th><th>by seed</th><th>p</th>
<th>cells</th><th>verdict</th></tr>
{% for e in a.effects %}<tr><td>{{ names[e.axis] }}</td><td>{{ e.before }}</td><td>{{ e.after }}</td>
<td>{{ e.task }}</td><td>{{ difference(e) }}</td><td>{{ seeds(e) }}</td><td>{{ p(e) }}</td><td>{{ e.pairs }}</td>
<td class="{{ e.verdict }}">{{ e.verdict }}</td></tr>
{% endfor %}</table></div>
{% for title, text in drawn %}<h2>{{ title }}</h2>
<figure role="img" aria-label="{{ title }}">{{ text | safe }}</figure>
{% endfor %}<h2>Cells</h2>
<div class="scroll"><table>
<tr><th>cell</th>{% for t in a.tasks %}<th>{{ t }}</th>
<th>against baseline</th><th>p</th><th>verdict</th>{% endfor %}</tr>
{% for c in a.cells %}<tr{% if c.name == a.baseline %} class="baseline"{% endif %}><td>{{ c.name }}</td>
{% for t in a.tasks %}<td>{{ score(c, t) }}</td>{% set e = versus.get((c.name, t)) %}
{% if e %}<td>{{ difference(e) }}</td><td>{{ p(e) }}</td><td class="{{ e.verdict }}">{{ e.verdict }}</td>
{% else %}<td>{{ "baseline" if c.name == a.baseline else "–" }}</td><td></td><td></td>{% endif %}{% endfor %}</tr>
{% endfor %}</table></div>
{% if a.failed %}<h2>Failed</h2>
<ul>{% for name, why in a.failed.items() %}<li>{{ name }}: {{ why }}</li>{% endfor %}</ul>{% endif %}
</body>
</html>
"""


def draw(samples: Sequence[Sample], out: Path) -> Ablation:
    """Write ABLATION.md, ablation.html and figures/*.png below `out` from the lines of a grid's results.jsonl.

    Raises:
        DataError: no finished cell.
        DependencyError: matplotlib, scipy or statsmodels is missing.
    """
    ablation = summarise(samples)
    images = draw_figures(ablation, out / "figures")
    write_text(out / TABLE, markdown(ablation, [(title, f"figures/{path.name}") for title, path in images]))
    write_text(out / PAGE, page(ablation))
    return ablation


def draw_figures(ablation: Ablation, folder: Path, prefix: str = "") -> list[tuple[str, Path]]:
    """One PNG per comparison, `{prefix}{axis}.png`; returns titles and paths."""
    found = []
    for figure in figures(ablation):
        path = folder / f"{prefix}{figure.name}.png"
        write_png(figure, path)
        found.append((figure.title, path))
    return found


def as_json(ablation: Ablation) -> dict[str, Any]:
    """Scores, differences and failures as JSON values."""
    return {
        "cells": {
            cell.name: {
                "axes": dict(cell.axes),
                "parameters": cell.parameters,
                "scores": {task: dict(by_seed) for task, by_seed in cell.scores.items()},
            }
            for cell in ablation.cells
        },
        "baseline": ablation.baseline,
        "against_baseline": [_values(item) for item in ablation.versus],
        "effects": [_values(item) for item in ablation.effects],
        "failed": dict(ablation.failed),
    }


def _values(item: Difference) -> dict[str, Any]:
    found = item.paired.difference
    return {
        "axis": item.axis,
        "before": item.before,
        "after": item.after,
        "task": item.task,
        "points": None if found is None else [found.estimate, found.low, found.high],
        "by_seed": list(item.by_seed),
        "p_holm": item.p_holm,
        "verdict": item.verdict,
    }


def page(ablation: Ablation) -> str:
    """The HTML page, with everything inside."""
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_TEMPLATE)
    return template.render(
        a=ablation,
        names=AXIS_NAMES,
        rule=verdict_rule(ablation),
        versus={(item.after, item.task): item for item in ablation.versus},
        drawn=[(figure.title, svg(figure)) for figure in figures(ablation)],
        difference=difference,
        seeds=seeds,
        p=p_value,
        score=score,
    )

"""The comparisons in Markdown: what each axis does, every cell beside the baseline, what failed, how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..benchmarks.report_tables import cell as as_cell
from .compare import ALPHA, Ablation, CellScore, Difference
from .grid import AXES
from .plots import size

AXIS_NAMES = {
    "tower": "vision encoder",
    "llm": "language model",
    "connector": "connector",
    "recipe": "recipe",
    "data": "data",
}


def markdown(ablation: Ablation, images: Sequence[tuple[str, str]] = ()) -> str:
    """The whole table as a Markdown page.

    Args:
        ablation: what was measured.
        images: title and address of each figure.
    """
    parts = [
        "# Ablation",
        "",
        *_introduction(ablation),
        "",
        "## What each axis does",
        "",
        *_effects(ablation),
        "",
        "## Cells",
        "",
        *_cells(ablation),
    ]
    for title, address in images:
        parts += ["", f"## {title}", "", f"![{title}]({address})"]
    if ablation.failed:
        parts += ["", "## Failed", "", *(f"- {as_cell(name)}: {as_cell(why)}" for name, why in ablation.failed.items())]
    return "\n".join([*parts, ""])


def _introduction(ablation: Ablation) -> list[str]:
    facts, machine = ablation.facts, ablation.machine
    questions = {task: _questions(ablation, task) for task in ablation.tasks}
    asked = ", ".join(f"{count:,} of {task}" for task, count in questions.items())
    processor = machine.get("cpu", {})
    name = processor.get("model", "unknown") if isinstance(processor, Mapping) else "unknown"
    scale = facts.get("scale", {})
    pictures = scale.get("pictures") if isinstance(scale, Mapping) else None
    return [
        f"`{facts.get('command', 'tinyllava-edge ablate')}`",
        "",
        f"{len(ablation.cells)} cells, seeds {', '.join(map(str, ablation.seeds))}; "
        + (f"{pictures:,} training pictures of each file; " if pictures else "")
        + f"questions: {asked}. Machine: {name}.",
        "",
        "Scores are means over seeds. Intervals (95 %) and tests are over pictures, on the same questions: exact "
        "McNemar for one seed and cell, else sign-flip permutations. p is adjusted by Holm over its table. "
        + verdict_rule(ablation),
    ]


def verdict_rule(ablation: Ablation) -> str:
    """What a verdict needs, and what it can't say where there is one seed."""
    if len(ablation.seeds) == 1:
        return (
            f"A verdict needs p < {ALPHA:g}. Every cell was trained once: whether another training would show the same "
            "difference, one seed can't say, so a verdict is about these trained models and not about the axis."
        )
    return f"A verdict needs p < {ALPHA:g} and the same sign with every seed."


def _questions(ablation: Ablation, task: str) -> int:
    for cell in ablation.cells:
        if task in cell.records:
            return len(next(iter(cell.records[task].values())))
    return 0


def _effects(ablation: Ablation) -> list[str]:
    if not ablation.effects:
        return ["No axis has two finished entries."]
    rows = [["axis", "from", "to", "task", "difference, points", "by seed", "p", "cells", "verdict"]]
    for item in ablation.effects:
        rows.append(
            [
                AXIS_NAMES[item.axis],
                item.before,
                item.after,
                item.task,
                difference(item),
                seeds(item),
                p_value(item),
                str(item.pairs),
                item.verdict,
            ]
        )
    return _rows(rows, "llllrrrrl")


def _cells(ablation: Ablation) -> list[str]:
    varied = [axis for axis in AXES if len(ablation.levels[axis]) > 1] or ["recipe"]
    versus = {(item.after, item.task): item for item in ablation.versus}
    head = [AXIS_NAMES[axis] for axis in varied] + ["parameters", "training, s"]
    for task in ablation.tasks:
        head += [f"{task}, {ablation.units.get(task, '%')}", "against baseline, points", "p", "verdict"]
    rows = [head]
    for cell in ablation.cells:
        row = [cell.axes[axis] for axis in varied] + [size(cell.parameters), f"{cell.seconds:.0f}"]
        for task in ablation.tasks:
            row.append(score(cell, task))
            item = versus.get((cell.name, task))
            if cell.name == ablation.baseline:
                row += ["baseline", "", ""]
            else:
                row += [difference(item), p_value(item), item.verdict] if item else ["–", "–", "–"]
        rows.append(row)
    note = []
    if ablation.baseline not in {cell.name for cell in ablation.cells}:
        note = ["", f"The baseline {ablation.baseline} is not finished, so nothing is compared with it."]
    return _rows(rows, "l" * len(varied) + "rr" + "rrrl" * len(ablation.tasks)) + note


def score(cell: CellScore, task: str) -> str:
    """`91.2 (89.0 to 93.1)`; without an interval where the score has none."""
    if task not in cell.scores:
        return "–"
    interval = cell.interval(task)
    bounds = "" if interval is None else f" ({interval.low:.1f} to {interval.high:.1f})"
    return f"{cell.score(task):.1f}{bounds}"


def difference(item: Difference) -> str:
    """`+1.4 (+0.2 to +2.6)`."""
    found = item.paired.difference
    return "–" if found is None else f"{found.estimate:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def seeds(item: Difference) -> str:
    """Each seed's difference."""
    return ", ".join(f"{value:+.1f}" for value in item.by_seed)


def p_value(item: Difference) -> str:
    """Adjusted p, `< 0.001` where smaller."""
    p = item.p_holm
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rows(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    rule = "|" + "|".join("---:" if letter == "r" else "---" for letter in align) + "|"
    clean = [[as_cell(text) for text in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in clean]
    return [lines[0], rule, *lines[1:]]

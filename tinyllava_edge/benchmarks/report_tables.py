"""Tables of the report: kinds of questions, the comparison with the reference, divergence, the budget, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks import report_speed as speed
from tinyllava_edge.benchmarks.compare import verdict
from tinyllava_edge.benchmarks.decision import COSTS
from tinyllava_edge.benchmarks.divergence_summary import CAUSES, DivergenceRow, summarise_divergence
from tinyllava_edge.benchmarks.evaluation import accuracy_by
from tinyllava_edge.benchmarks.paired import Paired, compare_pair
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.run_file import PICTURE
from tinyllava_edge.benchmarks.stats import LEVEL, Interval, holm
from tinyllava_edge.benchmarks.summary import Summary, answer_records, headline
from tinyllava_edge.benchmarks.summary_types import NOISY, WHOLE, BuildSummary, on_target
from tinyllava_edge.errors import DataError

CAUSE_NAMES = {
    "again": "reference again",
    "preprocess": "preprocessing",
    "runtime": "runtime",
    "vision": "vision",
    "llm": "language model",
    "both": "both",
}


def groups(summary: Summary) -> list[dict[str, Any]]:
    """Accuracy by question type and by tier: one table each, builds as rows, the blind baseline last."""
    tables = []
    rows = [row for row in summary.rows if not row.answered_on]
    several = len({row.target for row in rows}) > 1
    for title, key in (("question type", "question_type"), ("tier", "tier")):
        cells = [
            (row.label if several else row.name, row.by_type if key == "question_type" else row.by_tier) for row in rows
        ]
        names = list(dict.fromkeys(name for _, cell in cells for name in cell))
        if names:
            table = [{"label": label, "cells": [cell.get(name) for name in names]} for label, cell in cells if cell]
            blind = accuracy_by(summary.blind, key)
            tables.append({"title": title, "names": names, "rows": table, "blind": [blind.get(name) for name in names]})
    return tables


def comparison(samples: Sequence[Sample], summary: Summary) -> dict[str, Any]:
    """Every build against the reference on every task that both answered, with Holm's adjustment over all lines."""
    found: list[tuple[BuildSummary, Paired]] = []
    absent: list[str] = []
    before = {row.target: _tasks(samples, row) for row in summary.references}
    for row in summary.builds:
        base = before.get(row.target) or next((tasks for tasks in before.values() if tasks), {})
        for task, records in ({} if row.answered_on else _tasks(samples, row)).items():
            if task not in base:
                continue
            try:
                found.append((row, compare_pair(base[task], records, names=("reference", row.label))))
            except DataError as error:
                absent.append(f"{row.label}, {task or 'the file'}: {error.message}")
    adjusted = iter(holm([pair.p_value for _, pair in found if pair.p_value is not None]))
    rows = []
    for row, pair in found:
        done = pair if pair.p_value is None else replace(pair, p_holm=next(adjusted))
        rows.append({"row": row, "pair": replace(done, verdict=verdict(done, LEVEL))})
    return {"rows": rows, "absent": absent}


def divergence(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """KL split by cause, target by target: builds as rows, causes as columns.

    Raises:
        DataError: a divergence line that holds something else, or a question that occurs twice.
    """
    tables = []
    for target in dict.fromkeys(s.target for s in samples if s.kind == "divergence"):
        report = summarise_divergence([s for s in samples if s.target == target])
        cells: dict[str, dict[str, DivergenceRow]] = {}
        for row in report.rows:
            cells.setdefault(row.build, {})[row.cause] = row
        causes = [cause for cause in CAUSES if any(cause in row for row in cells.values())]
        rows = [{"build": build, "cells": [row.get(cause) for cause in causes]} for build, row in cells.items()]
        absent = {CAUSE_NAMES.get(cause, cause): why for cause, why in report.absent.items()}
        names = [CAUSE_NAMES[cause] for cause in causes]
        largest = max((row.mean for row in report.rows), default=0.0)
        tables.append({"target": target, "names": names, "rows": rows, "absent": absent, "largest": largest})
    return tables


def budget_table(summary: Summary, target: str) -> dict[str, Any]:
    """Every build's figures beside the budget's limits; nothing without a budget."""
    limits = summary.decision.budget
    rows = []
    for row in on_target(summary.builds, target) if limits else []:
        cells = []
        for name, limit in limits.items():
            _, figure, show = COSTS[name]
            found = figure(row)
            cells.append(
                {
                    "text": show(found.estimate) if found else formats.NONE,
                    "high": show(found.high) if found and found.high > found.estimate else "",
                    "met": found is not None and found.estimate <= limit,
                }
            )
        rows.append({"row": row, "cells": cells})
    heads = [{"name": COSTS[name][0], "limit": COSTS[name][2](limit)} for name, limit in limits.items()]
    return {"heads": heads, "rows": rows}


def markdown_table(summary: Summary) -> str:
    """The table of builds in GitHub's Markdown; columns that nobody measured are left out.

    Raises DependencyError without scipy, where two builds were timed.
    """
    rows, speeds = summary.rows, speed.speeds(summary)
    compared = bool(speed.how(speeds))
    columns: list[tuple[str, list[str]]] = [
        ("build", [f"**{cell(row.label)}**" if summary.ships(row) else cell(row.label) for row in rows]),
        ("verified", [{True: "yes", False: "no", None: "–"}[row.verified] for row in rows]),
        ("accuracy", [_accuracy(row) for row in rows]),
        ("change, points", [_change(row) for row in rows]),
        ("flips", [_flips(row) for row in rows]),
        ("TTFT, ms", [_time(row.ttft) + _star(row, "ttft_ms") if row.ttft else "–" for row in rows]),
        ("TTFT, ratio", [speeds[row.key].cell() if compared and row.key in speeds else "" for row in rows]),
        ("total, ms", [_time(row.total) + _star(row, "total_ms") if row.total else "" for row in rows]),
        ("decode, tokens/s", [formats.number(row.stages.get("decode_tokens_per_s")) for row in rows]),
        ("size, MB", [formats.mega(row.bytes) for row in rows]),
        ("peak, MB", [formats.mega(row.memory.get("peak_rss")) for row in rows]),
        ("energy, J", [f"{row.energy.estimate:.3g}" if row.energy else "" for row in rows]),
    ]
    kept = [(head, [text or "–" for text in cells]) for head, cells in columns if any(cells) or not rows]
    lines = ["| " + " | ".join(head for head, _ in kept) + " |", "|---" * len(kept) + "|"]
    lines += ["| " + " | ".join(cells[k] for _, cells in kept) + " |" for k in range(len(rows))]
    return "\n".join(lines) + "\n"


def legend(summary: Summary) -> list[str]:
    """Sentences that the Markdown table needs: what its brackets, ratios and stars mean, and on how much they rest."""
    timed = [row for row in summary.rows if row.ttft]
    words = [
        "Brackets: 95 % intervals, Wilson's for accuracy, drawn over pictures for its change, and for times as if each "
        "answer were independent of the one before."
    ]
    if timed:
        counts = sorted({row.samples for row in timed})
        many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        words = [f"Times are medians of {many} answers per build, {in_turns(summary)}, batch 1.", *words]
    if how := speed.how(speed.speeds(summary)):
        words.append(f"Ratio: {cell(how)}.")
    if any(row.scatters(stage) for row in timed for stage in WHOLE):
        words.append(f"\\*: coefficient of variation over {100 * NOISY:.0f} %: measure again on a quiet machine.")
    return words


def in_turns(summary: Summary) -> str:
    """Under which conditions builds were timed."""
    runs = max((row.runs for row in summary.builds), default=1)
    return "builds in turns within one run" if runs == 1 else f"builds in turns, up to {runs} runs pooled"


def cell(text: str) -> str:
    """Text that stays one cell of a Markdown table, and stays text."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("[", "\\[").replace("]", "\\]")


def _flips(row: BuildSummary) -> str:
    return f"{len(row.flips.correct_to_wrong)} worse, {len(row.flips.wrong_to_correct)} better" if row.flips else "–"


def _accuracy(row: BuildSummary) -> str:
    found = row.accuracy
    return f"{formats.percent(found)} ({100 * found.low:.1f} to {100 * found.high:.1f})" if found else formats.NONE


def _change(row: BuildSummary) -> str:
    if row.flips is None:
        return "–"
    gap = row.flips.difference
    return f"{formats.points(gap.estimate)} ({formats.points(gap.low)} to {formats.points(gap.high)})"


def _time(value: Interval) -> str:
    return f"{formats.ms(value.estimate)} ({formats.ms(value.low)} to {formats.ms(value.high)})"


def _star(row: BuildSummary, stage: str) -> str:
    return "\\*" if row.scatters(stage) else ""


def _tasks(samples: Sequence[Sample], row: BuildSummary) -> dict[str, list[AnswerRecord]]:
    """Answers of one row by task; those with a tier are left out where others are there."""
    table: dict[str, list[AnswerRecord]] = {}
    for record in answer_records(samples, row.runtime, row.build, PICTURE, row.target):
        table.setdefault(record.task, []).append(record)
    return {task: headline(records) for task, records in table.items()}

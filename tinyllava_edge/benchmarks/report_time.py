"""Where the time goes: a waterfall of stages per build, llama-bench's tests, loading, shares of the roofline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary_types import BuildSummary

# stage → its name and its colour's class in report.css; in the order of an answer
STAGE_NAMES: Mapping[str, tuple[str, str]] = {
    "decode_image_ms": ("decode image", "s0"),
    "preprocess_ms": ("preprocess", "s1"),
    "vision_ms": ("vision", "s2"),
    "image_prefill_ms": ("image prefill", "s3"),
    "text_prefill_ms": ("text prefill", "s5"),
    "prefill_ms": ("prefill", "s3"),
    "first_token_ms": ("sample", "s4"),
    "decode_ms": ("decode", "s6"),
}
SPLIT = ("image_prefill_ms", "text_prefill_ms")  # what `prefill_ms` consists of, where it was told apart
NOTABLE = 0.05  # share of an answer below which a stage's scatter is not flagged
LOADING = ("load_cold_ms", "load_warm_ms", "load_ms", "cold_ttft_ms")
MEMORY = ("peak_rss", "after_load", "anon", "file", "gpu")
_TEST = re.compile(r"(?:pp|tg)\d{1,9}(?:@.*)?|(?:ttft_ms|total_ms|decode_tokens_per_s)@.*")


def waterfall(rows: Sequence[BuildSummary], shares: Mapping[tuple[Any, ...], float]) -> list[dict[str, Any]]:
    """Per timed build its stages, each with start and width in percent of the longest build's sum of medians.

    Args:
        rows: builds.
        shares: (target, build, stage) → percent of the roofline, see `roofline_shares`.

    Targets have scales of their own: a board beside a server would leave nothing of the server's bars.
    """
    timed = [row for row in rows if row.ttft]
    stages = {row.key: _stages(row) for row in timed}
    longest: dict[str, float] = {}
    for row in timed:
        longest[row.target] = max(longest.get(row.target, 0.0), sum(stages[row.key].values()))
    table = []
    for row in timed:
        start, bars, whole = 0.0, [], sum(stages[row.key].values())
        scale = 100 / (longest[row.target] or 1.0)
        for stage, value in stages[row.key].items():
            name, color = STAGE_NAMES[stage]
            bars.append(
                {
                    "stage": stage,
                    "name": name,
                    "color": color,
                    "ms": value,
                    "left": scale * start,
                    "width": scale * value,
                    "noisy": row.scatters(stage) and value >= NOTABLE * whole,
                    "share": shares.get((row.target, row.build, stage)),
                }
            )
            start += value
        table.append({"row": row, "bars": bars})
    return table


def stages_shown(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names and colours of the stages that a waterfall draws, in order."""
    used = {bar["stage"] for row in table for bar in row["bars"]}
    return [look for stage, look in STAGE_NAMES.items() if stage in used]


def tests(rows: Sequence[BuildSummary]) -> dict[str, Any]:
    """What else was timed: `pp512`, `tg128`, and whole answers with other pictures or threads. Builds as rows."""
    names = [n for n in dict.fromkeys(stage for row in rows for stage in row.stages) if _TEST.fullmatch(n)]
    table = [
        {"row": row, "cells": [{"value": row.stages.get(name), "noisy": row.scatters(name)} for name in names]}
        for row in rows
        if any(name in row.stages for name in names)
    ]
    heads = [name.replace("ttft_ms", "first token, ms ").replace("total_ms", "last token, ms ") for name in names]
    return {"names": [head.replace("decode_tokens_per_s", "tokens/s ") for head in heads], "rows": table}


def loading(rows: Sequence[BuildSummary]) -> dict[str, Any]:
    """Memory by kind in bytes and loading in ms: builds as rows, measured columns only."""
    memory = [name for name in MEMORY if any(name in row.memory for row in rows)]
    times = [name for name in LOADING if any(name in row.stages for row in rows)]
    found = [row for row in rows if any(name in row.memory for name in memory) or any(n in row.stages for n in times)]
    return {"memory": memory, "times": times, "rows": found}


def roofline_shares(samples: Sequence[Sample]) -> dict[tuple[Any, ...], float]:
    """(target, build, stage) → share of the roofline in percent; empty where no ceilings or work were recorded."""
    from tinyllava_edge.benchmarks import roofline

    found: dict[tuple[Any, ...], float] = {}
    for row in roofline.shares(samples):
        if row.share_percent is not None:
            stage = "decode_ms" if row.stage == "decode_tokens_per_s" else row.stage  # the same steps, as a rate
            found.setdefault((row.target, row.build, stage), row.share_percent)
    return found


def roofline_notes(samples: Sequence[Sample]) -> list[str]:
    """Why some stages have no share of the roofline: each reason once, with the stages that it holds for."""
    from tinyllava_edge.benchmarks import roofline

    found: dict[str, list[str]] = {}
    for row in roofline.shares(samples):
        name = STAGE_NAMES.get(row.stage.partition("@")[0], (row.stage, ""))[0]
        if row.share_percent is None and row.note and name not in found.setdefault(row.note, []):
            found[row.note].append(name)
    return [f"{', '.join(names)}: {note}" for note, names in found.items()]


def _stages(row: BuildSummary) -> dict[str, float]:
    """Stage → median in ms; prefill in its two parts where both were measured."""
    split = all(row.stages.get(name, 0.0) > 0 for name in SPLIT)
    left_out = ("prefill_ms",) if split else SPLIT
    return {name: row.stages[name] for name in STAGE_NAMES if name in row.stages and name not in left_out}

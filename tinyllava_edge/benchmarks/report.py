"""results.jsonl → one report.html that needs no network and no script: the decision first, then what carries it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava_edge import __version__
from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks import report_plots
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.summary import (
    ALLOWED_LOSS,
    STAGES,
    BuildSummary,
    Summary,
    answer_records,
    headline,
    summarise,
)
from tinyllava_edge.benchmarks.tasks import PICTURE, accuracy, accuracy_by
from tinyllava_edge.errors import DataError, ImageError
from tinyllava_edge.files import write_text
from tinyllava_edge.image import load_image

MAX_FLIPS = 24  # per build and direction; the counts above the gallery are complete
THUMBNAIL = 160  # longest side of an embedded picture, in pixels
STAGE_NAMES = {
    "decode_image_ms": "decode image",
    "preprocess_ms": "preprocess",
    "vision_ms": "vision",
    "prefill_ms": "prefill",
    "first_token_ms": "sample",
}
RUNTIME_FACTS = {
    "n_threads": "threads",
    "n_ctx": "context",
    "kv_cache": "key-value cache",
    "providers": "providers",
    "precision": "precision",
    "torch": "torch",
    "transformers": "transformers",
}
FILTERS = {name: getattr(formats, name) for name in formats.__all__}


@dataclass(frozen=True)
class Flip:
    """One answer that changed."""

    question: str
    """what was asked"""
    expected: str
    """annotated answer"""
    before: str
    """the reference's answer"""
    after: str
    """the build's answer"""
    picture: str
    """data URI, or empty when the picture is not at hand"""
    worse: bool
    """right before, wrong now"""


def render_report(
    samples: Sequence[Sample],
    out: Path,
    *,
    images: Path | None = None,
    markdown: Path | None = None,
    png: Path | None = None,
) -> Summary:
    """Write the report and, on request, its table as Markdown and its plots as PNG.

    Args:
        samples: what `results.read_results` read.
        out: report.html.
        images: where the evaluated pictures lie; without it the flips are shown without pictures.
        markdown: table for a README.
        png: Pareto plots for a README.

    Raises:
        DataError: runs are not comparable.
        DependencyError: matplotlib is not installed.
    """
    summary = summarise(samples)
    write_text(out, html(samples, summary, images))
    if markdown:
        write_text(markdown, markdown_table(summary))
    if png and (found := report_plots.plots(summary)):
        report_plots.write_png(found, png)
    return summary


def html(samples: Sequence[Sample], summary: Summary, images: Path | None = None) -> str:
    """The whole page. Every string from the results is escaped by the template engine."""
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinyllava_edge", "benchmarks"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= FILTERS
    chosen = next((b for b in summary.builds if b.build == summary.decision.build), None)
    found = report_plots.plots(summary)
    try:
        return environment.get_template("report.html").render(
            version=__version__,
            css=markupsafe.Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),
            summary=summary,
            chosen=chosen,
            allowed_loss=f"{ALLOWED_LOSS:g}",
            largest=max((build.bytes or 0 for build in summary.builds), default=0),
            rows=([summary.reference] if summary.reference else []) + list(summary.builds),
            plots=[(plot.name, markupsafe.Markup(report_plots.svg(plot))) for plot in found],
            key=report_plots.Key.of(found[0]) if found else None,
            waterfall=waterfall(summary.builds),
            stage_names=STAGE_NAMES,
            groups=groups(summary),
            blind=accuracy(headline(summary.blind)) if summary.blind else None,
            gallery=gallery(samples, summary, images),
            max_flips=MAX_FLIPS,
            parity=[{"name": build.build, "record": build.verify} for build in summary.builds if build.verify],
            bundles=list({s.detail.get("sha256"): s.detail for s in samples if s.kind == "bundle"}.values()),
            machines=machines(samples),
            scores=[sample for sample in samples if sample.kind == "accuracy"],
            commands=[str(sample.detail.get("command", "")) for sample in samples if sample.kind == "command"],
            lines=len(samples),
        )
    except jinja2.UndefinedError as error:
        raise DataError(f"a result line lacks something: {error}", "measure again with this version") from error


def waterfall(builds: Sequence[BuildSummary]) -> list[dict[str, Any]]:
    """Per timed build its stages, each with start and width in percent of the longest build's sum of medians."""
    timed = [build for build in builds if build.ttft]
    longest = max((sum(b.stages.get(stage, 0.0) for stage in STAGES) for b in timed), default=0.0) or 1.0
    table = []
    for build in timed:
        start, bars = 0.0, []
        for stage in STAGES:
            value = build.stages.get(stage, 0.0)
            bars.append({"stage": stage, "ms": value, "left": 100 * start / longest, "width": 100 * value / longest})
            start += value
        table.append({"build": build, "bars": bars})
    return table


def groups(summary: Summary) -> list[dict[str, Any]]:
    """Accuracy by question type and by tier: one table each, builds as rows, the blind baseline last."""
    tables = []
    rows = ([summary.reference] if summary.reference else []) + list(summary.builds)
    for title, key in (("question type", "question_type"), ("tier", "tier")):
        cells = [(row.label, row.by_type if key == "question_type" else row.by_tier) for row in rows]
        names = list(dict.fromkeys(name for _, cell in cells for name in cell))
        if names:
            table = [{"label": label, "cells": [cell.get(name) for name in names]} for label, cell in cells if cell]
            blind = accuracy_by(summary.blind, key)
            tables.append({"title": title, "names": names, "rows": table, "blind": [blind.get(name) for name in names]})
    return tables


def gallery(samples: Sequence[Sample], summary: Summary, images: Path | None) -> list[dict[str, Any]]:
    """Per build the answers that turned wrong, then those that turned right, at most MAX_FLIPS of each."""
    if summary.reference is None:
        return []
    before = {r.id: r for r in answer_records(samples, "reference", summary.reference.build, PICTURE)}
    thumbnails: dict[str, str] = {}
    found = []
    for build in summary.builds:
        if build.flips is None:
            continue
        after = {r.id: r for r in answer_records(samples, "edge", build.build, PICTURE)}
        both = [build.flips, *([build.tier_flips] if build.tier_flips else [])]
        shown = [(name, True) for part in both for name in part.correct_to_wrong[:MAX_FLIPS]]
        shown += [(name, False) for part in both for name in part.wrong_to_correct[:MAX_FLIPS]]
        flips = [_flip(before[name], after[name], worse, images, thumbnails) for name, worse in shown]
        found.append({"build": build, "flips": flips})
    return found


def markdown_table(summary: Summary) -> str:
    """The table of builds in GitHub's Markdown."""
    head = [
        "build",
        "verified",
        "accuracy",
        "change, points",
        "flips",
        "TTFT, ms",
        "decode, tokens/s",
        "size, MB",
        "peak, MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in ([summary.reference] if summary.reference else []) + list(summary.builds):
        flips = row.flips
        cells = [
            f"**{row.label}**" if row.build == summary.decision.build else row.label,
            {True: "yes", False: "no", None: "–"}[row.verified],
            formats.percent(row.accuracy),
            formats.points(flips.difference.estimate) if flips else "–",
            f"{len(flips.correct_to_wrong)} worse, {len(flips.wrong_to_correct)} better" if flips else "–",
            formats.ms(row.ttft.estimate) if row.ttft else "–",
            formats.number(row.stages.get("decode_tokens_per_s")),
            formats.mega(row.bytes),
            formats.mega(row.memory.get("peak_rss")),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def thumbnail(images: Path | None, name: str) -> str:
    """A picture as a PNG data URI, decoded and written anew; empty when it is not below `images` or not readable."""
    if images is None:
        return ""
    path = (images / name).resolve()
    if not path.is_relative_to(images.resolve()):
        return ""
    from PIL import Image

    try:
        picture = Image.fromarray(load_image(path))
    except ImageError:
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def machines(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The machines that were measured on, each once, with what every runtime said of itself."""
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample.kind != "environment":
            continue
        detail = dict(sample.detail)
        key = json.dumps([detail.get(name) for name in ("cpu", "memory_bytes", "limits", "system", "libraries")])
        machine = found.setdefault(key, {**detail, "runtimes": {}, "ceilings": None})
        machine["ceilings"] = machine["ceilings"] or detail.get("ceilings")
        runtime = detail.get("runtime") or {}
        facts = [f"{name} {_flat(runtime[key])}" for key, name in RUNTIME_FACTS.items() if key in runtime]
        if facts:
            machine["runtimes"][f"{runtime.get('runtime', 'runtime')} runtime"] = "; ".join(facts)
        if "llama_cpp_system_info" in runtime:
            machine["runtimes"]["llama.cpp"] = str(runtime["llama_cpp_system_info"])
    return list(found.values())


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flip(before: AnswerRecord, after: AnswerRecord, worse: bool, images: Path | None, cache: dict[str, str]) -> Flip:
    if before.image not in cache:
        cache[before.image] = thumbnail(images, before.image)
    return Flip(before.question, before.expected, before.given, after.given, cache[before.image], worse)

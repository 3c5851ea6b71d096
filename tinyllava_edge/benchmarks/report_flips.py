"""Answers that changed between the reference and a build, with their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.run_file import PICTURE
from tinyllava_edge.benchmarks.summary import Summary, answer_records
from tinyllava_edge.errors import ImageError
from tinyllava_edge.image import load_image

MAX_FLIPS = 24  # per build and direction; the counts above the gallery are complete
THUMBNAIL = 160  # longest side of an embedded picture, in pixels


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


def gallery(samples: Sequence[Sample], summary: Summary, images: Path | None) -> list[dict[str, Any]]:
    """Per build the answers that turned wrong, then those that turned right, at most MAX_FLIPS of each."""
    thumbnails: dict[str, str] = {}
    found = []
    for row in summary.builds:
        if row.flips is None or row.answered_on:  # answers given on another target are shown there
            continue
        task = _task(samples)
        after = {
            r.id: r for r in answer_records(samples, row.runtime, row.build, PICTURE, row.target) if r.task == task
        }
        before = {r.id: r for r in _reference(samples, summary, row.target) if r.task == task}
        both = [row.flips, *([row.tier_flips] if row.tier_flips else [])]
        shown = [(name, True) for part in both for name in part.correct_to_wrong[:MAX_FLIPS]]
        shown += [(name, False) for part in both for name in part.wrong_to_correct[:MAX_FLIPS]]
        flips = [_flip(before[name], after[name], worse, images, thumbnails) for name, worse in shown]
        found.append({"build": row, "flips": flips})
    return found


def thumbnail(images: Path | None, name: str) -> str:
    """A picture as a PNG data URI, decoded and written anew; empty when it is not below `images` or not readable."""
    if images is None or not name or "\0" in name:
        return ""
    path = (images / name).resolve()
    if not path.is_relative_to(images.resolve()):
        return ""
    from PIL import Image

    try:
        picture = Image.fromarray(load_image(path))
    except (ImageError, OSError):
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _task(samples: Sequence[Sample]) -> str:
    """The task that the summary counts: the first one."""
    return next((str(s.detail.get("task", "")) for s in samples if s.kind == "answer"), "")


def _reference(samples: Sequence[Sample], summary: Summary, target: str) -> list[AnswerRecord]:
    """The answers that the build's flips were counted against: the same target's, else the first one's."""
    for row in sorted(summary.references, key=lambda row: row.target != target):
        if records := answer_records(samples, row.runtime, row.build, PICTURE, row.target):
            return records
    return []


def _flip(before: AnswerRecord, after: AnswerRecord, worse: bool, images: Path | None, cache: dict[str, str]) -> Flip:
    if before.image not in cache:
        cache[before.image] = thumbnail(images, before.image)
    return Flip(before.question, before.expected, before.given, after.given, cache[before.image], worse)

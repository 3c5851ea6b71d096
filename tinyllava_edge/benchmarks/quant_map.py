"""Quantisation map: which share of each build's tensors is kept in which type, from the bundle's own record.

The record is read back from the written files (`tensor_types`): types and counts, not bytes and not names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllava_edge.benchmarks.results import Sample

SHADES = (2, 3, 4, 5, 6, 8, 16, 32)  # bits that have a shade of their own; see .b2 … .b32 of report.css
_PLAIN = {"float": 32, "double": 64, "bool": 0}
_BITS = re.compile(r"(?:u?int|iq|tq|q|b?f|bfloat|float|mxfp|nvfp)(\d+)(?:_\w+)?", re.ASCII)


@dataclass(frozen=True)
class Segment:
    """Tensors of one type in one file."""

    type: str
    """as the file names it"""
    count: int
    """tensors"""
    bits: int
    """per weight, blocks' scales left out; 0 for what holds no weights (shapes, flags)"""
    left: float
    """start of its bar in percent"""
    width: float
    """of its bar in percent"""

    @property
    def shade(self) -> str:
        """CSS class of its colour: darker means fewer bits."""
        return f"b{min(SHADES, key=lambda bits: abs(bits - self.bits))}" if self.bits else "b0"


@dataclass(frozen=True)
class Part:
    """One file of a build."""

    role: str
    """`vision` or `llm`"""
    path: str
    """in the bundle"""
    bytes: int
    """its size"""
    segments: tuple[Segment, ...]
    """by falling bits"""


@dataclass(frozen=True)
class MapRow:
    """One build."""

    build: str
    """`{vision}+{llm}`"""
    parts: tuple[Part, ...]
    """its vision graph and its language model"""


def quantisation_map(samples: Iterable[Sample], builds: Sequence[str]) -> list[MapRow]:
    """One row per build whose files a bundle line describes; the last line counts. Nothing for older results."""
    files: dict[tuple[str, str], Mapping[str, Any]] = {}
    for sample in samples:
        entries = sample.detail.get("files") if sample.kind == "bundle" else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("tensor_types"), dict):
                files[str(entry.get("role")), str(entry.get("precision"))] = entry
    rows = []
    for build in dict.fromkeys(builds):
        vision, _, llm = build.partition("+")
        found = [_part(role, files.get((role, name))) for role, name in (("vision", vision), ("llm", llm))]
        if parts := tuple(part for part in found if part is not None):
            rows.append(MapRow(build, parts))
    return rows


def bits(name: str) -> int:
    """Bits of a weight of this type, 0 for an unknown one; 64-bit whole numbers are shapes, not weights."""
    name = name.lower()
    if name in _PLAIN:
        return _PLAIN[name]
    match = _BITS.fullmatch(name)
    found = int(match[1]) if match and len(match[1]) < 4 else 0
    return 0 if "int" in name and found > 16 else found


def _part(role: str, entry: Mapping[str, Any] | None) -> Part | None:
    if entry is None:
        return None
    counts = {str(k): v for k, v in entry["tensor_types"].items() if type(v) is int and 0 < v < 1e9}
    whole = sum(counts.values())
    if not whole:
        return None
    start, segments = 0.0, []
    for name, count in sorted(counts.items(), key=lambda item: (-bits(item[0]), item[0])):
        width = 100 * count / whole
        segments.append(Segment(name, count, bits(name), start, width))
        start += width
    size = entry.get("bytes")
    return Part(role, str(entry.get("path", "")), size if type(size) is int else 0, tuple(segments))

"""Quantisation map: in which type each tensor of each build is kept, as read back from the written files.

Lines of older results hold counts per type only (`tensor_types`); then there is a bar and no grid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllava_edge.benchmarks.results import Sample

SHADES = (2, 3, 4, 5, 6, 8, 16, 32)  # bits that have a shade of their own; see .b2 … .b32 of report.css
_PLAIN = {"float": 32, "double": 64, "bool": 0}
_BITS = re.compile(r"(?:u?int|iq|tq|q|w|b?f|bfloat|float|mxfp|nvfp)(\d+)(?:_\w+)?", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)(\d{1,3})\.", re.ASCII)
_MAX_TENSORS, _MAX_NAME = 20_000, 200  # results may come from another machine


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
        return _shade(self.bits)


@dataclass(frozen=True)
class Cell:
    """One tensor."""

    type: str
    """as the file names it"""

    @property
    def bits(self) -> int:
        """per weight"""
        return bits(self.type)

    @property
    def shade(self) -> str:
        """CSS class of its colour."""
        return _shade(self.bits)


@dataclass(frozen=True)
class Grid:
    """Every tensor of one file: those of layers by kind and layer, the others by name."""

    role: str
    """`vision` or `llm`"""
    path: str
    """in the bundle"""
    layers: tuple[int, ...]
    """the columns"""
    kinds: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    """name without its layer, and a cell for each layer; None where a layer has none of the kind"""
    others: tuple[tuple[str, Cell], ...]
    """name and cell of what belongs to no layer: embeddings, head, connector"""


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
    files = _files(samples)
    rows = []
    for build in dict.fromkeys(builds):
        vision, _, llm = build.partition("+")
        found = [_part(role, files.get((role, name))) for role, name in (("vision", vision), ("llm", llm))]
        if parts := tuple(part for part in found if part is not None):
            rows.append(MapRow(build, parts))
    return rows


def tensor_grids(samples: Iterable[Sample], builds: Sequence[str]) -> list[Grid]:
    """One grid per file that these builds use, vision first. Nothing for results without tensors' names."""
    files = _files(samples)
    wanted = [("vision", build.partition("+")[0]) for build in builds]
    wanted += [("llm", build.partition("+")[2]) for build in builds]
    grids = []
    for role, precision in dict.fromkeys(wanted):
        entry = files.get((role, precision), {})
        grid = _grid(role, str(entry.get("path", ""))[:_MAX_NAME], _table(entry))
        if grid.kinds or grid.others:
            grids.append(grid)
    return grids


def bits(name: str) -> int:
    """Bits of a weight of this type, 0 for an unknown one; 64-bit whole numbers are shapes, not weights."""
    name = name.lower()
    if name in _PLAIN:
        return _PLAIN[name]
    match = _BITS.fullmatch(name)
    found = int(match[1]) if match and len(match[1]) < 4 else 0
    return 0 if "int" in name and found > 16 else found


def _shade(width: int) -> str:
    return f"b{min(SHADES, key=lambda known: abs(known - width))}" if width else "b0"


def _files(samples: Iterable[Sample]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(role, precision) → what the last bundle line says of that file."""
    files: dict[tuple[str, str], Mapping[str, Any]] = {}
    for sample in samples:
        entries = sample.detail.get("files") if sample.kind == "bundle" else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("tensor_types"), dict):
                files[str(entry.get("role")), str(entry.get("precision"))] = entry
    return files


def _table(entry: Mapping[str, Any]) -> dict[str, str]:
    """Tensor → type; empty where the line has no names, or more than a model has."""
    tensors = entry.get("tensors")
    listed = [
        (name, kind)
        for kind, names in (tensors.items() if isinstance(tensors, dict) else ())
        for name in (names if isinstance(names, list) else ())
        if isinstance(name, str) and 0 < len(name) <= _MAX_NAME and len(kind) <= _MAX_NAME
    ]
    return dict(listed) if len(listed) <= _MAX_TENSORS else {}


def _grid(role: str, path: str, table: Mapping[str, str]) -> Grid:
    kinds: dict[str, dict[int, Cell]] = {}
    others = []
    for name, kind in table.items():
        if match := _LAYER.search(name):
            rest = name[: match.start()] + "." + name[match.end() :] if match.start() else name[match.end() :]
            kinds.setdefault(rest.removeprefix("blk.").removeprefix("layers."), {})[int(match[1])] = Cell(kind)
        else:
            others.append((name, Cell(kind)))
    layers = tuple(sorted({layer for cells in kinds.values() for layer in cells}))
    if len(kinds) * len(layers) > 4 * _MAX_TENSORS:  # no model's: a name of its own for every tensor
        return Grid(role, path, (), (), ())
    rows = [(name, tuple(kinds[name].get(layer) for layer in layers)) for name in sorted(kinds)]
    return Grid(role, path, layers, tuple(rows), tuple(sorted(others)))


def _part(role: str, entry: Mapping[str, Any] | None) -> Part | None:
    if entry is None:
        return None
    counts = {str(k): v for k, v in entry["tensor_types"].items() if type(v) is int and 0 < v < 1e9}
    if table := _table(entry):  # without the scales that belong to a quantised tensor
        counts = dict(Counter(table.values()))
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

"""The table that `bench` prints, in llama-bench's five forms: md, csv, json, jsonl, sql.

One row per build and test. Column names are llama-bench's where they mean the same; `test` is `pp512`, `tg128`, or a
stage of an answer as in results.jsonl. Raw samples stay in results.jsonl; json and jsonl carry them, too.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tinyllava_edge.benchmarks import stats
from tinyllava_edge.benchmarks.results import Sample

NOISY = 0.10  # coefficient of variation above which a row is flagged
TABLE = "tinyllava_bench"
KINDS = ("latency", "energy", "memory", "size")
_HIDDEN = ("preprocess", "vision", "llm")  # sizes by role: in the report, not in the table
_CONTROL = {code: None for code in range(32)}


@dataclass(frozen=True)
class Row:
    """One test of one build."""

    test_time: str
    """when the run began, UTC"""
    build_commit: str
    """commit of this program's source; empty where it is installed from a wheel"""
    cpu_info: str
    """processor"""
    model_name: str
    """bundle's name"""
    build: str
    """build name"""
    model_size: int | None
    """bytes of the build's files"""
    target: str
    """where it ran"""
    n_threads: int | None
    """CPU threads"""
    image_size: str
    """picture of an answer, `640x480`; empty for the decoder's tests"""
    n_prompt: int | None
    """prompt positions, image embeddings included; None where there was no prompt"""
    n_gen: int | None
    """most tokens that were decoded; None where none were"""
    test: str
    """`pp512`, `tg128`, or a stage"""
    unit: str
    """unit of all numbers that follow"""
    n: int
    """samples"""
    median: float | None
    """median; None where nothing could be read"""
    low: float | None
    """lower bound of its 95 % bootstrap interval"""
    high: float | None
    """upper bound"""
    p90: float | None
    """90th percentile"""
    mad: float | None
    """median absolute deviation"""
    avg: float | None
    """mean, for comparison with llama-bench's"""
    stddev: float | None
    """standard deviation of one sample"""
    cv: float | None
    """standard deviation over mean"""
    noisy: bool
    """whether cv is over 10 %"""
    reason: str
    """why there is no number"""
    samples: tuple[float, ...] = ()
    """raw values, in order; not in md, csv and sql"""


COLUMNS = tuple(field.name for field in fields(Row) if field.name != "samples")


def rows(samples: Sequence[Sample]) -> list[Row]:
    """Raw lines of one run → rows, tests in the order of measuring, builds side by side within each."""
    machine = {s.environment_id: s.detail for s in samples if s.kind == "environment"}
    bundle = next((s.detail for s in samples if s.kind == "bundle"), {})
    totals = {(s.target, s.build): s.value for s in samples if s.kind == "size" and s.stage == "total"}
    groups: dict[tuple[str, str, str, str], list[Sample]] = {}
    for s in samples:
        if s.kind in KINDS and not (s.kind == "size" and s.stage in _HIDDEN):
            groups.setdefault((s.kind, s.stage, s.target, s.build), []).append(s)
    tests = {key[:2]: place for place, key in reversed(list(enumerate(groups)))}
    ordered = sorted(groups, key=lambda key: tests[key[:2]])
    return [_row(groups[key], machine, bundle, totals.get(key[2:])) for key in ordered]


def markdown(table: Sequence[Row]) -> str:
    """A table for people; `!` marks rows that scatter by more than a tenth."""
    told = ("target", "n_threads", "image_size")
    several = [name for name in told if len({getattr(row, name) for row in table} - {"", None}) > 1]
    head = ["test", "build", *several, "median", "95 % interval", "p90", "MAD", "CV", "n"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---|" * len(several) + "---:|" * 6]
    for row in table:
        cells = [row.test, row.build, *(_plain(getattr(row, name)) for name in several)]
        if row.median is None:
            cells += [f"not measured: {row.reason}", "", "", "", "", ""]
        else:
            unit, scale = ("MB", 1e6) if row.unit == "bytes" else (row.unit, 1.0)
            cells.append(f"{_number(row.median / scale)} {unit}")
            if row.n < 2 or row.low is None or row.high is None:
                cells += ["", "", "", "", str(row.n)]
            else:
                cells.append(f"{_number(row.low / scale)}–{_number(row.high / scale)}")
                cells += [_number((row.p90 or 0) / scale), _number((row.mad or 0) / scale)]
                cells += [f"{100 * (row.cv or 0):.1f} %{' !' if row.noisy else ''}", str(row.n)]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    if any(row.noisy for row in table):
        lines += [
            "",
            f"! scatters by more than {100 * NOISY:.0f} % (coefficient of variation): look at the machine's load",
        ]
    return "\n".join(lines) + "\n"


def comma_separated(table: Sequence[Row]) -> str:
    """CSV with a header; text is quoted, absent numbers are empty."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in table:
        writer.writerow([_csv(getattr(row, name)) for name in COLUMNS])
    return out.getvalue()


def json_array(table: Sequence[Row]) -> str:
    """One JSON array of objects, raw values included."""
    return json.dumps([asdict(row) for row in table], indent=2, ensure_ascii=False) + "\n"


def json_lines(table: Sequence[Row]) -> str:
    """One JSON object per line, raw values included."""
    return "".join(json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in table)


def sql(table: Sequence[Row]) -> str:
    """CREATE TABLE and an INSERT per row, for `sqlite3 bench.sqlite`; runs of several days go into one table."""
    kinds = {field.name: _SQL_TYPES[str(field.type)] for field in fields(Row) if field.name in COLUMNS}
    columns = ",\n".join(f"  {name} {kind}" for name, kind in kinds.items())
    lines = [f"CREATE TABLE IF NOT EXISTS {TABLE} (\n{columns}\n);"]
    names = ", ".join(COLUMNS)
    for row in table:
        values = ", ".join(_literal(getattr(row, name)) for name in COLUMNS)
        lines.append(f"INSERT INTO {TABLE} ({names}) VALUES ({values});")
    return "\n".join(lines) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "json": json_array,
    "jsonl": json_lines,
    "sql": sql,
}
_SQL_TYPES = {
    "str": "TEXT",
    "bool": "INTEGER",
    "int": "INTEGER",
    "int | None": "INTEGER",
    "float | None": "REAL",
}


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation over mean; None for fewer than two values or a mean of 0."""
    if len(values) < 2 or not (mean := statistics.fmean(values)):
        return None
    return statistics.stdev(values) / mean


def _row(
    found: Sequence[Sample], machine: Mapping[str, Mapping[str, Any]], bundle: Mapping[str, Any], size: float | None
) -> Row:
    first = found[0]
    detail, environment = first.detail, machine.get(first.environment_id, {})
    values = [float(s.value) for s in found if s.value is not None]
    many = len(values) > 1
    middle = stats.median_interval(values) if values else None
    cv = variation(values)
    test = next(
        (part for part in [first.stage.partition("@")[0]] if part[:2] in ("pp", "tg") and part[2:].isdigit()), ""
    )
    prompt = int(test[2:]) if test.startswith("pp") else detail.get("prompt_tokens")
    return Row(
        test_time=str(environment.get("time", "")),
        build_commit=str(environment.get("git_commit") or ""),
        cpu_info=str((environment.get("cpu") or {}).get("model", "")),
        model_name=str(bundle.get("name", "")),
        build=first.build,
        model_size=None if size is None else int(size),
        target=first.target,
        n_threads=detail.get("n_threads") or (environment.get("runtime") or {}).get("n_threads"),
        image_size=str(detail.get("image_size", "")),
        n_prompt=prompt,
        n_gen=int(test[2:]) if test.startswith("tg") else detail.get("max_tokens"),
        test=f"energy_{first.stage}"
        if first.kind == "energy"
        else f"size_{first.stage}"
        if first.kind == "size"
        else first.stage,
        unit=first.unit,
        n=len(values),
        median=middle.estimate if middle else None,
        low=middle.low if middle and many else None,
        high=middle.high if middle and many else None,
        p90=stats.p90(values) if many else None,
        mad=stats.mad(values) if many else None,
        avg=statistics.fmean(values) if values else None,
        stddev=statistics.stdev(values) if many else None,
        cv=cv,
        noisy=cv is not None and cv > NOISY,
        reason="" if values else str(detail.get("reason", "nothing was read")),
        samples=tuple(values),
    )


def _number(value: float) -> str:
    """Three or more significant digits."""
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4}f}"


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _cell(text: str) -> str:
    return text.translate(_CONTROL).replace("|", "\\|")


def _csv(value: Any) -> Any:
    return "" if value is None else int(value) if isinstance(value, bool) else value


def _literal(value: Any) -> str:
    """An SQL literal; text with control characters goes as its bytes, so that no reader cuts it."""
    if value is None:
        return "NULL"
    if isinstance(value, str):
        if not value.isprintable():
            return f"CAST(X'{value.encode('utf-8', 'replace').hex()}' AS TEXT)"
        return "'" + value.replace("'", "''") + "'"
    return repr(int(value)) if isinstance(value, (bool, int)) else repr(float(value))

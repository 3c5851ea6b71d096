"""The table that `bench` prints, in llama-bench's five forms: md, csv, json, jsonl, sql.

One row per build and test. Column names are llama-bench's where they mean the same; `test` is `pp512`, `tg128`, or a
stage of an answer as in results.jsonl. Raw samples stay in results.jsonl; json and jsonl carry them, too.

Whole answers, the decoding rate and llama-bench's tests have a verdict against the run's first build (on the same
device, with the same threads and picture): `latency_compare` on the rounds as pairs.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tinyllava_edge.benchmarks import energy, stats
from tinyllava_edge.benchmarks.latency_compare import compare_samples
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import variation
from tinyllava_edge.benchmarks.summary_types import NOISY, WHOLE
from tinyllava_edge.errors import DependencyError, UsageError

COMPARED = (*WHOLE, "decode_tokens_per_s")  # stages with a verdict, besides llama-bench's tests
TABLE = "tinyllava_bench"
KINDS = ("latency", "energy", "memory", "size")
_HIDDEN = ("preprocess", "vision", "llm")  # sizes by role: in the report, not in the table
_TEST = re.compile(r"(?:pp|tg)[0-9]{1,8}", re.ASCII)
_FORMULA = tuple("=+-@\t\r")  # a spreadsheet would compute a text that begins so
_DIGITS = re.compile(r"(\d+)", re.ASCII)
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
    """90th percentile; None for a rate, whose slow tail is the other one"""
    p10: float | None
    """10th percentile of a rate (tokens/s); None for anything else"""
    mad: float | None
    """median absolute deviation"""
    avg: float | None
    """mean, for comparison with llama-bench's"""
    stddev: float | None
    """standard deviation of one sample"""
    cv: float | None
    """standard deviation over mean"""
    noisy: bool
    """whether cv is over 10 %, with three samples or more"""
    against: str
    """build that `verdict` compares with, the run's first; empty where there is no verdict"""
    verdict: str
    """`slower by 10.2 %`, `faster by 4.0 %`, `not distinguishable`, `too few rounds`; empty without a comparison"""
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
    tests = {(key[0], _plain_stage(key[1])): place for place, key in reversed(list(enumerate(groups)))}
    places = {name: place for place, name in enumerate(dict.fromkeys(s.target for s in samples))}
    builds = {name: place for place, name in enumerate(dict.fromkeys(s.build for s in samples))}  # not a round's order

    def order(key: tuple[str, str, str, str]) -> tuple[Any, ...]:
        kind, stage, target, build = key
        return tests[kind, _plain_stage(stage)], _mark(stage), places[target], builds[build]

    ordered = sorted(groups, key=order)
    base = {key[:3]: key[3] for key in reversed(ordered)}
    found = []
    for key in ordered:
        first = base[key[:3]]
        row = _row(groups[key], machine, bundle, totals.get(key[2:]))
        verdict = _verdict(groups[(*key[:3], first)], groups[key]) if key[3] != first else ""
        found.append(replace(row, against=first if verdict else "", verdict=verdict))
    return found


def markdown(table: Sequence[Row]) -> str:
    """A table for people; `!` marks rows that scatter by more than a tenth."""
    told = ("target", "n_threads", "image_size")
    several = [name for name in told if len({getattr(row, name) for row in table} - {"", None}) > 1]
    against = list(dict.fromkeys(row.against for row in table if row.against))
    judged = [f"against {against[0]}" if len(against) == 1 else "against the first build"] if against else []
    head = ["test", "build", *several, "median", "95 % interval", "p90", "MAD", "CV", "n", *judged]
    lines = ["| " + " | ".join(map(_cell, head)) + " |"]
    lines.append("|---|---|" + "---|" * len(several) + "---:|" * 6 + "---|" * len(judged))
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
                tail = _number((row.p90 or 0) / scale) if row.p10 is None else f"p10 {_number(row.p10 / scale)}"
                cells += [tail, _number((row.mad or 0) / scale)]
                scatter = "" if row.cv is None else f"{100 * row.cv:.1f} %{' !' if row.noisy else ''}"
                cells += [scatter, str(row.n)]
        cells += [row.verdict] if judged else []
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


def _verdict(base: Sequence[Sample], own: Sequence[Sample]) -> str:
    """How a build's lines of one stage differ from the first build's; empty where that can't be told."""
    stage = _plain_stage(own[0].stage)
    if own[0].kind != "latency" or not (stage in COMPARED or _decoder_test(stage)):
        return ""
    try:
        return compare_samples(base, own).verdict
    except UsageError:  # one round, or a value that is none
        return ""
    except DependencyError:
        return "needs scipy"


def _plain_stage(stage: str) -> str:
    return stage.partition("@")[0]


def _mark(stage: str) -> list[tuple[int, str]]:
    """A grid point's place among those of its stage: the plain one first, `@t2` before `@t10`."""
    return [
        (int(part) if part.isdigit() and len(part) < 9 else 0, part)
        for part in _DIGITS.split(stage.partition("@")[2])
        if part
    ]


def _decoder_test(stage: str) -> str:
    """`pp512@t2` → `pp512`; empty for other stages."""
    name = _plain_stage(stage)
    return name if _TEST.fullmatch(name) else ""


def _row(
    found: Sequence[Sample], machine: Mapping[str, Mapping[str, Any]], bundle: Mapping[str, Any], size: float | None
) -> Row:
    first = found[0]
    detail, environment = first.detail, machine.get(first.environment_id, {})
    values, reason = energy.values(found) if first.kind == "energy" else _read(found)
    many, rate = len(values) > 1, first.unit == "tokens/s"
    middle = stats.median_interval(values) if values else None
    cv = variation(values)
    test = _decoder_test(first.stage)
    prompt = int(test[2:]) if test.startswith("pp") else _whole(detail.get("prompt_tokens"))
    return Row(
        test_time=str(environment.get("time", "")),
        build_commit=str(environment.get("git_commit") or ""),
        cpu_info=str(_facts(environment.get("cpu")).get("model", "")),
        model_name=str(bundle.get("name", "")),
        build=first.build,
        model_size=None if size is None else int(size),
        target=first.target,
        n_threads=_whole(detail.get("n_threads")) or _whole(_facts(environment.get("runtime")).get("n_threads")),
        image_size=str(detail.get("image_size", "")),
        n_prompt=prompt,
        n_gen=int(test[2:]) if test.startswith("tg") else _whole(detail.get("max_tokens")),
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
        p90=stats.p90(values) if many and not rate else None,
        p10=stats.percentile(values, 0.1) if many and rate else None,
        mad=stats.mad(values) if many else None,
        avg=statistics.fmean(values) if values else None,
        stddev=statistics.stdev(values) if many else None,
        cv=cv,
        noisy=cv is not None and cv > NOISY,
        against="",
        verdict="",
        reason="" if values else reason or "nothing was read",
        samples=tuple(values),
    )


def _facts(value: Any) -> Mapping[str, Any]:
    """The table that a line holds there; another machine may have written anything."""
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _read(found: Sequence[Sample]) -> tuple[list[float], str]:
    """Values that were read, and the first reason for one that wasn't."""
    reason = next((str(s.detail["reason"]) for s in found if s.detail.get("reason")), "")
    return [float(s.value) for s in found if s.value is not None], reason


def _number(value: float) -> str:
    """Three or more significant digits."""
    size = abs(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4}f}"


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _cell(text: str) -> str:
    return text.translate(_CONTROL).replace("|", "\\|")


def _csv(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
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

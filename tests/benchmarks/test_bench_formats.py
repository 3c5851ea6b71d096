"""The five forms of the table, each read back by another program."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import statistics
from dataclasses import replace

import pytest

from tinyllava_edge.benchmarks import bench_formats as formats
from tinyllava_edge.benchmarks.results import Sample

NASTY = "a|b'); DROP TABLE tinyllava_bench; --\"\n, é\0x"


def samples(build: str = "fp32+f16") -> list[Sample]:
    machine = {
        "cpu": {"model": "Example"},
        "time": "2026-01-01T00:00:00Z",
        "git_commit": None,
        "runtime": {"n_threads": 2},
    }
    rows = [Sample("environment", environment_id="e", detail=machine)]
    rows.append(Sample("bundle", environment_id="e", detail={"name": "Tiny"}))
    for b in (build, "other"):
        rows.append(Sample("size", "edge", b, "llm", 5e6, "bytes", 0, "e"))
        rows.append(Sample("size", "edge", b, "total", 9e6, "bytes", 0, "e"))
    asked = {"prompt_tokens": 70, "image_tokens": 64, "max_tokens": 16, "image_size": "64x64", "n_threads": 2}
    for number, ms in enumerate((100.0, 102.0, 98.0, 101.0)):
        for b in (build, "other"):
            rows.append(Sample("latency", "edge", b, "ttft_ms", ms, "ms", number, "e", detail=asked))
            rows.append(Sample("latency", "edge", b, "pp512", 10 * ms * (1 + number), "tokens/s", number, "e"))
            rows.append(Sample("latency", "edge", b, "tg8@t4", ms, "tokens/s", number, "e", detail={"n_threads": 4}))
    rows.append(Sample("energy", "edge", build, "answer", None, "J", 0, "e", detail={"reason": "RAPL: not there"}))
    rows.append(Sample("memory", "edge", build, "peak_rss", 123e6, "bytes", 0, "e"))
    return rows


def test_rows_are_one_per_build_and_test_with_builds_side_by_side() -> None:
    rows = formats.rows(samples())
    assert [(r.test, r.build) for r in rows] == [
        (test, build) for test in ("size_total", "ttft_ms", "pp512", "tg8@t4") for build in ("fp32+f16", "other")
    ] + [("energy_answer", "fp32+f16"), ("peak_rss", "fp32+f16")]
    ttft = rows[2]
    values = [100.0, 102.0, 98.0, 101.0]
    assert (ttft.median, ttft.n, ttft.unit, ttft.n_prompt, ttft.n_gen) == (100.5, 4, "ms", 70, 16)
    assert ttft.mad == 1.0 and ttft.p90 == pytest.approx(101.7) and ttft.avg == statistics.fmean(values)
    assert ttft.low is not None and ttft.high is not None and 98 <= ttft.low <= 100.5 <= ttft.high <= 102
    assert (ttft.p10, rows[4].p90) == (None, None)
    assert rows[4].p10 == pytest.approx(1312.0)  # 1000, 2040, 2940, 4040: a rate's slow tail is the low one
    assert ttft.cv == pytest.approx(statistics.stdev(values) / statistics.fmean(values)) and not ttft.noisy
    pp = rows[4]
    assert (pp.n_prompt, pp.n_gen, pp.n_threads, pp.noisy) == (512, None, 2, True)  # 100 to 400: over 10 %
    assert (rows[6].n_prompt, rows[6].n_gen, rows[6].n_threads) == (None, 8, 4)
    assert rows[8].median is None and rows[8].reason == "RAPL: not there"
    assert (ttft.model_size, ttft.model_name, ttft.cpu_info) == (9_000_000, "Tiny", "Example")


def run(factors: dict[str, float], rounds: int = 20, stage: str = "total_ms", unit: str = "ms") -> list[Sample]:
    """Builds in rounds, each so many times as slow as the first; the load of a round meets all of them."""
    found = [Sample("size", "edge", build, "total", 1e6, "bytes") for build in factors]
    for number in range(rounds):
        load = 1 + number % 7 / 3
        for place, (build, factor) in enumerate(list(factors.items())[:: 1 - 2 * (number % 2)]):  # orders differ
            value = 100 * load * factor * (1 + (number * 5 + place * 3) % 11 / 200)
            value = value if unit == "ms" else 1000 / value
            found.append(Sample("latency", "edge", build, stage, value, unit, number, detail={"run": "r1"}))
    return found


@pytest.mark.parametrize(("stage", "unit"), [("total_ms", "ms"), ("tg8@t2", "tokens/s")])
def test_each_build_is_compared_with_the_first_one_round_by_round(stage: str, unit: str) -> None:
    """Load changes by a factor of three meanwhile, so that the intervals of the medians overlap; the pairs don't."""
    lines = run({"first": 1.0, "slow": 1.1, "same": 1.0}, 21, stage, unit)
    rows = {row.build: row for row in formats.rows(lines) if row.test == stage}
    assert list(rows) == ["first", "slow", "same"]
    slow, first = rows["slow"], rows["first"]
    assert slow.low and slow.high and first.low and first.high and first.low < slow.high and slow.low < first.high
    assert (first.verdict, first.against) == ("", "") and slow.against == "first"
    assert slow.verdict.startswith("slower by ") and rows["same"].verdict == "not distinguishable"
    text = formats.markdown(formats.rows(lines))
    assert "| against first |" in text and f"| {slow.verdict} |" in text
    few = formats.rows(run({"first": 1.0, "slow": 2.0}, 5, stage, unit))
    assert next(row.verdict for row in few if row.build == "slow" and row.test == stage) == "too few rounds"
    assert {row.verdict for row in formats.rows(run({"first": 1.0}))} == {""}


def test_rows_are_in_the_order_of_the_command_not_of_the_first_round() -> None:
    """A round's order is drawn: the plain stage comes first and builds stay as they were named, all the same."""
    first = [Sample("size", "edge", build, "total", 1e6, "bytes") for build in ("b", "a")]
    drawn = [("a", "pp8@t10"), ("b", "pp8@t2"), ("a", "pp8"), ("b", "pp8@t10"), ("a", "pp8@t2"), ("b", "pp8")]
    drawn += [("a", "ttft_ms@640x480"), ("a", "ttft_ms")]
    rows = formats.rows([*first, *(Sample("latency", "edge", build, stage, 5.0, "tokens/s") for build, stage in drawn)])
    tests = [(test, build) for test in ("pp8", "pp8@t2", "pp8@t10") for build in ("b", "a")]
    assert [(row.test, row.build) for row in rows[2:]] == [*tests, ("ttft_ms", "a"), ("ttft_ms@640x480", "a")]


def test_two_samples_are_never_flagged() -> None:
    """The same minimum as in the report, so that its `*` and this table's `!` agree."""
    two = [s for s in samples() if s.stage != "pp512" or s.sample < 2]
    row = next(row for row in formats.rows(two) if row.test == "pp512")
    assert row.n == 2 and not row.noisy and row.cv is None


def test_coarse_energy_is_no_number() -> None:
    told = {"source": "battery: BAT0 (energy)", "reason": "battery: BAT0 (energy): the counter did not move"}
    lines = [Sample("energy", "edge", "b", "answer", None, "J", n, "e", detail=told) for n in range(198)]
    lines += [Sample("energy", "edge", "b", "answer", 36.0, "J", n, "e", detail={"source": "b"}) for n in (198, 199)]
    (row,) = formats.rows(lines)
    assert row.median is None and row.n == 0 and "too coarse" in row.reason


def test_markdown_flags_noise_and_keeps_its_columns() -> None:
    text = formats.markdown(formats.rows(samples("a|b")))
    lines = text.splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1 and "n_threads" in lines[0] and "image_size" not in lines[0]
    pp = next(line for line in lines if line.startswith("| pp512"))
    assert "!" in pp and "tokens/s" in pp and "| p10 1,312 |" in pp and "! scatters by more than 10 %" in text
    assert "!" not in next(line for line in lines if line.startswith("| ttft_ms"))
    assert "not measured: RAPL: not there" in text and "123.0 MB" in text
    assert formats.markdown([]).count("\n") == 2


def test_csv_json_and_lines_say_the_same() -> None:
    rows = formats.rows(samples(NASTY))
    table = list(csv.DictReader(io.StringIO(formats.comma_separated(rows))))
    array = json.loads(formats.json_array(rows))
    lines = [json.loads(line) for line in formats.json_lines(rows).splitlines()]
    assert array == lines and len(table) == len(rows) == len(array)
    for row, text, value in zip(rows, table, array, strict=True):
        assert tuple(text) == formats.COLUMNS and set(value) == {*formats.COLUMNS, "samples"}
        assert text["build"] == value["build"] == row.build
        assert value["median"] == row.median
        assert text["median"] == ("" if row.median is None else repr(row.median))
        assert value["samples"] == list(row.samples)


def test_sql_is_read_back_by_sqlite_whatever_the_names_are() -> None:
    rows = formats.rows(samples(NASTY))
    base = sqlite3.connect(":memory:")
    base.executescript(formats.sql(rows))
    base.executescript(formats.sql(rows[:1]))  # a second run into the same table
    found = base.execute(f"SELECT {', '.join(formats.COLUMNS)} FROM {formats.TABLE}").fetchall()
    assert len(found) == len(rows) + 1
    for row, values in zip(rows, found, strict=False):
        for name, value in zip(formats.COLUMNS, values, strict=True):
            assert value == getattr(row, name), name  # bool equals 0 or 1
    quick = base.execute(f"SELECT build FROM {formats.TABLE} WHERE test = 'ttft_ms' AND median < 200").fetchall()
    assert (NASTY,) in quick


def test_an_empty_run_gives_empty_tables() -> None:
    assert formats.rows([]) == [] and json.loads(formats.json_array([])) == [] and formats.json_lines([]) == ""
    sqlite3.connect(":memory:").executescript(formats.sql([]))


def test_one_sample_has_no_interval() -> None:
    row = next(r for r in formats.rows(samples()) if r.test == "peak_rss")
    assert (row.low, row.high, row.cv, row.noisy) == (None, None, None, False)
    assert replace(row, median=None, reason="x|y") and "x\\|y" in formats.markdown(
        [replace(row, median=None, reason="x|y")]
    )


def test_lines_of_a_machine_that_writes_anything() -> None:
    """Types that nobody asked for cost a cell, not the table; a spreadsheet computes nothing."""
    machine = Sample("environment", environment_id="e", detail={"cpu": [1], "runtime": "x"})
    odd = {"n_threads": {}, "prompt_tokens": [], "max_tokens": {"a": 1}}
    line = Sample("latency", "edge", '=HYPERLINK("x")', "ttft_ms", 1.0, "ms", 0, "e", detail=odd)
    tests = [replace(line, stage=stage) for stage in ("tg\u00b2", "pp" + "9" * 5000, "ttft_ms@t" + "9" * 5000)]
    table = formats.rows([machine, line, *tests])
    assert {(row.n_threads, row.n_prompt, row.n_gen, row.cpu_info) for row in table} == {(None, None, None, "")}
    for draw in formats.FORMATS.values():
        assert draw(table)
    assert "'=HYPERLINK" in formats.FORMATS["csv"](table)

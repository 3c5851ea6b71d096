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
    assert ttft.cv == pytest.approx(statistics.stdev(values) / statistics.fmean(values)) and not ttft.noisy
    pp = rows[4]
    assert (pp.n_prompt, pp.n_gen, pp.n_threads, pp.noisy) == (512, None, 2, True)  # 100 to 400: over 10 %
    assert (rows[6].n_prompt, rows[6].n_gen, rows[6].n_threads) == (None, 8, 4)
    assert rows[8].median is None and rows[8].reason == "RAPL: not there"
    assert (ttft.model_size, ttft.model_name, ttft.cpu_info) == (9_000_000, "Tiny", "Example")


def test_variation() -> None:
    assert formats.variation([1.0]) is None and formats.variation([0.0, 0.0]) is None
    assert formats.variation([9.0, 11.0]) == pytest.approx(2**0.5 / 10)


def test_markdown_flags_noise_and_keeps_its_columns() -> None:
    text = formats.markdown(formats.rows(samples("a|b")))
    lines = text.splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1 and "n_threads" in lines[0] and "image_size" not in lines[0]
    pp = next(line for line in lines if line.startswith("| pp512"))
    assert "!" in pp and "tokens/s" in pp and "! scatters by more than 10 %" in text
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

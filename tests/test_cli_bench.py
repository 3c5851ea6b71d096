"""`bench` on the command line: forms on stdout, results files, exit codes, the gate."""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava_edge.bench_commands import split_outputs
from tinyllava_edge.benchmarks.results import read_results
from tinyllava_edge.errors import UsageError

QUICK = ["--min-time", "0", "-r", "2", "--resolution", "0", "--no-memory", "-t", "1"]


def bench(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tinyllava_edge.cli", "bench", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd)


def test_help_names_the_forms_and_the_defaults() -> None:
    from tinyllava_edge.benchmarks import bench_grid
    from tinyllava_edge.benchmarks.bench_formats import FORMATS
    from tinyllava_edge.cli_bench import bench as command

    told = inspect.signature(command).parameters
    assert all(form in str(told["out"].annotation) for form in FORMATS)
    assert told["resolution"].default == 5.0 and told["repetitions"].default == bench_grid.REPETITIONS == 20


def test_rounds_go_on_until_the_resolution_is_reached_and_it_is_said(tiny_bundle: Path, tmp_path: Path) -> None:
    quick = ["--min-time", "0", "-r", "3", "--no-memory", "-t", "1", "-n", "4", "-o", "r.jsonl"]
    done = bench(tiny_bundle, *quick, "--resolution", "50", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = next(s.detail for s in read_results([tmp_path / "r.jsonl"]) if s.stage == "after")
    assert 8 <= after["rounds"] <= 30 and after["stopped_by"] in ("resolution", "most rounds")
    assert after["resolution_asked"] == 0.5 and after["resolution"] > 0
    assert f"{100 * after['resolution']:.1f} % would be found by four of five such runs" in done.stdout
    assert "| against " in done.stdout
    done = bench(tiny_bundle, *QUICK, "-n", "4", cwd=tmp_path)
    assert "2 rounds, ended by count and time: too few to compare anything" in done.stdout


def test_results_are_appended_and_a_table_is_shown(tiny_bundle: Path, tmp_path: Path) -> None:
    for turn in (1, 2):
        done = bench(tiny_bundle, *QUICK, "--build", "int8+q4_k_m", "-o", "r.jsonl", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        samples = read_results([tmp_path / "r.jsonl"])
        assert sum(s.stage == "ttft_ms" for s in samples) == 2 * turn
    assert [s.kind for s in samples].count("command") == 2
    assert "tinyllava-edge bench" in next(s.detail["command"] for s in samples if s.kind == "command")
    assert (
        done.stdout.startswith("| test | build |")
        and "| ttft_ms |" in done.stdout
        and "results: r.jsonl" in done.stderr
    )
    assert "share of the roofline" in done.stdout


def test_decoder_tests_in_other_forms(tiny_bundle: Path, tmp_path: Path) -> None:
    grid = [tiny_bundle, *QUICK[:-2], "-t", "1,2", "-p", "8", "-n", "4", "--build", "int8+q4_k_m"]
    done = bench(*grid, "-o", "sql", "-o", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base = sqlite3.connect(":memory:")
    base.executescript(done.stdout)
    tests = [test for (test,) in base.execute("SELECT test FROM tinyllava_bench WHERE unit = 'tokens/s'")]
    assert tests == ["pp8", "pp8@t2", "tg4", "tg4@t2"]
    assert {s.stage for s in read_results([tmp_path / "r.jsonl"]) if s.kind == "latency"} == set(tests)
    done = bench(*grid, "-o", "csv", cwd=tmp_path)
    assert {row["test"] for row in csv.DictReader(io.StringIO(done.stdout))} >= set(tests)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl"]


def test_the_gate(tiny_bundle: Path, tmp_path: Path) -> None:
    done = bench(tiny_bundle, *QUICK, "--budget", "ttft=60s,size=1GB", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["passed"] and len(value["budget"]) == 2 * len({row["build"] for row in value["rows"]})
    done = bench(tiny_bundle, *QUICK, "--budget", "ttft=1ms,size=1KB", "-o", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "size 0." not in done.stderr and "limit 1.0 ms: FAIL" in done.stderr and "limit 0.0 MB: FAIL" in done.stderr
    assert (tmp_path / "r.jsonl").is_file()  # what was measured is kept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "tft=3"], "'tft=3'"),
        (["--budget", "drop=1"], "drop"),
        (["--budget", "rss=1GB", "--no-memory"], "rss with --no-memory"),
        (["--budget", "ttft=1s", "-p", "8"], "ttft with -p or -n alone"),
        (["--resolution", "-1"], "--resolution"),
        (["-p", "0"], "-p '0'"),
        (["-n", "99999"], "-n 99999"),
        (["--image-size", "0x5"], "'0x5'"),
        (["--target", "mars"], "'mars'"),
        (["--target", ""], "names none"),
        (["--device", "gpu"], "'gpu'"),
        (["--max-time", "1", "--min-time", "2"], "shorter"),
        (["-o", "md", "-o", "csv"], "one of them"),
        (["-o", "."], "is a directory"),
        (["--json", "-o", "md"], "both want stdout"),
        (["-t", "1,x"], "-t 'x'"),
        (["--image", "x.png", "--image-size", "64"], "size of its own"),
        (["--build", "fp16+q1"], "no build"),
    ],
)
def test_wrong_flags_are_said_at_once(arguments: list[str], words: str, tiny_bundle: Path, tmp_path: Path) -> None:
    done = bench(tiny_bundle, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_a_damaged_results_file_is_said_before_measuring(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"schema": 1')
    done = bench(tiny_bundle, "-o", "r.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "r.jsonl:1" in done.stderr and "warm" not in done.stderr
    assert (tmp_path / "r.jsonl").read_text() == '{"schema": 1'


def test_an_unverified_build_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    (copy / "verified.json").unlink()
    done = bench(copy, *QUICK, cwd=tmp_path)
    assert done.returncode == 1 and "--allow-unverified" in done.stderr


def test_outputs() -> None:
    assert split_outputs([]) == ("md", [])
    assert split_outputs(["a.jsonl", "json", "b.jsonl", "a.jsonl"]) == ("json", [Path("a.jsonl"), Path("b.jsonl")])
    assert split_outputs(["./json"]) == ("md", [Path("json")])
    with pytest.raises(UsageError):
        split_outputs([""])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--question", "\udcff"], "not Unicode"),
        (["-t", str(4 * (os.cpu_count() or 1) + 1)], "cores are here"),
        (["--image-size", "8192x1"], "thinner than"),
        (["-o", "file/r.jsonl"], "file"),
        (["-o", "pipe"], "regular file"),
    ],
)
def test_refused_before_anything_is_measured(tiny_bundle: Path, tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    done = bench(tiny_bundle, *QUICK, *words, cwd=tmp_path)
    assert done.returncode in (1, 2) and not done.stdout and says in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipe_is_no_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    done = bench(tiny_bundle, *QUICK, "--build", "int8+q4_k_m", "--image", "pipe.png", cwd=tmp_path)
    assert done.returncode in (1, 2) and "pipe.png" in done.stderr and "Traceback" not in done.stderr

"""Comparisons over files: which run is the reference, what is refused, Holm, the noise floor, the exit, the table."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllava_edge.benchmarks.compare import compare_files, read_runs
from tinyllava_edge.benchmarks.compare_text import comparison_text
from tinyllava_edge.benchmarks.paired import compare_pair
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample, write_results
from tinyllava_edge.benchmarks.stats import holm
from tinyllava_edge.errors import DataError, UsageError


def run(wrong: set[int], n: int = 100, task: str = "pope") -> list[AnswerRecord]:
    """A run whose questions, two on each picture, are right but for some."""
    return [
        AnswerRecord(
            str(k), f"{k // 2}.jpg", f"is it {k}?", "yes", "no" if k in wrong else "yes", task=task, protocol="p1",
            score=float(k not in wrong),
        )
        for k in range(n)
    ]  # fmt: skip


def lines(runtime: str, build: str, records: list[AnswerRecord], stage: str = "picture") -> list[Sample]:
    return [record.to_sample(runtime, build, stage, k, "e1") for k, record in enumerate(records)]


def write(path: Path, *parts: list[Sample]) -> Path:
    write_results(path, [sample for part in parts for sample in part])
    return path


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """One file with a checkpoint's run and two builds."""
    return write(
        tmp_path / "results.jsonl",
        lines("reference", "fp32", run({1, 2})),
        lines("reference", "fp32", run(set(range(50))), "blind"),
        lines("edge", "int8+q4", run({1, 2, *range(10, 30)})),
        lines("edge", "fp32+f32", run({1, 2})),
        [Sample("accuracy", "edge", "fp32+f32", "pope/f1", 98.0, "%")],
    )


def test_reference_and_builds_in_one_file(both: Path) -> None:
    found = compare_files(both, [both])
    assert found.reference == "reference fp32"
    assert [(row.task, row.build, row.worse, row.better) for row in found.rows] == [
        ("pope", "int8+q4", 20, 0), ("pope", "fp32+f32", 0, 0),
    ]  # fmt: skip
    worse, same = found.rows
    assert worse.verdict == "worse" and worse.p_value == pytest.approx(2**-19)
    assert same.verdict.startswith("not distinguishable at n = 100; ") and same.identical == same.n == 100
    assert not found.failed() and not found.failed(strict=True)  # no drop was allowed or forbidden


def test_named_reference_and_named_builds(both: Path) -> None:
    found = compare_files(both, [both], reference_build="fp32+f32", names=["fp32"])
    assert (found.reference, [row.build for row in found.rows]) == ("fp32+f32", ["reference fp32"])
    found = compare_files(both, [both], reference_build="fp32+f32")
    assert [row.build for row in found.rows] == ["int8+q4"]
    with pytest.raises(UsageError, match="no build 'q9'"):
        compare_files(both, [both], names=["q9"])
    with pytest.raises(DataError, match="0 runs could be the reference"):
        compare_files(both, [both], reference_build="q9")


def test_files_of_one_build_each_carry_their_names(both: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", lines("edge", "q4", run({3})))
    two = write(tmp_path / "two.jsonl", lines("edge", "q4", run({4})))
    found = compare_files(both, [one, two])
    assert [row.build for row in found.rows] == [f"q4 ({one})", f"q4 ({two})"]
    found = compare_files(one, [two])
    assert (found.reference, found.rows[0].build) == (f"q4 ({one})", f"q4 ({two})")
    torch = write(tmp_path / "torch.jsonl", lines("reference", "bf16", run({5})))
    assert [row.build for row in compare_files(both, [torch]).rows] == ["reference bf16"]


def test_reference_must_be_clear(tmp_path: Path) -> None:
    two = write(tmp_path / "two.jsonl", lines("edge", "a", run(set())), lines("edge", "b", run(set())))
    with pytest.raises(DataError, match="2 runs could be the reference; it holds a, b"):
        compare_files(two, [two])
    one = write(tmp_path / "one.jsonl", lines("edge", "a", run(set())))
    with pytest.raises(DataError, match="nothing to compare"):
        compare_files(one, [])
    (row,) = compare_files(one, [one]).rows  # named twice on purpose
    assert (row.identical, row.p_holm) == (100, 1.0)


def test_allowed_drop_decides_the_exit(both: Path, tmp_path: Path) -> None:
    found = compare_files(both, [both], max_drop=5)
    gates = {row.build: row.gate for row in found.rows}
    assert gates["int8+q4"].verdict == "worse than allowed" and gates["fp32+f32"].verdict == "within"
    assert found.failed()
    assert not compare_files(both, [both], max_drop=5, names=["fp32+f32"]).failed(strict=True)
    few = write(tmp_path / "few.jsonl", lines("edge", "q8", run({1, 2, 3})))
    found = compare_files(both, [few], max_drop=1, strict=True)
    assert found.rows[0].gate is not None and found.rows[0].gate.verdict == "not shown"
    assert found.failed() and not found.failed(strict=False)


def test_holm_runs_over_all_builds_and_tasks(tmp_path: Path) -> None:
    reference = write(tmp_path / "r.jsonl", lines("reference", "fp32", run(set())),
                      lines("reference", "fp32", run(set(), task="gqa")))  # fmt: skip
    builds = write(
        tmp_path / "b.jsonl",
        lines("edge", "a", run(set(range(6)))),
        lines("edge", "a", run(set(range(8)), task="gqa")),
        lines("edge", "b", run(set(range(7)))),
    )
    found = compare_files(reference, [builds])
    raw = [2 / 2**6, 2 / 2**8, 2 / 2**7]
    assert [(row.build, row.task) for row in found.rows] == [("a", "pope"), ("a", "gqa"), ("b", "pope")]
    assert [row.p_value for row in found.rows] == pytest.approx(raw)
    assert [row.p_holm for row in found.rows] == pytest.approx([raw[0], 3 * raw[1], 2 * raw[2]])
    assert found.absent == ("b and the reference don't both have gqa",)
    assert not replace(found, max_drop=50.0).failed() and replace(found, max_drop=50.0).failed(strict=True)
    assert "not compared: b and the reference" in comparison_text(found)
    assert [row.task for row in compare_files(reference, [builds], task="gqa", names=["a"]).rows] == ["gqa"]
    with pytest.raises(DataError, match="b has no task in common"):
        compare_files(reference, [builds], task="gqa")
    with pytest.raises(UsageError, match="no task 'mme'"):
        compare_files(reference, [builds], task="mme")


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_difference_that_only_the_number_of_comparisons_hides(tmp_path: Path) -> None:
    parts = [lines("edge", f"b{k}", run(set(range(8)) if k == 0 else set())) for k in range(10)]
    reference = write(tmp_path / "r.jsonl", lines("reference", "fp32", run(set())))
    found = compare_files(reference, [write(tmp_path / "b.jsonl", *parts)])
    assert found.rows[0].p_value == pytest.approx(2 / 2**8) and found.rows[0].p_holm == pytest.approx(20 / 2**8)
    assert found.rows[0].verdict == ("not distinguishable at n = 100 among so many comparisons; by itself it would be")


def test_a_difference_that_few_pictures_hide_is_not_put_down_to_many_comparisons(tmp_path: Path) -> None:
    """Five pictures that all fall: no swap of whole pictures gives a p below 2/32, however many questions they have."""
    before = [replace(record, image=f"{k // 20}.jpg", score=0.9) for k, record in enumerate(run(set()))]
    after = [replace(record, given="no", score=0.6 if k % 3 else 0.3) for k, record in enumerate(before)]
    reference = write(tmp_path / "r.jsonl", lines("reference", "fp32", before))
    (row,) = compare_files(reference, [write(tmp_path / "b.jsonl", lines("edge", "q4", after))]).rows
    assert row.p_value == row.p_holm == pytest.approx(2 / 32)
    assert row.needed is not None and row.needed <= row.scored
    assert row.verdict == "not distinguishable at n = 100; the test needs more pictures"


def test_noise_floor_stands_beside_the_build(both: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again.jsonl", lines("edge", "int8+q4", run({1, 2, 5, *range(10, 29)})))
    found = compare_files(both, [both], noise=again)
    floor = found.rows[0].noise
    assert floor is not None and (floor.of, floor.n, floor.changed, floor.worse, floor.better) == (
        "int8+q4", 100, 2, 1, 1,
    )  # fmt: skip
    assert found.rows[1].noise is None
    assert "noise floor, int8+q4 twice: 2 of 100 answers changed, 1 worse, 1 better" in comparison_text(found)
    again = write(tmp_path / "again2.jsonl", lines("reference", "fp32", run({1})))
    assert [row.noise.of for row in compare_files(both, [both], noise=again).rows if row.noise] == 2 * [
        "reference fp32"
    ]
    with pytest.raises(DataError, match="repeats none"):
        compare_files(both, [both], noise=write(tmp_path / "other.jsonl", lines("edge", "x", run(set()))))
    with pytest.raises(UsageError, match="its own repetition"):
        compare_files(both, [both], noise=both)


def test_blind_runs_are_never_compared(both: Path, tmp_path: Path) -> None:
    assert set(read_runs(both)) == {
        ("reference", "fp32", "pope"), ("edge", "int8+q4", "pope"), ("edge", "fp32+f32", "pope"),
    }  # fmt: skip
    blind = write(tmp_path / "blind.jsonl", lines("edge", "q4", run(set()), "blind"))
    with pytest.raises(DataError, match="blind answers only"):
        compare_files(both, [blind])


def test_files_that_do_not_fit_are_named(both: Path, tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", lines("edge", "q4", run(set(), 98)))
    with pytest.raises(DataError, match="short.jsonl: q4: 2 questions were answered in one run only"):
        compare_files(both, [short])
    other = [replace(record, protocol="p2") for record in run(set())]
    with pytest.raises(DataError, match="protocol of question 0"):
        compare_files(both, [write(tmp_path / "protocol.jsonl", lines("edge", "q4", other))])
    gold = [replace(record, expected="no") for record in run(set())]
    with pytest.raises(DataError, match="expected of question 0"):
        compare_files(both, [write(tmp_path / "gold.jsonl", lines("edge", "q4", gold))])
    task = write(tmp_path / "task.jsonl", lines("edge", "q4", run(set(), task="gqa")))
    with pytest.raises(DataError, match="task.jsonl: q4 has no task in common"):
        compare_files(both, [task])
    twice = write(tmp_path / "twice.jsonl", lines("edge", "q4", run(set())), lines("edge", "q4", run(set())))
    with pytest.raises(DataError, match="twice.jsonl: q4 answers question '0' twice"):
        compare_files(both, [twice])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"[1]\n", b'{"schema": 9}\n', b"\xff\xfe", b'{"schema": 1'])
def test_hostile_files_are_named(both: Path, tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    with pytest.raises(DataError, match="bad.jsonl"):
        compare_files(both, [bad])
    with pytest.raises(DataError, match="gone.jsonl"):
        compare_files(tmp_path / "gone.jsonl", [both])


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0.2}, {"max_drop": -1.0}])
def test_impossible_options_are_refused(both: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        compare_files(both, [both], **options)


def test_table_and_json_say_what_was_tested(both: Path) -> None:
    found = compare_files(both, [both], max_drop=1, confidence=0.9)
    text = comparison_text(found)
    assert "reference: reference fp32; intervals at 90 %" in text
    assert "score: mean over the questions, not the benchmark's headline" in text
    assert "reference 98.00; exact McNemar, Holm over all lines; protocol p1" in text
    assert "pope  int8+q4   100      50  78.00  −20.00" in text
    assert "20 worse, 0 better" in text and "a drop of 1 points: worse than allowed" in text
    value = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert value["rows"][0]["worse"] == 20 and value["failed"] is True
    assert value["rows"][0]["flips"][0]["before"] == "yes"


def test_ten_builds_of_gqa_take_seconds() -> None:
    rng = np.random.default_rng(0)
    base = [
        AnswerRecord(str(k), f"{k % 398}.jpg", "?", "a", "a", task="gqa", score=float(rng.random() < 0.6))
        for k in range(12578)
    ]
    builds = []
    for number in range(10):
        flip = rng.random(len(base)) < 0.06
        score = [1 - r.score if f else r.score for r, f in zip(base, flip, strict=True)]  # type: ignore[operator]
        if number % 2:
            score = [value * 0.9 for value in score]  # fractional: the slower test
        builds.append([replace(record, score=value) for record, value in zip(base, score, strict=True)])
    start = time.process_time()
    for records in builds:
        compare_pair(base, records, names=("r", "b"), max_drop=1)
    assert time.process_time() - start < 30  # of this process, whatever else runs; about 3 s


def test_lmms_eval_logs_are_compared_with_each_other_only(both: Path, tmp_path: Path) -> None:
    logs = []
    for number, said in enumerate(("yes", "no")):
        folder = tmp_path / str(number)
        folder.mkdir()
        logs.append(folder / f"2025010{number}_000000_samples_mine.jsonl")
        rows = [
            {"doc_id": k, "target": "yes", "filtered_resps": [said if k < 8 else "yes"], "input": f"is it {k}?",
             "doc_hash": str(k), "exact_match": float(said == "yes" or k >= 8), "arguments": {}}
            for k in range(40)
        ]  # fmt: skip
        logs[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (row,) = compare_files(logs[0], [logs[1]]).rows
    assert (row.task, row.n, row.worse, row.better, row.verdict) == ("mine", 40, 8, 0, "worse")
    assert row.build == "lmms-eval 20250101_000000_samples_mine"
    with pytest.raises(DataError, match="no task in common"):
        compare_files(both, [logs[1]])

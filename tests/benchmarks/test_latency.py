"""Measuring a tiny bundle with the real runtime: protocol, completeness, the grid."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyllava_edge.benchmarks.latency import bench
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.benchmarks.roofline import shares
from tinyllava_edge.benchmarks.summary import STAGES, summarise
from tinyllava_edge.errors import UsageError

BUILDS = ["fp32+f32", "fp32+q8_0"]


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, pictures: Path) -> list[Sample]:
    picture = pictures / "test-0.png"
    asked = {"question": "what color is it?", "repetitions": 3, "max_tokens": 4, "threads": [1], "loads": 2}
    return bench(tiny_bundle, picture=picture, **asked)  # type: ignore[arg-type]


def test_every_build_stage_and_round_is_there(measured: list[Sample], tmp_path: Path) -> None:
    ttft = [s for s in measured if s.stage == "ttft_ms"]
    assert [s.sample for s in ttft] == [0, 0, 1, 1, 2, 2]
    assert sorted((s.build, s.sample) for s in ttft) == [(b, r) for b in BUILDS for r in range(3)]
    assert all(s.value is not None and s.value > 0 and s.unit == "ms" for s in ttft)
    for sample in ttft:
        parts = sum(
            s.value or 0.0
            for s in measured
            if s.stage in STAGES and (s.build, s.sample) == (sample.build, sample.sample)
        )
        assert sample.value and 0.5 * sample.value < parts <= sample.value  # the clock's, with what lies between stages
    assert {s.stage for s in measured if s.kind == "size"} == {"preprocess", "vision", "llm", "total"}
    cold = [s for s in measured if s.stage in ("load_ms", "cold_ttft_ms")]
    assert len(cold) == 4 and all(s.value and s.value > 0 for s in cold)
    assert {s.environment_id for s in measured} == {measured[0].environment_id} != {""}
    write_results(tmp_path / "r.jsonl", measured)
    assert read_results([tmp_path / "r.jsonl"]) == measured


def test_prefill_is_split_and_the_whole_answer_is_timed(measured: list[Sample]) -> None:
    table = {(s.build, s.sample, s.stage): s for s in measured if s.kind == "latency" and s.detail.get("run")}
    for build in BUILDS:
        for number in range(3):
            value = {stage: s.value or 0.0 for (b, n, stage), s in table.items() if (b, n) == (build, number)}
            assert value["image_prefill_ms"] > 0 and value["text_prefill_ms"] > 0
            assert value["image_prefill_ms"] + value["text_prefill_ms"] == pytest.approx(value["prefill_ms"])
            steps = table[build, number, "total_ms"].detail["token_ms"]
            assert sum(steps) == pytest.approx(value["decode_ms"], abs=0.01) and len(steps) in (3, 4)
            assert value["ttft_ms"] + value["decode_ms"] <= value["total_ms"]


def test_what_was_asked_and_how_it_went(measured: list[Sample], pictures: Path) -> None:
    from tinyllava_edge.files import sha256_file

    detail = next(s.detail for s in measured if s.stage == "ttft_ms")
    assert detail["image_sha256"] == sha256_file(pictures / "test-0.png") and len(detail["prompt_sha256"]) == 64
    assert detail["image_size"] == "64x48" and detail["n_threads"] == 1
    before, after = (s.detail for s in measured if s.kind == "condition")
    assert {"temperature_c", "cpu_mhz", "governor", "load_average"} <= set(before) and set(before) <= set(after)
    assert (after["rounds"], after["stopped_by"]) == (3, "count and time") and after["seconds"] > 0
    assert after["resolution"] is None and after["resolution_asked"] == 0.0  # three rounds can't tell
    assert before["run"] == after["run"] == detail["run"] != ""
    assert {"copy_gb_per_s", "gemm_f32_gflop_per_s"} <= {s.stage for s in measured if s.kind == "ceiling"}
    energy = [s for s in measured if s.kind == "energy"]
    assert energy and all((s.value is None) == bool(s.detail.get("reason")) for s in energy)
    assert {s.build for s in energy} == set(BUILDS)


def test_summary_of_a_real_run(measured: list[Sample], tiny_bundle: Path) -> None:
    summary = summarise(measured)
    assert [b.build for b in summary.builds] == BUILDS and summary.reference is None
    first = summary.builds[0]
    assert first.bytes == sum(p.stat().st_size for p in tiny_bundle.iterdir() if p.name in (
        "preprocess.onnx", "vision-fp32.onnx", "llm-f32.gguf"))  # fmt: skip
    loads = [s for s in measured if s.stage in ("load_warm_ms", "load_cold_ms") and s.build == BUILDS[0]]
    assert [s.sample for s in loads] == [0, 1, 0, 1]
    assert first.samples == 3 and first.memory["peak_rss"] > 20e6
    assert first.verified is None and summary.decision.build is None
    assert "not verified" in summary.decision.rejected["fp32+f32"]


def test_a_grid_pools_nothing(tiny_bundle: Path) -> None:
    found = bench(
        tiny_bundle,
        ["fp32+q8_0"],
        repetitions=2,
        max_tokens=2,
        prompt_tokens=[8, 16],
        gen_tokens=[4],
        threads=[1, 2],
        image_sizes=["32", "48x64"],
        memory=False,
    )
    latency = [s for s in found if s.kind == "latency"]
    for stage in ("ttft_ms", "ttft_ms@48x64", "ttft_ms@t2", "ttft_ms@48x64@t2", "pp8", "pp16@t2", "tg4", "tg4@t2"):
        assert [s.sample for s in latency if s.stage == stage] == [0, 1], stage
    rates = {s.stage: s for s in latency if s.stage in ("pp16", "tg4")}
    for stage, size in (("pp16", 16), ("tg4", 4)):
        assert rates[stage].unit == "tokens/s"
        assert rates[stage].value == pytest.approx(1000 * size / rates[stage].detail["ms"])
    threads = {s.detail["n_threads"]: s.environment_id for s in latency if "run" in s.detail}
    assert sorted(threads) == [1, 2] and len(set(threads.values())) == 2
    assert {s.environment_id for s in found if s.kind == "environment"} == set(threads.values())
    roofs = {(s.environment_id, s.detail["n_threads"]) for s in found if s.kind == "ceiling"}
    assert roofs == {(threads[1], 1), (threads[2], 2)}  # each number of threads has ceilings of its own
    rows = {row.stage: row for row in shares(found)}
    for stage in ("vision_ms", "vision_ms@t2", "pp16@t2", "tg4@t2"):
        assert rows[stage].share_percent, stage
    sizes = {s.stage: s.detail["image_size"] for s in latency if s.stage.startswith("ttft_ms")}
    assert sizes["ttft_ms"] == "32x32" and sizes["ttft_ms@48x64@t2"] == "48x64"


def test_the_decoders_tests_alone(tiny_bundle: Path) -> None:
    found = bench(tiny_bundle, ["fp32+f32"], repetitions=1, prompt_tokens=[4], memory=False, threads=[1])
    assert {s.stage for s in found if s.kind == "latency"} == {"pp4"}


def test_refusals(tiny_bundle: Path, pictures: Path) -> None:
    picture = pictures / "test-0.png"
    for arguments, words in (
        ({"repetitions": 0}, "repetitions"),
        ({"builds": ["fp16+q1"]}, "no build"),
        ({"prompt_tokens": [4096]}, "-p 4096: the context has"),
        ({"image_sizes": ["64"]}, "--image has a size of its own"),
        ({"devices": ["tpu"]}, "tpu"),
        ({"resolution": 1.0}, "--resolution 100"),
        ({"min_time_s": 3.0, "max_time_s": 1.0}, "shorter than"),
    ):
        with pytest.raises(UsageError, match=words):
            bench(tiny_bundle, picture=picture, question="?", memory=False, **arguments)  # type: ignore[arg-type]

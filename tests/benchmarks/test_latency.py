"""Measuring a tiny bundle with the real runtime: protocol, completeness, memory in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks.environment import capture, ceilings, cpu, environment_sample
from tinyllava_edge.benchmarks.latency import bench, interleaved, peak_memory
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.benchmarks.summary import STAGES, summarise
from tinyllava_edge.errors import EngineError, UsageError
from tinyllava_edge.runtimes.base import Answer, StageTimings

BUILDS = ["fp32+f32", "fp32+q8_0"]


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, pictures: Path) -> list[Sample]:
    picture = pictures / "test-0.png"
    return bench(tiny_bundle, picture=picture, question="what color is it?", repetitions=3, max_tokens=4, n_threads=1)


def test_every_build_stage_and_round_is_there(measured: list[Sample], tmp_path: Path) -> None:
    ttft = [s for s in measured if s.stage == "ttft_ms"]
    assert [(s.build, s.sample) for s in ttft] == [
        (b, r) for r in range(3) for b in (BUILDS if r != 1 else BUILDS[::-1])
    ]
    assert all(s.value is not None and s.value > 0 and s.unit == "ms" for s in ttft)
    for sample in ttft:
        parts = [
            s.value for s in measured if s.stage in STAGES and (s.build, s.sample) == (sample.build, sample.sample)
        ]
        assert sum(parts) == pytest.approx(sample.value)  # type: ignore[arg-type]
    assert {s.stage for s in measured if s.kind == "size"} == {"preprocess", "vision", "llm", "total"}
    cold = [s for s in measured if s.stage in ("load_ms", "cold_ttft_ms")]
    assert len(cold) == 4 and all(s.value and s.value > 0 for s in cold)
    assert {s.environment_id for s in measured} == {measured[0].environment_id} != {""}
    write_results(tmp_path / "r.jsonl", measured)
    assert read_results([tmp_path / "r.jsonl"]) == measured


def test_summary_of_a_real_run(measured: list[Sample], tiny_bundle: Path) -> None:
    summary = summarise(measured)
    assert [b.build for b in summary.builds] == BUILDS and summary.reference is None
    first = summary.builds[0]
    assert first.bytes == sum(p.stat().st_size for p in tiny_bundle.iterdir() if p.name in (
        "preprocess.onnx", "vision-fp32.onnx", "llm-f32.gguf"))  # fmt: skip
    assert first.samples == 3 and first.memory["peak_rss"] > 20e6
    assert first.verified is None and summary.decision.build is None
    assert "not verified" in summary.decision.rejected["fp32+f32"]


def test_memory_is_the_childs_own(tiny_bundle: Path, pictures: Path, measured: list[Sample]) -> None:
    """A parent that holds 600 MB must not show in the child's peak, as ru_maxrss would after exec."""
    ballast = bytearray(600 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    found = {
        s.stage: s.value for s in peak_memory(tiny_bundle, BUILDS[0], pictures / "test-0.png", "what?", n_threads=1)
    }
    assert found["peak_rss"] and found["peak_rss"] < 550 << 20
    assert found["after_load"] <= found["peak_rss"] and found["anon"] <= found["peak_rss"]  # type: ignore[operator]
    del ballast


def test_a_failing_child_is_reported(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"fp32\+f32: the memory measurement failed: .*no such file"):
        peak_memory(tiny_bundle, BUILDS[0], tmp_path / "none.png", "what?")


def test_a_hanging_child_is_reported_with_a_flag_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("peak_rss", 600)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(EngineError, match="no answer within 600 s") as caught:
        peak_memory(Path("bundle"), BUILDS[0], Path("x.png"), "what?")
    assert "--memory" not in caught.value.hint


def test_peak_rss_shows_its_usage() -> None:
    done = subprocess.run([sys.executable, "-m", "tinyllava_edge.benchmarks.peak_rss"], capture_output=True, text=True)
    assert done.returncode == 1 and "BUNDLE BUILD IMAGE QUESTION" in done.stderr


def test_rounds_rotate_and_warm_up_is_not_counted() -> None:
    class Clocked:
        name = "edge"
        asked: list[str] = []

        def __init__(self, build: str) -> None:
            self.build = build

        def answer(self, *args: object, **options: object) -> Answer:
            self.asked.append(self.build)
            timings = StageTimings(vision_ms=float(len(self.asked)), decode_ms=10.0)
            return Answer("a b c", (1, 2, 3), "stop", 70, 64, timings)

    runtimes = {name: Clocked(name) for name in "abc"}
    samples = interleaved(runtimes, Path("x.png"), "?", 4, 8)  # type: ignore[arg-type]
    assert "".join(Clocked.asked) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    vision = [s.value for s in samples if s.stage == "vision_ms"]
    assert vision == [float(k) for k in range(7, 19)]  # the six warm-up answers left no sample
    assert {s.value for s in samples if s.stage == "decode_tokens_per_s"} == {300.0}  # two tokens and the end in 10 ms


def test_refusals(tiny_bundle: Path, pictures: Path) -> None:
    with pytest.raises(UsageError, match="repetitions"):
        bench(tiny_bundle, picture=pictures / "test-0.png", question="?", repetitions=0)
    with pytest.raises(UsageError, match="no build"):
        bench(tiny_bundle, ["fp16+q1"], picture=pictures / "test-0.png", question="?")


def test_environment_identity_ignores_the_minute_and_nothing_else() -> None:
    machine = capture()
    later = {**machine, "time": "2030-01-01T00:00:00Z", "load_average": [9, 9, 9], "ceilings": {}}
    other = {**machine, "libraries": {**machine["libraries"], "numpy": "0.1"}}
    identity = environment_sample(machine).environment_id
    assert environment_sample(later).environment_id == identity != environment_sample(other).environment_id
    assert cpu()["cores"] >= 1 and cpu()["model"]
    assert {"numpy", "onnxruntime", "llama-cpp-python"} <= set(machine["libraries"])


def test_ceilings_are_plausible() -> None:
    found = ceilings()
    assert (
        0.01 < found["copy_gb_per_s"] < 5000 and 0.01 < found["gemm_f32_gflop_per_s"] < 1e6
    )  # any machine, even a starved one

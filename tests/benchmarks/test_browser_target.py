"""`bench --target browser`: what a real Chromium measures comes back as lines of results.jsonl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("onnxruntime_genai", reason="the decoder's builder, extra [decoder], is not installed")

from tinyllava_edge.bench_commands import bench_bundle
from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.benchmarks.summary import summarise
from tinyllava_edge.benchmarks.targets import browser
from tinyllava_edge.benchmarks.targets.browser_page import VARIABLE, BrowserPage
from tinyllava_edge.benchmarks.targets.browser_runtime import WebRuntime
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.cli import app
from tinyllava_edge.errors import BundleError, DependencyError, EngineError, UnverifiedError, UsageError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.runtimes.server.web_files import default_dist

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_page = pytest.mark.skipif(
    CHROMIUM is None or not (default_dist() / "sw.js").is_file(),
    reason="needs Chromium (apt install chromium) and the built page (make web)",
)
STAGES = {
    "load_ms", "cold_ttft_ms", "decode_image_ms", "preprocess_ms", "vision_ms", "prefill_ms", "first_token_ms",
    "decode_ms", "ttft_ms", "total_ms", "decode_tokens_per_s",
}  # fmt: skip
QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32",), vision=("fp32",), web=("q4", "fp32"))
    return out


@pytest.fixture(scope="module")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], str]:
    """Lines of a run through the command line, and what it printed."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    out = tmp_path_factory.mktemp("results") / "results.jsonl"
    arguments = ["bench", str(bundle), "--target", "browser", "-r", "3", "--min-time", "0", "--max-tokens", "4"]
    arguments += ["--resolution", "0"]
    found = CliRunner().invoke(app, [*arguments, "--allow-unverified", "-o", str(out)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return read_results([out]), found.stdout


@needs_page
def test_samples(measured: tuple[list[Sample], str], bundle: Path) -> None:
    """Every stage of every round of both builds, interleaved, as measured in the page."""
    samples, printed = measured
    latency = [sample for sample in samples if sample.kind == "latency"]
    assert {sample.target for sample in samples if sample.kind != "command"} == {"browser"}
    assert {sample.runtime for sample in latency} == {"web"}
    for build in ("web-fp32", "web-q4"):
        assert {sample.stage for sample in latency if sample.build == build} == STAGES
        assert f"| ttft_ms | {build} |" in printed
        sizes = {s.stage: s.value for s in samples if s.kind == "size" and s.build == build}
        assert sizes["total"] == sizes["preprocess"] + sizes["vision"] + sizes["llm"]
    totals = [sample for sample in latency if sample.stage == "total_ms"]
    for number in range(3):  # interleaved: each build once a round, one after the other
        turn = [sample for sample in totals if sample.sample == number]
        assert {sample.build for sample in turn} == {"web-fp32", "web-q4"}
        assert [sample.detail["order"] for sample in turn] == [0, 1]
    assert len(totals) == 6
    for total in totals:
        steps = total.detail["token_ms"]
        assert len(steps) >= 3 and 0 < sum(steps) < total.value and len(total.detail["image_sha256"]) == 64
    peaks = [sample.value for sample in samples if sample.kind == "memory"]
    assert len(peaks) == 2 and min(peaks) > 50e6
    ended = next(sample for sample in samples if sample.kind == "condition" and sample.stage == "after").detail
    assert (ended["rounds"], ended["repetitions"], ended["resolution_asked"]) == (3, 3, 0) and ended["run"]
    described = next(sample for sample in samples if sample.kind == "bundle").detail
    assert described["sha256"] == read_bundle(bundle).sha256
    assert {row.target for row in summarise(samples).rows} == {"browser"}


@needs_page
def test_environment(measured: tuple[list[Sample], str]) -> None:
    """Browser, isolation, threads, and for each build its provider and the self-test's outcome."""
    samples, _ = measured
    (line,) = [sample for sample in samples if sample.kind == "environment"]
    found = line.detail["runtime"]
    assert "Chrome" in found["user_agent"] and found["cross_origin_isolated"] is True
    assert found["hardware_concurrency"] >= 1 and found["n_threads"] >= 1
    assert found["onnxruntime_web"].count(".") == 2 and len(found["page"]) == 16
    for engine in found["builds"].values():
        assert engine["provider"] in ("wasm", "webgpu") and engine["self_test"]["outcome"] in ("reference", "equal")
    assert {s.environment_id for s in samples if s.kind == "latency"} == {line.environment_id}
    assert json.dumps(line.detail)


@needs_page
def test_a_wrong_webgpu_is_never_used(bundle: Path) -> None:
    """WebGPU computed by the processor: either it passes the self-test and answers alike, or it is refused."""
    software = ["--use-webgpu-adapter=swiftshader", "--enable-unsafe-swiftshader"]
    with BrowserPage(bundle, flags=software) as page:
        opened = read_bundle(bundle)
        sure = WebRuntime(page, opened, "fp32", provider="wasm")
        try:
            tried = WebRuntime(page, opened, "fp32", provider="webgpu")
        except EngineError as error:
            assert "WebGPU can't be used" in str(error) or "no WebGPU" in str(error)
            return
        assert tried.facts["self_test"]["outcome"] == "equal" and tried.facts["provider"] == "webgpu"
        assert max(tried.facts["self_test"]["errors"].values()) <= 0.05

        given = [runtime.answer(None, QUESTION, max_tokens=8).token_ids for runtime in (sure, tried)]
        assert given[0] == given[1]


def ask(bundle: Path, target: str, builds: str = "", **more: Any) -> None:
    grid = dict.fromkeys(("prompt", "gen", "threads", "image_sizes", "devices"), "") | {"builds": builds}
    options = {"question": QUESTION, "max_tokens": 2, "repetitions": 1, "memory": False, "resolution": 0.0}
    options |= {"min_time_s": 0.0, "max_time_s": 1.0}
    bench_bundle(
        bundle, image=None, grid={**grid, **more.pop("grid", {})}, options=options, target=target, ssh={}, outputs=[],
        budget="", allow_unverified=more.pop("allow_unverified", True), progress=lambda line: None,
    )  # fmt: skip


def test_refused_before_anything_is_measured(bundle: Path, tiny_bundle: Path) -> None:
    """Wrong builds, tests that browsers don't run, a missing stamp: each with the next step."""
    with pytest.raises(UsageError, match="no browser build 'web-q8'") as wrong:
        ask(bundle, "browser", "web-q8")
    assert wrong.value.hint == "it holds: web-fp32, web-q4"
    with pytest.raises(UsageError, match="no browser build 'fp32\\+f32'"):
        ask(bundle, "browser", "fp32+f32")
    with pytest.raises(UsageError, match="--build names none for --target cpu"):
        ask(bundle, "cpu,browser", "web-q4")
    with pytest.raises(UsageError, match="no build 'web-q4'"):
        ask(bundle, "cpu", "web-q4")
    with pytest.raises(UsageError, match="-p and -n"):
        ask(bundle, "browser", grid={"prompt": "16"})
    with pytest.raises(UnverifiedError) as unverified:
        ask(bundle, "browser", allow_unverified=False)
    assert "--allow-unverified" in unverified.value.hint
    with pytest.raises(BundleError, match="no web files"):
        ask(tiny_bundle, "browser")
    with pytest.raises(UsageError, match="--target 'firefox'"):
        ask(bundle, "firefox")


@needs_page
def test_a_missing_browser(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said with what to install; the server's thread is gone afterwards."""
    import threading

    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(DependencyError, match="no Chromium") as missing:
        browser.run(bundle, allow_unverified=True, memory=False)
    assert "apt install chromium" in missing.value.hint
    assert not [thread for thread in threading.enumerate() if thread.name == "web"]

"""`bench --target browser`: what a real Chromium measures comes back as lines of results.jsonl."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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
from tinyllava_edge.errors import (
    BundleError,
    DependencyError,
    EngineError,
    TinyLlavaEdgeError,
    UnverifiedError,
    UsageError,
)
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.verify_pictures import photograph
from tinyllava_edge.runtimes.server.web_files import default_dist

from ..conftest import make_checkpoint

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


@pytest.fixture
def stamped(bundle: Path, tmp_path: Path) -> Path:
    """Fp32 verified in earnest, for the edge runtime and for browsers; q4 is not."""
    from tinyllava_edge.export.verify import verify

    out = Path(shutil.copytree(bundle, tmp_path / "stamped"))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "NanoSig")
    picture = tmp_path / "a.png"
    picture.write_bytes(photograph(97, 60))
    builds = ["fp32+f32", "web-fp32"]
    assert verify(out, checkpoint, builds=builds, pictures=[picture], n_threads=1).passed
    return out


@needs_page
def test_evaluated_and_measured_beside_the_edge_builds(stamped: Path, tmp_path: Path) -> None:
    """`eval` and `bench` of a verified web build need no leave; one report has accuracy and latency of both targets."""
    run = CliRunner()
    common = [
        "eval",
        str(stamped),
        "--task",
        "easy_vqa",
        "--limit",
        "12",
        "-t",
        "1",
        "-o",
        str(tmp_path / "eval.jsonl"),
    ]
    done = run.invoke(app, [*common, "--build", "fp32+f32,web-fp32", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    scored = json.loads(done.stdout)["results"]["easy_vqa"]
    assert scored["web-fp32"]["runtime"] == "web" and scored["fp32+f32"]["runtime"] == "edge"
    assert scored["web-fp32"]["scores"] == scored["fp32+f32"]["scores"] and scored["web-fp32"]["n"] == 12
    web, edge = (read_results([tmp_path / f"eval-{name}.jsonl"]) for name in ("web-fp32", "fp32+f32"))
    answers = [[line.detail["given"] for line in lines if line.kind == "answer"] for lines in (web, edge)]
    assert len(answers[0]) == 12 and answers[0] == answers[1]
    for kind in ("environment", "run", "answer", "accuracy"):
        assert {line.target for line in web if line.kind == kind} == {"browser"}, kind
    assert {line.runtime for line in web if line.kind in ("run", "answer", "accuracy")} == {"web"}
    timed = [line.detail["timings_ms"] for line in web if line.kind == "answer"]
    assert all(one["vision_ms"] > 0 and one["prefill_ms"] > 0 for one in timed)
    facts = next(line.detail["runtime"] for line in web if line.kind == "environment")
    assert facts["verified"] is True and "Chrome" in facts["user_agent"] and facts["self_test"]["outcome"]
    again = run.invoke(app, [*common, "--runtime", "web", "--build", "web-fp32", "--json"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    bench = ["bench", str(stamped), "--target", "cpu,browser", "--build", "fp32+f32,web-fp32", "-t", "1"]
    bench += ["-r", "3", "--min-time", "0", "--max-tokens", "4", "--resolution", "0", "--no-memory"]
    done = run.invoke(app, [*bench, "-o", str(tmp_path / "bench.jsonl")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    files = [tmp_path / name for name in ("eval-web-fp32.jsonl", "eval-fp32+f32.jsonl", "bench.jsonl")]
    page = tmp_path / "report.html"
    done = run.invoke(app, ["report", *map(str, files), "-o", str(page)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = {(row.target, row.build): row for row in summarise(read_results(files)).rows}
    assert set(rows) == {("browser", "web-fp32"), ("cpu", "fp32+f32")}
    for row in rows.values():
        assert row.accuracy is not None and row.n == 12 and row.ttft is not None and row.bytes and row.verified is True
        assert not row.answered_on
    text = page.read_text(encoding="utf-8")
    assert "web-fp32" in text and "fp32+f32" in text and "browser" in text


@needs_page
def test_a_damaged_file_is_named_with_its_remedy(bundle: Path, tmp_path: Path) -> None:
    """Changed, cut, longer, gone; what is no file's fault keeps the other hint."""
    bad = Path(shutil.copytree(bundle, tmp_path / "bad"))
    graph = bad / "web/onnx/vision_encoder_q4.onnx"
    right = graph.read_bytes()
    with BrowserPage(bad) as page:
        for data, words in (
            (right[:-1] + bytes([right[-1] ^ 1]), "its SHA-256 differs"),
            (right[:-1], f"{len(right) - 1} bytes, {len(right)} expected"),
            (right + b"x", f"longer than its {len(right)} bytes"),
        ):
            graph.write_bytes(data)
            with pytest.raises(EngineError) as error:
                page.open("q4", provider="wasm", threads=1)
            assert error.value.message.startswith(f"the browser: web/onnx/vision_encoder_q4.onnx: {words}")
            assert error.value.hint == "copy the file again, or export again"
        graph.unlink()
        with pytest.raises(EngineError, match=r"^the browser: web/onnx/vision_encoder_q4\.onnx") as error:
            page.open("q4", provider="wasm", threads=1)
        assert error.value.hint == "copy the file again, or export again"
        with pytest.raises(EngineError, match="^the browser: the bundle has no ") as error:
            page.open("q8", provider="wasm", threads=1)
        assert "try the page by hand" in error.value.hint
    graph.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    command = ["eval", str(bad), "--task", "easy_vqa", "--limit", "1", "--build", "web-q4", "--allow-unverified"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "eval.jsonl")])
    assert isinstance(done.exception, EngineError) and done.exception.hint == "copy the file again, or export again"


@needs_page
def test_agreement_keeps_every_answer(bundle: Path, tmp_path: Path) -> None:
    """benchmarks/browser_agreement.py: question by question what was asked, what is right, and what each side said."""
    script = Path(__file__).parents[2] / "benchmarks" / "browser_agreement.py"
    command = [sys.executable, str(script), str(bundle), "--questions", "6", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    rows = found["answers"]
    assert len(rows) == found["questions"] == 6 and len({row["id"] for row in rows}) == 6
    assert all(set(row) == {"id", "question", "image", "expected", "edge", "fp32", "q4"} for row in rows)
    assert all(row["edge"] == row["fp32"] for row in rows) and found["fp32"]["equal"] == 1
    assert found["q4"]["differ"] == [row["id"] for row in rows if row["q4"] != row["edge"]]


def test_what_a_browser_does_not_take(bundle: Path, tiny_bundle: Path) -> None:
    """Said before anything is asked."""
    for root, arguments, words in (
        (bundle, ["--build", "web-fp32"], "carries no `verified` stamp"),
        (bundle, ["--build", "web-fp32", "--allow-unverified", "-c", "64"], "--ctx-size means nothing to a browser"),
        (bundle, ["--build", "web-fp32", "--allow-unverified", "--device", "cuda"], "--device means nothing"),
        (bundle, ["--build", "web-q8"], "no build 'web-q8'"),
        (bundle, ["--build", "web-q4", "--runtime", "edge"], "the edge runtime does not run build web-q4"),
        (bundle, ["--build", "fp32+f32", "--runtime", "web"], "the web runtime does not run build fp32+f32"),
        (tiny_bundle, ["--runtime", "web"], "holds no web files"),
    ):
        done = CliRunner().invoke(app, ["eval", str(root), "--task", "easy_vqa", "--limit", "1", *arguments])
        assert isinstance(done.exception, TinyLlavaEdgeError), (arguments, done.output)
        assert words in done.exception.message and done.exception.hint


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
    with pytest.raises(UnverifiedError, match="build web-fp32 carries no `verified` stamp") as unverified:
        ask(bundle, "browser", allow_unverified=False)
    assert "verify" in unverified.value.hint and "--allow-unverified" in unverified.value.hint
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

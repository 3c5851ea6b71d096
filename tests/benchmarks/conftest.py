"""Synthetic results: five builds and their reference with known accuracies, latencies and verdicts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tinyllava_edge.benchmarks.results import AnswerRecord, Sample
from tinyllava_edge.benchmarks.summary import STAGES

# build → (answers wrong of the reference's right ones, answers right of its wrong ones, MB, TTFT factor, verified)
BUILDS = {
    "fp32+f16": (0, 0, 12.0, 1.0, True),
    "fp32+q8_0": (1, 1, 9.5, 0.95, True),
    "int8+f16": (2, 1, 9.0, 0.72, True),
    "int8+q8_0": (2, 2, 6.5, 0.66, True),
    "int8+q4_k_m": (21, 3, 5.0, 0.62, True),
}
QUESTIONS, PER_PICTURE, REFERENCE_WRONG = 600, 6, 24
KINDS = ("yes/no", "color", "shape")
MEDIANS = (0.4, 1.1, 11.0, 14.0, 0.1)  # STAGES of fp32+f16 in ms


def records(wrong: set[int]) -> list[AnswerRecord]:
    """Answers to the same questions, wrong at the given numbers."""
    rows = []
    for k in range(QUESTIONS):
        kind = KINDS[k % 3]
        given = "nothing" if k in wrong else "yes"
        tier = "hard" if k % 4 == 0 else "easy"
        image = f"test-{k // PER_PICTURE}.png"
        rows.append(AnswerRecord(f"q{k}", image, f"is number {k} a {kind}?", "yes", given, kind, tier))
    return rows


def verify_record(passed: bool) -> dict[str, object]:
    """A verify record of the shape that the stamp keeps."""
    limits = {"max_abs": None, "relative": 0.35, "cosine": 0.9, "share": None, "reason": ""}
    numbers = {"max_abs": 0.021, "mean_abs": 0.0012, "relative": 0.013, "cosine": 0.99991, "share": None, "equal": None}
    checks = [
        {"stage": stage, "input": given, "passed": passed or stage != "image_embeds", "gated": given != "own",
         "tolerance": limits, "worst": "photo-97x640.jpg", **numbers}
        for stage in ("image_features", "image_embeds", "first_logits")
        for given in ("reference", "own")
    ]  # fmt: skip
    first = None if passed else "image_embeds"
    return {
        "build": "",
        "passed": passed,
        "first_divergence": first,
        "checks": checks,
        "samples": 66,
        "tie_margin": 0.1,
    }


def make_samples(seed: int = 0) -> list[Sample]:
    """A whole results file."""
    rng = random.Random(seed)
    order = list(range(QUESTIONS))
    rng.shuffle(order)
    lost = set(order[:REFERENCE_WRONG])
    machine = {
        "cpu": {"model": "Example CPU", "flags": ["avx2"], "cores": 2, "affinity": [0, 1], "governor": None},
        "memory_bytes": 24_000_000_000, "limits": {"cpu": None, "memory": None}, "system": "Linux 6.1 x86_64",
        "python": "3.11.2", "libraries": {"numpy": "2.4.6", "onnxruntime": "1.31.0"}, "git_commit": None,
        "load_average": [0.31, 0.28, 0.2], "time": "2026-01-01T12:00:00Z",
        "ceilings": {"copy_gb_per_s": 11.2, "gemm_f32_gflop_per_s": 96.0},
        "runtime": {"runtime": "edge", "n_threads": 2, "providers": ["CPUExecutionProvider"], "kv_cache": "f16"},
    }  # fmt: skip
    samples = [Sample("environment", environment_id="e1", detail=machine)]
    files = [
        {"path": f"{role}-{precision}.bin", "role": role, "precision": precision, "sha256": "ab" * 32,
         "bytes": 4_000_000, "tensor_types": {"F16": 12, "Q6_K": 3}}
        for role, precision in (("preprocess", "uint8"), ("vision", "fp32"), ("vision", "int8"), ("llm", "q4_k_m"))
    ]  # fmt: skip
    bundle = {"name": "TinyLLaVA-base-NanoSig-Nano", "sha256": "cd" * 32, "files": files, "visual_tokens": 64}
    bundle |= {"source": {"name": "checkpoint", "sha256": "ef" * 32}, "tool_versions": {}, "verified": {}}
    samples.append(Sample("bundle", environment_id="e1", detail=bundle))
    samples += [r.to_sample("reference", "fp32", "picture", k, "e1") for k, r in enumerate(records(lost))]
    blind = set(order[: int(0.35 * QUESTIONS)])
    samples += [r.to_sample("reference", "fp32", "blind", k, "e1") for k, r in enumerate(records(blind))]
    for build, (worse, better, size, factor, passed) in BUILDS.items():
        wrong = (lost - set(order[:better])) | set(order[REFERENCE_WRONG : REFERENCE_WRONG + worse])
        samples += [r.to_sample("edge", build, "picture", k, "e1") for k, r in enumerate(records(wrong))]
        parts = {"preprocess": 0.01, "vision": 0.4 * size, "llm": 0.6 * size, "total": size}
        samples += [Sample("size", "edge", build, role, mb * 1e6, "bytes", 0, "e1") for role, mb in parts.items()]
        samples.append(Sample("memory", "edge", build, "peak_rss", (120 + 2 * size) * 1e6, "bytes", 0, "e1"))
        samples.append(Sample("latency", "edge", build, "cold_ttft_ms", 60 * factor, "ms", 0, "e1"))
        for number in range(15):
            values = [m * factor * rng.lognormvariate(0, 0.04) for m in MEDIANS]
            stages = [*zip(STAGES, values, strict=True), ("ttft_ms", sum(values))]
            samples += [Sample("latency", "edge", build, stage, v, "ms", number, "e1") for stage, v in stages]
            samples.append(
                Sample("latency", "edge", build, "decode_tokens_per_s", 180 / factor, "tokens/s", number, "e1")
            )
        samples.append(Sample("verify", "edge", build, environment_id="e1", detail=verify_record(passed)))
    samples.append(Sample("command", detail={"command": "tinyllava-edge bench BUNDLE -o results.jsonl"}))
    return samples


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """The synthetic results."""
    return make_samples()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures that the synthetic answers name."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    for k in range(QUESTIONS // PER_PICTURE):
        Image.new("RGB", (64, 48), (k % 256, 90, 255 - k % 256)).save(root / f"test-{k}.png")
    return root


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two builds of the tiny random checkpoint: fp32+f32 and fp32+q8_0."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("bench") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32", "q8_0"), vision=("fp32",))
    return out

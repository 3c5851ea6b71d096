"""Ceilings, the work of a build against independent counts, and shares against numbers worked out by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tinyllava_edge.benchmarks import ceilings
from tinyllava_edge.benchmarks.environment import bundle_sample
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.benchmarks.roofline import shares
from tinyllava_edge.benchmarks.work import BuildWork, bundle_work, llm_work, vision_work
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import BundleError


def test_every_ceiling_is_measured_in_bounded_time() -> None:
    start = time.perf_counter()
    found = ceilings.ceiling_samples(1, "e1", seconds=0.2)
    assert time.perf_counter() - start < 60  # a starved machine; 1 s on a quiet one
    assert {s.stage: s.unit for s in found} == dict(ceilings.UNITS)
    assert all(s.value and 0.001 < s.value < 1e6 and s.detail == {"n_threads": 1} for s in found)
    assert {s.kind for s in found} == {"ceiling"} and {s.environment_id for s in found} == {"e1"}
    assert {s.detail["n_threads"] for s in ceilings.ceiling_samples(2, seconds=0.1)} == {2}


def test_a_product_that_onnx_runtime_refuses_is_null_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "product_graph", lambda *arguments: b"no graph")
    found = {s.stage: s for s in ceilings.ceiling_samples(1, seconds=0.05)}
    line = found["gemm_int8_gop_per_s"]
    assert line.value is None and "ONNX Runtime refused MatMulInteger" in line.detail["reason"]
    assert found["read_gb_per_s"].value and found["gemm_f32_gflop_per_s"].value is None


@pytest.mark.parametrize("operator", ["MatMul", "MatMulInteger"])
def test_the_hand_made_graph_is_a_product(operator: str) -> None:
    draw = np.random.default_rng(0)
    weights = draw.integers(-60, 60, (200, 3)).astype(np.float32 if operator == "MatMul" else np.int8)
    given = draw.integers(0, 127, (150, 200)).astype(np.float32 if operator == "MatMul" else np.uint8)
    graph = ceilings.product_graph(operator, 150, weights)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": given})
    # small numbers: without VNNI, x86 adds up two products in 16 bits
    assert np.array_equal(found, given.astype(np.int64) @ weights.astype(np.int64))
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)


def test_the_array_is_larger_than_the_caches_and_smaller_than_the_memory(tmp_path: Path) -> None:
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    for n, size in enumerate(("48K", "2048K", "65536K", "odd")):
        (cache / f"index{n}").mkdir(parents=True)
        (cache / f"index{n}/size").write_text(size)
    (tmp_path / "proc").mkdir()
    for free_kib, wanted in ((64 << 20, 256 << 20), (1 << 20, 64 << 20), (1024, 4 << 20)):
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {free_kib} kB\n")
        assert ceilings.array_bytes(tmp_path) == wanted


@pytest.mark.parametrize(
    ("vision", "connector"),
    [
        ("NanoSig", "resampler"),
        ("NanoC", "mlp2x_gelu"),
        ("NanoC", "ldpv2-16"),
        ("NanoSig", "pixelshuffle-16"),
        ("NanoSig", "avgpool-16"),
        ("NanoSig", "qformer-7"),
    ],
)
def test_vision_work_is_what_torch_counts(vision: str, connector: str, tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tinyllava_edge import spec
    from tinyllava_edge.connectors import connector_tokens
    from tinyllava_edge.export.vision import export_vision_fp32
    from tinyllava_edge.export.vision_quantize import quantize_vision_int8, quantize_vision_w4
    from tinyllava_edge.model import build_model

    made = spec.model_spec(f"TinyLLaVA-base-{vision}-Nano")
    options = {
        "resampler": {"num_queries": 7, "num_layers": 2},
        "qformer-7": {"num_layers": 3, "hidden_size": 96, "num_heads": 4},
    }.get(connector)
    made = replace(made, connector=connector, visual_tokens=connector_tokens(connector, 64, options))
    tower = {**spec.VISION_BACKBONES[vision].config, "num_hidden_layers": 2}
    text = {**spec.LLM_BACKBONES["Nano"].config, "num_hidden_layers": 1}
    model = build_model(made, tower, text, 1023, options).eval()
    counter = FlopCounterMode(display=False, depth=10)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.model.multi_modal_projector(model.tower_features(torch.zeros(1, 3, 64, 64)))
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    dead = sum(counts.get(name, 0) for name in counts if name.endswith((".encoder.layers.1", "VisionModel.head")))
    wanted = counter.get_total_flops() - dead
    assert dead > 0 < wanted
    path = tmp_path / "fp32.onnx"
    export_vision_fp32(model, made, path)
    assert vision_work(path, made) == {"float": wanted, "int8": 0}
    for name, quantise in (("int8.onnx", quantize_vision_int8), ("w4.onnx", quantize_vision_w4)):
        quantise(path, tmp_path / name)
        found = vision_work(tmp_path / name, made)
        assert sum(found.values()) == wanted and found["int8"] > 0.55 * wanted, name


def test_llm_work_is_ggufs_own_count(tiny_bundle: Path) -> None:
    gguf = pytest.importorskip("gguf")
    bundle = read_bundle(tiny_bundle)
    for name, build in bundle.builds().items():
        path = bundle.path(build.llm)
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        read = [t for n, t in tensors.items() if n != "token_embd.weight"]
        found = llm_work(path)
        exact = sum(int(t.n_bytes) for t in read)
        assert exact <= found["token_bytes"] <= exact + 32 * len(read), name  # with the padding
        body = sum(2 * int(t.n_elements) for t in read if len(t.shape) == 2 and t.name != "output.weight")
        assert found["body_float"] + found["body_int8"] == body
        assert found["head_float"] + found["head_int8"] == 2 * int(tensors["output.weight"].n_elements)
        assert (found["body_int8"] > 0) == (build.llm.precision == "q8_0")
        # 2 layers, 4 heads of 64 channels, 2 key heads
        assert found["pair"] == 2 * 2 * 4 * 128 and found["position_bytes"] == 2 * 2 * 2 * 128


def test_the_bundle_line_carries_the_work(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    line = bundle_sample(bundle, "e1")
    write_results(tmp_path / "r.jsonl", [line])
    (again,) = read_results([tmp_path / "r.jsonl"])
    assert {name: BuildWork.from_dict(value) for name, value in again.detail["work"].items()} == bundle_work(bundle)
    assert bundle_sample(replace(bundle, root=tmp_path), "e1").detail["work"] == {}


@pytest.mark.parametrize("cut", [0.0, 0.5, 0.99])
def test_damaged_graphs_are_refused(tiny_bundle: Path, tmp_path: Path, cut: float) -> None:
    bundle = read_bundle(tiny_bundle)
    data = (tiny_bundle / "vision-fp32.onnx").read_bytes()
    path = tmp_path / "v.onnx"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(BundleError, match="v.onnx"):
        vision_work(path, bundle.spec)


@pytest.mark.parametrize("value", [None, [], {}, {"vision_float": 1}, "x"])
def test_work_of_other_files_is_no_work(value: object) -> None:
    assert BuildWork.from_dict(value) is None
    good = dict.fromkeys(BuildWork.__dataclass_fields__, 1)
    assert BuildWork.from_dict(good) and BuildWork.from_dict({**good, "pair": -1}) is None
    assert BuildWork.from_dict({**good, "pair": 1.5}) is None and BuildWork.from_dict({**good, "pair": True}) is None


WORK = BuildWork(
    vision_float=20_000_000, vision_int8=80_000_000, body_float=0, body_int8=2_000_000, head_float=0,
    head_int8=1_000_000, pair=100, token_bytes=9_000_000, position_bytes=10_000, vocab=1000, pixel_bytes=12_000,
)  # fmt: skip
RATES = {"copy_gb_per_s": 1.0, "read_gb_per_s": 10.0, "gemm_f32_gflop_per_s": 10.0, "gemm_int8_gop_per_s": 40.0}
DETAIL = {"prompt_tokens": 100, "image_tokens": 64}


def lines(stages: dict[str, float], target: str = "cpu", **detail: object) -> list[Sample]:
    found = [Sample("bundle", environment_id="e1", detail={"work": {"b": WORK.to_dict()}})]
    found += [Sample("ceiling", stage=name, value=rate, environment_id="e1") for name, rate in RATES.items()]
    found.append(Sample("size", "edge", "b", "total", 20e6, "bytes", 0, "e1"))
    told = {**DETAIL, **detail}
    found += [Sample("latency", "edge", "b", s, v, "", 0, "e1", target, told) for s, v in stages.items()]
    return found


@pytest.mark.parametrize(
    ("stage", "value", "work", "percent"),
    [
        ("vision_ms", 8.0, 0.1, 50.0),  # 2 ms of floats and 2 ms of integers
        ("image_prefill_ms", 10.0, 0.128 + 64 * 65 / 2 * 100e-9, 32.208),  # 3.2 ms and 0.0208 ms
        ("text_prefill_ms", 10.0, 0.073 + (5050 - 2080) * 100e-9, 18.547),  # 36 rows and the head
        ("prefill_ms", 10.0, 0.201 + 5050 * 100e-9, 50.755),
        ("decode_tokens_per_s", 500.0, 0.01, 50.0),  # 9 MB of weights, 1 MB of 100 positions, in 2 ms
        ("load_warm_ms", 20.0, 0.02, 10.0),
        ("first_token_ms", 0.001, 4e-6, 40.0),
        ("pp10", 1000.0, 0.0091, 9.1),  # 10 tokens in 10 ms: 9 MB of weights and 0.1 MB of keys; operations take less
        ("pp40", 4000.0, 0.081 + 820 * 100e-9, 20.332),  # 40 tokens: operations take longer than the bytes
        ("tg200", 100.0, 0.01, 10.0),  # 100 positions on average
        ("vision_ms@t4", 8.0, 0.1, 50.0),
    ],
)
def test_shares_by_hand(stage: str, value: float, work: float, percent: float) -> None:
    (row,) = shares(lines({stage: value}))
    assert (row.target, row.runtime, row.build, row.stage) == ("cpu", "edge", "b", stage)
    assert row.work == pytest.approx(work) and row.share_percent == pytest.approx(percent, rel=1e-3)
    assert row.ceiling and row.work
    assert row.share_percent == pytest.approx(100 * row.work / row.ceiling / (row.ms / 1000)) and row.note == ""
    assert row.unit == ("GOP" if "vision" in stage or "prefill" in stage or stage == "pp40" else "GB")


def test_the_longer_of_operations_and_bytes_is_the_roof() -> None:
    """A picture with little to compute still reads its graph's weights, and a short prompt the language model's."""
    graph = Sample("size", "edge", "b", "vision", 50e6, "bytes", 0, "e1")
    (row,) = shares([*lines({"vision_ms": 8.0}), graph])
    assert (row.unit, row.work) == ("GB", pytest.approx(0.05)) and row.share_percent == pytest.approx(62.5)
    slow = [replace(s, value=0.5) if s.stage == "read_gb_per_s" else s for s in lines({"text_prefill_ms": 40.0})]
    (row,) = shares(slow)
    assert row.work == pytest.approx(0.00936) and row.share_percent == pytest.approx(46.8)  # 36 positions' keys, too
    body = [replace(s, stage="image_prefill_ms") if s.kind == "latency" else s for s in slow]
    (row,) = shares(body)  # without the head: 0.5 million int8 weights
    assert row.work == pytest.approx(0.009 + 64e-5 - 0.5e-3 * 34 / 32)


def test_the_median_counts_and_the_picture_s_size() -> None:
    samples = lines({"vision_ms": 8.0}, image_size="100x80") + lines({"vision_ms": 80.0})[-1:]
    samples += lines({"vision_ms": 4.0})[-1:] + lines({"preprocess_ms": 1.0}, image_size="100x80")[-1:]
    rows = {row.stage: row for row in shares(samples)}
    assert rows["vision_ms"].ms == 8.0
    assert rows["preprocess_ms"].share_percent == pytest.approx(3.6)  # 24 kB in, 12 kB out, at 1 GB/s
    steps = shares(lines({"decode_tokens_per_s": 500.0}, token_ms=[1.0] * 20))
    assert steps[0].work == pytest.approx(0.0101)


def test_over_a_hundred_says_why() -> None:
    rows = {row.stage: row for row in shares(lines({"vision_ms": 1.0, "decode_tokens_per_s": 9000.0}))}
    assert rows["vision_ms"].share_percent == pytest.approx(400) and "beat" in rows["vision_ms"].note
    assert "cache" in rows["decode_tokens_per_s"].note


def test_what_has_no_ceiling_says_so() -> None:
    (row,) = shares(lines({"decode_image_ms": 1.0}))
    assert row.share_percent is None and row.ceiling is None and "no ceiling" in row.note
    assert shares(lines({"ttft_ms": 1.0, "load_ms": 3.0, "pp0": 1.0, "ppx": 1.0})) == []  # not stages that do work
    (row,) = shares(lines({"preprocess_ms": 1.0}))
    assert row.share_percent is None and "the picture's size" in row.note
    only = [s for s in lines({"vision_ms": 8.0, "load_warm_ms": 5.0}) if s.stage != "gemm_int8_gop_per_s"]
    rows = {row.stage: row for row in shares(only)}
    assert rows["vision_ms"].share_percent is None and "ceiling" in rows["vision_ms"].note
    assert rows["load_warm_ms"].share_percent
    hostile = lines({"vision_ms": 8.0, "prefill_ms": 1.0}, prompt_tokens="many", image_tokens=-4, token_ms="x")
    assert [(row.stage, row.share_percent is None) for row in shares(hostile)] == [
        ("vision_ms", False),
        ("prefill_ms", True),
    ]


def test_targets_without_ceilings_and_builds_without_work_have_rows_that_say_so() -> None:
    """A GPU's ceilings aren't measured; neither are those of a machine whose lines aren't there."""
    for target in ("cuda", "ssh://pi@pi/x"):
        rows = shares(lines({"vision_ms": 1.0, "tg8": 5.0, "ttft_ms": 2.0}, target=target))
        assert [(row.stage, row.share_percent) for row in rows] == [("vision_ms", None), ("tg8", None)]
        assert all("no ceilings were measured for this target" in row.note for row in rows) and rows[1].ms == 200.0
    (row,) = shares([s for s in lines({"vision_ms": 8.0}) if s.kind != "bundle"])
    assert row.share_percent is None and "bundle line" in row.note


def test_another_environment_of_the_same_grid_needs_its_own_ceilings() -> None:
    more = [replace(s, environment_id="e2") for s in lines({"vision_ms@t4": 8.0}) if s.kind in ("latency", "ceiling")]
    rows = shares(lines({"vision_ms": 8.0}) + more)
    assert [row.stage for row in rows] == ["vision_ms", "vision_ms@t4"]
    changed = replace(WORK, vision_float=1)
    other = Sample("bundle", environment_id="e3", detail={"work": {"b": changed.to_dict()}})
    told = {row.stage: row.share_percent for row in shares([*lines({"vision_ms": 8.0}), other, *more])}
    assert told["vision_ms"] and told["vision_ms@t4"] is None

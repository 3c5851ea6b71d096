"""Both engines on each device that this machine has, and the truth about where they ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllava_edge.bundle import Bundle, read_bundle
from tinyllava_edge.errors import EngineError, UsageError
from tinyllava_edge.info import engine_facts
from tinyllava_edge.runtimes import devices
from tinyllava_edge.runtimes.binding import BoundSession
from tinyllava_edge.runtimes.devices import (
    ON_CPU,
    DevicePlan,
    choose_device,
    ggml_devices,
    gpus,
    machine_facts,
)
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.engine import open_bundle
from tinyllava_edge.runtimes.llama import Llama
from tinyllava_edge.runtimes.placement import read_placement
from tinyllava_edge.runtimes.providers import (
    CPU,
    CUDA,
    RECORD_NODES,
    cuda_problem,
    nodes_by_provider,
    onnxruntime_api,
    products_elsewhere,
    require_taken,
)
from tinyllava_edge.runtimes.reference import ReferenceRuntime
from tinyllava_edge.runtimes.vision import Vision, open_session

from .conftest import QUESTIONS, Pair, picture

# Greatest difference from the reference: (embeddings, logits). On CUDA ggml multiplies float32 as TF32.
LIMITS = {
    ("cpu", "fp32+f32"): (1e-3, 1e-3),
    ("cpu", "fp16+q4_k_m"): (5e-2, None),
    ("cuda", "fp32+f32"): (2e-3, 5e-2),
    ("cuda", "fp16+q4_k_m"): (5e-2, None),
}
NO_GPU = not gpus() and cuda_problem() is not None


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Every precision that a device may treat in a way of its own."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("devices") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32", "q4_k_m"), vision=("fp32", "fp16", "int8"))
    return read_bundle(out)


@pytest.mark.parametrize("build", ["fp32+f32", "fp16+q4_k_m"])
def test_equals_the_reference(device: DevicePlan, build: str, bundle: Bundle, reference: ReferenceRuntime) -> None:
    embeds, logits = LIMITS[device.name, build]
    with open_edge(bundle, build, allow_unverified=True, n_threads=1, plan=device) as edge:
        for seed, question in enumerate(QUESTIONS[:3]):
            ours, theirs = (runtime.probe(picture(seed), question) for runtime in (edge, reference))
            assert ours.prompt_ids == theirs.prompt_ids
            np.testing.assert_allclose(ours.pixel_values, theirs.pixel_values, atol=1e-5)
            np.testing.assert_allclose(ours.image_embeds, theirs.image_embeds, atol=embeds)
            if logits is not None:
                np.testing.assert_allclose(ours.first_logits, theirs.first_logits, atol=logits)


def test_a_device_answers_alike(device: DevicePlan, bundle: Bundle) -> None:
    """The same question twice, before and after another one: buffers that stay on a device keep nothing of it."""
    with open_edge(bundle, "fp16+q4_k_m", allow_unverified=True, n_threads=1, plan=device) as edge:
        first = edge.probe(picture(1), "what?")
        other = edge.probe(picture(2), "is it blue?")
        again = edge.probe(picture(1), "what?")
        np.testing.assert_array_equal(first.image_embeds, again.image_embeds)
        np.testing.assert_array_equal(first.first_logits, again.first_logits)
        assert np.abs(first.image_embeds - other.image_embeds).max() > 0.1
        many = edge.answer_many(picture(1), QUESTIONS[:3], max_tokens=4)
        assert [len(answer.token_ids) for answer in many] == [4, 4, 4]


def test_what_ran_where(device: DevicePlan, bundle: Bundle) -> None:
    """The engines' own account: nodes by provider, layers and buffers; the same facts with every result."""
    with open_edge(bundle, "fp32+q4_k_m", allow_unverified=True, n_threads=1, plan=device) as edge:
        edge.answer(picture(0), "what?", max_tokens=2)
        facts = json.loads(json.dumps(edge.environment()))
    assert facts["device"] == device.name and facts["n_threads"] == 1
    weights = facts["llama_cpp_buffers_mib"]["model"]
    if device.name == "cuda":
        assert facts["providers"] == [CUDA, CPU]
        assert facts["vision_nodes"][CUDA] > 5 * facts["vision_nodes"].get(CPU, 0)  # which computes shapes
        assert facts["llama_cpp_layers_on_gpu"] == facts["llama_cpp_layers"] == 3  # two, and the output layer
        assert max(weights, key=weights.__getitem__) == "CUDA0" and facts["gpu"] is True
        assert any(name == "CUDA0" for name in facts["llama_cpp_buffers_mib"]["kv"])
    else:
        assert facts["providers"] == [CPU] and facts["vision_nodes"] == {}
        assert facts["llama_cpp_layers_on_gpu"] == 0 and facts["gpu"] is False
        assert sum(weights.values()) > 1 and all(name.startswith("CPU") for name in weights)
        repacks = "AVX2 = 1" in facts["llama_cpp_system_info"] and "AMX_INT8 = 1" not in facts["llama_cpp_system_info"]
        assert facts["llama_cpp_repack"] is ("CPU_REPACK" in weights)
        assert facts["llama_cpp_repack"] or not repacks  # K-quants are repacked for AVX2


def test_float32_is_not_repacked(bundle: Bundle) -> None:
    with open_edge(bundle, "fp32+f32", allow_unverified=True, n_threads=1) as edge:
        assert edge.environment()["llama_cpp_repack"] is False


def test_the_engine_streams(device: DevicePlan, bundle: Bundle) -> None:
    with open_bundle(bundle, "fp16+q4_k_m", device=device.name, allow_unverified=True, n_threads=1) as engine:
        stream = engine.generate("what?", image=picture(0), stream=True, max_tokens=12)
        assert "".join(stream) == stream.result().text
        assert engine.environment()["device"] == device.name


def test_some_layers(device: DevicePlan, bundle: Bundle) -> None:
    """-ngl counts from the output layer on; the rest stays on the CPU, and both are told."""
    if device.name == "cpu":
        with pytest.raises(UsageError, match="n_gpu_layers=1 on the device cpu"):
            choose_device("cpu", 1)
        return
    plan = choose_device(device.name, 2)
    with open_edge(bundle, "fp32+f32", allow_unverified=True, n_threads=1, plan=plan) as edge:
        facts = edge.environment()
        assert (facts["llama_cpp_layers_on_gpu"], facts["llama_cpp_layers"]) == (2, 3)
        assert len(facts["llama_cpp_buffers_mib"]["model"]) > 1
        assert edge.answer(picture(0), "what?", max_tokens=4).token_ids
    assert choose_device(device.name, 0).n_gpu_layers == 0


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU that both engines know")
def test_cuda_without_cuda_is_an_error(bundle: Bundle) -> None:
    """Both engines are named, each with the line that mends it; nothing runs on the CPU in silence."""
    with pytest.raises(EngineError) as caught:
        open_bundle(bundle, device="cuda", allow_unverified=True)
    assert CUDA in caught.value.message and "llama.cpp has no CUDA device (it has CPU)" in caught.value.message
    assert "tinyllava-edge[gpu]" in caught.value.hint and "-DGGML_CUDA=on" in caught.value.hint
    with pytest.raises(EngineError) as caught:  # the language model left to the CPU: its part is not asked for
        choose_device("cuda", 0)
    assert CUDA in caught.value.message and "llama.cpp" not in caught.value.message
    plan = choose_device("auto")
    assert plan.providers == (CPU,) and plan.n_gpu_layers == 0
    assert CUDA in plan.reasons[0] and "built without it" in plan.reasons[1]
    with pytest.raises(EngineError, match="n_gpu_layers=3: llama.cpp has no GPU"):
        choose_device("auto", 3)


@pytest.mark.skipif(bool(gpus()), reason="llama.cpp has a GPU here")
def test_layers_that_land_nowhere(bundle: Bundle) -> None:
    """llama.cpp itself ignores n_gpu_layers when it was built without a GPU back end."""
    path = bundle.path(bundle.build("fp32+f32").llm)
    with pytest.raises(EngineError, match="put no layer on a GPU, n_gpu_layers=2"):
        Llama(path, n_ctx=256, n_threads=1, n_gpu_layers=2)


@pytest.mark.skipif(cuda_problem() is None, reason="CUDA works here")
def test_a_provider_that_does_not_start(bundle: Bundle) -> None:
    """onnxruntime-gpu lists CUDA on a machine without a GPU too and falls back; that must not pass for CUDA."""
    build = bundle.build("fp32+f32")
    paths = bundle.path(build.preprocess), bundle.path(build.vision)
    with pytest.raises(EngineError, match=rf"vision-fp32\.onnx: .*{CUDA}"):
        Vision(*paths, bundle.spec, n_threads=1, providers=(CUDA, CPU))
    silent = onnxruntime_api().InferenceSession(str(paths[1]), providers=[CPU])
    with pytest.raises(EngineError, match=f"{CUDA} did not start"):
        require_taken(paths[1], silent, (CUDA, CPU))


def test_work_left_to_another_provider(bundle: Bundle) -> None:
    """Products are told by operator from ONNX Runtime's own record, so that a graph of them can't pass for CUDA's."""
    ort = onnxruntime_api()
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD_NODES, "1")
    path = bundle.path(bundle.build("int8+f32").vision)
    session = ort.InferenceSession(str(path), options, providers=[CPU])
    left = products_elsewhere(session, CUDA)
    assert any("MatMul" in kind for kind in left) and left["Conv"] == 1
    assert products_elsewhere(session, CPU) == {}
    assert sum(left.values()) < nodes_by_provider(session)[CPU]
    silent = ort.InferenceSession(str(path), providers=[CPU])
    assert nodes_by_provider(silent) == products_elsewhere(silent, CUDA) == {}


def test_int8_stays_on_the_cpu() -> None:
    cuda, auto = (DevicePlan(name, (CUDA, CPU), -1, ()) for name in ("cuda", "auto"))
    with pytest.raises(EngineError, match="vision precision int8 runs on the CPU only"):
        cuda.vision_providers("int8")
    assert auto.vision_providers("int8") == ON_CPU.vision_providers("int8") == (CPU,)
    assert auto.vision_providers("fp16") == cuda.vision_providers("fp16") == (CUDA, CPU)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [("gpu", None, "unknown device 'gpu'"), ("auto", -2, "n_gpu_layers=-2"), ("cuda", 1001, "n_gpu_layers=1001")],
)
def test_settings_out_of_range(name: str, layers: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_device(name, layers)


def test_bound_tensors_give_what_a_plain_run_gives(bundle: Bundle) -> None:
    """I/O binding in the CPU's own memory: equal values, outputs that a later run leaves alone, errors passed on."""
    path = bundle.path(bundle.build("fp32+f32").vision)
    session = open_session(path, 1, (CPU,))
    bound = BoundSession(session, "cpu")
    pixels = [np.random.default_rng(seed).normal(size=(1, 3, 64, 64)).astype(np.float32) for seed in (0, 1)]
    names = ["image_embeds", "image_features"]
    first = bound.run(names, {"pixel_values": pixels[0]})
    kept, unchanged = first[0].copy(), pixels[0].copy()
    second = bound.run(names[:1], {"pixel_values": pixels[1]})
    np.testing.assert_array_equal(first[0], kept)
    np.testing.assert_array_equal(pixels[0], unchanged)
    for outputs, value in ((first, pixels[0]), (second, pixels[1])):
        for ours, theirs in zip(outputs, session.run(names, {"pixel_values": value}), strict=False):
            np.testing.assert_array_equal(ours, theirs)
    two = np.concatenate(pixels)
    np.testing.assert_allclose(bound.run(names, {"pixel_values": two})[0][0], kept[0], atol=1e-4)
    with pytest.raises(Exception, match="pixel_values"):
        bound.run(names, {"pixel_values": pixels[0][:, :, :32]})
    assert bound.get_providers() == [CPU]


def test_the_machine(capfd: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = json.loads(json.dumps(machine_facts()))
    names = [device["name"] for device in facts["llama_cpp_devices"]]
    assert "CPU" in names and names == [device.name for device in ggml_devices()]
    assert facts["llama_cpp_gpu_offload"] is bool(gpus())
    assert CPU in facts["onnxruntime_providers"] and "build type" in facts["onnxruntime_build"]
    assert all(device["memory_bytes"] > 1 << 28 for device in facts["llama_cpp_devices"] if device["kind"] == "cpu")
    assert facts["ggml_version"][0].isdigit() and "." in facts["ggml_version"]
    commit = facts["ggml_commit"]
    assert commit == "unknown" or all(letter in "0123456789abcdef" for letter in commit.removesuffix("-dirty"))
    assert capfd.readouterr() == ("", "")


def test_a_library_that_does_not_tell_its_commit() -> None:
    assert devices._library_text("ggml_no_such_function") is None


def test_info_tells_of_the_engines() -> None:
    """CUDA is what was tried, not what is listed; a listed provider that doesn't start is a problem with its cure."""
    facts, broken = engine_facts()
    problem = cuda_problem()
    assert facts["onnxruntime_cuda"] == (problem or "works")
    listed = CUDA in facts["onnxruntime_providers"]
    assert any("does not start" in line and "Mend:" in line for line in broken) is (listed and problem is not None)
    assert facts["llama_cpp_devices"] == machine_facts()["llama_cpp_devices"]


def test_reading_the_account_of_a_load() -> None:
    """Lines as llama.cpp 0.3.36 writes them, some of them in pieces."""
    pieces = [
        "load_tensors: offloading 22 repeating layers to GPU\nload_tensors: offloaded 23/23 ",
        "layers to GPU\nload_tensors:   CPU_Mapped model buffer size =    66.50 MiB\n",
        "load_tensors:        CUDA0 model buffer size =   541.25 MiB\n",
        "load_tensors:        CUDA0 model buffer size =     1.25 MiB\n",
        "llama_kv_cache:      CUDA0 KV buffer size =    44.00 MiB\n",
    ]
    placement = read_placement(pieces)
    assert (placement.layers_on_gpu, placement.layers, placement.repacked_mib) == (23, 23, 0)
    assert placement.buffers_mib == {"model": {"CPU_Mapped": 66.5, "CUDA0": 542.5}, "kv": {"CUDA0": 44.0}}
    assert read_placement([]).layers is None


def test_reference_bundle_is_the_conftest_one(siglip: Pair, bundle: Bundle) -> None:
    """Both come from one checkpoint, or the comparison above would mean nothing."""
    assert read_bundle(siglip.bundle).spec == bundle.spec

"""The speed comparison: runs on a tiny model, takes turns, and its ratios are those of its samples."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = ("runtime_speed", "runtime_peers", "runtime_ceilings", "runtime_report", "full_size")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        import runtime_speed

        yield runtime_speed
    finally:
        while str(FOLDER) in sys.path:
            sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an mmproj, which llama.cpp's road needs."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("speed") / "tiny"
    export_bundle(tiny_checkpoint, out, llm=("q8_0",), vision=("fp32",), mmproj=("f16",))
    return out


@pytest.fixture(scope="module")
def measured(
    script: Any, bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Samples of every part that takes no process of its own, read from the file."""
    out = tmp_path_factory.mktemp("samples") / "out.jsonl"
    settings = script.Settings(
        build=None, threads=1, repetitions=3, decode_repetitions=3, tokens=6, decode_tokens=4, nano_repetitions=2
    )
    record = script.Recorder(out)
    script.ceilings.BIG = 1 << 20
    parts = ("ttft", "second", "decode", "ceilings", "nano")
    failed = script.run([(bundle, tiny_checkpoint)], [bundle], settings, parts, record, "the command")
    assert failed == []
    samples = [json.loads(line) for line in out.read_text().splitlines()]
    assert samples == record.samples
    return samples


def of(samples: list[dict[str, Any]], part: str, who: str = "") -> list[dict[str, Any]]:
    return [s for s in samples if s["part"] == part and who in ("", s["who"])]


def test_they_take_turns(measured: list[dict[str, Any]]) -> None:
    """Each repetition has every participant once, and another one begins each time."""
    for part, names in (
        ("ttft", ["ours", "ours, no caches", "mtmd"]),
        ("decode", ["ours", "llama_decode", "llama_decode, fused attention"]),
    ):
        rows = sorted(of(measured, part), key=lambda s: s["at"])
        turns = [[s["who"] for s in rows if s["repetition"] == number] for number in range(3)]
        assert turns == [names, names[1:] + names[:1], names[2:] + names[:2]]
        assert [s["repetition"] for s in rows] == sorted(s["repetition"] for s in rows)


def test_what_may_be_cached(measured: list[dict[str, Any]]) -> None:
    """A new picture finds the system prompt at most; without caches nothing; a second question finds the picture."""
    ours, second = of(measured, "ttft", "ours"), of(measured, "second")
    assert all(0 < s["n_cached_tokens"] < s["n_prompt_tokens"] - s["n_image_tokens"] and s["vision_ms"] for s in ours)
    for who in ("ours, no caches", "mtmd"):
        assert all(s["n_cached_tokens"] == 0 and s["vision_ms"] > 0 for s in of(measured, "ttft", who))
    assert len(second) == 3
    assert all(s["n_cached_tokens"] > s["n_image_tokens"] and s["vision_ms"] == 0 for s in second)
    for number in range(3):
        asked = [s for s in of(measured, "ttft") if s["repetition"] == number]
        assert len({(s["n_prompt_tokens"], s["n_image_tokens"]) for s in asked}) == 1


def test_ratios_are_of_the_samples(script: Any, measured: list[dict[str, Any]]) -> None:
    targets = {t.what: t for t in script.report.__globals__["targets"](measured)}

    def median(part: str, who: str, key: str) -> float:
        return statistics.median(s[key] for s in of(measured, part, who) if s[key] is not None)

    def typical(ours: tuple[str, str], theirs: tuple[str, str], key: str) -> float:
        """Both of one repetition, which met the same machine."""
        sides = [{s["repetition"]: s[key] for s in of(measured, *side)} for side in (ours, theirs)]
        return statistics.median(value / sides[1][number] for number, value in sides[0].items())

    found = targets["TTFT, ours / mtmd"]
    assert found.value == typical(("ttft", "ours"), ("ttft", "mtmd"), "ttft_ms")
    assert found.n == 3 and (found.aim, found.at_most) == (0.75, True)
    assert all(target.low <= target.value <= target.high for target in targets.values())
    assert targets["vision, ours / mtmd"].value == typical(("ttft", "ours"), ("ttft", "mtmd"), "see_ms")
    again = targets["second question / first, TTFT"].value
    assert again == typical(("second", "ours"), ("ttft", "ours"), "ttft_ms")
    loop = max(script.LOOPS, key=lambda name: median("decode", name, "tokens_per_s"))
    steps = targets["decode, ours / best llama_decode loop"]
    assert steps.value == typical(("decode", "ours"), ("decode", loop), "tokens_per_s") and not steps.at_most
    text = script.report(measured)
    assert all(f"| {t.what} |" in text and (" met |" in text or "not met" in text) for t in targets.values())


@pytest.mark.parametrize(("at_most", "value", "met"), [(True, 0.9, True), (True, 1.1, False), (False, 0.9, False)])
def test_met_or_not(script: Any, at_most: bool, value: float, met: bool) -> None:
    target = script.report.__globals__["Target"]
    assert target("", "", value, value, value, 1.0, at_most).met is met


def test_overhead_is_what_the_engines_leave(measured: list[dict[str, Any]]) -> None:
    rows = of(measured, "nano")
    assert len(rows) == 4
    for s in rows:
        assert s["ort_ms"] > 0 and s["llama_ms"] > 0
        assert s["overhead_ms"] == pytest.approx(s["ttft_ms"] - s["ort_ms"] - s["llama_ms"])
        assert 0 < s["overhead_ms"] < s["overhead_by_clock_ms"]


def test_work_is_the_models(script: Any, bundle: Path, tiny_checkpoint: Path, measured: list[dict[str, Any]]) -> None:
    """Tower and decoder are counted from their shapes; the checkpoint's own tensors give the same."""
    from safetensors import safe_open

    (found,) = of(measured, "ceilings")
    spec = json.loads((tiny_checkpoint / "model_spec.json").read_text())
    with safe_open(tiny_checkpoint / "model.safetensors", "np") as file:
        keys = list(file.keys())
        shapes = {key: file.get_slice(key).get_shape() for key in keys}
    size = {key: math.prod(shape) for key, shape in shapes.items()}
    text = {k: n for k, n in size.items() if "language_model" in k and "embed_tokens" not in k and "lm_head" not in k}
    assert found["body"] == sum(text.values())
    layer = sum(n for k, n in size.items() if "vision" in k and ".layers.0." in k and len(shapes[k]) == 2)
    tokens = spec["visual_tokens"]
    layers = 3 + 1 + spec["feature_layer"]
    tower = next(shapes[k][0] for k in shapes if "vision" in k and k.endswith("q_proj.weight"))
    attention = 2 * tokens * tokens * tower
    patches = next(n for k, n in size.items() if "patch_embedding.weight" in k)
    connector = sum(n for k, n in size.items() if "projector" in k and len(shapes[k]) == 2)
    assert found["vision_ops"] == 2 * (layers * (tokens * layer + attention) + tokens * (patches + connector))


def test_a_failing_part_loses_nothing(script: Any, bundle: Path, tmp_path: Path) -> None:
    """No checkpoint where transformers looks for one; the child's last word is kept."""
    record = script.Recorder(tmp_path / "out.jsonl")
    settings = script.Settings(build=None, threads=1, cold_builds=("fp32+q8_0",), hf_types=("float32",))
    failed = script.run([(bundle, tmp_path / "none")], [], settings, ("cold", "transformers"), record)
    assert len(failed) == 1 and "none" in failed[0]
    checked, unchecked = of(record.samples, "cold")
    assert checked["hashes"] and not unchecked["hashes"]
    assert checked["open_to_token_ms"] == pytest.approx(checked["open_ms"] + checked["answer_ms"])
    assert "## Failed" in script.report(record.samples) and "fp32+q8_0" in script.report(record.samples)


def test_generate_gets_the_same_prompt(script: Any, tiny_checkpoint: Path, measured: list[dict[str, Any]]) -> None:
    asked = next(s for s in of(measured, "ttft", "ours"))
    text = script.peers.question(30, lambda text: len(text.split()))
    arguments = {"checkpoint": str(tiny_checkpoint), "dtype": "float32", "threads": 1, "question": text}
    found = script.peers.child("generate", {**arguments, "pictures": [script.peers.photo(1).hex()] * 2}, 120)
    assert len(found["ttft_ms"]) == 2 and found["n_prompt_tokens"] > asked["n_image_tokens"]

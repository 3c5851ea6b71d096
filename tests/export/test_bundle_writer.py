"""Whole exports: what a bundle holds, and what a failed, killed or cramped export leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tinyllava_edge import checkpoint
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import BundleError, ExportError, StorageError, UnverifiedError, UsageError
from tinyllava_edge.export import llm
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.files import sha256_tree
from tinyllava_edge.runtimes.edge import open_edge


@pytest.mark.parametrize("which", ["tiny_checkpoint", "tiny_checkpoint_clip"])
def test_default_export(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Six builds, highest precision first; hashes, types, source and versions in the manifest; no stray files."""
    root, out = request.getfixturevalue(which), tmp_path / "bundle"
    steps: list[str] = []
    bundle = export_bundle(root, out, progress=steps.append)
    bundle.check()
    assert list(bundle.builds()) == [f"{v}+{m}" for m in ("f16", "q8_0", "q4_k_m") for v in ("fp32", "int8")]
    assert {p.name for p in out.iterdir()} == {"bundle.json", *(file.path for file in bundle.files)}
    types = {file.path: set(file.tensor_types) for file in bundle.files}
    assert types["llm-f16.gguf"] == {"f16", "f32"} and types["llm-q8_0.gguf"] == {"q8_0", "f32"}
    assert types["llm-q4_k_m.gguf"] == {"q4_k", "q6_k", "f32"} and "int8" in types["vision-int8.onnx"]
    assert bundle.source == {"name": bundle.name, "sha256": sha256_tree(root)}
    assert bundle.spec == checkpoint.load_spec(root)
    assert set(bundle.tool_versions) >= {"torch", "transformers", "onnx", "onnxruntime", "gguf", "llama-cpp-python"}
    assert "unknown" not in bundle.tool_versions.values()
    with pytest.raises(UnverifiedError):
        bundle.require_verified(bundle.build())
    assert steps[0].startswith("loading") and any("q4_k_m" in step for step in steps)
    assert str(root) not in (out / "bundle.json").read_text()
    read_bundle(shutil.move(out, tmp_path / "moved")).check()  # self-contained


def test_graphs_fit_together(tiny_checkpoint_clip: Path, tmp_path: Path) -> None:
    """A photograph-sized picture through preprocess.onnx and vision-fp32.onnx equals processor + stock tower, 1e-3."""
    bundle = export_bundle(tiny_checkpoint_clip, tmp_path / "bundle", llm=["q4_0"], vision=["fp32"])
    picture = np.random.default_rng(0).integers(0, 256, (97, 150, 3), dtype=np.uint8)
    (pixels,) = ort.InferenceSession(bundle.root / "preprocess.onnx").run(None, {"image": picture[None]})
    embeds, _ = ort.InferenceSession(bundle.root / "vision-fp32.onnx").run(None, {"pixel_values": pixels})
    loaded = checkpoint.load(tiny_checkpoint_clip)
    fed = checkpoint.image_processor(loaded.spec)(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = loaded.model.model.multi_modal_projector(loaded.model.tower_features(fed)).numpy()
    cosine = (embeds * wanted).sum(-1) / np.linalg.norm(embeds, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert embeds.shape == (1, 64, 256) and cosine.min() > 0.999


def test_only_what_was_asked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Intermediates are not shipped; names repeat or come in any order."""
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", llm=["q4_0", "q8_0", "q4_0"], vision=["int8"])
    assert {p.name for p in bundle.root.iterdir()} == {
        *("bundle.json", "export.json", "preprocess.onnx", "vision-int8.onnx", "llm-q8_0.gguf", "llm-q4_0.gguf")
    }
    assert list(bundle.builds()) == ["int8+q8_0", "int8+q4_0"]


def test_same_checkpoint_same_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two exports give the same bytes, so a hash names a build; f32 alone needs no f16 file."""
    first, second = (
        export_bundle(tiny_checkpoint, tmp_path / name, llm=types)
        for name, types in (("a", ["f32", "q4_k_m"]), ("b", ["f32"]))
    )
    assert {file.path for file in second.files} == {
        *("export.json", "preprocess.onnx", "vision-fp32.onnx", "vision-int8.onnx", "llm-f32.gguf")
    }
    hashes = {file.path: file.sha256 for file in first.files}
    assert all(hashes[file.path] == file.sha256 for file in second.files if file.role != "text")
    assert {p.name for p in second.root.iterdir()} == {"bundle.json", *(file.path for file in second.files)}


def test_bfloat16_checkpoint_in_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Quantised from bfloat16, so nothing is lost before; every GGUF in shards, which the device opens and checks."""
    loaded = checkpoint.load(tiny_checkpoint)
    checkpoint.save(loaded.model.to(torch.bfloat16), loaded.tokenizer, loaded.spec, tmp_path / "bf16")
    bundle = export_bundle(
        tmp_path / "bf16",
        tmp_path / "out",
        llm=["bf16", "q8_0"],
        vision=["fp32"],
        mmproj=["f16"],
        max_shard_bytes=700_000,
    )
    figures = json.loads((bundle.root / "export.json").read_text())
    q8_0 = {"made_from": "bf16", "fallbacks": {}, "overrides": {}, "imatrix_sha256": None}
    assert figures["llm"]["q8_0"] == q8_0 and figures["mmproj"]["f16"]["passed"] is True
    assert {"Modelfile", "STOCK_HOSTS.md"} <= {file.path for file in bundle.files if file.role == "text"}
    assert [report["precision"] for report in figures["vision"]] == ["fp32"]
    assert figures["vision"][0]["cosine_min"] > 0.9999 and len(figures["vision"][0]["pictures"]) == 8
    names = {path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*")}
    assert names == {"bundle.json", *(entry.path for file in bundle.files for entry in file.entries)}
    by_kind = {(file.role, file.precision): file for file in bundle.files}
    assert set(by_kind[("llm", "bf16")].tensor_types) == {"bf16", "f32"} and ("mmproj", "f16") in by_kind
    for kind in ("bf16", "q8_0"):
        assert by_kind[("llm", kind)].path.startswith(f"llm-{kind}-00001-of-") and by_kind[("llm", kind)].parts
    with open_edge(bundle, "fp32+q8_0", allow_unverified=True, n_threads=1) as runtime:
        assert len(runtime.environment()["files"]) == 3 + len(by_kind[("llm", "q8_0")].parts)
        assert runtime.answer(np.zeros((8, 8, 3), np.uint8), "what color?", max_tokens=2).token_ids
    manifest = json.loads((bundle.root / "bundle.json").read_text())
    for entry in manifest["files"]:
        entry.pop("parts", None)
    (bundle.root / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has other shards than bundle.json lists"):
        open_edge(bundle.root, "fp32+q8_0", allow_unverified=True, n_threads=1)


def test_model_is_never_whole_in_memory(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The language model is asked for a few rows at a time, and none are kept."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most, plain = [0], checkpoint.LlmSource.rows

    def rows(source: checkpoint.LlmSource, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = plain(source, name, start, stop)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(checkpoint.LlmSource, "rows", rows)
    monkeypatch.setattr(llm, "BLOCK_BYTES", 1 << 18)  # 256 rows of float32
    monkeypatch.setattr(checkpoint, "load", lambda root: pytest.fail("the whole checkpoint was loaded"))
    export_bundle(tiny_checkpoint, tmp_path / "bundle", llm=["f16"], vision=["fp32"])
    assert len(alive) > 30 and most[0] <= 2


def test_unknown_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"llm": ["q4"]}, "q4"),
        ({"vision": ["fp64"]}, "fp64"),
        ({"llm": []}, "no LLM type"),
        ({"mmproj": ["q2_k"]}, "q2_k"),
        ({"web": ["fp64"]}, "fp64"),
        ({"llm": ["iq2_xs"]}, "needs an importance matrix"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            export_bundle(tiny_checkpoint, tmp_path / "bundle", **arguments)
        assert "known: " in caught.value.hint or "imatrix" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_options_that_go_with_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Said before the long work, whatever the part that would have told at its end."""
    for arguments, error, message in (
        ({"overrides": {"ffn": "q9"}}, UsageError, "unknown tensor type 'q9'"),
        ({"overrides": {"ffn": "q6_k"}, "llm": ["f16"]}, UsageError, "overrides have no effect on f16"),
        ({"clip_workaround": True}, UsageError, "none is asked for"),
        ({"clip_workaround": True, "mmproj": ["f16"]}, ExportError, "workaround on a siglip tower"),
    ):
        steps: list[str] = []
        with pytest.raises(error, match=message) as caught:
            export_bundle(tiny_checkpoint, tmp_path / "bundle", progress=steps.append, **arguments)  # type: ignore[arg-type]
        assert caught.value.hint and len(steps) < 2
    assert not list(tmp_path.iterdir())


def test_not_into_the_checkpoint(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="lies in the checkpoint"):
        export_bundle(tiny_checkpoint, tiny_checkpoint / "bundle")
    assert not (tiny_checkpoint / "bundle").exists()


def test_no_overwrite(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An existing target stays as it is, before any work; --force replaces it as a whole, and only on success."""
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        export_bundle(tiny_checkpoint, out, progress=lambda text: pytest.fail(text))
    with pytest.raises(StorageError, match="something else"):
        export_bundle(tiny_checkpoint, out, force=True, progress=lambda text: pytest.fail(text))
    (out / "bundle.json").write_text("{}")  # what an export leaves

    def fail(text: str) -> None:
        if text.startswith("language model: q4_0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, out, llm=["q4_0"], vision=["int8"], force=True, progress=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"] and (out / "mine.txt").read_text() == "mine"
    export_bundle(tiny_checkpoint, out, llm=["q4_0"], vision=["int8"], force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"] and not (out / "mine.txt").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from tinyllava_edge.export import llm
from tinyllava_edge.export.bundle_writer import export_bundle
def die(text):
    if text.startswith("language model: q4_0"):
        os.kill(os.getpid(), signal.SIGKILL)
export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), llm=["q4_0"], vision=["fp32"], progress=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A killed export leaves nothing under the final name, and the next one sweeps its remains."""
    out = tmp_path / "bundle"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(out)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    export_bundle(tiny_checkpoint, out, llm=["q4_0"], vision=["fp32"]).check()
    assert list(tmp_path.iterdir()) == [out]


def test_bad_weights_and_contradictions(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """NaN anywhere, also in the tower; a spec that says other than config.json."""
    loaded = checkpoint.load(tiny_checkpoint)
    with torch.no_grad():
        loaded.model.model.vision_tower.encoder.layers[1].mlp.fc1.bias[7] = float("inf")
    checkpoint.save(loaded.model, loaded.tokenizer, loaded.spec, tmp_path / "bad")
    with pytest.raises(ExportError, match=r"vision_tower\.encoder\.layers\.1\.mlp\.fc1\.bias"):
        export_bundle(tmp_path / "bad", tmp_path / "bundle")
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    spec = json.loads((tmp_path / "other" / "model_spec.json").read_text())
    (tmp_path / "other" / "model_spec.json").write_text(json.dumps({**spec, "feature_layer": -1}))
    with pytest.raises(ExportError, match="feature_layer = -2, model_spec.json says -1"):
        export_bundle(tmp_path / "other", tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "other"]


@pytest.mark.parametrize("kibibytes", [8, 5000, 8400])
def test_full_disk(kibibytes: int, tiny_checkpoint: Path, small_disk: Callable[[int], Path]) -> None:
    """The disk fills up while torch, the int8 quantiser or llama.cpp writes: one error each, no remains."""
    place = small_disk(kibibytes)
    with pytest.raises(StorageError, match="no space left"):
        export_bundle(tiny_checkpoint, place / "bundle")
    assert not list(place.iterdir())

"""Bundles that were changed, truncated, mixed up or never verified: an error that names the file, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.bundle import MANIFEST, read_bundle
from tinyllava_edge.errors import BundleError, EngineError, ImageError, TinyLlavaEdgeError, UnverifiedError, UsageError
from tinyllava_edge.files import sha256_file
from tinyllava_edge.runtimes.devices import ON_CPU
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge

from .conftest import Pair, picture

BUILD = "fp32+f16"
FILES = ("preprocess.onnx", "vision-fp32.onnx", "llm-f16.gguf")


@pytest.fixture
def bundle(siglip: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(siglip.bundle, tmp_path / "bundle"))


def rehash(bundle: Path) -> None:
    """Make the manifest agree with the files again, as someone who forges a bundle would."""
    path = bundle / MANIFEST
    value = json.loads(path.read_text())
    for entry in value["files"]:
        file = bundle / entry["path"]
        entry["sha256"], entry["bytes"] = sha256_file(file), file.stat().st_size
    path.write_text(json.dumps(value))


def edit_spec(bundle: Path, **changes: object) -> None:
    path = bundle / MANIFEST
    value = json.loads(path.read_text())
    value["model"].update(changes)
    path.write_text(json.dumps(value))


def flip(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "one bit": flip,
    "truncated": lambda data: data[: len(data) // 2],
    "header only": lambda data: data[:40],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0" * 32,
    "something else": lambda data: b"<html>not found</html>",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_changed_file(bundle: Path, file: str, damage: str) -> None:
    path = bundle / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(BundleError, match=file.replace(".", r"\.")) as caught:
        open_edge(bundle, BUILD, allow_unverified=True)
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    for check_hashes in (True, False):
        with pytest.raises(BundleError, match=rf"{file}: missing"):
            open_edge(bundle, BUILD, allow_unverified=True, check_hashes=check_hashes)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "header only", "empty", "something else"])
def test_a_damaged_file_with_matching_hash(bundle: Path, file: str, damage: str) -> None:
    path = bundle / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for check_hashes in (True, False):
        if check_hashes:
            rehash(bundle)
        with pytest.raises((BundleError, EngineError), match=file.replace(".", r"\.")) as caught:
            open_edge(bundle, BUILD, allow_unverified=True, check_hashes=check_hashes)
        assert "\n" not in caught.value.message and caught.value.hint


def test_unverified(siglip: Pair, bundle: Path) -> None:
    with pytest.raises(UnverifiedError, match=r"fp32\+f16 carries no `verified` stamp"):
        open_edge(bundle, BUILD)
    with pytest.raises(UnverifiedError):
        open_edge(read_bundle(bundle))
    read_bundle(bundle).stamp({BUILD: {"passed": True}, "fp32+f32": {"passed": False}})
    with open_edge(bundle, BUILD) as edge:
        assert edge.environment()["verified"] is True
    with pytest.raises(UnverifiedError):
        open_edge(bundle, "fp32+f32")


def test_parts_of_different_models(bundle: Path, clip: Pair) -> None:
    """Same shapes, other model: the manifest's hashes tell. Other shapes: the graphs themselves tell."""
    shutil.copy(clip.bundle / "llm-f16.gguf", bundle / "llm-f16.gguf")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        open_edge(bundle, BUILD, allow_unverified=True)


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"visual_tokens": 63}, "vision-fp32.onnx"),
        ({"embedding_dim": 192}, "vision-fp32.onnx"),
        ({"image_size": 72}, "preprocess.onnx"),
    ],
)
def test_graphs_that_contradict_the_spec(bundle: Path, change: dict[str, object], file: str) -> None:
    edit_spec(bundle, **change)
    with pytest.raises(EngineError, match=file):
        open_edge(bundle, BUILD, allow_unverified=True)


def test_gguf_of_another_width(bundle: Path, edge: EdgeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vision graph fits the spec but the decoder doesn't: refused at opening, and again before decoding."""
    from tinyllava_edge.runtimes import edge as module

    class Narrow(module.Llama):
        n_embd = property(lambda self: 192, lambda self, value: None)  # type: ignore[assignment]

    monkeypatch.setattr(module, "Llama", Narrow)
    with pytest.raises(EngineError, match=r"llm-f16\.gguf: takes embeddings of width 192, 256 expected"):
        open_edge(bundle, BUILD, allow_unverified=True)
    with pytest.raises(EngineError, match=r"shape \(4, 192\)"):
        edge._llama.decode_embeddings(np.zeros((4, 192), np.float32), 0)


def test_template_without_its_end_token(bundle: Path) -> None:
    edit_spec(bundle, template="qwen2_instruct")
    with pytest.raises(EngineError, match=r"'<\|im_end\|>' is not one token"):
        open_edge(bundle, BUILD, allow_unverified=True)


def test_settings_out_of_range(bundle: Path) -> None:
    for settings in ({"n_ctx": 0}, {"n_ctx": 1 << 30}, {"n_threads": 0}, {"n_threads": -2}):
        with pytest.raises(UsageError, match="is outside"):
            open_edge(bundle, BUILD, allow_unverified=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no build 'int3'"):
        open_edge(bundle, "int3", allow_unverified=True)
    with pytest.raises(EngineError, match="no NoSuchProvider"):
        plan = replace(ON_CPU, providers=("NoSuchProvider",))
        open_edge(bundle, BUILD, allow_unverified=True, plan=plan)


def test_pictures_that_are_none(edge: EdgeRuntime, tmp_path: Path) -> None:
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    grey = np.zeros((8, 8), np.uint8)
    floats = np.zeros((8, 8, 3), np.float32)
    for bad in (tmp_path / "nothing.png", torn, b"", b"GIF89a", grey, floats, np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ImageError):
            edge.answer(bad, "what?")  # type: ignore[arg-type]
    assert edge.answer(picture(), "what?", max_tokens=1).n_image_tokens == 64  # and it goes on


def test_too_much_padding(factory: Pair) -> None:
    """A long thin picture would be padded to 100 million pixels and more."""
    edge = open_edge(factory.bundle, BUILD, allow_unverified=True, n_threads=1)
    with edge, pytest.raises(ImageError, match="are padded to"):
        edge.answer(np.zeros((30, 15_000, 3), np.uint8), "what?")


def test_after_close(bundle: Path) -> None:
    edge = open_edge(bundle, BUILD, allow_unverified=True, n_threads=1)
    edge.close()
    edge.close()
    with pytest.raises(TinyLlavaEdgeError, match="closed already"):
        edge.answer(picture(), "what?")

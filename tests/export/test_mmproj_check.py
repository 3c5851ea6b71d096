"""Stock llama.cpp against Hugging Face, through llama.cpp's own mtmd; and that the check can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllava_edge import checkpoint
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export import mmproj
from tinyllava_edge.export.llm import export_llm
from tinyllava_edge.export.mmproj_check import LIMITS, SIZES, MmprojReport, check_mmproj
from tinyllava_edge.spec import ModelSpec

from .test_mmproj import odd_model


@pytest.fixture(scope="module")
def siglip(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def clip(tiny_checkpoint_clip: Path) -> Checkpoint:
    return checkpoint.load(tiny_checkpoint_clip)


@pytest.fixture(scope="module")
def text(siglip: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Any text GGUF of width 256; only its vocabulary is opened."""
    path = tmp_path_factory.mktemp("text") / "llm-f16.gguf"
    export_llm(siglip, path)
    return path


@pytest.fixture
def measure(text: Path, tmp_path: Path) -> Callable[..., MmprojReport]:
    def run(
        model: Any, spec: ModelSpec, float_type: str = "f16", *, judge: ModelSpec | None = None, **options: Any
    ) -> MmprojReport:
        path = tmp_path / mmproj.mmproj_name("tiny", float_type)
        mmproj.export_mmproj(model, spec, path, float_type, **options)
        return check_mmproj(path, text, model, judge or spec)

    return run


@pytest.mark.parametrize("float_type", mmproj.MMPROJ_TYPES)
def test_siglip(siglip: Checkpoint, measure: Callable[..., MmprojReport], float_type: str) -> None:
    """Every type reaches its limit (0.99999 for f32 and f16), on pictures as they come: mtmd stretches them.

    A tall picture may differ by a few levels of 255, because mtmd resamples the horizontal axis first and Pillow 13
    the other one: 1e-4 is allowed for that.
    """
    report = measure(siglip.model, siglip.spec, float_type)
    assert report.passed
    assert report.exact
    assert report.limit == LIMITS[float_type]
    assert report.defects == ()
    assert len(report.pictures) == len(SIZES)
    for picture in report.pictures:
        assert picture.host >= LIMITS[float_type]
        assert picture.raw >= LIMITS[float_type] - 1e-4
        assert picture.expected == pytest.approx(picture.host, abs=1e-9)  # no defect to allow for
    if float_type in ("f32", "f16"):
        assert min(picture.host_lowest for picture in report.pictures) >= 0.9999


def test_odd_sizes(measure: Callable[..., MmprojReport]) -> None:
    """A side that patches don't fill, as 384 by 14: llama.cpp leaves the same margin out as the convolution does."""
    report = measure(*odd_model())
    assert report.exact, report.lines()


def test_legacy(siglip: Checkpoint, measure: Callable[..., MmprojReport]) -> None:
    """A tower cut at its last layer and read before the post-norm, pictures padded with the model's own colour.

    The encoder is exact, the padding of stock hosts is not, and is told.
    """
    spec = replace(siglip.spec, feature_layer=-1, compat="legacy", image_policy="pad", pad_color=(127, 127, 127))
    report = measure(siglip.model, spec)
    assert report.passed
    assert report.exact
    shapes = {picture.square: picture for picture in report.pictures}
    assert shapes[True].raw >= 0.9999
    assert shapes[False].raw < 0.99
    assert len(report.defects) == 1
    assert "64 x 64 first" in report.defects[0]


def test_dropped_first_patch(siglip: Checkpoint, measure: Callable[..., MmprojReport]) -> None:
    """Factory's SigLIP: stock hosts pass one embedding too many; the others are exact."""
    spec = replace(siglip.spec, select_strategy="default", visual_tokens=63, compat="factory")
    report = measure(siglip.model, spec)
    assert report.passed
    assert not report.exact
    assert (report.tokens, report.tokens_model) == (64, 63)
    assert min(picture.host for picture in report.pictures) >= 0.9999
    assert len(report.defects) == 1
    assert "64 image embeddings, the model was trained with 63" in report.defects[0]


def test_clip(clip: Checkpoint, measure: Callable[..., MmprojReport]) -> None:
    """The file is right (mtmd gives what its own arithmetic does, ≥ 0.9999), the host is wrong, and that is told."""
    report = measure(clip.model, clip.spec)
    assert report.passed
    assert not report.exact
    assert min(picture.expected for picture in report.pictures) >= 0.9999
    assert max(picture.host for picture in report.pictures) < 0.95
    assert any(f"cosine {min(p.host for p in report.pictures):.4f}" in defect for defect in report.defects)
    assert any("64 x 64 first" in defect for defect in report.defects)


def test_clip_workaround(clip: Checkpoint, measure: Callable[..., MmprojReport]) -> None:
    """Every row equals the model's next one (≥ 0.9999): what the workaround promises. The report says what is left."""
    report = measure(clip.model, clip.spec, clip_workaround=True)
    assert report.passed
    assert not report.exact
    assert min(picture.early or 0.0 for picture in report.pictures) >= 0.9999
    assert any("one place early" in defect and "do harm" in defect for defect in report.defects)


def test_clip_with_its_class_token(clip: Checkpoint, measure: Callable[..., MmprojReport]) -> None:
    report = measure(clip.model, replace(clip.spec, select_strategy="full", visual_tokens=65))
    assert report.passed
    assert (report.tokens, report.tokens_model) == (64, 65)
    assert any("class token is missing" in defect for defect in report.defects)


def test_faults_are_seen(
    siglip: Checkpoint, measure: Callable[..., MmprojReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests above could not fail: each fault brings the gate down."""
    spec = siglip.spec
    assert not measure(siglip.model, replace(spec, feature_layer=-3), judge=spec).passed
    assert not measure(siglip.model, replace(spec, image_mean=(0.4, 0.5, 0.6)), judge=spec).passed
    assert not measure(siglip.model, replace(spec, image_std=(0.3, 0.5, 0.5)), judge=spec).passed
    with monkeypatch.context() as patch:
        patch.setitem(mmproj.ACTIVATIONS, "gelu_pytorch_tanh", False)
        assert not measure(siglip.model, spec).passed
    with monkeypatch.context() as patch:
        patch.setitem(mmproj._BLOCK, "self_attn.q_proj", "attn_k")
        patch.setitem(mmproj._BLOCK, "self_attn.k_proj", "attn_q")
        swapped = measure(siglip.model, spec)
        assert not swapped.passed
        assert "FAILED" in swapped.lines()[0]
    larger = measure(siglip.model, replace(spec, llm_family="gemma"), judge=spec)
    assert not larger.passed and larger.pictures[0].size == pytest.approx(spec.embedding_dim**-0.5, rel=0.01)
    assert min(picture.expected for picture in larger.pictures) >= larger.limit  # no cosine sees it


def test_report(siglip: Checkpoint, measure: Callable[..., MmprojReport]) -> None:
    """It can be kept as JSON, and read."""
    report = measure(siglip.model, siglip.spec)
    assert json.loads(json.dumps(report.to_dict()))["pictures"][0]["name"] == "photo-317x211.jpg"
    assert report.lines()[0].startswith("mmproj-tiny-f16.gguf: passed, 4 pictures")


def test_no_pictures(siglip: Checkpoint, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        check_mmproj(tmp_path / "x", text, siglip.model, siglip.spec, [])

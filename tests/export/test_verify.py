"""verify: a sound bundle passes and is stamped; each seeded fault is found at its own stage and leaves no stamp."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from PIL import Image

from tinyllava_edge import checkpoint
from tinyllava_edge.bundle import MANIFEST, Bundle, describe_file, read_bundle, write_manifest
from tinyllava_edge.errors import BundleError, CheckpointError, UsageError, VerifyError
from tinyllava_edge.export import tolerances
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.compare import Difference, Equal, Pixels
from tinyllava_edge.export.quantize import LLM_TYPES
from tinyllava_edge.export.verify import VerifyReport, verify
from tinyllava_edge.export.verify_pictures import PHOTO_SIZES, cases, default_cases, photograph
from tinyllava_edge.export.vision import VISION_PRECISIONS, export_vision_fp32

EXACT = "fp32+f32"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures")
    paths = [root / f"photo-{width}x{height}.jpg" for width, height in PHOTO_SIZES]
    for path, size in zip(paths, PHOTO_SIZES, strict=True):
        path.write_bytes(photograph(*size))
    for case in default_cases(2)[:2]:
        assert isinstance(case.picture, Path)
        paths.append(Path(shutil.copy(case.picture, root / case.name)))
    return paths


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32", "f16"), vision=("fp32",))
    return out


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle", ignore=shutil.ignore_patterns("verified.json")))


def rewrite(root: Path, template: str | None = None) -> Bundle:
    """Make the manifest true again after a file was changed, as an export with that fault would have left it."""
    old = read_bundle(root)
    files = [describe_file(root, f.path, f.role, f.precision, f.tensor_types) for f in old.files]
    spec = dataclasses.replace(old.spec, template=template) if template else old.spec
    write_manifest(root, spec, files, old.source, old.tool_versions)
    return read_bundle(root)


def check(root: Path, reference: Path, pictures: list[Path], builds: list[str] | None = None) -> VerifyReport:
    return verify(root, reference, builds=builds or [EXACT], pictures=pictures, n_threads=1)


def edit_onnx(path: Path, change: Callable[[dict[str, onnx.TensorProto]], None]) -> None:
    model = onnx.load(path)
    change({tensor.name: tensor for tensor in model.graph.initializer})
    onnx.save(model, path)


def put(tensor: onnx.TensorProto, value: np.ndarray) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), tensor.name))


def swap_mean_and_std(root: Path, _: Path) -> None:
    """CLIP's and SigLIP's processors differ in these; the mean is shifted, because both are 0.5 here."""

    def change(tensors: dict[str, onnx.TensorProto]) -> None:
        std = onnx.numpy_helper.to_array(tensors["std"])
        put(tensors["mean"], std * 0.9)
        put(tensors["std"], std * 0.54)

    edit_onnx(root / "preprocess.onnx", change)


def keep_the_post_norm(root: Path, _: Path) -> None:
    """A layer norm between the last layer and the connector, as with SigLIP's post-layernorm left in."""
    path = root / "vision-fp32.onnx"
    model = onnx.load(path)
    graph = model.graph
    last = next(node for node in graph.node if "image_features" in node.output)
    last.output[list(last.output).index("image_features")] = "raw_features"
    width = 192
    for name, value in (("post.weight", np.ones(width)), ("post.bias", np.zeros(width))):
        graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    inputs = ["raw_features", "post.weight", "post.bias"]
    norm = onnx.helper.make_node("LayerNormalization", inputs, ["image_features"], axis=-1)
    graph.node.insert(list(graph.node).index(last) + 1, norm)
    onnx.save(model, path)


def damage_the_connector(root: Path, _: Path) -> None:
    """One column of the connector's last matrix is lost."""
    model = onnx.load(root / "vision-fp32.onnx")
    made_by = {name: node for node in model.graph.node for name in node.output}
    product = made_by[next(name for name in made_by["image_embeds"].input if name in made_by)]
    assert product.op_type == "MatMul"

    def change(tensors: dict[str, onnx.TensorProto]) -> None:
        matrix = onnx.numpy_helper.to_array(tensors[product.input[1]]).copy()
        matrix[:, 7] = 0
        put(tensors[product.input[1]], matrix)

    edit_onnx(root / "vision-fp32.onnx", change)


def corrupt_a_gguf_block(root: Path, _: Path) -> None:
    """32 weights of the first layer's output projection."""
    path = root / "llm-f32.gguf"
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_output.weight")
    data = bytearray(path.read_bytes())
    block = np.full(32, 3.0, np.float32).tobytes()
    data[tensor.data_offset : tensor.data_offset + len(block)] = block
    path.write_bytes(data)


FAULTS: dict[str, Callable[[Path, Path], None]] = {
    "pixels": swap_mean_and_std,
    "image_features": keep_the_post_norm,
    "image_embeds": damage_the_connector,
    "first_logits": corrupt_a_gguf_block,
}


@pytest.fixture(scope="module")
def report(sound: Path, tiny_checkpoint: Path, pictures: list[Path]) -> VerifyReport:
    return check(sound, tiny_checkpoint, pictures, [EXACT, "fp32+f16"])


def test_a_sound_bundle_passes_and_is_stamped(report: VerifyReport, sound: Path) -> None:
    assert report.passed, "\n".join(report.lines())
    opened = read_bundle(sound)
    assert set(opened.verified_builds()) == {EXACT, "fp32+f16"}
    opened.require_verified(opened.build("fp32+f16"))
    assert all(build.first_divergence is None and build.samples == 4 for build in report.builds)


def test_float32_is_far_inside_its_limits(report: VerifyReport) -> None:
    """Ten times tighter than the limits, so that these can't be met by accident."""
    numbers = {(c.stage, c.input): c for c in report.builds[0].checks}
    for stage in ("image_features", "image_embeds"):
        alone = numbers[stage, "reference"]
        assert alone.relative is not None and alone.relative < 2e-6
        assert alone.cosine is not None and alone.cosine > 0.999999
    logits = numbers["first_logits", "reference"]
    assert logits.max_abs is not None and logits.max_abs < 0.002
    assert numbers["prompt_ids", "own"].equal == 1 == numbers["answer", "own"].share
    share = numbers["pixels", "own"].share
    assert share is not None and share > 0.999


def test_report_is_json_and_readable(report: VerifyReport) -> None:
    value = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert value["passed"] is True and [b["build"] for b in value["builds"]] == [EXACT, "fp32+f16"]
    assert [s.build for s in report.samples("e1")] == [EXACT, "fp32+f16"]
    assert report.samples()[0].detail["passed"] is True
    text = "\n".join(report.lines())
    assert text.count("passed, 4 pictures") == 2 and "image_embeds" in text and "FAIL" not in text


@pytest.mark.parametrize("stage", FAULTS)
def test_a_fault_is_found_at_its_stage(stage: str, bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    read_bundle(bundle).stamp({EXACT: {"passed": True}, "fp32+f16": {"passed": True}})
    FAULTS[stage](bundle, tiny_checkpoint)
    opened = rewrite(bundle)
    opened.stamp({EXACT: {"passed": True}, "fp32+f16": {"passed": True}})
    found = check(bundle, tiny_checkpoint, pictures)
    assert not found.passed and found.builds[0].first_divergence == stage, "\n".join(found.lines())
    assert "FAIL" in "\n".join(found.lines())
    json.dumps(found.to_dict(), allow_nan=False)
    assert set(opened.verified_builds()) == {"fp32+f16"}  # the failing build lost its stamp, the other one kept it


def test_a_wrong_template_is_found_at_the_prompt(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    rewrite(bundle, template="pretrain")
    found = check(bundle, tiny_checkpoint, pictures)
    assert found.builds[0].first_divergence == "prompt_ids"
    json.dumps(found.to_dict(), allow_nan=False)


def test_stages_are_blamed_for_their_own_error_only(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    swap_mean_and_std(bundle, tiny_checkpoint)
    rewrite(bundle)
    checks = {(c.stage, c.input): c for c in check(bundle, tiny_checkpoint, pictures).builds[0].checks}
    for stage in ("image_features", "image_embeds", "first_logits"):
        assert checks[stage, "reference"].passed, stage
        relative = checks[stage, "own"].relative
        assert relative is not None and relative > 0.01, stage
    assert not checks["first_logits", "own"].passed


def test_the_reference_is_gone_before_a_build_is_opened(
    bundle: Path, tiny_checkpoint: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both would stand in memory: 12 GB of float32 beside the build, for a model of 3 billion parameters."""
    from tinyllava_edge.export import verify as module
    from tinyllava_edge.model import TinyLlava

    def alive() -> int:
        return sum(isinstance(thing, TinyLlava) for thing in gc.get_objects())

    seen: list[int] = []
    opened = module.open_edge

    def watched(*args: Any, **settings: Any) -> Any:
        seen.append(alive())
        return opened(*args, **settings)

    monkeypatch.setattr(module, "open_edge", watched)
    before = alive()
    found = check(bundle, tiny_checkpoint, pictures[:1])
    assert seen == [before]
    assert found.peak_rss > 0 and "peak memory" in found.lines()[-1]


def test_clip_passes_and_a_wrong_layer_is_found(
    tiny_checkpoint_clip: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """The other tower; then its graph is cut one layer late, at the last hidden state."""
    root = tmp_path / "bundle"
    export_bundle(tiny_checkpoint_clip, root, llm=("f32",), vision=("fp32",))
    found = check(root, tiny_checkpoint_clip, pictures)
    assert found.passed, "\n".join(found.lines())
    loaded = checkpoint.load(tiny_checkpoint_clip)
    wrong = dataclasses.replace(loaded.spec, feature_layer=-1)
    export_vision_fp32(loaded.model, wrong, root / "vision-fp32.onnx")
    rewrite(root)
    found = check(root, tiny_checkpoint_clip, pictures[:2])
    assert found.builds[0].first_divergence == "image_features"
    assert read_bundle(root).verified_builds() == {}


def test_a_changed_file_raises_and_unstamps(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    read_bundle(bundle).stamp({EXACT: {"passed": True}})
    corrupt_a_gguf_block(bundle, tiny_checkpoint)  # and the manifest still has the old hash
    with pytest.raises(BundleError, match="SHA-256"):
        check(bundle, tiny_checkpoint, pictures[:1])
    assert read_bundle(bundle).verified_builds() == {}


def test_a_wrong_checkpoint_costs_no_stamp(bundle: Path) -> None:
    opened = read_bundle(bundle)
    opened.stamp({"fp32+f16": {"passed": True}})
    with pytest.raises(CheckpointError, match="no model_spec.json"):
        verify(bundle, bundle)
    assert "fp32+f16" in opened.verified_builds()


def test_a_precision_without_limits_is_refused(bundle: Path, tiny_checkpoint: Path, pictures: list[Path]) -> None:
    manifest = bundle / MANIFEST
    manifest.write_text(manifest.read_text().replace('"precision": "f32"', '"precision": "f33"'))
    with pytest.raises(VerifyError, match="f33"):
        check(bundle, tiny_checkpoint, pictures[:1], ["fp32+f33"])


def test_every_exportable_type_has_limits() -> None:
    assert set(LLM_TYPES) <= set(tolerances.LOGITS) and set(VISION_PRECISIONS) <= set(tolerances.FEATURES)
    for llm in tolerances.LOGITS:
        for vision in tolerances.FEATURES:
            road = tolerances.whole_road(vision, llm)
            assert road.reason and (tolerances.answers(vision, llm).share or 0) <= 1
    assert tolerances.answers("fp32", "f16").share == 1.0


def test_default_pictures() -> None:
    chosen = default_cases()
    assert len(chosen) == 66 and len({case.name for case in chosen}) == 66
    assert len({case.question for case in chosen}) > 8
    sizes = [Image.open(io.BytesIO(c.picture)).size for c in chosen if isinstance(c.picture, bytes)]
    assert sizes == list(PHOTO_SIZES)
    assert photograph(97, 640) == photograph(97, 640)
    assert np.asarray(Image.open(io.BytesIO(photograph(317, 211)))).std() > 30


def test_questions_must_fit_the_pictures(pictures: list[Path]) -> None:
    assert [c.question for c in cases(pictures[:2], ["a?", "b?"])] == ["a?", "b?"]
    assert [c.question for c in cases(pictures[:2], ["a?"])] == ["a?", "a?"]
    for asked in ((pictures[:3], ["a?", "b?"]), (None, ["a?"]), ([], None)):
        with pytest.raises(UsageError):
            cases(*asked)


def test_comparisons_see_what_they_should() -> None:
    base = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    one_bad_row, scaled, broken = base.copy(), base * 1.01, base.copy()
    one_bad_row[3] *= -1
    broken[0, 0] = np.nan
    limit = tolerances.FEATURES["fp32"]
    for ours, passes in ((base, True), (one_bad_row, False), (scaled, False), (broken, False), (base[:4], False)):
        difference = Difference()
        difference.add("a", base, base)
        difference.add("b", ours, base)
        found = difference.check("image_features", "own", limit)
        assert found.passed is passes and found.worst.partition(":")[0] == "b"
    assert not Difference().check("first_logits", "own", limit).passed  # what could not run did not pass


def test_logits_compare_without_their_common_offset_and_know_ties() -> None:
    base = np.array([0.0, 5.0, 4.99, -3.0], np.float32)
    swapped = np.array([0.0, 4.99, 5.0, -3.0], np.float32)
    for ours, allowed, share in ((base + 7, 1e-5, 1.0), (swapped, 0.02, 1.0), (swapped, 0.002, 0.0)):
        difference = Difference(tolerances.Tolerance(max_abs=allowed))
        difference.add_logits("a", ours, base)
        found = difference.check("first_logits", "own", tolerances.Tolerance(max_abs=0.05, share=1.0))
        assert found.share == share and found.passed is (share == 1.0)


def test_pixels_count_in_grey_levels() -> None:
    std = (0.5, 0.25, 0.125)
    base = np.zeros((3, 10, 10), np.float32)
    step = np.array([1 / (255 * s) for s in std], np.float32)[:, None, None]
    for levels, share, passes in ((0.0, 1.0, True), (1.0, 1.0, True), (1.5, 0.0, False), (3.0, 0.0, False)):
        pixels = Pixels(std)
        pixels.add("a", base + levels * step, base)
        found = pixels.check("pixels", "own", tolerances.PIXELS)
        assert found.max_abs == pytest.approx(levels, abs=1e-4) and found.share == share and found.passed is passes


def test_equality_counts_ties_apart() -> None:
    counts = Equal()
    for equal, tie in ((True, False), (False, True), (False, False), (True, True)):
        counts.add("x", equal, tie)
    found = counts.check("answer", "own", tolerances.Tolerance(share=0.75))
    assert (found.share, found.equal, found.passed) == (0.75, 0.5, True)

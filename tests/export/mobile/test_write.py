"""Bundles with mobile files: what they hold, who carries them on, and who leaves them."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from tinyllava_edge.benchmarks.targets import ssh
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.commands import describe_bundle
from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.bundle_writer import export_bundle
from tinyllava_edge.export.mobile import ort_format
from tinyllava_edge.export.mobile.forms import MOBILE_FORMS, PACKAGES
from tinyllava_edge.export.mobile.ort_format import runner
from tinyllava_edge.export.requantize import quantize_bundle
from tinyllava_edge.export.verify import verify
from tinyllava_edge.publish import write_hf_layout

from .samples import pictures

FILES = {
    "mobile/preprocess.ort": "ort_uint8",
    "mobile/vision-fp32.ort": "ort_fp32",
    "mobile/vision-int8.ort": "ort_int8",
    "mobile/required_operators_and_types.config": "ort_config",
    "mobile/vision-coreml.onnx": "coreml_fp32",
    "mobile/usability.txt": "coreml_usability",
    "mobile/check.json": "check",
    "mobile/check.png": "check",
    "mobile/check-pixel_values.f32": "check",
    "mobile/check-image_embeds.f32": "check",
}


@pytest.fixture(scope="module")
def root(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamic bundle with .ort and CoreML's form, compared on three pictures."""
    out = tmp_path_factory.mktemp("mobile") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f16",), mobile=("coreml", "ort"), pictures=pictures())
    return out


def mobile_files(root: Path) -> dict[str, str]:
    return {file.path: file.precision for file in read_bundle(root).files if file.role == "mobile"}


def test_files_and_figures(root: Path) -> None:
    """Hashed and listed, in their folder and nothing else there; the measured numbers stand in export.json."""
    bundle = read_bundle(root)
    bundle.check()
    assert mobile_files(root) == FILES
    assert {path.relative_to(root).as_posix() for path in (root / "mobile").iterdir()} == set(FILES)
    assert list(bundle.builds()) == ["fp32+f16", "int8+f16"]
    figures = json.loads((root / "export.json").read_text())["mobile"]
    assert list(figures) == ["ort", "coreml"]
    assert figures["ort"]["preprocess"] == {"pictures": 3, "against": "preprocess.onnx", "equal": True}
    assert figures["ort"]["int8"]["onnx"]["image_embeds"]["relative"] == 0
    assert figures["coreml"]["usability"]["CoreML MLProgram"]["partitions"] == 1
    assert figures["coreml"]["image_embeds"]["relative"] < figures["coreml"]["relative_allowed"]
    assert "CoreML MLProgram" in (root / "mobile" / "usability.txt").read_text()
    static = next(file for file in bundle.files if file.precision == "coreml_fp32")
    assert "float" in static.tensor_types


def test_a_host_can_check_itself(root: Path, tmp_path: Path) -> None:
    """From the files of `mobile/` alone, as docs/mobile_files.md says; a wrong tower and wrong pixels show."""
    folder = root / "mobile"
    facts = json.loads((folder / "check.json").read_text())

    def read(key: str) -> np.ndarray:
        return np.fromfile(folder / facts[key]["file"], "<f4").reshape(facts[key]["shape"])

    def error(name: str, pixels: np.ndarray) -> float:
        found = runner(folder / name)(pixels)[0].astype(np.float64)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted.astype(np.float64)))

    rgb = np.asarray(Image.open(folder / facts["picture"]["file"]))
    pixels, wanted = read("pixel_values"), read("image_embeds")
    assert list(rgb.shape) == facts["picture"]["shape"] and rgb.dtype == np.uint8 and rgb.shape[0] != rgb.shape[1]
    assert pixels.shape == (1, 3, 64, 64) and wanted.shape == (1, 64, 256)
    session = ort.InferenceSession(folder / "preprocess.ort", providers=["CPUExecutionProvider"])
    (ours,) = session.run(["pixel_values"], {"image": rgb[None]})
    assert np.array_equal(ours, pixels)
    assert list(facts["files"]) == ["vision-fp32.ort", "vision-int8.ort", "vision-coreml.onnx"]
    for name, figures in facts["files"].items():
        assert error(name, pixels) == pytest.approx(figures["relative_measured"], rel=0.2, abs=1e-7)
        assert figures["relative_measured"] < figures["relative_allowed"], name
        mirrored = np.ascontiguousarray(pixels[..., ::-1])
        assert error(name, mirrored) > figures["relative_allowed"], name
        assert error(name, np.ascontiguousarray(pixels[:, ::-1])) > figures["relative_allowed"], name
    allowed = {name: figures["relative_allowed"] for name, figures in facts["files"].items()}
    assert allowed["vision-fp32.ort"] < 1e-3 < allowed["vision-coreml.onnx"] < allowed["vision-int8.ort"]


def test_runtimes_leave_them_and_others_carry_them_on(root: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A damaged mobile file stops no build; verify passes; quantize, publish and info keep and name them."""
    work = shutil.copytree(root, tmp_path / "bundle")
    Image.fromarray(pictures()[0][1]).save(tmp_path / "noise.png")
    report = verify(work, tiny_checkpoint, builds=["fp32+f16"], pictures=[tmp_path / "noise.png"])
    assert report.passed
    layout = ssh._layout(read_bundle(work), [read_bundle(work).build()])
    assert set(layout) == {"preprocess.onnx", "vision-fp32.onnx", "llm-f16.gguf", "bundle.json", "verified.json"}
    quantize_bundle(work, ("q8_0",))
    assert mobile_files(work) == FILES and read_bundle(work).is_verified(read_bundle(work).build("fp32+f16"))
    read_bundle(work).check()
    assert "mobile" in json.loads((work / "export.json").read_text())
    assert set(FILES) <= {file["path"] for file in describe_bundle(read_bundle(work))["files"]}
    write_hf_layout(work, tmp_path / "published")
    assert mobile_files(tmp_path / "published") == FILES
    read_bundle(tmp_path / "published").check()
    (work / "mobile" / "vision-int8.ort").write_bytes(b"damaged")
    read_bundle(work).check(read_bundle(work).build())


def test_a_refused_form_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is what refuses: with one that nothing meets, the export fails whole."""
    limit = ort_format.Tolerance(relative=-1.0, cosine=0.99999)
    monkeypatch.setattr(ort_format, "SAME", limit)
    with pytest.raises(ExportError, match="vision-int8.ort: image_embeds differs from vision-int8.onnx"):
        export_bundle(
            tiny_checkpoint, tmp_path / "b", llm=("f16",), vision=("int8",), mobile=("ort",), pictures=pictures()
        )
    assert not list(tmp_path.iterdir())


def test_every_form(tiny_checkpoint_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All four in one export, as the command line runs it; stdout stays free for data."""
    missing = [form for form, module in PACKAGES.items() if find_spec(module) is None]
    if missing:
        pytest.skip(f"extras {missing} are not installed")
    from tinyllava_edge import cli

    arguments = ["export", str(tiny_checkpoint_clip), "-o", str(tmp_path / "b"), "--llm", "f16", "--vision", "int8"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["x", *arguments, "--mobile", ",".join(MOBILE_FORMS), "--no-verify", "--json"])
        cli.main()
    assert left.value.code == 0
    assert json.loads(capfd.readouterr().out)["kind"] == "bundle"
    figures = json.loads((tmp_path / "b" / "export.json").read_text())["mobile"]
    assert list(figures) == list(MOBILE_FORMS)
    assert figures["executorch"]["tool"].startswith("executorch 1.") and figures["litert"]["tool"].startswith("litert-")
    assert {"mobile/vision-xnnpack.pte", "mobile/vision.tflite"} <= set(mobile_files(tmp_path / "b"))
    assert "mobile/vision-fp32.ort" not in mobile_files(tmp_path / "b")

"""One picture with what the checkpoint makes of it, beside the mobile files: a host compares itself on the device.

check.png                 small upright RGB picture
check-pixel_values.f32    float32, little-endian, C order: what preprocessing must give
check-image_embeds.f32    likewise: what the checkpoint's tower and connector give for these pixels
check.json                shapes, and the largest relative error that each file may show
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import BundleFile
from ...files import storage_errors, write_json
from ...image import load_image
from ...runtimes.reference import relative_change
from ...spec import ModelSpec
from .. import tolerances
from ..calibration import samples
from ..ranges import Floats
from ..verify_pictures import photograph
from ..vision_report import in_torch
from .parity import Runner

PICTURE, PIXELS, EMBEDS, FACTS = "check.png", "check-pixel_values.f32", "check-image_embeds.f32", "check.json"
FILES = (FACTS, PICTURE, PIXELS, EMBEDS)
PRECISION = "check"  # of all four in the manifest
_SIZE, _SEED = (160, 112), 101  # width, height; no picture of verify or of calibration
_ERROR = "norm of (yours - file) / norm of file, over all values of image_embeds, summed in float64"
_EXACT = (
    "what preprocess.onnx and preprocess.ort give is equal or nearly so; another resizing may be one grey level off"
)


def write_check(
    folder: Path, model: Any, spec: ModelSpec, runners: Mapping[str, tuple[str, Runner]], float32_limit: float
) -> dict[str, Any]:
    """Write FILES into `folder`, and run every form on the picture.

    Args:
        folder: existing directory.
        model: TinyLlava in float32 and eval mode; only the vision tower and the connector are used.
        spec: how it must be fed.
        runners: name of a written file → its precision in the manifest, and the file opened here.
        float32_limit: largest relative error of a float32 file.

    Returns:
        What check.json holds.

    Raises:
        StorageError: the disk is full.
    """
    rgb = load_image(photograph(*_SIZE, seed=_SEED))
    (sample,) = samples(spec, [(PICTURE, rgb)])
    embeds = in_torch(model, sample.pixel_values)[0]
    files = {}
    for name, (precision, run) in runners.items():
        limit, reason = _limit(precision, float32_limit)
        measured = relative_change(run(sample.pixel_values)[0], embeds)
        files[name] = {"relative_allowed": limit, "relative_measured": measured, "reason": reason}
    facts = {
        "picture": {"file": PICTURE, "shape": list(rgb.shape), "type": "uint8"},
        "pixel_values": {**_save(folder / PIXELS, sample.pixel_values), "note": _EXACT},
        "image_embeds": _save(folder / EMBEDS, embeds),
        "relative_error": _ERROR,
        "files": files,
    }
    _save_picture(folder / PICTURE, rgb)
    write_json(folder / FACTS, facts)
    return facts


def above(facts: Mapping[str, Any]) -> list[str]:
    """Files whose error was above the limit where they were exported."""
    return [n for n, found in facts["files"].items() if not found["relative_measured"] <= found["relative_allowed"]]


def runnable(files: Sequence[BundleFile]) -> list[BundleFile]:
    """Those of the written files that are vision graphs."""
    other = ("ort_uint8", "ort_config", "coreml_usability")
    return [file for file in files if file.precision not in other]


def _limit(precision: str, float32_limit: float) -> tuple[float, str]:
    """The largest relative error of a manifest precision such as `ort_int8`, and why."""
    engine, kind = precision.split("_")
    if engine == "coreml":
        return float(tolerances.FEATURES["fp16"].relative or 0), "CoreML may compute in float16"
    if kind == "fp32":
        return float32_limit, "float32 on both sides: eight times the checkpoint's own rounding, but at least 2e-5"
    limit = tolerances.known(tolerances.FEATURES, kind, "vision")
    return float(limit.relative or 0), limit.reason


def _save(path: Path, values: Floats) -> dict[str, Any]:
    with storage_errors(path.parent):
        path.write_bytes(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return {"file": path.name, "shape": list(values.shape), "type": "float32, little-endian"}


def _save_picture(path: Path, rgb: Any) -> None:
    from PIL import Image

    with storage_errors(path.parent):
        Image.fromarray(rgb).save(path)

"""Mobile files beside the checkpoint: the same pictures through both, and a refusal that names the measured number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ExportError
from ...image import load_image
from ...runtimes.base import Picture
from ...runtimes.reference import moved, relative_change
from ...spec import ModelSpec
from ..calibration import Sample, default_pictures, samples
from ..compare import Difference
from ..ranges import Floats
from ..tolerances import Tolerance, float32_features
from ..vision_report import in_torch

Runner = Callable[[Floats], Sequence[Floats]]  # pixel_values (1, 3, s, s) → OUTPUTS, in order
OUTPUTS = ("image_embeds", "image_features")  # (1, t, d) and (1, t, v)
DRAWINGS, PHOTOS = 4, 4  # the pictures that export compares its vision precisions on
NOISE_PICTURES = 4  # as many as show how far rounding goes


@dataclass(frozen=True)
class Expected:
    """What the checkpoint makes of the pictures."""

    spec: ModelSpec
    """how the model must be fed"""
    images: tuple[Any, ...]
    """uint8 RGB (h, w, 3), one per picture"""
    samples: tuple[Sample, ...]
    """the pictures as the tower takes them"""
    outputs: tuple[tuple[Floats, ...], ...]
    """per picture: OUTPUTS of the torch model"""
    limit: Tolerance
    """what a float32 file may differ by: see tolerances.float32_features"""


def expected(model: Any, spec: ModelSpec, pictures: Sequence[tuple[str, Picture]] | None = None) -> Expected:
    """Run the torch model on at most DRAWINGS + PHOTOS pictures.

    Args:
        model: TinyLlava in float32 and eval mode; only the vision tower and the connector are used.
        spec: the checkpoint's spec.
        pictures: names and pictures; `default_pictures` when None.

    Raises:
        ImageError: a picture that can't be read.
        DataError: the default set is wanted and the easy-vqa package is not installed.
    """
    chosen = (default_pictures(DRAWINGS, PHOTOS) if pictures is None else list(pictures))[: DRAWINGS + PHOTOS]
    images = [picture if isinstance(picture, np.ndarray) else load_image(picture) for _name, picture in chosen]
    seen = samples(spec, chosen)
    outputs = [in_torch(model, sample.pixel_values) for sample in seen]
    noise = 0.0
    for sample, wanted in zip(seen[:NOISE_PICTURES], outputs, strict=False):
        for ours, theirs in zip(in_torch(model, moved(sample.pixel_values)), wanted, strict=True):
            noise = max(noise, relative_change(ours, theirs))
    return Expected(spec, tuple(images), tuple(seen), tuple(outputs), float32_features(noise))


def compare(path: Path, run: Runner, wanted: Expected, limit: Tolerance | None) -> dict[str, Any]:
    """A file's outputs beside the checkpoint's, as JSON values.

    Args:
        path: the file, for messages.
        run: opens it in the engine that phones use.
        wanted: what the checkpoint gives.
        limit: what is allowed; None where the numbers only explain.

    Raises:
        ExportError: it is outside the limit, can't be run, or gives another shape or a value that is not finite.
    """
    return measure(path, run, wanted.samples, wanted.outputs, limit, "the checkpoint")


def measure(
    path: Path,
    run: Runner,
    seen: Sequence[Sample],
    outputs: Sequence[Sequence[Floats]],
    limit: Tolerance | None,
    other: str,
) -> dict[str, Any]:
    """`compare` with any reference, which messages call `other`."""
    differences = [Difference() for _ in OUTPUTS]
    for sample, theirs in zip(seen, outputs, strict=True):
        try:
            ours = run(sample.pixel_values)
        except Exception as error:  # engines raise what they like
            raise ExportError(f"{path.name}: can't be run on {sample.name} ({reason(error)})", _HINT) from error
        for name, difference, one, another in zip(OUTPUTS, differences, ours, theirs, strict=True):
            difference.add(sample.name, one, another)
            if not np.isfinite(difference.relative):
                raise ExportError(f"{path.name}: {name} of {difference.worst}", _HINT)
    figures: dict[str, Any] = {"pictures": len(seen), "against": other}
    if limit is not None:
        figures |= {"relative_allowed": limit.relative, "cosine_allowed": limit.cosine}
    for name, difference in zip(OUTPUTS, differences, strict=True):
        check = difference.check(name, other, limit)
        if not check.passed and limit is not None:
            raise ExportError(
                f"{path.name}: {name} differs from {other} by a relative {difference.relative:.2g} with a cosine of "
                f"{difference.cosine:.6f} on {difference.worst}; {limit.relative:.2g} and {limit.cosine} are allowed",
                _HINT,
            )
        figures[name] = {key: getattr(check, key) for key in ("relative", "cosine", "max_abs")}
    return figures


_HINT = "leave this form out of --mobile, and report it with the checkpoint's config.json"


def reason(error: Exception) -> str:
    """First line of what a library raised."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]


def line(figures: dict[str, Any]) -> str:
    """The embeddings' figures on one line."""
    found = figures["image_embeds"]
    return (
        f"relative {found['relative']:.2g}  cosine {found['cosine']:.6f}  max error {found['max_abs']:.2g}  "
        f"against {figures['against']} ({figures['pictures']} pictures)"
    )

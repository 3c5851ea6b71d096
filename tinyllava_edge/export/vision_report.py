"""What each precision of a vision graph costs, picture by picture, against the float32 graph or the torch model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExportError
from . import onnx_io
from .calibration import Sample
from .ranges import Floats

Embedder = Callable[[Floats], Floats]  # pixel_values (b, 3, s, s) → image embeddings (b, t, d)


@dataclass(frozen=True)
class PictureError:
    """Image embeddings of one picture beside the reference's."""

    picture: str
    """its name"""
    cosine_min: float
    """lowest cosine of any visual token"""
    cosine_mean: float
    """mean cosine of the visual tokens"""
    max_abs: float
    """largest absolute difference of any value"""
    relative: float
    """norm of the difference / norm of the reference"""


@dataclass(frozen=True)
class PrecisionReport:
    """One vision file over all pictures."""

    precision: str
    """key of VISION_PRECISIONS"""
    bytes: int
    """size of the file, external data included"""
    pictures: tuple[PictureError, ...]
    """one entry per picture"""

    @property
    def cosine_min(self) -> float:
        """Lowest cosine of any token of any picture."""
        return min(p.cosine_min for p in self.pictures)

    @property
    def cosine_mean(self) -> float:
        """Mean cosine over pictures and tokens."""
        return float(np.mean([p.cosine_mean for p in self.pictures]))

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any picture."""
        return max(p.max_abs for p in self.pictures)

    @property
    def relative(self) -> float:
        """Relative error of the worst picture."""
        return max(p.relative for p in self.pictures)

    def line(self) -> str:
        """The report on one line."""
        return (
            f"{self.precision:<5} {self.bytes / 1e6:9.1f} MB  cosine min {self.cosine_min:.6f} mean "
            f"{self.cosine_mean:.6f}  max error {self.max_abs:.3g}  relative {self.relative:.3g}  "
            f"({len(self.pictures)} pictures)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, summary first."""
        summary = {key: getattr(self, key) for key in ("cosine_min", "cosine_mean", "max_abs", "relative")}
        return {
            "precision": self.precision,
            "bytes": self.bytes,
            **summary,
            "pictures": [dataclasses.asdict(picture) for picture in self.pictures],
        }


def vision_report(
    reference: Path | Embedder, candidates: Mapping[str, Path], pictures: Sequence[Sample]
) -> tuple[PrecisionReport, ...]:
    """Compare image embeddings on real pictures.

    Args:
        reference: the float32 graph, or a function such as `eager(model)`.
        candidates: precision → its file, in the order of the report.
        pictures: what to look at; `calibration.samples` makes them.

    Raises:
        ExportError: no pictures, or a file gives another shape or something that is not a finite number.
    """
    if not pictures:
        raise ExportError("a vision report without pictures", "give at least one")
    embed = _session(reference) if isinstance(reference, Path) else reference
    wanted = [embed(sample.pixel_values) for sample in pictures]
    reports = []
    for precision, path in candidates.items():
        candidate = _session(path)
        found = [
            _compare(path, sample.name, candidate(sample.pixel_values), reference)
            for sample, reference in zip(pictures, wanted, strict=True)
        ]
        reports.append(PrecisionReport(precision, onnx_io.total_bytes(path), tuple(found)))
    return tuple(reports)


def eager(model: Any) -> Embedder:
    """Tower and connector of a TinyLlava model in torch, as a reference for `vision_report`."""

    def embed(pixel_values: Floats) -> Floats:
        return in_torch(model, pixel_values)[0]

    return embed


def in_torch(model: Any, pixel_values: Floats) -> tuple[Floats, Floats]:
    """Tower and connector: (b, 3, s, s) → image embeddings (b, t, d) and the tower's features (b, p, v)."""
    import torch

    with torch.no_grad():
        features = model.tower_features(torch.from_numpy(pixel_values))
        return model.model.multi_modal_projector(features).numpy(), features.numpy()


def _session(path: Path) -> Embedder:
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def embed(pixel_values: Floats) -> Floats:
        (embeds,) = session.run(["image_embeds"], {"pixel_values": pixel_values})
        found: Floats = embeds
        return found

    return embed


def _compare(path: Path, picture: str, ours: Floats, theirs: Floats) -> PictureError:
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        raise ExportError(
            f"{path}: {picture} gives {ours.shape}, {np.count_nonzero(~np.isfinite(ours))} values not finite; "
            f"{theirs.shape} expected",
            "leave this precision out, and report it with the checkpoint's config.json",
        )
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(-1) / np.maximum(norms, 1e-12)
    relative = np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12)
    return PictureError(picture, float(cosine.min()), float(cosine.mean()), float(np.abs(a - b).max()), float(relative))

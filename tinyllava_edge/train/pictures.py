"""Pictures of a data set as tensors: decoded for each batch, or once as tower features when the tower is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import image_processor
from ..errors import ImageError
from ..image import load_image, pad_to_square
from ..model import TinyLlava
from ..spec import ModelSpec

CACHE_BYTES = 2 << 30  # features beyond this are computed for each batch instead of kept
CACHE_BATCH = 64  # pictures per forward pass of the tower


class Pixels:
    """Decodes pictures on demand."""

    def __init__(self, spec: ModelSpec, images: Path) -> None:
        self.spec, self.images = spec, images
        self.processor = image_processor(spec)

    def __call__(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """`pixel_values` (i, 3, s, s). Raises ImageError that names a picture which can't be decoded."""
        return {"pixel_values": torch.stack([self.pixels(name) for name in names])}

    def pixels(self, name: str) -> torch.Tensor:
        """One picture, float32 (3, s, s), as the checkpoint's own image processor makes it."""
        picture = load_image(self.images / name)
        if self.spec.image_policy == "pad":
            picture = pad_to_square(picture, self.spec.pad_color)
        values = self.processor(images=picture, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.asarray(values[0], np.float32))


class Features:
    """Tower features of every picture, kept in memory."""

    def __init__(self, features: torch.Tensor, names: Sequence[str]) -> None:
        self.features = features  # (pictures, p, v)
        self.place = {name: k for k, name in enumerate(names)}

    def __call__(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """`image_features` (i, p, v)."""
        return {"image_features": self.features[[self.place[name] for name in names]]}


Pictures = Callable[[Sequence[str]], dict[str, torch.Tensor]]


def cache_size(model: TinyLlava, spec: ModelSpec, count: int) -> int:
    """Bytes that the features of `count` pictures take."""
    return count * spec.feature_tokens * int(model.config.vision_config.hidden_size) * 4


def cache_features(
    model: TinyLlava, pixels: Pixels, names: Sequence[str], on_progress: Callable[[int, int], None] | None = None
) -> tuple[Features, dict[str, str]]:
    """Run the frozen tower once over all pictures.

    Args:
        on_progress: called with the pictures done and their number.

    Returns:
        The features, float32, and for each picture that can't be decoded the reason.
    """
    device = next(model.model.vision_tower.parameters()).device
    kept: list[str] = []
    parts: list[torch.Tensor] = []
    faults: dict[str, str] = {}
    tower_mode = model.model.vision_tower.training
    model.model.vision_tower.eval()
    for start in range(0, len(names), CACHE_BATCH):
        decoded: list[torch.Tensor] = []
        for name in names[start : start + CACHE_BATCH]:
            try:
                decoded.append(pixels.pixels(name))
                kept.append(name)
            except ImageError as error:
                faults[name] = error.message
        if decoded:
            with torch.no_grad():
                parts.append(model.tower_features(torch.stack(decoded).to(device)).float().cpu())
        if on_progress is not None:
            on_progress(min(start + CACHE_BATCH, len(names)), len(names))
    model.model.vision_tower.train(tower_mode)
    return Features(torch.cat(parts) if parts else torch.zeros(0), kept), faults

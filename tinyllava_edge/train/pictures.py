"""Pictures of a data set as tensors: decoded for each batch, or kept tower features when the tower is frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import image_processor
from ..image import load_image, pad_to_square
from ..spec import ModelSpec
from .source import Source
from .token_store import TokenStore

CACHE_BYTES = 2 << 30  # features beyond this are computed for each batch instead of kept


class Pixels:
    """Pictures as the checkpoint's own image processor makes them."""

    def __init__(self, spec: ModelSpec, images: Path) -> None:
        self.spec, self.images = spec, images
        self.processor = image_processor(spec)

    def __call__(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """`pixel_values` (i, 3, s, s). Raises ImageError that names a picture which can't be decoded."""
        return {"pixel_values": torch.stack([self.pixels(name) for name in names])}

    def pixels(self, name: str) -> torch.Tensor:
        """One picture of the folder, float32 (3, s, s)."""
        return self.decode(self.images / name)

    def decode(self, picture: Path | bytes, name: str | None = None) -> torch.Tensor:
        """A file or its bytes, float32 (3, s, s); `name` is what messages call it."""
        found = load_image(picture, name)
        if self.spec.image_policy == "pad":
            found = pad_to_square(found, self.spec.pad_color)
        values = self.processor(images=found, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.asarray(values[0], np.float32))


class StoredPixels:
    """Decodes a data set's pictures, by their numbers, for each batch."""

    def __init__(self, spec: ModelSpec, source: Source, store: TokenStore) -> None:
        self.source, self.store = source, store
        self.pixels = Pixels(spec, Path())

    def __call__(self, pictures: Sequence[int]) -> dict[str, torch.Tensor]:
        """`pixel_values` (i, 3, s, s). Raises ImageError that names a picture which can't be decoded."""
        return {"pixel_values": torch.stack([self.one(number) for number in pictures])}

    def read(self, number: int) -> bytes:
        """A picture's file. Raises ImageError that names it."""
        return self.source.picture(*self.store.picture(number))

    def one(self, number: int, data: bytes | None = None) -> torch.Tensor:
        """One picture, float32 (3, s, s), from its file or from bytes that were read already."""
        data = self.read(number) if data is None else data
        return self.pixels.decode(data, self.name(number))

    def name(self, number: int) -> str:
        """What messages call a picture."""
        return self.source.picture_path(*self.store.picture(number))


Pictures = Callable[[Sequence[int]], dict[str, torch.Tensor]]

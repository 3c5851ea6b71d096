"""What callers pass as a picture → RGB, the same for every runtime."""

from __future__ import annotations

import numpy as np

from ..errors import ImageError
from ..image import MAX_PIXELS, RgbImage, check_array, load_image
from ..spec import ModelSpec
from .base import Picture


def read_picture(picture: Picture, spec: ModelSpec, name: str | None = None) -> RgbImage:
    """A path, a file's bytes or an RGB array → uint8 (height, width, 3); `name` is what messages call it.

    Raises:
        ImageError: not a usable picture, or one whose padding to a square would need too much memory.
    """
    rgb = check_array(picture, name or "image") if isinstance(picture, np.ndarray) else load_image(picture, name)
    side = max(rgb.shape[:2])
    if spec.image_policy == "pad" and side * side > 2 * MAX_PIXELS:
        raise ImageError(
            f"{name or 'image'}: {rgb.shape[1]:,} x {rgb.shape[0]:,} pixels are padded to {side:,} x {side:,}",
            "scale the picture down first",
        )
    return rgb

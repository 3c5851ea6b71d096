"""A picture → the square that the tower sees, before normalisation: for hosts that would resize otherwise."""

from __future__ import annotations

import numpy as np

from ..image import RgbImage, check_array, pad_to_square
from ..spec import ModelSpec


def fit_picture(image: RgbImage, spec: ModelSpec) -> RgbImage:
    """Bring a picture to (s, s, 3) by the model's own policy, as the preprocessing graph does before it normalises.

    Args:
        image: uint8 RGB (height, width, 3).
        spec: image_policy, image_size, crop_resize, resample and pad_color are read.

    Raises:
        ImageError: not a usable picture.
    """
    from PIL import Image

    rgb = check_array(image)
    if spec.image_policy == "pad":
        rgb = pad_to_square(rgb, spec.pad_color)
    side = spec.image_size
    height, width = (side, side)
    if spec.image_policy == "crop":
        short, edge = min(rgb.shape[:2]), spec.crop_resize or side
        height, width = (edge * n // short for n in rgb.shape[:2])
    if rgb.shape[:2] != (height, width):
        rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling[spec.resample.upper()]))
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(rgb[top : top + side, left : left + side])

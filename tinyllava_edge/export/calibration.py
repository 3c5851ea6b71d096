"""Pictures → pixel_values for what must look at pictures: static quantisation, the float16 check, the vision report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data import easy_vqa
from ..image import load_image
from ..runtimes.base import Picture
from ..spec import ModelSpec
from .preprocess import preprocess_graph
from .ranges import Floats
from .verify_pictures import photograph

DRAWINGS, PHOTOS = 24, 8
PHOTO_SIZES = ((640, 480), (317, 211), (97, 640), (512, 512))  # width, height; taken in turns


@dataclass(frozen=True)
class Sample:
    """One picture as the tower takes it."""

    name: str
    """what the picture is called in reports"""
    pixel_values: Floats
    """float32 (1, 3, s, s)"""


def default_pictures(drawings: int = DRAWINGS, photos: int = PHOTOS) -> list[tuple[str, Picture]]:
    """Names and pictures: easy-VQA's training set in even steps, and photographs of several sizes.

    `verify` looks at the test set and at other photographs, so that nothing is judged by what it was fitted to.

    Raises:
        DataError: the easy-vqa package is not installed.
    """
    root = easy_vqa.package_data() / "train" / "images"
    files = sorted(root.glob("*.png"), key=lambda path: int(path.stem))
    step = max(1, len(files) // max(1, drawings))
    chosen: list[tuple[str, Picture]] = [(f"train-{path.name}", path) for path in files[::step][:drawings]]
    for number in range(photos):
        width, height = PHOTO_SIZES[number % len(PHOTO_SIZES)]
        chosen.append((f"photo-{number + 1}.jpg", photograph(width, height, seed=number + 1)))
    return chosen


def samples(spec: ModelSpec, pictures: Sequence[tuple[str, Picture]] | None = None) -> list[Sample]:
    """Pictures through the spec's preprocessing graph; `default_pictures` when None.

    Raises:
        ImageError: a picture that can't be read.
        DataError: the default set is wanted and the easy-vqa package is not installed.
    """
    import onnxruntime as ort

    session = ort.InferenceSession(preprocess_graph(spec).SerializeToString(), providers=["CPUExecutionProvider"])
    found = []
    for name, picture in default_pictures() if pictures is None else pictures:
        rgb = picture if isinstance(picture, np.ndarray) else load_image(picture)
        (pixels,) = session.run(["pixel_values"], {"image": rgb[None]})
        found.append(Sample(name, pixels))
    return found

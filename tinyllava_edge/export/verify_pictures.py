"""The pictures that `verify` looks at by default: easy-VQA's test set and two photographs of awkward sizes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllava_edge.data import easy_vqa
from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.base import Picture

DEFAULT_COUNT = 64
PHOTO_SIZES = ((317, 211), (97, 640))  # width, height: neither square nor a multiple of a patch
PHOTO_QUESTION = "What is in the image?"


@dataclass(frozen=True)
class Case:
    """One picture with its question."""

    name: str
    """what the picture is called in reports"""
    picture: Picture
    """a path, or a file's bytes"""
    question: str
    """what is asked"""


def cases(pictures: Sequence[Path] | None, questions: Sequence[str] | None) -> list[Case]:
    """The cases to compare.

    Args:
        pictures: files; the default set when None.
        questions: one for all pictures, or one each; PHOTO_QUESTION when None.

    Raises:
        UsageError: the counts don't fit, or questions come without pictures.
        DataError: the default set is wanted and the easy-vqa package is not installed.
    """
    if pictures is None:
        if questions is not None:
            raise UsageError("questions without pictures", "name the pictures too")
        return default_cases()
    asked = list(questions or [PHOTO_QUESTION])
    if not pictures or len(asked) not in (1, len(pictures)):
        raise UsageError(
            f"{len(pictures)} pictures and {len(asked)} questions", "give one question, or one per picture"
        )
    asked = asked * len(pictures) if len(asked) == 1 else asked
    return [Case(path.name, path, question) for path, question in zip(pictures, asked, strict=True)]


def default_cases(count: int = DEFAULT_COUNT) -> list[Case]:
    """`count` easy-VQA test pictures with one question each, then the photographs."""
    root = easy_vqa.package_data() / "test" / "images"
    rows: dict[int, list[str]] = {}
    for question, _, number in easy_vqa.questions("test"):
        rows.setdefault(number, []).append(question)
    step = max(1, len(rows) // count)
    chosen = list(rows.items())[::step][:count]
    # the k-th picture is asked its k-th question, so that all kinds of question occur
    found = [
        Case(f"test-{number}.png", root / f"{number}.png", asked[k % len(asked)])
        for k, (number, asked) in enumerate(chosen)
    ]
    photos = [Case(f"photo-{w}x{h}.jpg", photograph(w, h), PHOTO_QUESTION) for w, h in PHOTO_SIZES]
    return found + photos


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with what photographs have and drawings lack: gradients, edges, texture at all scales, noise, blocks."""
    from PIL import Image

    rng = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = x / width, y / height
    base = np.stack([200 * u + 20, 180 * (1 - v) + 30, 120 + 90 * np.sin(7 * u + 5 * v)], axis=-1)
    for cells in (4, 16, 64):  # value noise: random grids, enlarged
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        base += (
            (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 128) * 1.6 / cells**0.5
        )
    base[(u - 0.6) ** 2 + (v - 0.4) ** 2 < 0.03] *= 0.35  # a dark disc with a sharp edge
    base += rng.normal(0, 6, base.shape)
    buffer = io.BytesIO()
    Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()

"""What a tower is taught, as compact arrays: pictures, which object covers each patch, and the objects' attributes."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyllava_edge.data import easy_vqa
from tinyllava_edge.data.scene_text import CHARACTER, COLORS, SHAPES, SIZES, SceneObject
from tinyllava_edge.data.scenes import LARGE, SMALL, render, scene_seed

PATCH, GRID = 8, 8  # pixels per patch side, patches per picture side
MAX_OBJECTS = 4
IGNORE = -100
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
KINDS = (*SHAPES, CHARACTER)
ATTRIBUTES = {  # name -> classes, class 0 is "none"
    "shape": 1 + len(KINDS), "color": 1 + len(COLORS), "size": 1 + len(SIZES),
    "vertical": 3, "horizontal": 3, "character": 1 + len(CHARACTERS),
}  # fmt: skip
MIN_PIXELS = 3  # an object must cover this much of a patch to own it
MIDDLE = 2.0  # no place label this near to the middle line (pixels)


@dataclass(frozen=True)
class Pool:
    """N labelled pictures."""

    images: NDArray[np.uint8]
    """(N, 64, 64, 3)."""
    owners: NDArray[np.int64]
    """(N, 64): 0, or k when object k - 1 covers most of the patch."""
    attributes: NDArray[np.int64]
    """(N, 1 + MAX_OBJECTS, 6): class per ATTRIBUTES; row 0 and unused rows are "none"; IGNORE where it is unclear."""


def scene_pool(split: str, seed: int, count: int, workers: int = 2) -> Pool:
    """`count` generated scenes of a split, rendered by `workers` processes."""
    chunk = max(1, count // (8 * workers))
    spans = [(split, seed, start, min(start + chunk, count)) for start in range(0, count, chunk)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(_render_span, spans)
    return Pool(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def easy_vqa_pool(split: str) -> Pool:
    """The pictures of easy-VQA; the labels come from questions and pixels."""
    rows: dict[int, list[easy_vqa.Row]] = {}
    for row in easy_vqa.questions(split):
        rows.setdefault(row[2], []).append(row)
    images, owners, attributes = [], [], []
    for number in sorted(rows):
        image = easy_vqa.picture(split, number)
        found, mask = easy_vqa.describe(image, rows[number])
        images.append(np.asarray(image))
        owners.append(_owners(mask.astype(np.uint8)))
        attributes.append(_attributes((found,)))
    return Pool(np.stack(images), np.stack(owners), np.stack(attributes))


def _render_span(span: tuple[str, int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    split, seed, start, stop = span
    scenes = [render(scene_seed(split, seed, i)) for i in range(start, stop)]
    return (
        np.stack([np.asarray(s.image) for s in scenes]),
        np.stack([_owners(s.ids) for s in scenes]),
        np.stack([_attributes(s.objects) for s in scenes]),
    )


def _owners(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    patches = ids.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, PATCH * PATCH)
    counts = np.stack([(patches == k).sum(1) for k in range(1, MAX_OBJECTS + 1)], 1)  # (64, MAX_OBJECTS)
    return np.where(counts.max(1) >= MIN_PIXELS, counts.argmax(1) + 1, 0)


def _attributes(objects: tuple[SceneObject, ...]) -> NDArray[np.int64]:
    table = np.zeros((1 + MAX_OBJECTS, len(ATTRIBUTES)), np.int64)
    for k, o in enumerate(objects, start=1):
        longest = max(o.box[2] - o.box[0], o.box[3] - o.box[1])
        between = o.shape != CHARACTER and SMALL[1] < longest < LARGE[0]
        (x, y), middle = o.center, PATCH * GRID / 2
        table[k] = (
            1 + KINDS.index(o.shape),
            1 + list(COLORS).index(o.color),
            IGNORE if between else 1 + SIZES.index(o.size),
            IGNORE if abs(y - middle) < MIDDLE else 1 + int(y > middle),
            IGNORE if abs(x - middle) < MIDDLE else 1 + int(x > middle),
            1 + CHARACTERS.index(o.character) if o.character else 0,
        )
    return table

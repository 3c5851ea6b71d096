"""The comparison itself: what it lets through and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.mobile.parity import DRAWINGS, PHOTOS, Runner, compare, expected, line
from tinyllava_edge.export.ranges import Floats
from tinyllava_edge.export.vision import vision_graph

from ..vision_models import make
from .samples import FAMILIES, pictures, tower, with_erf_gelu

FILE = Path("vision.pte")


def torch_runner(model: Any, spec: Any) -> Runner:
    graph = vision_graph(model, spec)

    def run(pixel_values: Floats) -> list[Floats]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in graph(torch.from_numpy(pixel_values))]

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_another_gelu_is_refused(family: str) -> None:
    """The right graph is nearly equal; erf-GELU is refused with its number, though its cosine rounds to 1."""
    model, spec, wanted = tower(family)
    figures = compare(FILE, torch_runner(model, spec), wanted, wanted.limit)
    assert figures["pictures"] == 3 and figures["image_embeds"]["relative"] < 1e-6
    assert figures["relative_allowed"] == wanted.limit.relative == pytest.approx(2e-5)
    assert "(3 pictures)" in line(figures)
    with pytest.raises(ExportError, match=r"vision.pte: image_embeds differs from the checkpoint by a relative \d"):
        compare(FILE, torch_runner(with_erf_gelu(model), spec), wanted, wanted.limit)


def test_one_bad_token_of_one_picture_is_refused() -> None:
    """Cosine is the lowest over tokens: one of 64 turned round shows, in the features too."""
    model, spec, wanted = tower("siglip")
    right = torch_runner(model, spec)

    def run(pixel_values: Floats) -> list[Floats]:
        embeds, features = right(pixel_values)
        if np.array_equal(pixel_values, wanted.samples[1].pixel_values):
            features = features.copy()
            features[0, 7] *= -1
        return [embeds, features]

    with pytest.raises(ExportError, match="image_features .* on noise-48x131"):
        compare(FILE, run, wanted, wanted.limit)


@pytest.mark.parametrize("fault", ["shape", "nan"])
def test_shapes_and_values_that_are_no_numbers(fault: str) -> None:
    """Refused even where the numbers only explain."""
    model, spec, wanted = tower("clip")
    right = torch_runner(model, spec)

    def run(pixel_values: Floats) -> list[Floats]:
        embeds, features = (array.copy() for array in right(pixel_values))
        embeds[0, 0, 0] = np.nan if fault == "nan" else 0
        return [embeds if fault == "nan" else embeds[:, 1:], features]

    with pytest.raises(ExportError, match="not finite" if fault == "nan" else "shape"):
        compare(FILE, run, wanted, None)


def test_an_engine_that_fails() -> None:
    """Whatever it raises becomes one error with the file's and the picture's name."""
    _model, _spec, wanted = tower("clip")

    def run(pixel_values: Floats) -> list[Floats]:
        raise RuntimeError("no kernel for aten.foo.out\nsecond line")

    with pytest.raises(ExportError, match=r"vision.pte: can't be run on noise-64x64 \(no kernel for aten.foo.out\)$"):
        compare(FILE, run, wanted, None)


def test_the_built_in_pictures_and_at_most_so_many() -> None:
    """Drawings and photographs by default; a longer list is cut."""
    model, spec = make("clip")
    assert len(expected(model, spec).samples) == DRAWINGS + PHOTOS
    assert len(expected(model, spec, pictures() * 4).samples) == DRAWINGS + PHOTOS

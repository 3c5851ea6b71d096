"""What every connector's builder is given, and the patch grid that the token-reducing ones share.

Legend: b pictures, n patches along a side, m embeddings along a side, v any width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from ..errors import CheckpointError


@dataclass(frozen=True)
class Sizes:
    """What a connector joins."""

    name: str
    """the connector's whole name, for messages"""
    vision_width: int
    """width of the tower's features"""
    text_width: int
    """hidden size of the language model"""
    options: Mapping[str, int]
    """`connector_options` of config.json, checked"""
    features: int | None
    """tower tokens that the connector reads, class token included; None where nobody said"""
    tokens: int
    """visual tokens that the name ends in; 0 for a name without"""


@dataclass(frozen=True)
class Part:
    """An entry of the connector table."""

    build: Callable[[Sizes], nn.Module]
    """makes the module with random weights; raises CheckpointError for sizes that it can't join"""
    options: Mapping[str, int] = field(default_factory=dict)
    """option → largest value; the smallest is 1"""


def grids(sizes: Sizes, *, whole: bool) -> tuple[int, int]:
    """Sides of the tower's grid and of the reduced one.

    Args:
        sizes: of a connector whose name ends in its visual tokens.
        whole: whether the reduced side must divide the tower's.

    Raises:
        CheckpointError: the features are no square grid, or can't become so many tokens; the hint says what fits.
    """
    if sizes.features is None:
        raise CheckpointError(
            f"connector {sizes.name}: nobody said how many tower tokens it reads", "give feature_tokens in config.json"
        )
    n, m = math.isqrt(sizes.features), math.isqrt(sizes.tokens)
    if n * n != sizes.features:
        raise CheckpointError(
            f"connector {sizes.name} needs a square grid of patches, and {sizes.features} tower tokens are none",
            _square_hint(sizes.features),
        )
    sides = [side for side in range(1, n + 1) if not whole or n % side == 0]
    if m * m != sizes.tokens or m not in sides:
        stem = sizes.name.rpartition("-")[0]
        raise CheckpointError(
            f"connector {sizes.name}: {n} x {n} patches can't become {sizes.tokens} tokens",
            f"possible for {stem}: {', '.join(str(side * side) for side in sides)}",
        )
    return n, m


def check_grid(features: torch.Tensor, n: int) -> None:
    """Raise CheckpointError unless the features (b, p, v) hold n · n tokens."""
    if features.shape[1] != n * n:
        raise CheckpointError(
            f"the connector was made for {n} x {n} patches, and the tower gives {features.shape[1]} tokens",
            "feed pictures of the model's own size; feature_tokens in config.json says how many it expects",
        )


def average(features: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Adaptive average pooling of a grid, as torch.nn.AdaptiveAvgPool2d(m): (b, n · n, v) → (b, m · m, v).

    Window i holds the rows from floor(i · n / m) to ceil((i + 1) · n / m); windows overlap where m doesn't divide n.
    """
    check_grid(features, n)
    if n % m == 0:
        grid = features.transpose(1, 2).reshape(-1, features.shape[2], n, n)  # (b, v, n, n)
        return functional.avg_pool2d(grid, n // m).flatten(2).transpose(1, 2)
    # As two products with a constant matrix: exporters turn overlapping windows into gathers, which phones lack.
    spans = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
    rows = [[(start <= x < stop) / (stop - start) for x in range(n)] for start, stop in spans]
    windows = torch.tensor(rows, dtype=features.dtype, device=features.device)  # (m, n)
    reduced = windows @ features.reshape(-1, n, n * features.shape[2])  # (b, m, n · v)
    return (windows @ reduced.reshape(-1, m, n, features.shape[2])).flatten(1, 2)


def _square_hint(features: int) -> str:
    if math.isqrt(features + 1) ** 2 == features + 1:
        return (
            "the first patch is dropped: keep it with select_strategy full, "
            "or use a connector that takes any number of tokens, as resampler and qformer do"
        )
    if math.isqrt(features - 1) ** 2 == features - 1:
        return "a class token is among them: drop it with select_strategy default"
    return "use a connector that takes any number of tokens, as resampler and qformer do"

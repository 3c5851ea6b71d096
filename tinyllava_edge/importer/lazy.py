"""A tensor that is read when it is written: steps wrap each other's `read`, so memory holds one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..weights import TensorSource


@dataclass(frozen=True)
class Lazy:
    """One tensor of the model that is being imported."""

    name: str
    """name in the source's files"""
    file: Path
    """file that holds it"""
    shape: tuple[int, ...]
    """sizes, outermost first"""
    dtype: torch.dtype
    """type, kept from the source"""
    read: Callable[[], torch.Tensor]
    """gives the tensor; nothing is kept"""

    def with_change(self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """The tensor that `change` makes of this one, of the same type and, unless given, the same shape."""
        return dataclasses.replace(self, shape=shape or self.shape, read=lambda: change(self.read()))


Tensors = dict[str, Lazy]


def lazy(source: TensorSource) -> Tensors:
    """Every tensor of opened files under its own name."""

    def entry(name: str) -> Lazy:
        info = source.infos[name]
        return Lazy(name, info.file, info.shape, info.dtype, lambda: source.get(name))

    return {name: entry(name) for name in source.infos}

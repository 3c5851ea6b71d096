"""Tensors of a directory by name, read one at a time: a 3-billion-parameter model never stands in memory whole.

safetensors only. Pickled files are read by the importer alone, through torch's weights-only path (importer/pickled.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    """sizes, outermost first"""
    dtype: torch.dtype
    """type on disk"""
    file: Path
    """file that holds it"""

    @property
    def bytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name; `get` reads one and keeps nothing."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name → what the header says, in the files' order."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """One tensor in its type on disk."""
        ...


class Weights:
    """Tensors of one or several safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers.

        Raises:
            CheckpointError: a file is missing or truncated, its header lies, or two files hold the same name.
        """
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _header(file):
                if name in self.infos:
                    raise CheckpointError(
                        f"{file}: tensor {name} is in {self.infos[name].file.name} too", "restore the checkpoint"
                    )
                self.infos[name] = info

    def get(self, name: str) -> torch.Tensor:
        """One tensor in its type on disk; the file is closed again. Raises CheckpointError."""
        if name not in self.infos:
            raise CheckpointError(f"no tensor {name}", "restore the checkpoint")
        path = self.infos[name].file
        with _open(path) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of one tensor, so that a large embedding needn't stand in memory whole."""
        with _open(self.infos[name].file) as file:
            part: torch.Tensor = file.get_slice(name)[start:stop]
        return part


def open_weights(root: Path) -> Weights:
    """The tensors of a model directory: what its index lists, or model.safetensors, or its only safetensors files.

    Raises:
        CheckpointError: there are none, or the index names files or tensors that aren't there.
    """
    index = root / INDEX
    if index.is_file():
        placed = _placed(index)
        weights = Weights([root / name for name in sorted(set(placed.values()))])
        lost = [name for name, file in placed.items() if name not in weights.infos]
        if lost:
            raise CheckpointError(f"{index}: lists {lost[0]}, which no file holds", "copy the whole checkpoint again")
        return weights
    if (root / SINGLE).is_file():
        return Weights([root / SINGLE])
    raise CheckpointError(f"{root}: no {SINGLE} and no {INDEX}", "name a directory with safetensors weights")


def _placed(index: Path) -> dict[str, str]:
    """Tensor → file of an index. Raises CheckpointError for one that isn't an index or leaves its directory."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = {str(name): str(file) for name, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of weights ({error!r})", "copy the file again") from error
    for file in placed.values():
        if not file or Path(file).name != file:
            raise CheckpointError(f"{index}: names {file!r}, which leaves the directory", "get the model again")
    return placed


def _header(path: Path) -> Iterator[tuple[str, TensorInfo]]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            part = file.get_slice(name)
            kind = str(part.get_dtype())
            if kind not in _DTYPES:
                raise CheckpointError(f"{path}: tensor {name} is of type {kind}", "save it in float16 or float32")
            yield name, TensorInfo(tuple(part.get_shape()), _DTYPES[kind], path)


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: missing", "copy the whole checkpoint again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({error})", "copy the file again") from error

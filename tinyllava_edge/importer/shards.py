"""safetensors files written tensor by tensor: memory holds one tensor, whatever the model's size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import write_json
from ..weights import INDEX, SINGLE
from .lazy import Lazy

SHARD_BYTES = 2_000_000_000
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_shards(
    out: Path,
    tensors: Sequence[tuple[str, Lazy]],
    *,
    limit: int = SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Write model.safetensors, or shards of at most `limit` bytes and their index; a larger tensor has its own shard.

    Args:
        out: directory.
        tensors: name in the files, tensor.
        limit: bytes of tensor data per file.
        progress: told each file.

    Returns:
        Bytes of tensor data.

    Raises:
        CheckpointError: a tensor is not a float, holds NaN or infinity, or isn't what its header promised.
    """
    shards: list[list[tuple[str, Lazy]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} is {str(tensor.dtype).removeprefix('torch.')}",
                "quantised weights can't be imported: get them in float16, bfloat16 or float32",
            )
        if shards[-1] and filled + _bytes(tensor) > limit:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += _bytes(tensor)
    many = len(shards) > 1
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        if progress:
            progress(f"weights: file {number} of {len(shards)}")
        _write(out / file, shard)
        placed |= dict.fromkeys((name for name, _ in shard), file)
    total = sum(_bytes(tensor) for _, tensor in tensors)
    if many:
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
    return total


def _write(path: Path, tensors: Sequence[tuple[str, Lazy]]) -> None:
    """One file: eight bytes of header length, JSON padded with spaces to a multiple of eight, then the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors:
        end = start + _bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in tensors:
            value = tensor.read()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name} isn't what its header says")
            if not torch.isfinite(value).all():
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name} holds NaN or infinity",
                    "the weights are damaged: get another copy",
                )
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _bytes(tensor: Lazy) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize

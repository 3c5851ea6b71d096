"""Importance matrices: per input channel of every matrix, the mean square of what flows into it.

llama.cpp's quantisers weigh a column's rounding error with it. Read and written in llama.cpp's own GGUF format, so
its tools take ours and we take theirs; `calibrate.collect` makes one over pictures and text.

Not covered, as in llama.cpp's own collector: the token embedding, whose rows are looked up and not multiplied, and
the output head, which gets 5 or 6 bits anyway. A tied head is both.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import ExportError
from ..files import new_file, sha256_file
from .gguf_header import GgufHeader, GgufTensor, matrices, read_header

Floats = npt.NDArray[np.float32]
MAX_BYTES = 1 << 28  # a 7-billion-parameter model's takes 5 MB
CHUNK_SIZE = 512  # positions that llama.cpp's tools call a chunk
_FLOOR = 1e-6  # share of the mean
_MOST = 1e20  # mean square; from about 1e38 llama.cpp's quantisers overflow and end the process
UNCOVERED = ("token_embd.weight", "output.weight")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_OURS = "tinyllava_edge.imatrix."
_AGAIN = "collect it again with `tinyllava-edge imatrix`; llama.cpp's old .dat form isn't read"


@dataclass(frozen=True)
class Imatrix:
    """Sums of squares per input channel."""

    sums: Mapping[str, Floats]
    """GGUF name of a matrix → (columns,): sum over positions of the squared input"""
    counts: Mapping[str, int]
    """GGUF name of a matrix → positions summed"""
    datasets: tuple[str, ...] = ()
    """what it was collected on"""
    image_share: float | None = None
    """share of the positions that held image embeddings; None where the file doesn't say"""
    samples: int = 0
    """conversations it was collected on; 0 where the file doesn't say"""
    checkpoint_sha256: str = ""
    """files.sha256_tree of the checkpoint, where the file says"""
    sha256: str = ""
    """hash of the file; empty until saved"""

    @property
    def positions(self) -> int:
        """Positions that the fullest entry summed."""
        return max(self.counts.values())

    def weights(self, name: str) -> Floats:
        """Mean square per input channel of one matrix, (columns,), as the quantisers get it.

        None is zero: llama.cpp's quantisers erase a block whose channels are all zero, so a channel that the
        calibration never used keeps a millionth of the matrix's mean.
        """
        mean = self.sums[name].astype(np.float64) / self.counts[name]
        return np.maximum(mean, _FLOOR * mean.mean()).astype(np.float32)


def save_imatrix(imatrix: Imatrix, path: Path) -> Imatrix:
    """Write llama.cpp's GGUF form, whole or not at all; returns the same matrix with its file's hash."""
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        try:
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(imatrix.datasets) or ["unknown"])
            writer.add_uint32("imatrix.chunk_count", math.ceil(imatrix.positions / CHUNK_SIZE))
            writer.add_uint32("imatrix.chunk_size", CHUNK_SIZE)
            writer.add_uint32(f"{_OURS}samples", imatrix.samples)
            writer.add_string(f"{_OURS}checkpoint_sha256", imatrix.checkpoint_sha256)
            if imatrix.image_share is not None:
                writer.add_float32(f"{_OURS}image_share", imatrix.image_share)
            for name in sorted(imatrix.sums):
                writer.add_tensor(name + _SUMS, np.asarray(imatrix.sums[name], np.float32)[None])
                writer.add_tensor(name + _COUNTS, np.array([[imatrix.counts[name]]], np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return replace(imatrix, sha256=sha256_file(path))


def load_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix, ours or llama.cpp's.

    Raises:
        ExportError: missing, too large, not in this format, or with values that no collection gives.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such importance matrix", _AGAIN)
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(f"{path}: {path.stat().st_size:,} bytes, limit {MAX_BYTES:,}", _AGAIN)
    header = read_header(path)
    if header.values.get("general.type") != "imatrix":
        raise ExportError(f"{path}: general.type is {str(header.values.get('general.type'))[:40]!r}", _AGAIN)
    sums: dict[str, Floats] = {}
    counts: dict[str, int] = {}
    for key, tensor in header.tensors.items():
        name = key.removesuffix(_SUMS).removesuffix(_COUNTS)
        if {name + _SUMS, name + _COUNTS} - set(header.tensors) or key == name:
            raise ExportError(f"{path}: {key[:100]!r} is no half of a pair {_SUMS}, {_COUNTS}", _AGAIN)
        values = _values(path, key, tensor)
        if key.endswith(_SUMS):
            sums[name] = values
        elif values.size != 1 or not 1 <= values[0] < 1 << 62:
            raise ExportError(f"{path}: {key[:100]!r} holds {values[:4].tolist()}, expected one count", _AGAIN)
        else:
            counts[name] = int(values[0])
    imatrix = Imatrix(sums, counts, sha256=sha256_file(path), **_told(header))
    check_values(imatrix, str(path))
    return imatrix


def check_values(imatrix: Imatrix, where: str) -> None:
    """Raise ExportError for what no collection gives, and for what makes llama.cpp erase weights or end the process."""
    if not imatrix.sums:
        raise ExportError(f"{where}: the importance matrix holds no entry", _AGAIN)
    for name, sums in imatrix.sums.items():
        most = float(sums.max(initial=0)) / imatrix.counts[name]
        if not np.isfinite(sums).all() or (sums < 0).any() or not 0 < most < _MOST:
            raise ExportError(
                f"{where}: importance of {name[:100]!r} is not finite, below zero, all zero or beyond {_MOST:g}", _AGAIN
            )


def check_fits(imatrix: Imatrix, header: GgufHeader, path: Path) -> None:
    """Raise ExportError unless the matrix covers every matrix of the layers of `path` with the right width."""
    wanted = {name: tensor.shape[0] for name, tensor in matrices(header).items() if name not in UNCOVERED}
    missing = [name for name in wanted if name not in imatrix.sums]
    wrong = [name for name in wanted if name not in missing and len(imatrix.sums[name]) != wanted[name]]
    if missing or wrong:
        name = (missing or wrong)[0]
        found = "is missing" if missing else f"has {len(imatrix.sums[name])} channels for {wanted[name]}"
        raise ExportError(
            f"the importance matrix belongs to another model than {path}: {name} {found} "
            f"({len(missing) + len(wrong)} of {len(wanted)} matrices)",
            "collect one on this model's checkpoint",
        )


def native_array(imatrix: Imatrix) -> tuple[Any, list[Any]]:
    """llama.cpp's null-terminated array, and what must stay alive while it is in use."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix.sums) + 1))()
    kept: list[Any] = [entries]
    for entry, name in zip(entries, imatrix.sums, strict=False):
        values = imatrix.weights(name)
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        kept.append(values)
    return entries, kept


def _values(path: Path, key: str, tensor: GgufTensor) -> Floats:
    """One tensor's numbers, flat. Raises ExportError unless it is one row of float32."""
    if tensor.type != "f32" or math.prod(tensor.shape[1:]) != 1 or not tensor.bytes:
        raise ExportError(f"{path}: {key[:100]!r} is {tensor.type} of shape {tensor.shape}", _AGAIN)
    return np.fromfile(path, np.float32, tensor.bytes // 4, offset=tensor.offset)


def _told(header: GgufHeader) -> dict[str, Any]:
    """What a file says of its making, as far as it has the right type."""
    datasets = header.values.get("imatrix.datasets")
    share = header.values.get(f"{_OURS}image_share")
    samples = header.values.get(f"{_OURS}samples")
    checkpoint = header.values.get(f"{_OURS}checkpoint_sha256")
    return {
        "datasets": tuple(str(name)[:200] for name in datasets[:16]) if isinstance(datasets, list) else (),
        "image_share": share if isinstance(share, float) and 0 <= share <= 1 else None,
        "samples": samples if isinstance(samples, int) else 0,
        "checkpoint_sha256": checkpoint[:64] if isinstance(checkpoint, str) else "",
    }

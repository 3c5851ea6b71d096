"""A float GGUF → a quantised one, by llama.cpp, with the types that were really written."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import gguf

from ..errors import ExportError, UsageError
from ..files import is_full, new_file, no_space
from .llm import tensor_types
from .native_log import captured

# Name → llama_ftype. Types that need an importance matrix are left out: without one llama.cpp refuses them.
LLM_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q5_0": 8,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q4_0": 2,
    "q3_k_m": 12,
    "q2_k": 10,
}

# Blocks of 256 columns: where a matrix has other widths, llama.cpp takes a type of its own choice instead.
_BLOCK = 256
_K_TYPES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k")


def quantize_gguf(src: Path, dst: Path, llm_type: str, n_threads: int | None = None) -> dict[str, int]:
    """Quantise a GGUF.

    Args:
        src: f32 or f16 file.
        dst: file to write, whole or not at all.
        llm_type: key of LLM_TYPES.
        n_threads: threads to use; all cores by default.

    Returns:
        Tensor type → number of tensors, read back from the file.

    Raises:
        UsageError: unknown type.
        StorageError: the disk is full.
        ExportError: llama.cpp refused; its last log lines are quoted.
    """
    import llama_cpp

    if llm_type not in LLM_TYPES:
        raise UsageError(f"unknown LLM type {llm_type!r}", f"known: {', '.join(LLM_TYPES)}")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = LLM_TYPES[llm_type]
    parameters.nthread = n_threads or os.cpu_count() or 1
    with new_file(dst) as temporary, captured() as log:
        code = llama_cpp.llama_model_quantize(str(src).encode(), str(temporary).encode(), ctypes.byref(parameters))
        if code != 0:
            if is_full(dst) or "iostream" in log.reason():  # what a C++ stream says when a write fails
                raise no_space(dst)
            raise ExportError(
                f"{dst}: llama.cpp can't quantise to {llm_type} ({log.reason()})", "try another --llm type"
            )
        _check_whole(temporary, dst)
    return tensor_types(dst)


def fallbacks(path: Path, llm_type: str) -> dict[str, str]:
    """Matrices that did not get a type of the asked family: tensor name → type written.

    K-quants work in blocks of 256 columns; matrices of other widths get a 32-column type, which is larger.
    """
    if llm_type not in _K_TYPES:
        return {}
    return {
        tensor.name: tensor.tensor_type.name.lower()
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) > 1 and int(tensor.shape[0]) % _BLOCK != 0
    }


def _check_whole(written: Path, dst: Path) -> None:
    """A full disk may pass unnoticed in native code: the file must reach to the end of its last tensor."""
    try:
        tensors = gguf.GGUFReader(written).tensors
        end = max(tensor.data_offset + int(tensor.n_bytes) for tensor in tensors)
    except (ValueError, IndexError, OSError) as error:
        end, reason = written.stat().st_size + 1, str(error)
    else:
        reason = "it ends inside a tensor"
    if written.stat().st_size < end:
        if is_full(dst):
            raise no_space(dst)
        raise ExportError(f"{dst}: llama.cpp left a damaged file ({reason})", "export again")

"""A float GGUF → a quantised one, by llama.cpp, with the types that were really written.

llama.cpp ends the process on some requests (a block type for a width that it doesn't divide, a 2-bit type without an
importance matrix), so everything it would assert is asked here first.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError, UsageError
from ..files import is_full, new_file, no_space, scratch_directory
from .gguf_header import GgufHeader, matrices, read_header, read_shards
from .gguf_shards import shards_of
from .imatrix import Imatrix, check_fits, native_array
from .llm_types import FLOAT_LLM_TYPES, IMATRIX_HINT, LLM_TYPES, TENSOR_TYPES, llm_type, tensor_type
from .native_log import captured

__all__ = [
    "LLM_TYPES",
    "check_request",
    "fallbacks",
    "planned_types",
    "quantize_gguf",
    "quantize_recorded",
    "resolve_overrides",
]

HEAD, EMBEDDING = "output.weight", "token_embd.weight"
_MAX_PATTERN = 100  # bytes of one override's pattern, so that its record fits in _MAX_TEXT
_TEXT, _INT = 3, 0  # llama_model_kv_override's tags
_MAX_TEXT = 127  # bytes of a text in llama_model_kv_override
# [   1/ 201] token_embd.weight - [ 2048, 32000, 1, 1], type = f16, size = 125.00 MiB -> 70.31 MiB (q4_K)
_PLANNED = re.compile(r"\[\s*\d+/\s*\d+\] (\S+)\s+- \[.*\], type =\s*(\w+), size =[^(]*(?:\((\w+)\))?$")
MAX_BUFFER = 64 << 20  # bytes of rows that llama.cpp works on at once; its default is a whole embedding in float32


def quantize_gguf(
    src: Path,
    dst: Path,
    name: str,
    *,
    imatrix: Imatrix | None = None,
    overrides: Mapping[str, str] | None = None,
    n_threads: int | None = None,
) -> dict[str, int]:
    """Quantise a GGUF. What it was made with is written into its metadata, under llama.cpp's own keys and ours.

    Args:
        src: f32, f16 or bf16 file, or its shards' common name; the result is one file.
        dst: file to write, whole or not at all.
        name: key of LLM_TYPES.
        imatrix: importance matrix of the same model.
        overrides: regular expression → key of TENSOR_TYPES, for matrices whose GGUF name it is found in; the first
            that matches counts. `output` and `token_embd` are ordinary names here.
        n_threads: threads to use; all cores by default.

    Returns:
        Tensor type → number of tensors, read back from the file; most frequent first.

    Raises:
        UsageError: an unknown type, a type that needs an importance matrix, or an override that can't be.
        StorageError: the disk is full.
        ExportError: the source is quantised already, the importance matrix is another model's, or llama.cpp refused;
            its last log lines are quoted.
    """
    import llama_cpp

    check_request(name, imatrix is not None)
    header, first = _read_source(src, dst, name), shards_of(src)[0]
    if imatrix is not None:
        check_fits(imatrix, header, src)
    parameters, _alive = _parameters(header, name, imatrix, overrides or {}, n_threads)
    with new_file(dst) as temporary, captured() as log:
        code = llama_cpp.llama_model_quantize(os.fsencode(first), os.fsencode(temporary), ctypes.byref(parameters))
        if code != 0:
            if is_full(dst) or "iostream" in log.reason():  # what a C++ stream says when a write fails
                raise no_space(dst)
            raise ExportError(f"{dst}: llama.cpp can't quantise to {name} ({log.reason()})", "try another --llm type")
        written = _check_whole(temporary, dst)
    counts: dict[str, int] = {}
    for tensor in written.tensors.values():
        counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def planned_types(
    src: Path, name: str, *, imatrix: Imatrix | None = None, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Which type every tensor would get: llama.cpp's own choice, asked for in a dry run that reads no weight.

    Args:
        src, name, imatrix, overrides: as quantize_gguf; of the matrix it only counts whether there is one.

    Returns:
        GGUF name → tensor type in lower case.

    Raises:
        UsageError, ExportError: as quantize_gguf, and llama.cpp has no dry run or told of other tensors.
    """
    import llama_cpp

    check_request(name, imatrix is not None)
    header = _read_source(src, src, name)
    parameters, _alive = _parameters(header, name, imatrix, overrides or {}, 1)
    remedy = "install the llama-cpp-python that this version asks for, or export without --profile"
    if "dry_run" not in {entry[0] for entry in parameters._fields_}:  # ctypes would take it for an attribute of its own
        raise ExportError("this llama-cpp-python has no dry run of a quantisation", remedy)
    parameters.dry_run = True
    with captured(kept=None) as log, scratch_directory() as folder:
        target = folder / "planned.gguf"
        code = llama_cpp.llama_model_quantize(os.fsencode(src), os.fsencode(target), ctypes.byref(parameters))
    found = {told[1]: (told[3] or told[2]).lower() for line in log.lines() if (told := _PLANNED.match(line))}
    if code != 0 or set(found) != set(header.tensors):
        raise ExportError(
            f"llama.cpp told the types of {len(found)} of {len(header.tensors)} tensors for {name} ({log.reason()})",
            remedy,
        )
    return found


def quantize_recorded(
    src: Path,
    dst: Path,
    name: str,
    made_from: str,
    *,
    imatrix: Imatrix | None = None,
    overrides: Mapping[str, str] | None = None,
    n_threads: int | None = None,
    tell: Callable[[str], None],
) -> tuple[dict[str, int], dict[str, Any]]:
    """`quantize_gguf`, told step by step, and what a bundle's export.json keeps of it.

    Args:
        src, dst, name, imatrix, overrides, n_threads: as quantize_gguf.
        made_from: key of FLOAT_LLM_TYPES, the type of `src`.
        tell: told the type, and the matrices that fell back to another.

    Returns:
        Tensor type → number of tensors, and the record.
    """
    tell(f"language model: {name}")
    counts = quantize_gguf(src, dst, name, imatrix=imatrix, overrides=overrides, n_threads=n_threads)
    other = fallbacks(dst, name)
    if other:
        kinds = ", ".join(sorted(set(other.values())))
        tell(f"language model: {name}: {len(other)} matrices don't fit its blocks and became {kinds}")
    record = {"made_from": made_from, "fallbacks": other, "overrides": dict(overrides or {})}
    return counts, {**record, "imatrix_sha256": None if imatrix is None else imatrix.sha256}


def check_request(name: str, has_imatrix: bool) -> None:
    """Raise UsageError for an unknown type, or one that needs an importance matrix when there is none."""
    if llm_type(name).needs_imatrix and not has_imatrix:
        raise UsageError(f"{name} needs an importance matrix", IMATRIX_HINT)


def fallbacks(path: Path, name: str) -> dict[str, str]:
    """Matrices that did not get a type of the asked family: tensor name → type written.

    Types with blocks of 256 columns can't hold a matrix of another width; llama.cpp then takes a type with blocks of
    32, which is larger, or float16 where 32 doesn't divide it either.
    """
    block = llm_type(name).block
    return {key: tensor.type for key, tensor in matrices(read_shards(path)).items() if tensor.shape[0] % block != 0}


def resolve_overrides(
    header: GgufHeader, overrides: Mapping[str, str], name: str, imatrix: Imatrix | None = None
) -> dict[str, str]:
    """Which matrices get which type.

    Returns:
        GGUF name of a matrix → key of TENSOR_TYPES.

    Raises:
        UsageError: a pattern that is too long, isn't one, or matches no matrix; an unknown type, one whose blocks don't
            divide the matrix, or one that needs an importance matrix which doesn't cover it.
    """
    if overrides and name in FLOAT_LLM_TYPES:
        raise UsageError(f"overrides have no effect on {name}", "give them with a quantised type")
    widths = {key: tensor.shape[0] for key, tensor in matrices(header).items()}
    chosen: dict[str, str] = {}
    for pattern, kind in overrides.items():
        wanted = tensor_type(kind)
        found = [key for key in widths if _compiled(pattern).search(key)]
        if not found:
            raise UsageError(
                f"override {pattern!r} matches no matrix", f"there are e.g. {', '.join(list(widths)[:12])}"
            )
        for key in found:
            if widths[key] % wanted.block:
                raise UsageError(
                    f"override {pattern!r}: {kind} has blocks of {wanted.block}, {key} is {widths[key]} wide",
                    f"take one of {', '.join(k for k, t in TENSOR_TYPES.items() if widths[key] % t.block == 0)}",
                )
            if wanted.needs_imatrix and (imatrix is None or key not in imatrix.sums):
                reason = IMATRIX_HINT if imatrix is None else "the head and the token embedding take 3 bits or more"
                raise UsageError(f"override {pattern!r}: {kind} needs an importance matrix of {key}", reason)
            chosen.setdefault(key, kind)
    return chosen


def _compiled(pattern: str) -> re.Pattern[str]:
    size = len(pattern.encode("utf-8", "replace"))
    if not 1 <= size <= _MAX_PATTERN:
        raise UsageError(f"override pattern of {size} bytes", f"give 1 to {_MAX_PATTERN}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"override {pattern!r} is no regular expression: {error}", "escape its dots: \\.") from error


def _read_source(src: Path, dst: Path, name: str) -> GgufHeader:
    try:
        header = read_shards(src)
    except ExportError as error:
        raise ExportError(f"{dst}: can't quantise to {name}: {error.message}", error.hint) from error
    for key, tensor in header.tensors.items():
        if tensor.type not in FLOAT_LLM_TYPES:
            raise ExportError(
                f"{src}: {key} is {tensor.type} already; quantising twice adds both errors",
                "start from an f16, bf16 or f32 file: export with --llm f16",
            )
    return header


def _parameters(
    header: GgufHeader, name: str, imatrix: Imatrix | None, overrides: Mapping[str, str], n_threads: int | None
) -> tuple[Any, list[Any]]:
    """llama.cpp's request, and what must stay alive while it is in use."""
    import llama_cpp

    chosen = resolve_overrides(header, overrides, name, imatrix)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = LLM_TYPES[name].ftype
    parameters.nthread = n_threads or os.cpu_count() or 1
    parameters.max_buf_size = MAX_BUFFER
    kept = [_set_overrides(parameters, chosen), _set_record(parameters, imatrix, overrides)]
    if imatrix is not None:
        parameters.imatrix, alive = native_array(imatrix)
        kept.append(alive)
    return parameters, kept


def _set_overrides(parameters: Any, chosen: Mapping[str, str]) -> Any:
    """One escaped pattern per matrix, so that the engine never runs a pattern that somebody typed."""
    import llama_cpp

    layers = {key: kind for key, kind in chosen.items() if key not in (HEAD, EMBEDDING)}
    if HEAD in chosen:
        parameters.output_tensor_type = TENSOR_TYPES[chosen[HEAD]].ggml_type
    if EMBEDDING in chosen:
        parameters.token_embedding_type = TENSOR_TYPES[chosen[EMBEDDING]].ggml_type
    entries = (llama_cpp.llama_model_tensor_override * (len(layers) + 1))()
    for entry, (key, kind) in zip(entries, layers.items(), strict=False):
        entry.pattern = b"^" + key.replace(".", r"\.").encode() + b"$"
        entry.type = TENSOR_TYPES[kind].ggml_type
    parameters.tt_overrides = entries
    return entries


def _set_record(parameters: Any, imatrix: Imatrix | None, overrides: Mapping[str, str]) -> Any:
    """Metadata that says how the file was made: llama.cpp's own four keys, the matrix's hash, the overrides."""
    import llama_cpp

    record: dict[str, str | int] = {}
    if imatrix is not None:
        record = {
            "quantize.imatrix.file": "imatrix.gguf",
            "quantize.imatrix.dataset": imatrix.datasets[0] if imatrix.datasets else "unknown",
            "quantize.imatrix.entries_count": len(imatrix.sums),
            "quantize.imatrix.chunks_count": -(-imatrix.positions // 512),
            "tinyllava_edge.imatrix_sha256": imatrix.sha256,
        }
    for number, pair in enumerate(overrides.items()):
        record[f"tinyllava_edge.override.{number}"] = "=".join(pair)
    entries = (llama_cpp.llama_model_kv_override * (len(record) + 1))()
    for entry, (key, value) in zip(entries, record.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = _TEXT, value.encode()[:_MAX_TEXT].decode(errors="ignore").encode()
        else:
            entry.tag, entry.value.val_i64 = _INT, value
    parameters.kv_overrides = entries
    return entries


def _check_whole(written: Path, dst: Path) -> GgufHeader:
    """A full disk may pass unnoticed in native code: the file must reach to the end of its last tensor."""
    try:
        return read_header(written)
    except ExportError as error:
        if is_full(dst):
            raise no_space(dst) from error
        raise ExportError(f"{dst}: llama.cpp left a damaged file ({error.message})", "export again") from error

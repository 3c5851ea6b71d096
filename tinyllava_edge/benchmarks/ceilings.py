"""What this machine can do at best, measured in the same run: memory bandwidth and matrix products.

Bandwidth is numpy's over arrays that no cache holds; products are ONNX Runtime's, the engine of the vision graph, fed
with a graph of one node that is written here byte by byte. The best of several tries counts; about 1.5 s in all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava_edge.benchmarks.conditions import text
from tinyllava_edge.benchmarks.results import Sample

UNITS: Mapping[str, str] = {
    "copy_gb_per_s": "GB/s",
    "read_gb_per_s": "GB/s",
    "gemm_f32_gflop_per_s": "GFLOP/s",
    "gemm_int8_gop_per_s": "GOP/s",
}
SECONDS = 1.5  # in all
_MIB = 1 << 20
_LEAST, _MOST = 64 * _MIB, 512 * _MIB  # bytes of the array that is read
_SHAPES = ((256, 512, 512), (576, 1024, 1024), (576, 1024, 4096), (729, 1152, 4304))  # m, k, n; the towers' are last
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6  # TensorProto.DataType


def ceiling_samples(
    n_threads: int, environment_id: str = "", target: str = "cpu", seconds: float = SECONDS
) -> list[Sample]:
    """Measure the ceilings.

    Args:
        n_threads: threads of each; as many as the builds have.
        environment_id: the environment line that they belong to.
        target: the lines' target.
        seconds: time for all of them; each runs at least twice, however slow the machine.

    Returns:
        A `ceiling` line for each of UNITS; value null with a reason for one that can't be measured.
    """
    return [
        Sample("ceiling", "", "", name, value, UNITS[name], 0, environment_id, target,
               {"n_threads": n_threads} | ({"reason": reason} if reason else {}))
        for name, value, reason in _all(n_threads, seconds)
    ]  # fmt: skip


def _all(n_threads: int, seconds: float) -> list[tuple[str, float | None, str]]:
    share = seconds / 4
    size = array_bytes()
    rows: list[tuple[str, float | None, str]] = [
        ("copy_gb_per_s", copy_bandwidth(n_threads, share, size) / 1e9, ""),
        ("read_gb_per_s", read_bandwidth(n_threads, share, size) / 1e9, ""),
    ]
    for name, operator in (("gemm_f32_gflop_per_s", "MatMul"), ("gemm_int8_gop_per_s", "MatMulInteger")):
        try:
            rows.append((name, gemm_rate(operator, n_threads, share) / 1e9, ""))
        except ImportError as error:
            rows.append((name, None, f"no ONNX Runtime ({error})"))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            rows.append((name, None, f"ONNX Runtime refused {operator}: {str(error).splitlines()[0][:200]}"))
    return rows


def array_bytes(root: Path = Path("/")) -> int:
    """Size of the array to read: four times the largest cache, 64 to 512 MiB, and no more than a sixteenth of what is
    free."""
    caches = [text(index / "size") or "" for index in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*")]
    largest = max((int(size[:-1]) * 1024 for size in caches if size[:-1].isdigit() and size.endswith("K")), default=0)
    free = _available(root)
    size = min(max(_LEAST, 4 * largest), _MOST)
    return size if free is None else max(4 * _MIB, min(size, free // 16))


def copy_bandwidth(threads: int, seconds: float, size: int) -> float:
    """Bytes per second that are read and written together while an array is copied."""
    half = size // 16  # numbers of 8 bytes in half the array
    source, target = np.ones(half, np.float64), np.zeros(half, np.float64)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    return _rate(lambda pool: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts)), threads, seconds,
                 2 * source.nbytes)  # fmt: skip


def read_bandwidth(threads: int, seconds: float, size: int) -> float:
    """Bytes per second that are read, by the better of two ways to go through an array once."""
    data = np.ones(size // 8, np.int64)
    parts = np.array_split(data, threads)
    rates = []
    for way in (np.max, np.sum):
        work = partial(_each, way, parts)
        rates.append(_rate(work, threads, seconds / 2, data.nbytes))
    return max(rates)


def _each(way: Callable[[Any], Any], parts: Sequence[Any], pool: ThreadPoolExecutor) -> None:
    """Go through the parts side by side."""
    list(pool.map(way, parts))


def _rate(work: Callable[[ThreadPoolExecutor], Any], threads: int, seconds: float, size: int) -> float:
    """The best rate of a piece of work that moves `size` bytes."""
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for took in _times(lambda: work(pool), seconds):
            best = max(best, size / took)
    return best


def gemm_rate(operator: str, threads: int, seconds: float) -> float:
    """Operations per second of a matrix product with constant weights; larger ones are tried while time is left.

    Args:
        operator: `MatMul` of float32, or `MatMulInteger` of uint8 by int8 as dynamic quantisation makes it.
        threads: of the operator.
        seconds: time for all tries; the first size always runs.
    """
    import onnxruntime as ort

    end, best = time.perf_counter() + seconds, 0.0
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    draw = np.random.default_rng(0)
    for m, k, n in _SHAPES:
        work, left = 2 * m * k * n, end - time.perf_counter()
        if best and 3 * work / best > left:  # a warm run and two that count
            break
        taken = np.dtype(np.float32) if operator == "MatMul" else np.dtype(np.uint8)
        weights = draw.integers(-100, 100, (k, n)).astype(np.float32 if operator == "MatMul" else np.int8)
        model = product_graph(operator, m, weights)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        inputs = {"x": draw.integers(0, 100, (m, k)).astype(taken)}
        session.run(None, inputs)
        slot = 0.0 if not best else (end - time.perf_counter()) / 2
        best = max(best, work / min(_times(partial(session.run, None, inputs), slot)))
    return best


def product_graph(operator: str, rows: int, weights: np.ndarray[Any, Any]) -> bytes:
    """An ONNX model, opset 17: y = operator(x, w), with x of (rows, k) and the constant w of (k, n)."""
    k, n = weights.shape
    taken, kind, given = (_FLOAT, _FLOAT, _FLOAT) if operator == "MatMul" else (_UINT8, _INT8, _INT32)
    node = _field(1, b"x") + _field(1, b"w") + _field(2, b"y") + _field(4, operator.encode())
    constant = _number(1, k) + _number(1, n) + _number(2, kind) + _field(8, b"w") + _field(9, weights.tobytes())
    graph = _field(1, node) + _field(2, b"product") + _field(5, constant)
    graph += _field(11, _value(b"x", taken, (rows, k))) + _field(12, _value(b"y", given, (rows, n)))
    return _number(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 17))


def _value(name: bytes, kind: int, shape: tuple[int, ...]) -> bytes:
    """ValueInfoProto of a tensor."""
    sizes = b"".join(_field(1, _number(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _number(1, kind) + _field(2, sizes)))


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field that has a length."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _times(work: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each run; at least two, and as many as fit."""
    found, end = list[float](), time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() + min(found) < end:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def _available(root: Path) -> int | None:
    """Bytes that new pages can get."""
    for line in (text(root / "proc/meminfo") or "").splitlines():
        words = line.split()
        if words[:1] == ["MemAvailable:"] and words[1].isdigit():
            return int(words[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return None

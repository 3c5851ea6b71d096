"""What this machine can do at most, and how much work the stages are: the yardsticks of runtime_speed.py.

Legend: m rows, k inputs, n outputs of a matrix product; 2 m k n floating-point operations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BIG = 512 << 20  # bytes; far beyond any cache
OUTSIDE = ("token_embd.", "position_embd.")  # tables: a token reads one row


def read_bandwidth(threads: int, repetitions: int = 5, size: int = BIG) -> float:
    """Bytes per second that `threads` threads read together: the best of several ways to add up a large array."""
    data = np.ones(size // 8, np.float64)
    parts = np.array_split(data, threads)
    ways: tuple[Callable[[Any], Any], ...] = (
        np.sum,
        np.max,
        lambda part: np.max(part.view(np.int64)),
        lambda part: np.max(part.view(np.int8)),
    )
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for way in ways:
            for _ in range(repetitions):
                start = time.perf_counter()
                list(pool.map(way, parts))
                best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def gemm_rate(shape: tuple[int, int, int], kind: str, threads: int, repetitions: int = 8) -> float:
    """Operations per second of one matrix product in ONNX Runtime, the best of several runs.

    Args:
        shape: m, k, n.
        kind: `fp32` (MatMul) or `int8` (MatMulInteger of uint8 by int8, as dynamic quantisation makes it).
        threads: CPU threads.
        repetitions: runs.
    """
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    m, k, n = shape
    draw = np.random.default_rng(0)
    types = {
        "fp32": ("MatMul", TensorProto.FLOAT, TensorProto.FLOAT, np.float32, np.float32),
        "int8": ("MatMulInteger", TensorProto.UINT8, TensorProto.INT32, np.uint8, np.int8),
    }
    operator, taken, given, left, right = types[kind]
    weights = numpy_helper.from_array(draw.integers(-100, 100, (k, n)).astype(right), "w")
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", taken, [m, k])],
        [helper.make_tensor_value_info("y", given, [m, n])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {"x": draw.integers(0, 100, (m, k)).astype(left)}
    session.run(None, inputs)
    best = 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        session.run(None, inputs)
        best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def vision_work(checkpoint: Path) -> tuple[int, list[tuple[int, int, int]]]:
    """Operations of tower and connector for one picture, and the shapes of the tower's largest products.

    Matrix products only: patches, attention and MLP of the layers that the connector reads, and its two layers.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    spec = json.loads((checkpoint / "model_spec.json").read_text(encoding="utf-8"))
    vision, width = config["vision_config"], spec["embedding_dim"]
    d, ff, layer = vision["hidden_size"], vision["intermediate_size"], spec["feature_layer"]
    layers = vision["num_hidden_layers"] + 1 + layer if layer < 0 else layer
    patches = (spec["image_size"] // spec["patch_size"]) ** 2
    t = patches + (1 if spec["vision_family"] in ("clip", "dinov2") else 0)
    one = 4 * t * d * d + 2 * t * t * d + 2 * t * d * ff
    work = layers * one + patches * 3 * spec["patch_size"] ** 2 * d
    work += spec["visual_tokens"] * (d * width + width * width)
    return 2 * work, [(t, d, ff), (t, ff, d), (t, d, d)]


def gguf_work(paths: Sequence[Path]) -> dict[str, int]:
    """A language model's size in numbers, from its GGUF.

    Returns:
        `bytes_per_token`: weights that one decode step reads; `body`: parameters that every position passes through;
        `head`: those of the output layer, which only positions with logits pass through.
    """
    import gguf

    tensors = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    table = sum(int(t.n_elements) for t in tensors if t.name == "token_embd.weight")
    head = table if tied else sum(int(t.n_elements) for t in tensors if t.name == "output.weight")
    read = [t for t in tensors if not t.name.startswith(OUTSIDE) or (tied and t.name == "token_embd.weight")]
    inner = [t for t in read if t.name not in ("output.weight", "token_embd.weight")]
    return {
        "bytes_per_token": sum(int(t.n_bytes) for t in read),
        "body": sum(int(t.n_elements) for t in inner),
        "head": head,
    }

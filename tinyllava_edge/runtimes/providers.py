"""ONNX Runtime's execution providers: which ones start here, with which options, and which nodes they really took."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DependencyError, EngineError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
MEND_CUDA = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'tinyllava-edge[gpu]'"
CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # trying every algorithm costs seconds, for the one convolution of a tower
    "arena_extend_strategy": "kSameAsRequested",  # doubling would take memory from the language model
    "use_tf32": "0",  # a float32 graph is there to be exact; the fast one is fp16
}
RECORD_NODES = "session.record_ep_graph_assignment_info"
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
# b = Conv(a, a) on one float32, opset 13: the smallest graph that shows whether a provider and cuDNN work
_PROBE = (
    b'\x08\x08:N\n\x0f\n\x01a\n\x01a\x12\x01b"\x04Conv\x12\x01g'
    b"Z\x1b\n\x01a\x12\x16\n\x14\x08\x01\x12\x10\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01"
    b"b\x1b\n\x01b\x12\x16\n\x14\x08\x01\x12\x10\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01"
    b"B\x04\n\x00\x10\r"
)


def onnxruntime_api() -> Any:
    """The onnxruntime module, silenced. Raises DependencyError if there is none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError("onnxruntime is not installed", "pip install 'tinyllava-edge[cpu]'") from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def with_options(providers: Sequence[str]) -> list[str | tuple[str, dict[str, str]]]:
    """Providers as InferenceSession takes them, with the options that matter here."""
    return [(name, CUDA_OPTIONS) if name == CUDA else name for name in providers]


def nodes_by_provider(session: Any) -> dict[str, int]:
    """Provider → nodes of the optimised graph that it runs; empty where the session wasn't told to record them."""
    counts: Counter[str] = Counter()
    for part in _parts(session):
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def _parts(session: Any) -> Sequence[Any]:
    try:
        found: Sequence[Any] = session.get_provider_graph_assignment_info()
    except Exception:  # not recorded, or an onnxruntime that can't
        return ()
    return found


@functools.cache
def cuda_problem() -> str | None:
    """Why ONNX Runtime can't run on CUDA here, None if it can; found by running one convolution, once per process.

    onnxruntime-gpu lists CUDA as available on a machine without a GPU too, and then falls back without a word.
    """
    ort = onnxruntime_api()
    if CUDA not in ort.get_available_providers():
        return f"this onnxruntime ({ort.__version__}) has no {CUDA}"
    said = preload_cuda(ort)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(_PROBE, options, providers=with_options([CUDA, CPU]), enable_fallback=0)
        if CUDA in session.get_providers():
            session.run(None, {"a": np.ones((1, 1, 1, 1), np.float32)})
            return None
        reason = _library_problem(ort) or said or "its libraries load, so the NVIDIA driver or the device is missing"
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = " ".join(str(error).split())[:300]
    return f"{CUDA} does not start: {reason}"


def require_taken(path: Path, session: Any, providers: Sequence[str]) -> None:
    """Raises EngineError where a provider that was asked for isn't there, or CUDA left the graph's work to the CPU."""
    lost = [name for name in providers if name not in session.get_providers()]
    if lost:
        raise EngineError(f"{path}: {lost[0]} did not start", "install its drivers and libraries, or run on the CPU")
    if CUDA in providers and (left := products_elsewhere(session, CUDA)):
        named = ", ".join(f"{count} {kind}" for kind, count in left.items())
        raise EngineError(f"{path}: CUDA doesn't run {named}", "choose a build whose vision is fp16 or fp32")


def products_elsewhere(session: Any, provider: str) -> dict[str, int]:
    """Operator → nodes that multiply weights and that another provider took: nearly all of a tower's work."""
    counts: Counter[str] = Counter()
    for part in _parts(session):
        if part.ep_name != provider:
            counts.update(node.op_type for node in part.get_nodes() if any(p in node.op_type for p in _PRODUCTS))
    return dict(counts)


def preload_cuda(ort: Any) -> str:
    """Load CUDA's and cuDNN's libraries from NVIDIA's pip packages, where there are any; returns what it complained of.

    Without it the dynamic loader finds only those on LD_LIBRARY_PATH. It prints to stdout, which belongs to data.
    """
    said = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said):
            ort.preload_dlls(msvc=False)
    return "; ".join(line.strip() for line in said.getvalue().splitlines() if line.strip())[:300]


def _library_problem(ort: Any) -> str | None:
    """What the dynamic loader misses for the CUDA provider, in its own words."""
    for path in Path(ort.__file__).parent.glob("capi/*onnxruntime_providers_cuda.*"):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return str(error)
    return None

"""Where llama.cpp put a model: its own account, given while loading, is the only place that tells."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_BUFFER = re.compile(r": +(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")
_listening = threading.local()  # llama.cpp logs a load in the thread that asked for it


@dataclass(frozen=True)
class Placement:
    """Layers and buffers of a loaded model and its context."""

    layers_on_gpu: int = 0
    """layers that a GPU runs, the output layer counted as one"""
    layers: int | None = None
    """layers there are, counted alike; None where llama.cpp was built without a GPU back end and doesn't say"""
    buffers_mib: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """use (`model`, `kv`, `compute`, `output`) → buffer (`CPU_Mapped`, `CPU_REPACK`, `CUDA0`, …) → MiB"""

    @property
    def repacked_mib(self) -> float:
        """Weights in an order of their own that the CPU's kernels read faster, in MiB."""
        return sum(size for name, size in self.buffers_mib.get("model", {}).items() if "REPACK" in name)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as they stand in `environment()` and in results."""
        return {
            "llama_cpp_layers_on_gpu": self.layers_on_gpu,
            "llama_cpp_layers": self.layers,
            "llama_cpp_buffers_mib": {use: dict(sizes) for use, sizes in self.buffers_mib.items()},
            "llama_cpp_repack": self.repacked_mib > 0,
        }


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """A list that receives everything llama.cpp logs in this thread within the block."""
    lines: list[str] = []
    _listening.lines = lines
    try:
        yield lines
    finally:
        _listening.lines = None


def hear(text: str) -> None:
    """Called by the log callback with each piece of text."""
    lines = getattr(_listening, "lines", None)
    if lines is not None:
        lines.append(text)


def read_placement(pieces: Sequence[str]) -> Placement:
    """llama.cpp's log of `llama_model_load_from_file` and `llama_init_from_model` → what went where."""
    text = "".join(pieces)
    found = _OFFLOADED.search(text)
    buffers: dict[str, dict[str, float]] = {}
    for name, use, size in _BUFFER.findall(text):
        sizes = buffers.setdefault(use.lower(), {})
        sizes[name] = round(sizes.get(name, 0.0) + float(size), 2)
    on_gpu, layers = (int(found[1]), int(found[2])) if found else (0, None)
    return Placement(on_gpu, layers, buffers)

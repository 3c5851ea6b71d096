"""Train a TinyLLaVA, turn it into files that run on a device, and prove what each step cost."""

import os
from typing import Any

# ONNX Runtime's wheels gather usage data unless this is set before they are imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`tinyllava_edge.open_bundle`, imported when it is asked for."""
    if name == "open_bundle":
        from .runtimes.engine import open_bundle

        return open_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

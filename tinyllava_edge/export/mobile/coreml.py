"""The static float32 graph for ONNX Runtime's CoreML provider, and what ONNX Runtime's usability checker says of it.

The checker knows which operators NNAPI and CoreML take, and counts the partitions that they cut the graph into. It runs
anywhere and nothing on a phone: the caveats that it can't check stand in its report.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from ...errors import ExportError
from ...runtimes.providers import onnxruntime_api

GRAPH = "vision-coreml.onnx"
REPORT = "usability.txt"
MLPROGRAM = "CoreML MLProgram"
PROVIDERS = ("NNAPI", "CoreML NeuralNetwork", MLPROGRAM)
_COUNT = re.compile(r"(\d+) partitions with a total of (\d+)/(\d+) nodes can be handled by the (.+) EP\.")


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def usability(path: Path) -> tuple[str, dict[str, dict[str, int]]]:
    """Run the checker on a graph.

    Returns:
        Its report, and per provider the `partitions`, and the nodes `supported` of all `nodes`, after the optimisations
        that ONNX Runtime applies everywhere.

    Raises:
        ExportError: the checker says nothing of a provider.
    """
    onnxruntime_api()
    from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model

    handler, logger = _Lines(), logging.Logger("usability", logging.INFO)  # of no tree: nobody else hears it
    logger.addHandler(handler)
    analyze_model(path, logger=logger)
    text = "\n".join(handler.lines).replace(str(path), path.name)
    return f"{text.strip()}\n", read_counts(path, text)


def read_counts(path: Path, text: str) -> dict[str, dict[str, int]]:
    """Numbers of a report, the graph's own shapes counting. Raises ExportError where a provider is missing."""
    counts: dict[str, dict[str, int]] = {}
    for partitions, supported, nodes, name in _COUNT.findall(text):
        found = {"partitions": int(partitions), "supported": int(supported), "nodes": int(nodes)}
        counts.setdefault(name, found)  # a second count is of shapes that the graph doesn't have
    missing = [name for name in PROVIDERS if name not in counts]
    if missing:
        raise ExportError(
            f"{path.name}: ONNX Runtime's usability checker says nothing of {', '.join(missing)}",
            "its report has changed: use the onnxruntime of constraints.txt, or leave coreml out of --mobile",
        )
    return counts


def line(counts: dict[str, Any]) -> str:
    """MLProgram's count on one line."""
    found = counts[MLPROGRAM]
    parts = "1 partition" if found["partitions"] == 1 else f"{found['partitions']} partitions"
    return f"{MLPROGRAM}: {parts}, {found['supported']} of {found['nodes']} nodes"


def is_whole(counts: dict[str, Any]) -> bool:
    """Whether MLProgram takes every node in one partition."""
    found = counts[MLPROGRAM]
    return bool(found["partitions"] == 1 and found["supported"] == found["nodes"])

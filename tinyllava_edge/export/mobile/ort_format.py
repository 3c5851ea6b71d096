"""ONNX → `.ort`, the only form that a minimal build of ONNX Runtime opens, and the list of operators to build it with.

Converted by ONNX Runtime's own tool at the level `extended`: beyond it lie optimisations for the machine that converts,
such as x86's NCHWc layout, or float16 weights stored as float32.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ExportError
from ...files import is_full, no_space, storage_errors, write_text
from ...runtimes.providers import CPU, onnxruntime_api
from .. import onnx_io
from ..ranges import Floats
from ..tolerances import Tolerance
from .parity import OUTPUTS, Expected, Runner, compare, measure

CONFIG = "required_operators_and_types.config"
SAME = Tolerance(
    relative=1e-5,
    cosine=0.99999,
    reason="the same operators in the same order: equal to the last bit was measured for every precision",
)
_LEVEL = "extended"
_LEVEL_VARIABLE = "ORT_CONVERT_ONNX_MODELS_TO_ORT_OPTIMIZATION_LEVEL"  # the tool's only way to be told


def convert(graphs: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Convert graphs into `folder`, which gets CONFIG too.

    Args:
        graphs: any names → ONNX files, whose stems differ.
        folder: existing directory.

    Returns:
        The same names → written `.ort` files.

    Raises:
        ExportError: a graph can't be converted: it is above 2 GB, or holds an operator without kernel.
        StorageError: the disk is full.
    """
    onnxruntime_api()
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with storage_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".ort-") as scratch:
        given, made = Path(scratch) / "onnx", Path(scratch) / "ort"
        given.mkdir()
        for path in graphs.values():
            for part in (path, *onnx_io.parts(path)):
                _link(part, given / part.name)
        try:
            with onnx_io.quiet(), contextlib.redirect_stdout(io.StringIO()), _level():
                convert_onnx_models_to_ort(
                    given,
                    output_dir=made,
                    optimization_styles=[OptimizationStyle.Fixed],
                    target_platform="arm",
                    enable_type_reduction=True,
                )
        except Exception as error:  # the tool lets through whatever the engine or flatbuffers raise
            if is_full(folder / CONFIG, sum(onnx_io.total_bytes(path) for path in graphs.values())):
                raise no_space(folder) from error
            reason = str(error).replace(f"{made}{os.sep}", "").strip().splitlines() or [repr(error)]
            raise ExportError(
                f"{', '.join(path.name for path in graphs.values())}: not converted to ORT format ({reason[0][:300]})",
                "files of this format stay below 2 GB: leave out fp32, or ort out of --mobile",
            ) from error
        found = {}
        for name, path in graphs.items():
            found[name] = folder / f"{path.stem}.ort"
            (made / f"{path.stem}.{_LEVEL}.ort").rename(found[name])
        config = (made / f"{Path(CONFIG).stem}.{_LEVEL}.config").read_text(encoding="utf-8")
    write_text(folder / CONFIG, _without_paths(config))
    return found


def check_graph(onnx: Path, ort: Path, precision: str, wanted: Expected) -> dict[str, Any]:
    """A vision graph's `.ort` beside its `.onnx`, and beside the checkpoint, as JSON values.

    The verdict on a quantised graph is `verify`'s; here it must be what the .onnx is.

    Raises:
        ExportError: it differs from its .onnx by more than SAME, or a float32 one from the checkpoint.
    """
    run = runner(ort)
    reference = runner(onnx, as_converted=True)
    outputs = [reference(sample.pixel_values) for sample in wanted.samples]
    same = measure(ort, run, wanted.samples, outputs, SAME, onnx.name)
    own = compare(ort, run, wanted, wanted.limit if precision == "fp32" else None)
    return {"onnx": same, "checkpoint": own}


def check_preprocess(onnx: Path, ort: Path, wanted: Expected) -> dict[str, Any]:
    """Preprocessing as `.ort` beside the `.onnx`, on pictures of several sizes. Raises ExportError unless equal."""
    ours, theirs = (_session(path) for path in (ort, onnx))
    for image, sample in zip(wanted.images, wanted.samples, strict=True):
        (one,), (another,) = (session.run(["pixel_values"], {"image": image[None]}) for session in (ours, theirs))
        if not np.array_equal(one, another):
            difference = float(np.abs(one - another).max()) if one.shape == another.shape else float("inf")
            raise ExportError(f"{ort.name}: {sample.name} differs from {onnx.name} by {difference:.2g}; 0 is allowed")
    return {"pictures": len(wanted.samples), "against": onnx.name, "equal": True}


def runner(path: Path, *, as_converted: bool = False) -> Runner:
    """Open a vision graph, `.onnx` or `.ort`, on the CPU; a graph with no more optimisations than its `.ort` has."""
    session = _session(path, as_converted)

    def run(pixel_values: Floats) -> list[Floats]:
        found: list[Floats] = session.run(list(OUTPUTS), {"pixel_values": pixel_values})
        return found

    return run


def _session(path: Path, as_converted: bool = False) -> Any:
    engine = onnxruntime_api()
    options = engine.SessionOptions()
    if as_converted:
        options.graph_optimization_level = engine.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return engine.InferenceSession(path, options, providers=[CPU])


@contextlib.contextmanager
def _level() -> Iterator[None]:
    before = os.environ.get(_LEVEL_VARIABLE)
    os.environ[_LEVEL_VARIABLE] = _LEVEL
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LEVEL_VARIABLE]
        else:
            os.environ[_LEVEL_VARIABLE] = before


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _without_paths(config: str) -> str:
    """The tool lists the files that it read with their directories, and with its own suffix."""
    lines = []
    for line in config.splitlines():
        if line.startswith("# - "):
            line = f"# - {Path(line.removeprefix('# - ')).name.replace(f'.{_LEVEL}.ort', '.ort')}"
        lines.append(line)
    return "\n".join([*lines, ""])

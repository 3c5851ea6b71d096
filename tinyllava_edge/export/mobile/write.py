"""What native hosts load, below `mobile/` of a bundle: each file is run here and compared before it is listed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ... import checkpoint
from ...bundle import BundleFile, describe_file
from ...errors import ExportError
from ...files import write_text
from ...runtimes.base import Picture
from ...spec import ModelSpec
from .. import onnx_io
from ..vision import export_vision_fp32, vision_graph
from . import check, coreml, executorch, litert, ort_format
from .forms import FOLDER, check_forms
from .parity import Expected, Runner, compare, expected, line, reason

Progress = Callable[[str], None]
_Written = tuple[list[BundleFile], dict[str, Any]]


@dataclass(frozen=True)
class _Job:
    """What every form needs."""

    root: Path
    """bundle under construction"""
    model: Any
    """tower and connector, float32"""
    spec: ModelSpec
    """how the model must be fed"""
    graphs: Mapping[str, Path]
    """vision precision → its ONNX file in the bundle"""
    wanted: Expected
    """what the checkpoint makes of the pictures"""
    tell: Progress
    """told each step"""

    def place(self, name: str) -> Path:
        """Where a file of this role goes."""
        return self.root / FOLDER / name

    def describe(self, path: Path, precision: str, types: Mapping[str, int] | None = None) -> BundleFile:
        """Manifest entry of a file that was just written, and of its external data."""
        parts = [part.relative_to(self.root).as_posix() for part in onnx_io.parts(path)]
        place = path.relative_to(self.root).as_posix()
        return describe_file(self.root, place, "mobile", precision, types or {}, parts)

    def pixels(self) -> torch.Tensor:
        """(1, 3, s, s): what a static graph is traced with."""
        return torch.zeros(1, 3, self.spec.image_size, self.spec.image_size)


def write_mobile(
    source: Path,
    root: Path,
    names: Sequence[str],
    graphs: Mapping[str, Path],
    *,
    pictures: Sequence[tuple[str, Picture]] | None = None,
    tell: Progress | None = None,
) -> _Written:
    """Write every asked form below `root`/FOLDER.

    Args:
        source: checkpoint directory.
        root: bundle under construction; it holds `preprocess.onnx` and the graphs.
        names: keys of MOBILE_FORMS.
        graphs: vision precision → its ONNX file.
        pictures: what to compare on; the built-in set by default.
        tell: told each step.

    Returns:
        The files in the order of MOBILE_FORMS and those of check.py, and form → what was measured, as JSON values.

    Raises:
        UsageError, DependencyError: see check_forms.
        ExportError: a form can't be made, or differs from the checkpoint by more than it may.
        StorageError: the disk is full.
    """
    chosen, told = check_forms(names), tell or (lambda _text: None)
    (root / FOLDER).mkdir(exist_ok=True)
    model, spec = checkpoint.load_vision(source)
    job = _Job(root, model, spec, graphs, expected(model, spec, pictures), told)
    files: list[BundleFile] = []
    figures: dict[str, Any] = {}
    for name in chosen:
        told(f"mobile form: {name}")
        written, figures[name] = _WRITERS[name](job)
        files += written
        gc.collect()  # exported programs refer to each other, and each holds the weights
    files += _check(job, files)
    del model, job
    gc.collect()
    return files, figures


def _ort(job: _Job) -> _Written:
    preprocess = job.root / "preprocess.onnx"
    made = ort_format.convert({"preprocess": preprocess, **job.graphs}, job.root / FOLDER)
    figures: dict[str, Any] = {"preprocess": ort_format.check_preprocess(preprocess, made["preprocess"], job.wanted)}
    files = [job.describe(made["preprocess"], "ort_uint8")]
    for precision, onnx in job.graphs.items():
        figures[precision] = ort_format.check_graph(onnx, made[precision], precision, job.wanted)
        job.tell(f"  {precision}: {line(figures[precision]['onnx'])}")
        files.append(job.describe(made[precision], f"ort_{precision}"))
    return [*files, job.describe(job.place(ort_format.CONFIG), "ort_config")], figures


def _coreml(job: _Job) -> _Written:
    target, report = job.place(coreml.GRAPH), job.place(coreml.REPORT)
    types = export_vision_fp32(job.model, job.spec, target, static=True)
    figures = compare(target, ort_format.runner(target), job.wanted, job.wanted.limit)
    text, counts = coreml.usability(target)
    write_text(report, text)
    job.tell(f"  {line(figures)}")
    job.tell(f"  {coreml.line(counts)}" if coreml.is_whole(counts) else f"  note: {coreml.line(counts)}; one is best")
    files = [job.describe(target, "coreml_fp32", types), job.describe(report, "coreml_usability")]
    return files, {**figures, "usability": counts}


def _executorch(job: _Job) -> _Written:
    target = job.place("vision-xnnpack.pte")
    parts = executorch.write_executorch(vision_graph(job.model, job.spec), job.pixels(), target)
    tool = f"executorch {version('executorch')}"
    return _checked(job, target, executorch.runner, "executorch_fp32", {"tool": tool, **parts})


def _litert(job: _Job) -> _Written:
    target = job.place("vision.tflite")
    litert.write_litert(vision_graph(job.model, job.spec), job.pixels(), target)
    tool = f"litert-torch {version('litert-torch')}"
    return _checked(job, target, litert.runner, "litert_fp32", {"tool": tool})


def _checked(
    job: _Job, target: Path, engine: Callable[[Path], Runner], precision: str, more: Mapping[str, Any]
) -> _Written:
    try:
        run = engine(target)
    except Exception as error:  # engines raise what they like
        raise ExportError(
            f"{target.name}: its engine can't open it ({reason(error)})", "leave this form out of --mobile"
        ) from error
    figures = compare(target, run, job.wanted, job.wanted.limit)
    job.tell(f"  {line(figures)}")
    return [job.describe(target, precision)], {**figures, **more}


def _check(job: _Job, files: Sequence[BundleFile]) -> list[BundleFile]:
    """One picture for a host's own test on the device."""
    engines = {"executorch": executorch.runner, "litert": litert.runner}
    runners = {}
    for file in check.runnable(files):
        path = job.root / file.path
        runners[path.name] = file.precision, engines.get(file.precision.split("_")[0], ort_format.runner)(path)
    limit = job.wanted.limit.relative or 0.0
    facts = check.write_check(job.root / FOLDER, job.model, job.spec, runners, limit)
    for name in check.above(facts):
        found = facts["files"][name]
        job.tell(
            f"  note: {name} is off by a relative {found['relative_measured']:.2g} on {check.PICTURE}, where "
            f"{found['relative_allowed']:.2g} is allowed: verify its precision"
        )
    return [job.describe(job.place(name), check.PRECISION) for name in check.FILES]


_WRITERS: dict[str, Callable[[_Job], _Written]] = {
    "ort": _ort,
    "coreml": _coreml,
    "executorch": _executorch,
    "litert": _litert,
}

"""Checkpoint → bundle: preprocessing graph, vision graphs, GGUFs, and the manifest that hashes them, written last.

Tower and connector are loaded once and let go; the language model is read tensor by tensor. So the peak is the larger
of the two steps, never their sum.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, checkpoint
from ..bundle import MANIFEST, Bundle, BundleFile, describe_file, read_bundle, write_manifest
from ..errors import ExportError, StorageError, UsageError
from ..files import check_forced, new_directory, sha256_tree, write_json
from ..runtimes.base import Picture
from ..spec import ModelSpec
from ..towers import TOWERS
from . import onnx_io
from .calibration import Sample, default_pictures, samples
from .gguf_shards import shards_of, split_gguf
from .imatrix import Imatrix, load_imatrix
from .llm import FLOAT_TYPES, LlmTensors, export_llm
from .llm_architectures import architecture_of
from .llm_types import LLM_TYPES, tensor_type
from .mobile.forms import check_forms
from .options import DEFAULTS
from .preprocess import write_preprocess
from .quantize import check_request, quantize_recorded
from .vision import export_vision_fp32
from .vision_quantize import CALIBRATED, VISION_PRECISIONS
from .vision_report import eager, vision_report

if TYPE_CHECKING:
    from .profile_fit import Plan

Progress = Callable[[str], None]
FIGURES = "export.json"
REPORT_DRAWINGS, REPORT_PHOTOS = 4, 4  # pictures that every vision precision is compared on
_TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "gguf", "llama-cpp-python")


@dataclass(frozen=True)
class _Job:
    """What every step needs to know."""

    source: Path
    """checkpoint directory"""
    root: Path
    """bundle under construction"""
    spec: ModelSpec
    """how the model must be fed"""
    tell: Progress
    """told each step"""
    figures: dict[str, Any]
    """filled by the steps, written as FIGURES"""


def export_bundle(
    root: Path,
    out: Path,
    *,
    llm: Sequence[str] = DEFAULTS["llm"],
    vision: Sequence[str] = DEFAULTS["vision"],
    mmproj: Sequence[str] = (),
    web: Sequence[str] = (),
    mobile: Sequence[str] = (),
    static: bool = False,
    max_shard_bytes: int | None = None,
    imatrix: Path | Imatrix | None = None,
    overrides: Mapping[str, str] | None = None,
    pictures: Sequence[tuple[str, Picture]] | None = None,
    clip_workaround: bool = False,
    force: bool = False,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle directory, whole or not at all.

    Args:
        root: checkpoint directory.
        out: bundle directory to write.
        llm: keys of LLM_TYPES; listed from the highest precision to the lowest, whatever the order given.
        vision: keys of VISION_PRECISIONS; likewise.
        mmproj: keys of MMPROJ_TYPES, for llama.cpp's own programs; none by default.
        web: keys of WEB_PRECISIONS, for transformers.js; none by default.
        mobile: keys of MOBILE_FORMS, for native hosts; none by default.
        static: fix the vision graph's batch to 1, as CoreML and NPUs ask for.
        max_shard_bytes: most tensor bytes of one GGUF; larger ones are split. None or 0: one file each.
        imatrix: importance matrix of this model, loaded or as a file in llama.cpp's GGUF form.
        overrides: regular expression → tensor type of the quantised files, see quantize_gguf.
        pictures: names and pictures to calibrate and to compare the vision precisions on; a built-in set by default.
        clip_workaround: see export_mmproj.
        force: replace `out` if it exists.
        plan: what these types were chosen for; the written files are held against it, and it is recorded.
        progress: told each step.

    Returns:
        The written bundle, opened. It carries no `verified` stamp yet.

    Raises:
        UsageError: an unknown name, or none at all, or options that go with nothing asked for.
        CheckpointError: the checkpoint can't be loaded.
        ExportError: a weight that is not finite, a part that has no device form, or a build that doesn't fit the plan.
        StorageError: `out` exists and `force` is off, or the disk is full.
    """
    llm, vision = known_names("LLM type", llm, LLM_TYPES), known_names("vision precision", vision, VISION_PRECISIONS)
    for name in llm:
        check_request(name, imatrix is not None)
    overrides = overrides or {}
    for kind in overrides.values():
        tensor_type(kind)
    if overrides and not set(llm) - set(FLOAT_TYPES):
        raise UsageError(f"overrides have no effect on {', '.join(llm)}", "ask for a quantised type too")
    if clip_workaround and not mmproj:
        raise UsageError("the CLIP workaround changes mmproj files, and none is asked for", "give --mmproj f16 too")
    if mmproj:
        from .mmproj import MMPROJ_TYPES

        mmproj = known_names("mmproj type", mmproj, MMPROJ_TYPES)
    if web:
        from .web import check_precisions

        check_precisions(web)
    check_forms(mobile)
    matrix = load_imatrix(imatrix) if isinstance(imatrix, Path) else imatrix
    check_place(root, out, force)
    tell = progress or (lambda _text: None)
    tell("loading the checkpoint")
    source = checkpoint.llm_source(root)
    check_config(root, source.spec)
    _check_forms(source, mmproj, web, clip_workaround)
    origin = {"name": source.spec.name, "sha256": sha256_tree(root)}
    if matrix is not None and matrix.checkpoint_sha256 not in ("", origin["sha256"]):
        tell("note: the importance matrix was collected on another checkpoint")
    asked = None if plan is None else (plan.n_ctx, plan.profile.n_threads)
    with new_directory(out, force=force, ours=MANIFEST) as temporary:
        job = _Job(root, temporary, source.spec, tell, {})
        files = _write_vision(job, vision, static, pictures)
        texts = _write_llm(job, source, llm, max_shard_bytes, matrix, overrides)
        files += texts
        smallest = temporary / texts[-1].path  # goes with the mmproj
        files += _write_mmproj(job, mmproj, smallest, clip_workaround, asked)
        files += _write_web(job, web, static)
        files += _write_mobile(job, mobile, vision, pictures)
        if "fp32" not in vision:
            onnx_io.remove(temporary / "vision-fp32.onnx")
        if matrix is not None:
            told = ("sha256", "samples", "image_share", "datasets")
            job.figures["imatrix"] = {name: getattr(matrix, name) for name in told}
        if plan is not None:
            files.append(_write_plan(job, plan, files, origin))
        write_json(temporary / FIGURES, job.figures)
        files.append(describe_file(temporary, FIGURES, "text", "text", {}))
        write_manifest(temporary, source.spec, files, origin, tool_versions())
    tell(f"wrote {out}")
    return read_bundle(out)


def check_place(root: Path, out: Path, force: bool) -> None:
    """Raise UsageError or StorageError for a place that no bundle of this checkpoint may be written to."""
    if out.resolve() in (root.resolve(), *root.resolve().parents):
        raise UsageError(f"{out} holds the checkpoint itself", "name another place with -o")
    if out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{out} lies in the checkpoint, whose hash it would change", "name another place with -o")
    if out.exists() and not force:  # said before the long work, and again by new_directory
        raise StorageError(f"{out} exists already", "name another place with -o, or replace it with --force")
    check_forced(out, MANIFEST)


def check_config(root: Path, spec: ModelSpec) -> None:
    """Raise ExportError where config.json contradicts the spec."""
    config = checkpoint.load_config(root)
    pairs: dict[str, tuple[Any, Any]] = {
        "feature_layer": (config.vision_feature_layer, spec.feature_layer),
        "select_strategy": (config.vision_feature_select_strategy, spec.select_strategy),
        "image_size": (config.vision_config.image_size, spec.image_size),
        "patch_size": (config.vision_config.patch_size, spec.patch_size),
        "llm_family": (config.text_config.model_type, spec.llm_family),
    }
    if not TOWERS[spec.vision_family].size_in_config:  # positions are resized, so that size is no promise
        del pairs["image_size"]
    for name, (in_config, in_spec) in pairs.items():
        if in_config != in_spec:
            raise ExportError(
                f"{root}: config.json says {name} = {in_config}, model_spec.json says {in_spec}",
                "correct the one that is wrong; the weights follow only one of them",
            )


def _check_forms(source: checkpoint.LlmSource, mmproj: Sequence[str], web: Sequence[str], workaround: bool) -> None:
    """Raise ExportError for a model that has no such form, before the long work."""
    architecture_of(source.config)
    if mmproj:
        from .mmproj import check_model

        check_model(checkpoint.load_config(source.root), source.spec, workaround)
    if web:
        from .decoder import check_architecture

        check_architecture(source.root, source.config)


def tool_versions() -> dict[str, str]:
    """Package → version of everything that takes part in writing a bundle."""
    versions = {"tinyllava-edge": __version__}
    for name in _TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def known_names(what: str, given: Sequence[str], known: Mapping[str, object]) -> tuple[str, ...]:
    """The asked names in the table's order, each once. Raises UsageError that lists the known ones."""
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise UsageError(
            f"unknown {what} {unknown[0]!r}" if unknown else f"no {what} asked for", f"known: {', '.join(known)}"
        )
    return tuple(name for name in known if name in given)


def _write_vision(
    job: _Job, names: Sequence[str], static: bool, pictures: Sequence[tuple[str, Picture]] | None
) -> list[BundleFile]:
    """Preprocessing and every asked precision, while tower and connector are in memory."""
    job.tell("preprocessing graph")
    types = write_preprocess(job.spec, job.root / "preprocess.onnx")
    files = [describe_file(job.root, "preprocess.onnx", "preprocess", "uint8", types)]
    model, _spec = checkpoint.load_vision(job.source)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{job.source}: tensor {name} holds NaN or infinity", "train again from the last good checkpoint"
            )
    files += _write_graphs(job, model, names, static, pictures)
    del model
    gc.collect()  # modules refer to each other: without this the tower stays until Python next looks
    return files


def _write_graphs(
    job: _Job, model: Any, names: Sequence[str], static: bool, pictures: Sequence[tuple[str, Picture]] | None
) -> list[BundleFile]:
    """Every asked precision, and the float32 graph that they are made from."""
    job.tell("vision graph: fp32")
    paths = {name: job.root / f"vision-{name}.onnx" for name in ("fp32", *names)}
    types = {"fp32": export_vision_fp32(model, job.spec, paths["fp32"], static=static)}
    chosen: list[Sample] | None = None if pictures is None else samples(job.spec, pictures)
    pixels = [s.pixel_values for s in chosen or samples(job.spec)] if set(names) & set(CALIBRATED) else []
    for name in names:
        convert = VISION_PRECISIONS[name]
        if convert is not None:
            job.tell(f"vision graph: {name}")
            types[name] = convert(paths["fp32"], paths[name], pixels)
    job.tell("vision graphs: compared with the checkpoint")
    seen = chosen or samples(job.spec, default_pictures(REPORT_DRAWINGS, REPORT_PHOTOS))
    reports = vision_report(eager(model), {name: paths[name] for name in names}, seen)
    for report in reports:
        job.tell(f"  {report.line()}")
    job.figures["vision"] = [report.to_dict() for report in reports]
    return [
        describe_file(job.root, paths[name].name, "vision", name, types[name], _names_of(onnx_io.parts(paths[name])))
        for name in names
    ]


def _write_plan(job: _Job, plan: Plan, files: Sequence[BundleFile], origin: Mapping[str, str]) -> BundleFile:
    """Hold the written builds against the plan, and record it."""
    from .profile_fit import check_written
    from .profile_record import write_record

    written = Bundle(job.root, job.spec.name, job.spec, tuple(files), origin, {}, "")
    builds, pages = check_written(written, plan)
    return write_record(job.root, plan.profile, plan.n_ctx, plan.preferred, builds, pages)


def _write_mmproj(
    job: _Job, names: Sequence[str], llm: Path, clip_workaround: bool, asked: tuple[int, int] | None
) -> list[BundleFile]:
    """Tower and connector for llama.cpp's own programs, which are measured with the text GGUF beside them."""
    if not names:
        return []
    from .mmproj_files import write_mmproj_files

    model, spec = checkpoint.load_vision(job.source)
    files, reports = write_mmproj_files(
        job.root, model, spec, names, llm, clip_workaround=clip_workaround, run_with=asked, tell=job.tell
    )
    job.figures["mmproj"] = {name: report.to_dict() for name, report in zip(names, reports, strict=True)}
    del model
    gc.collect()
    return files


def _write_llm(
    job: _Job,
    source: LlmTensors,
    names: Sequence[str],
    max_shard_bytes: int | None,
    imatrix: Imatrix | None,
    overrides: Mapping[str, str],
) -> list[BundleFile]:
    """Every asked type; the float file that the quantised ones are made from stays only if it was asked for."""
    types: dict[str, dict[str, int]] = {}
    paths = {name: job.root / f"llm-{name}.gguf" for name in LLM_TYPES}
    base = base_type(source)
    for name in [name for name in FLOAT_TYPES if name in names or (name == base and set(names) - set(FLOAT_TYPES))]:
        job.tell(f"language model: {name}")
        types[name] = export_llm(source, paths[name], name, max_shard_bytes=max_shard_bytes if name in names else None)
    job.figures["llm"] = {}
    for name in [name for name in names if name not in FLOAT_TYPES]:
        types[name], job.figures["llm"][name] = quantize_recorded(
            shards_of(paths[base])[0], paths[name], name, base, imatrix=imatrix, overrides=overrides, tell=job.tell
        )
        if max_shard_bytes:
            split_gguf(paths[name], max_shard_bytes)
    if base not in names:
        paths[base].unlink(missing_ok=True)
    files = []
    for name in names:
        first, *others = _names_of(shards_of(paths[name]))
        files.append(describe_file(job.root, first, "llm", name, types[name], others))
    return files


def base_type(source: LlmTensors) -> str:
    """Float type that quantised files are made from: bfloat16 where most weights are stored so, float16 otherwise."""
    stored = [info.dtype for info in source.infos.values() if len(info.shape) > 1]
    return "bf16" if 2 * stored.count(torch.bfloat16) > len(stored) else "f16"


def _write_web(job: _Job, names: Sequence[str], static: bool) -> list[BundleFile]:
    """The transformers.js layout below `web`; its vision graphs are made from ours where that takes any batch."""
    if not names:
        return []
    from .decoder import DECODER_PRECISIONS
    from .web import write_web

    graph = None if static else job.root / "vision-fp32.onnx"
    written = write_web(job.source, job.root / "web", names, vision_fp32=graph, progress=job.tell)
    suffixes = {DECODER_PRECISIONS[name].suffix: name for name in names}
    files = []
    for path in sorted(path for path in written if ".onnx_data" not in path.name):
        place = path.relative_to(job.root).as_posix()
        if path.suffix != ".onnx":
            files.append(describe_file(job.root, place, "web", "text", {}))
            continue
        suffix = next((suffix for suffix in suffixes if suffix and path.stem.endswith(suffix)), "")
        parts = sorted(part for part in written if part.name.startswith(f"{path.name}_data"))
        names_of_parts = [part.relative_to(job.root).as_posix() for part in parts]
        types = onnx_io.tensor_types(path)
        files.append(describe_file(job.root, place, "web", suffixes[suffix], types, names_of_parts))
    return files


def _write_mobile(
    job: _Job, names: Sequence[str], vision: Sequence[str], pictures: Sequence[tuple[str, Picture]] | None
) -> list[BundleFile]:
    """The vision graph in the forms that native hosts load, below `mobile`."""
    if not names:
        return []
    from .mobile.write import write_mobile

    graphs = {name: job.root / f"vision-{name}.onnx" for name in vision}
    files, job.figures["mobile"] = write_mobile(job.source, job.root, names, graphs, pictures=pictures, tell=job.tell)
    return files


def _names_of(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]

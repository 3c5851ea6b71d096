"""Checkpoint → bundle: preprocessing graph, vision graphs, GGUFs, and the manifest that hashes them, written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__, checkpoint
from ..bundle import Bundle, BundleFile, describe_file, open_bundle, write_manifest
from ..errors import ExportError, StorageError, UsageError
from ..files import new_directory, sha256_tree
from .llm import FLOAT_TYPES, export_llm
from .preprocess import write_preprocess
from .quantize import LLM_TYPES, fallbacks, quantize_gguf
from .vision import VISION_PRECISIONS, export_vision_fp32

Progress = Callable[[str], None]
DEFAULT_LLM = ("f16", "q8_0", "q4_k_m")
DEFAULT_VISION = ("fp32", "int8")
_TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "gguf", "llama-cpp-python")


def export_bundle(
    root: Path,
    out: Path,
    *,
    llm: Sequence[str] = DEFAULT_LLM,
    vision: Sequence[str] = DEFAULT_VISION,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle directory, whole or not at all.

    Args:
        root: checkpoint directory.
        out: bundle directory to write.
        llm: keys of LLM_TYPES; listed from the highest precision to the lowest, whatever the order given.
        vision: keys of VISION_PRECISIONS; likewise.
        force: replace `out` if it exists.
        progress: told each step.

    Returns:
        The written bundle, opened. It carries no `verified` stamp yet.

    Raises:
        UsageError: an unknown name, or none at all.
        CheckpointError: the checkpoint can't be loaded.
        ExportError: a weight that is not finite, or a part that has no device form.
        StorageError: `out` exists and `force` is off, or the disk is full.
    """
    llm, vision = _names("LLM type", llm, LLM_TYPES), _names("vision precision", vision, VISION_PRECISIONS)
    if out.resolve() in (root.resolve(), *root.resolve().parents):
        raise UsageError(f"{out} holds the checkpoint itself", "name another place with -o")
    if out.exists() and not force:  # said before the long work, and again by new_directory
        raise StorageError(f"{out} exists already", "name another place with -o, or replace it with --force")
    tell = progress or (lambda _text: None)
    tell("loading the checkpoint")
    loaded = checkpoint.load(root)
    check_model(loaded)
    source = {"name": loaded.spec.name, "sha256": sha256_tree(root)}
    with new_directory(out, force=force) as temporary:
        tell("preprocessing graph")
        types = write_preprocess(loaded.spec, temporary / "preprocess.onnx")
        files = [describe_file(temporary, "preprocess.onnx", "preprocess", "uint8", types)]
        files += _write_vision(loaded, temporary, vision, tell)
        files += _write_llm(loaded, temporary, llm, tell)
        write_manifest(temporary, loaded.spec, files, source, tool_versions())
    tell(f"wrote {out}")
    return open_bundle(out)


def check_model(loaded: checkpoint.Checkpoint) -> None:
    """Raise ExportError for a weight that is not finite, or a configuration that contradicts the spec."""
    for name, tensor in [*loaded.model.named_parameters(), *loaded.model.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{loaded.root}: tensor {name} holds NaN or infinity", "train again from the last good checkpoint"
            )
    config, spec = loaded.model.config, loaded.spec
    pairs: dict[str, tuple[Any, Any]] = {
        "feature_layer": (config.vision_feature_layer, spec.feature_layer),
        "select_strategy": (config.vision_feature_select_strategy, spec.select_strategy),
        "image_size": (config.vision_config.image_size, spec.image_size),
        "patch_size": (config.vision_config.patch_size, spec.patch_size),
    }
    for name, (in_config, in_spec) in pairs.items():
        if in_config != in_spec:
            raise ExportError(
                f"{loaded.root}: config.json says {name} = {in_config}, model_spec.json says {in_spec}",
                "correct the one that is wrong; the weights follow only one of them",
            )


def tool_versions() -> dict[str, str]:
    """Package → version of everything that takes part in writing a bundle."""
    versions = {"tinyllava-edge": __version__}
    for name in _TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _names(what: str, given: Sequence[str], known: Mapping[str, object]) -> tuple[str, ...]:
    """The asked names in the table's order, each once. Raises UsageError that lists the known ones."""
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise UsageError(
            f"unknown {what} {unknown[0]!r}" if unknown else f"no {what} asked for", f"known: {', '.join(known)}"
        )
    return tuple(name for name in known if name in given)


def _write_vision(loaded: checkpoint.Checkpoint, root: Path, names: Sequence[str], tell: Progress) -> list[BundleFile]:
    """Every asked precision; the float32 graph that they are made from stays only if it was asked for."""
    tell("vision graph: fp32")
    base = root / "vision-fp32.onnx"
    types = {"fp32": export_vision_fp32(loaded.model, loaded.spec, base)}
    for name in names:
        convert = VISION_PRECISIONS[name]
        if convert is not None:
            tell(f"vision graph: {name}")
            types[name] = convert(base, root / f"vision-{name}.onnx")
    if "fp32" not in names:
        base.unlink()
    return [describe_file(root, f"vision-{name}.onnx", "vision", name, types[name]) for name in names]


def _write_llm(loaded: checkpoint.Checkpoint, root: Path, names: Sequence[str], tell: Progress) -> list[BundleFile]:
    """Every asked type; the float16 file that the quantised ones are made from stays only if it was asked for."""
    types: dict[str, dict[str, int]] = {}
    base = root / "llm-f16.gguf"
    for name in [name for name in FLOAT_TYPES if name in names or (name == "f16" and set(names) - set(FLOAT_TYPES))]:
        tell(f"language model: {name}")
        types[name] = export_llm(loaded, root / f"llm-{name}.gguf", name)
    for name in [name for name in names if name not in FLOAT_TYPES]:
        tell(f"language model: {name}")
        target = root / f"llm-{name}.gguf"
        types[name] = quantize_gguf(base, target, name)
        other = fallbacks(target, name)
        if other:
            kinds = ", ".join(sorted(set(other.values())))
            tell(f"language model: {name}: {len(other)} matrices are not a multiple of 256 wide and became {kinds}")
    if "f16" not in names:
        base.unlink(missing_ok=True)
    return [describe_file(root, f"llm-{name}.gguf", "llm", name, types[name]) for name in names]

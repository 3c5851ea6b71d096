"""What the family is, what a directory holds, what this machine is, and what is wrong with the installation."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, read_bundle
from .errors import BundleError, CheckpointError, DependencyError, UsageError
from .spec import LLM_BACKBONES, NANO_VARIANTS, VARIANTS, VISION_BACKBONES, model_spec

PACKAGES = {
    "device": ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python"),
    "train": ("torch", "transformers", "accelerate", "safetensors", "easy-vqa"),
    "export": ("onnx", "onnxscript", "onnx-ir", "ml-dtypes", "gguf"),
    "decoder": ("onnxruntime-genai",),
    "optimum": ("optimum",),
    "grammar": ("llguidance",),
    "serve": ("uvicorn", "h11", "prometheus-client"),
    "report": ("matplotlib",),
}


def list_variants() -> list[dict[str, Any]]:
    """The twelve variants of Table A1, then the nano ones.

    `parameters` and `parameters_exported` are counted on the meta device and are None where torch or transformers is
    not installed.
    """
    counted = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
    rows = []
    for name, chosen in {**VARIANTS, **NANO_VARIANTS}.items():
        counts: dict[str, int | None] = {"parameters": None, "parameters_exported": None}
        if counted:
            from .model import count_parameters

            counts = dict(count_parameters(name))
        vision, llm = VISION_BACKBONES[chosen.vision], LLM_BACKBONES[chosen.llm]
        rows.append(
            {
                "variant": name,
                "recipe": chosen.recipe,
                "vision": vision.hub_id,
                "llm": llm.hub_id,
                "size_paper": chosen.size_paper,
                **counts,
                "resolution": vision.image_size,
                "visual_tokens": model_spec(name).visual_tokens,
            }
        )
    return rows


def print_variants(rows: list[dict[str, Any]]) -> None:
    """The family as a table on stdout."""

    def billions(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e9:.3f} B" if value > 1e8 else f"{value / 1e6:.2f} M"

    head = ("variant", "size_paper", "parameters", "exported", "px", "tokens", "vision", "llm")
    body = [
        (
            row["variant"],
            "-" if row["size_paper"] is None else f"{row['size_paper']:.1f} B",
            billions(row["parameters"]),
            billions(row["parameters_exported"]),
            str(row["resolution"]),
            str(row["visual_tokens"]),
            row["vision"],
            row["llm"],
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line in [head, *body]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if rows and rows[0]["parameters"] is None:
        print("parameters need torch and transformers: pip install 'tinyllava-edge[train]'", file=sys.stderr)


def doctor() -> dict[str, Any]:
    """This machine, the installed packages by extra, both engines and their devices, problems with what mends each."""
    installed = {extra: {name: _version(name) for name in packages} for extra, packages in PACKAGES.items()}
    found = problems(installed["device"])
    engines, broken = engine_facts()
    return {
        "tinyllava_edge": _version("tinyllava-edge"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "installed": installed,
        "engines": engines,
        "problems": [*found, *broken],
    }


def engine_facts() -> tuple[dict[str, Any], list[str]]:
    """What ONNX Runtime and llama.cpp say of themselves, and what stops them; a GPU is tried, not believed."""
    try:
        from .runtimes.devices import MEND_LLAMA, machine_facts
        from .runtimes.providers import CUDA, MEND_CUDA, cuda_problem

        facts = machine_facts()
    except (DependencyError, ModuleNotFoundError):
        return {}, []  # `problems` names what isn't installed
    except Exception as error:  # a library that is there and can't be loaded
        return {}, [f"an engine can't be loaded: {' '.join(str(error).split())[:300]}. Mend: install it again"]
    broken = []
    listed = CUDA in facts["onnxruntime_providers"]
    facts["onnxruntime_cuda"] = problem = cuda_problem() or "works"
    if listed and problem != "works":
        broken.append(f"{problem}. Mend: {MEND_CUDA}, and the NVIDIA driver")
    if problem == "works" and not facts["llama_cpp_gpu_offload"]:
        broken.append(f"llama.cpp was built without a GPU back end. Mend: {MEND_LLAMA}")
    return facts, broken


def problems(device: dict[str, str | None]) -> list[str]:
    """What would make the device path fail or lie, one line each."""
    found = []
    cpu, gpu = device.get("onnxruntime"), device.get("onnxruntime-gpu")
    if cpu and gpu:
        found.append(
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed; the last one installed hides the other. "
            "Mend: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'tinyllava-edge[cpu]' (or [gpu])"
        )
    elif not cpu and not gpu:
        found.append("onnxruntime is not installed. Mend: pip install 'tinyllava-edge[cpu]' (or [gpu])")
    if not device.get("llama-cpp-python"):
        found.append("llama-cpp-python is not installed. Mend: pip install llama-cpp-python (compiles for minutes)")
    return found


def describe_path(path: Path) -> dict[str, Any]:
    """A bundle's or a checkpoint's description. Raises UsageError when it is neither."""
    if (path / MANIFEST).is_file():
        from .commands import describe_bundle

        bundle = read_bundle(path)
        found: list[str] = []
        try:
            bundle.check()
        except BundleError as error:
            found.append(f"{error.message}. Mend: {error.hint}")
        return {**describe_bundle(bundle), "problems": found}
    from .checkpoint_spec import SPEC_FILE, load_spec

    if not (path / SPEC_FILE).is_file():
        raise UsageError(f"{path}: neither a bundle ({MANIFEST}) nor a checkpoint ({SPEC_FILE})", "check the path")
    try:
        spec = load_spec(path)
    except CheckpointError as error:
        raise UsageError(error.message, error.hint) from error
    sizes = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}
    return {"kind": "checkpoint", "path": str(path), "model": spec.to_dict(), "files": sizes}


def print_info(value: dict[str, Any], indent: str = "") -> None:
    """Nested tables as indented lines on stdout; problems are printed as they are."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            print(f"{indent}{key}")
            print_info(entry, indent + "  ")
        elif isinstance(entry, list | tuple) and entry and isinstance(entry[0], dict):
            print(f"{indent}{key}")
            for item in entry:
                print(f"{indent}  {', '.join(f'{k} {v}' for k, v in item.items())}")
        elif isinstance(entry, list) and key == "problems":
            print(f"{indent}problems: {'none' if not entry else ''}")
            for line in entry:
                print(f"{indent}  {line}")
        else:
            print(f"{indent}{key}: {'-' if entry is None else entry}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Which device each engine is asked to run on, and what really ran where.

A GPU that was asked for and isn't used is an error, never a slower answer; `auto` may settle for less and says why.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from ..errors import EngineError, UsageError
from .llama import Llama, native_api
from .providers import CPU, CUDA, MEND_CUDA, cuda_problem, onnxruntime_api
from .vision import Vision

ALL_LAYERS = -1
MAX_LAYERS = 1000
CPU_PRECISIONS = ("int8",)
MEND_LLAMA = (
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python '
    "llama-cpp-python"
)
_KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class GgmlDevice:
    """A device that llama.cpp can compute on."""

    name: str
    """`CUDA0`, `Metal`, `Vulkan0`, `CPU`"""
    description: str
    """what it is, in its driver's words"""
    kind: str
    """`cpu`, `gpu`, `igpu` (shares the host's memory), `accel` or `meta`"""
    backend: str
    """`CUDA`, `Metal`, `Vulkan`, `ROCm`, `CPU`, …"""
    memory_bytes: int
    """its memory in all; 0 where it doesn't say"""


@dataclass(frozen=True)
class DevicePlan:
    """What each engine is asked for."""

    name: str
    """the device that was asked for"""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers of the vision graph, in order"""
    n_gpu_layers: int
    """decoder layers on the GPU: 0 none, -1 all, the output layer included"""
    reasons: tuple[str, ...]
    """why `auto` settled as it did, one line for each engine; empty where nothing was left to choose"""

    def vision_providers(self, precision: str) -> tuple[str, ...]:
        """The providers for a vision graph of this precision.

        CUDA has no kernels for dynamic int8: its MatMulInteger nodes stay on the CPU, with copies in between.

        Raises:
            EngineError: `cuda` was asked for and the graph can't run there.
        """
        if CUDA not in self.providers or precision not in CPU_PRECISIONS:
            return self.providers
        if self.name == "cuda":
            raise EngineError(
                f"device cuda: vision precision {precision} runs on the CPU only",
                "choose a build whose vision is fp16 or fp32 (--build), or the device auto",
            )
        return (CPU,)


ON_CPU = DevicePlan("cpu", (CPU,), 0, ())


def choose_device(name: str = "cpu", n_gpu_layers: int | None = None) -> DevicePlan:
    """What to ask of ONNX Runtime and of llama.cpp.

    Args:
        name: `cpu`; `cuda`: both engines, each of which must really have it; `auto`: the best of each, which for the
            vision graph is CUDA or the CPU, and for the language model any GPU that llama.cpp was built for.
        n_gpu_layers: decoder layers on the GPU: -1 for all, which is the default where there is one; 0 leaves the
            language model to the CPU and then asks nothing of llama.cpp.

    Raises:
        UsageError: an unknown device, or a number of layers that it can't have.
        EngineError: `cuda` was asked for and an engine lacks it; everything that is missing is named with its cure.
        DependencyError: an engine isn't installed.
    """
    if name not in CHOICES:
        raise UsageError(f"unknown device {name[:40]!r}", f"known: {', '.join(CHOICES)}")
    if n_gpu_layers is not None and not ALL_LAYERS <= n_gpu_layers <= MAX_LAYERS:
        raise UsageError(f"n_gpu_layers={n_gpu_layers} is outside {ALL_LAYERS}..{MAX_LAYERS}", "-1 offloads all")
    return CHOICES[name](n_gpu_layers)


def _cpu(n_gpu_layers: int | None) -> DevicePlan:
    if n_gpu_layers:
        raise UsageError(f"n_gpu_layers={n_gpu_layers} on the device cpu", "choose the device auto or cuda")
    return ON_CPU


def _cuda(n_gpu_layers: int | None) -> DevicePlan:
    layers = ALL_LAYERS if n_gpu_layers is None else n_gpu_layers
    missing = [(problem, MEND_CUDA)] if (problem := cuda_problem()) else []
    if layers and not any(device.backend == "CUDA" for device in gpus()):
        missing.append((_no_gpu("CUDA"), MEND_LLAMA))
    if missing:
        raise EngineError(
            f"device cuda: {'; '.join(text for text, _ in missing)}",
            f"{'; '.join(cure for _, cure in missing)}; or choose the device auto or cpu",
        )
    return DevicePlan("cuda", (CUDA, CPU), layers, ())


def _auto(n_gpu_layers: int | None) -> DevicePlan:
    problem = cuda_problem()
    vision = f"vision on the CPU: {problem}" if problem else "vision on CUDA: a session started"
    found = gpus()
    if n_gpu_layers == 0:
        layers, llm = 0, "language model on the CPU: n_gpu_layers=0"
    elif found:
        layers = ALL_LAYERS if n_gpu_layers is None else n_gpu_layers
        llm = f"language model on {', '.join(f'{gpu.name} ({gpu.description})' for gpu in found)}"
    elif n_gpu_layers:
        raise EngineError(f"n_gpu_layers={n_gpu_layers}: {_no_gpu()}", f"{MEND_LLAMA}; or leave it out")
    else:
        layers, llm = 0, f"language model on the CPU: {_no_gpu()}"
    return DevicePlan("auto", (CPU,) if problem else (CUDA, CPU), layers, (vision, llm))


_Choice = Callable[[int | None], DevicePlan]
CHOICES: Mapping[str, _Choice] = MappingProxyType({"cpu": _cpu, "cuda": _cuda, "auto": _auto})


def _no_gpu(backend: str = "") -> str:
    devices = ", ".join(device.name for device in ggml_devices()) or "none"
    wanted = f"{backend} device" if backend else "GPU"
    return f"llama.cpp has no {wanted} (it has {devices}): built without it, or the driver is missing"


def gpus() -> list[GgmlDevice]:
    """The GPUs that llama.cpp would offload to: those with memory of their own, or else the integrated ones."""
    devices = ggml_devices()
    return [d for d in devices if d.kind == "gpu"] or [d for d in devices if d.kind == "igpu"]


def ggml_devices() -> list[GgmlDevice]:
    """Every device of llama.cpp's registry."""
    native_api()
    count = _ggml("ggml_backend_dev_count", ctypes.c_size_t)
    get = _ggml("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = _ggml("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description = _ggml("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    registry = _ggml("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
    kind = _ggml("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    backend = _ggml("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
    memory = _ggml("ggml_backend_dev_memory", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    found = []
    for index in range(count()):
        device = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        texts = (name(device), description(device), backend(registry(device)))
        named, described, owner = ((text or b"").decode("utf-8", "replace") for text in texts)
        found.append(GgmlDevice(named, described, _kind(kind(device)), owner, total.value))
    return found


def _kind(number: int) -> str:
    return _KINDS[number] if 0 <= number < len(_KINDS) else f"type {number}"


def _ggml(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml's C API, which the bindings don't wrap. Raises EngineError if the library has none."""
    from llama_cpp import _ggml

    libraries = [_ggml.libggml]  # its dependencies are searched too, but not on Windows
    if os.name == "nt":
        libraries.append(ctypes.CDLL(str(_ggml.libggml_base_path / "ggml-base.dll")))
    for library in libraries:
        if hasattr(library, name):
            function = library[name]  # a new object: the attribute is shared with whoever else uses the library
            function.restype, function.argtypes = result, arguments
            return function
    raise EngineError(f"llama.cpp's library has no {name}", "pip install 'llama-cpp-python>=0.3.36'")


def _library_text(name: str) -> str | None:
    """What a function of ggml's without arguments says, such as the commit it was built from; None where it has none.

    The wheel's version doesn't tell: the same one is built from source with other flags, or against another llama.cpp.
    """
    try:
        said: bytes | None = _ggml(name, ctypes.c_char_p)()
    except EngineError:  # libraries before mid-2025
        return None
    return said.decode("utf-8", "replace").strip() or None if said else None


def machine_facts() -> dict[str, Any]:
    """Both engines' versions, builds and devices, before any model is opened. Raises DependencyError."""
    ort, api = onnxruntime_api(), native_api()
    return {
        "onnxruntime": str(ort.__version__),
        "onnxruntime_build": str(ort.get_build_info()),
        "onnxruntime_providers": list(ort.get_available_providers()),
        "llama_cpp_python": str(api.__version__),
        "llama_cpp_system_info": api.llama_print_system_info().decode("utf-8", "replace").strip(),
        "ggml_version": _library_text("ggml_version"),
        "ggml_commit": _library_text("ggml_commit"),
        "llama_cpp_gpu_offload": bool(api.llama_supports_gpu_offload()),
        "llama_cpp_devices": [asdict(device) for device in ggml_devices()],
    }


def backend_truth(vision: Vision, llama: Llama, plan: DevicePlan | None = None) -> dict[str, Any]:
    """What really runs where, for `environment()` and with every result; JSON values that stay the same within a run.

    `providers` is empty and `vision_nodes` too while a lazy vision graph isn't open.
    """
    reasons = [] if plan is None else list(plan.reasons)
    if plan is not None and reasons and CUDA in plan.providers and CUDA not in vision.settings[0]:
        reasons[0] = "vision on the CPU: CUDA has no kernels for this precision"
    return {
        **machine_facts(),
        **({} if plan is None else {"device": plan.name, "device_reasons": reasons}),
        "providers": vision.providers,
        "vision_nodes": vision.nodes,
        **llama.settings,
        **llama.placement.to_dict(),
    }

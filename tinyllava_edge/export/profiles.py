"""Device profiles as plain values: what a device has, what one program may take of it, and which files suit it.

The TOML files in `export/` hold the same for reading and copying; `load` takes a name or a file. How a profile decides
what is written: profile_fit.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..toml_files import place, read_toml
from .mobile.forms import MOBILE_FORMS

GIB = 1 << 30
DEVICES = ("cpu", "cuda", "web")
PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_FEATURES = 32  # words; llama.cpp knows about as many
_COMPARE = "compare with the files in export/"
_MEMORY_MD = "benchmarks/MEMORY.md"
PAGE_CONTEXT = 2048  # positions that the browser app keeps: MOST_POSITIONS of runtimes/web/src/engine/answer.ts
_LARGEST_CONTEXT = "729 visual tokens, the most of the paper's models, leave room for a question and an answer"


@dataclass(frozen=True)
class DeviceProfile:
    """A class of devices."""

    name: str
    """what `--profile` is given, and what the bundle records"""
    description: str
    """the device in one line"""
    device: str
    """`cpu`; `cuda`, both engines on a GPU, whose memory is meant; `web`, ONNX Runtime Web in a browser"""
    memory_bytes: int
    """memory that the device has, in bytes"""
    budget_bytes: int
    """most bytes that one program may hold resident; what needs more is refused"""
    n_threads: int
    """CPU threads to run with"""
    n_ctx: int
    """positions to run with: picture, conversation and answer"""
    max_visual_tokens: int
    """embeddings of one picture above which export tells what their prefill costs"""
    llm: tuple[str, ...]
    """types of the text GGUF, keys of LLM_TYPES, the preferred first"""
    vision: tuple[str, ...]
    """precisions of the vision graph, keys of VISION_PRECISIONS, the preferred first"""
    mmproj: tuple[str, ...] = ()
    """types of the mmproj, keys of MMPROJ_TYPES; none is written by default"""
    web: tuple[str, ...] = ()
    """precisions of the web files, keys of WEB_PRECISIONS; none are written by default"""
    mobile: tuple[str, ...] = ()
    """forms of the vision graph for mobile runtimes, keys of MOBILE_FORMS; none by default"""
    cpu_features: tuple[str, ...] = ()
    """llama.cpp's words on the processor: they decide which weights it keeps a second time, in another order"""
    trims: bool = True
    """whether the C library has malloc_trim, as glibc does; without it, what parsing a vision graph took stays taken"""
    imatrix: bool = False
    """whether types of 4 bits and less are to be made with an importance matrix"""
    static: bool = False
    """whether the vision graph's batch is fixed to 1"""
    sources: Mapping[str, str] = field(default_factory=dict)
    """field → where its value comes from: a data sheet, a measurement, or why it was chosen"""

    @property
    def system_info(self) -> bytes:
        """`cpu_features` as llama.cpp prints them."""
        return b" | ".join(f"{name} = 1".encode() for name in self.cpu_features)


PRESETS: dict[str, DeviceProfile] = {
    "phone-arm64": DeviceProfile(
        name="phone-arm64",
        description="Phone with a 64-bit ARM processor and 6 GiB, on its CPU: Termux, or a llama.cpp app.",
        device="cpu",
        memory_bytes=6 * GIB,
        budget_bytes=2 * GIB,
        n_threads=4,
        n_ctx=1024,
        max_visual_tokens=144,
        llm=("q4_0", "q4_k_m"),
        vision=("int8",),
        mmproj=("f16",),
        mobile=("ort",),
        cpu_features=("NEON", "DOTPROD", "MATMUL_INT8", "REPACK"),
        trims=False,
        imatrix=True,
        sources={
            "memory_bytes": "Android 12 Compatibility Definition, performance class: at least 6 GB",
            "budget_bytes": "our choice, a third of the memory: Android ends large apps first",
            "n_threads": "our choice: as many fast cores as most phones have",
            "n_ctx": "our choice: " + _LARGEST_CONTEXT,
            "max_visual_tokens": "our choice: what MobileVLM's LDPv2 connector gives; prefill grows with it",
            "llm": "llama.cpp's ggml-cpu/repack.cpp: q4_0 and q4_K are multiplied in an order of their own on ARM; "
            "q4_0, the smallest and fastest there, is the less exact one, hence the matrix",
            "vision": "docs/export.md: dynamic int8 is the fast form on CPUs",
            "mmproj": "what phone apps load; q8_0 is no faster in llama.cpp's own encoder and less exact",
            "mobile": "the form that a small build of ONNX Runtime for phones reads",
            "cpu_features": "Armv8.6 and newer have both products of 8-bit integers; older cores with DOTPROD alone "
            "repack the same types",
            "trims": "Android's C library, bionic: libc/include/malloc.h declares no malloc_trim",
        },
    ),
    "raspberry-pi-5": DeviceProfile(
        name="raspberry-pi-5",
        description="Raspberry Pi 5 with 4 GB, 64-bit system; what fits runs on the larger ones too.",
        device="cpu",
        memory_bytes=4 * GIB,
        budget_bytes=3 * GIB,
        n_threads=4,
        n_ctx=1024,
        max_visual_tokens=144,
        llm=("q4_k_m", "q4_0"),
        vision=("int8",),
        cpu_features=("NEON", "DOTPROD", "REPACK"),
        sources={
            "memory_bytes": "Raspberry Pi 5 product page: LPDDR4X-4267, the 4 GB model",
            "budget_bytes": "our choice: 1 GiB is left to the system, which then runs without a desktop",
            "n_threads": "product page: four Cortex-A76 cores",
            "n_ctx": "our choice: " + _LARGEST_CONTEXT,
            "max_visual_tokens": "our choice, as for phones: prefill grows with it",
            "llm": "llama.cpp's ggml-cpu/repack.cpp: both types are repacked; q4_k_m is the more exact one and needs "
            "no importance matrix",
            "vision": "docs/export.md: dynamic int8 is the fast form on CPUs",
            "cpu_features": "Cortex-A76 (Armv8.2): products of four 8-bit integers, no matrix products of them",
        },
    ),
    "jetson-orin": DeviceProfile(
        name="jetson-orin",
        description="Jetson Orin Nano with 8 GB that CPU and GPU share; both engines on CUDA.",
        device="cuda",
        memory_bytes=8 * GIB,
        budget_bytes=5 * GIB,
        n_threads=6,
        n_ctx=2048,
        max_visual_tokens=729,
        llm=("q4_k_m", "q8_0"),
        vision=("fp16",),
        cpu_features=("NEON", "DOTPROD", "REPACK"),
        sources={
            "memory_bytes": "Jetson Orin Nano data sheet: 8 GB of 128-bit LPDDR5, shared",
            "budget_bytes": "our choice: 3 GiB are left to the system and to the CUDA contexts and work spaces of "
            "both engines, which the estimate doesn't know",
            "n_threads": "data sheet: six Cortex-A78AE cores",
            "n_ctx": "the runtime's own default",
            "max_visual_tokens": "our choice: the most of the paper's models; on a GPU prefill is the smaller part",
            "llm": "our choice: a token of the answer reads all weights once, so fewer bytes are faster",
            "vision": "docs/gpu.md: CUDA has no kernels for dynamic int8, and fp16 is its fast form",
            "cpu_features": "Cortex-A78AE (Armv8.2); on a GPU nothing is repacked",
        },
    ),
    "laptop-cpu": DeviceProfile(
        name="laptop-cpu",
        description="Laptop with an x86-64 processor (AVX2) and 8 GiB, on its CPU.",
        device="cpu",
        memory_bytes=8 * GIB,
        budget_bytes=4 * GIB,
        n_threads=4,
        n_ctx=2048,
        max_visual_tokens=576,
        llm=("q4_k_m", "q8_0"),
        vision=("int8",),
        cpu_features=("AVX2", "REPACK"),
        sources={
            "memory_bytes": "our choice: the smallest that laptops are sold with",
            "budget_bytes": "our choice: half, the rest is the desktop's and the browser's",
            "n_threads": "our choice: the fast cores that most laptops have; more don't speed up the answer, which "
            "waits for memory",
            "n_ctx": "the runtime's own default",
            "max_visual_tokens": "our choice: what CLIP-L/14-336 gives",
            "llm": f"{_MEMORY_MD} for the sizes; q8_0 where its nearness to the checkpoint is worth twice the bytes",
            "vision": "docs/export.md: dynamic int8 is the fast form on CPUs",
            "cpu_features": "our choice: most have AVX2; Celeron and Pentium N and J lack it. AVX-512 adds q2_k only",
            "trims": "Linux with glibc is meant; Windows and macOS have no malloc_trim: false in a profile of your own",
        },
    ),
    "laptop-gpu": DeviceProfile(
        name="laptop-gpu",
        description="Laptop with an NVIDIA GPU of 8 GiB; both engines on CUDA.",
        device="cuda",
        memory_bytes=8 * GIB,
        budget_bytes=6 * GIB,
        n_threads=4,
        n_ctx=2048,
        max_visual_tokens=729,
        llm=("q8_0", "q4_k_m"),
        vision=("fp16",),
        cpu_features=("AVX2", "REPACK"),
        sources={
            "memory_bytes": "our choice: the GPU memory of the middle class",
            "budget_bytes": "our choice: 2 GiB are left to the desktop and to the CUDA contexts and work spaces of "
            "both engines, which the estimate doesn't know",
            "n_threads": "our choice: pictures are prepared on the CPU, the rest isn't",
            "n_ctx": "the runtime's own default",
            "max_visual_tokens": "our choice: the most of the paper's models; docs/gpu.md has 16,000 positions of "
            "prefill a second on an H100",
            "llm": "our choice: the nearest to the checkpoint that fits with room for the context",
            "vision": "docs/gpu.md: CUDA has no kernels for dynamic int8, and fp16 is its fast form",
            "cpu_features": "our choice: most have AVX2; Celeron and Pentium N and J lack it; a GPU repacks nothing",
        },
    ),
    "browser": DeviceProfile(
        name="browser",
        description="The browser app, on WebGPU or WebAssembly; one page's memory is what is meant.",
        device="web",
        memory_bytes=4 * GIB,
        budget_bytes=3 * GIB,
        n_threads=4,
        n_ctx=PAGE_CONTEXT,
        max_visual_tokens=144,
        llm=("q4_k_m",),
        vision=("w8",),
        web=("q4",),
        cpu_features=("AVX2", "REPACK"),
        sources={
            "memory_bytes": "v8.dev/blog/4gb-wasm-memory: pointers of 32 bits reach 4 GiB, and no more",
            "budget_bytes": "our choice: 1 GiB is left to ONNX Runtime Web itself and to holes in its heap",
            "n_threads": "our choice: a page may use as many as the processor has, and the app takes eight at most",
            "n_ctx": "runtimes/web/src/engine/answer.ts: what the page keeps, of a model with that many or more",
            "max_visual_tokens": "our choice, as for phones: prefill grows with it",
            "llm": "every bundle holds a build that verify and eval can run; of about the web files' precision",
            "vision": "our choice, for verify and eval alone: the page runs web/onnx/vision_encoder_q4.onnx",
            "web": "the smallest form that runs everywhere: 16-bit graphs want a GPU with float16 shaders",
            "cpu_features": "of the machine that runs the build; the browser has no use for it",
        },
    ),
}


def load(name_or_path: str | Path) -> DeviceProfile:
    """A preset by its exact name, or a TOML file's profile.

    Raises:
        UsageError: unknown name, unreadable file, unknown or missing key, or a value out of range.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".toml"):
        known = f"known: {', '.join(PRESETS)}, or the path of a .toml file"
        raise UsageError(f"unknown profile {_short(name)}", known)
    return profile_from(read_toml(name, _COMPARE), place(name))


def profile_from(value: Mapping[str, Any], where: str) -> DeviceProfile:
    """A profile from parsed TOML; `where` is named in errors. Raises UsageError."""
    fields = {item.name: item for item in dataclasses.fields(DeviceProfile)}
    unknown = [key for key in value if key not in fields]
    if unknown:
        raise UsageError(f"{where}: unknown key {_short(unknown[0])}", f"known: {', '.join(fields)}")
    needed = [name for name, item in fields.items() if _required(item)]
    missing = [name for name in needed if name not in value]
    if missing:
        raise UsageError(f"{where}: {missing[0]} is missing", f"needed: {', '.join(needed)}")
    clean = {name: _typed(given, str(fields[name].type), f"{where}: {name}") for name, given in value.items()}
    profile = DeviceProfile(**clean)
    _check(profile, where)
    return profile


def is_description(text: str) -> bool:
    """Whether a text is one printable line of at most 200 characters."""
    return text.isprintable() and len(text) <= 200


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _typed(given: Any, kind: str, where: str) -> Any:
    """A value in its field's type, which is named as in the source."""
    plain: dict[str, type] = {"str": str, "int": int, "bool": bool}
    if kind in plain:
        good = type(given) is plain[kind]
    elif kind.startswith("tuple"):
        good = isinstance(given, list) and all(type(item) is str for item in given)
        given = tuple(given) if good else given
    else:
        good = isinstance(given, Mapping) and all(type(text) is str for text in given.values())
        given = dict(given) if good else given
    if not good:
        words = "a list of texts" if kind.startswith("tuple") else "a table of texts" if kind not in plain else kind
        raise UsageError(f"{where} = {_short(given)}: not {words}", _COMPARE)
    return given


def _check(profile: DeviceProfile, where: str) -> None:
    """Raise UsageError for a name that isn't known and a number that no device has."""
    from .llm_types import LLM_TYPES
    from .mmproj import MMPROJ_TYPES
    from .vision_quantize import VISION_PRECISIONS
    from .web import WEB_PRECISIONS

    if not PROFILE_NAME.fullmatch(profile.name):
        raise UsageError(f"{where}: name = {_short(profile.name)}", "letters, digits, dots and hyphens, at most 64")
    if not is_description(profile.description):
        raise UsageError(f"{where}: description = {_short(profile.description)}", "one line of at most 200 characters")
    limits = {
        "memory_bytes": (1 << 26, 1 << 45),
        "budget_bytes": (1 << 26, profile.memory_bytes),
        "n_threads": (1, 1024),
        "n_ctx": (64, 1 << 20),
        "max_visual_tokens": (1, 65536),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(profile, name) <= high:
            raise UsageError(f"{where}: {name} = {_short(getattr(profile, name))}", f"it must be in {low:,}..{high:,}")
    known: dict[str, tuple[str, ...]] = {
        "llm": tuple(LLM_TYPES),
        "vision": tuple(VISION_PRECISIONS),
        "mmproj": tuple(MMPROJ_TYPES),
        "web": tuple(WEB_PRECISIONS),
        "mobile": tuple(MOBILE_FORMS),
    }
    for name, names in known.items():
        asked: tuple[str, ...] = getattr(profile, name)
        odd = [kind for kind in asked if kind not in names]
        if odd or len(set(asked)) != len(asked):
            reason = f"unknown {_short(odd[0])}" if odd else "one is named twice"
            raise UsageError(f"{where}: {name}: {reason}", f"known: {', '.join(names)}")
    if not profile.llm or not profile.vision or (profile.device == "web" and not profile.web):
        raise UsageError(f"{where}: llm, vision, or web of a browser, is empty", "name at least one type")
    if profile.device not in DEVICES:
        raise UsageError(f"{where}: device = {_short(profile.device)}", f"known: {', '.join(DEVICES)}")
    if profile.device == "web" and profile.n_ctx != PAGE_CONTEXT:
        raise UsageError(
            f"{where}: n_ctx = {profile.n_ctx}", f"the browser app keeps {PAGE_CONTEXT}, whatever stands here"
        )
    features = profile.cpu_features
    if len(features) > _MAX_FEATURES or len(set(features)) != len(features):
        reason = f"{len(features):,} words" if len(features) > _MAX_FEATURES else "one is named twice"
        raise UsageError(f"{where}: cpu_features: {reason}", f"name each once, {_MAX_FEATURES} at most")
    for word in features:
        if not re.fullmatch(r"[A-Z0-9_]{1,32}", word):
            raise UsageError(f"{where}: cpu_features: {_short(word)}", "write llama.cpp's words, e.g. NEON, DOTPROD")
    odd = [key for key in profile.sources if key not in DeviceProfile.__dataclass_fields__]
    if odd:
        raise UsageError(f"{where}: sources: unknown key {_short(odd[0])}", "name a field of the profile")
    odd = [key for key, text in profile.sources.items() if not is_description(text)]
    if odd:
        raise UsageError(
            f"{where}: sources: {odd[0]} = {_short(profile.sources[odd[0]])}", "one line of at most 200 characters"
        )


def _short(given: Any) -> str:
    """A value as messages repeat it."""
    if type(given) is int and abs(given) >= 1 << 63:
        return "a very large number"
    return repr(given)[:40] if isinstance(given, str | int | float) else f"a {type(given).__name__}"

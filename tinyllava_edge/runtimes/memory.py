"""How much memory a build will take, and a refusal in words where the kernel would end the process.

`MemoryEstimate.total` is the expected peak of the resident set: one picture, and an answer that fills n_ctx, on the
CPU; pages of mapped files count. A limit is compared with less, `required`. llama.cpp maps the GGUF, reads all of it
once, and copies the weights that the processor wants in another order; the originals of those are dead pages then, and
the kernel drops them at no cost. Weights used where they are mapped could be dropped too, but then every token would
read them from the disk again: they count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..bundle import Build, Bundle, BundleFile
from ..errors import MemoryLimitError
from .gguf_sizes import CELLS, GgufSizes, gguf_sizes
from .llama import native_api, repacks
from .memory_limit import (
    ADDRESSES,
    PRIVATE,
    RESIDENT,
    Held,
    MemoryLimit,
    give_back,
    held_now,
    memory_limits,
    size_words,
)
from .onnx_sizes import OnnxSizes, onnx_sizes
from .providers import onnxruntime_api
from .text import default_context

MEGAPIXEL = 1_000_000
_PIXEL = 13  # bytes: Pillow's 4, the array's 3, 3 for a padded square, 3 for the planes in the preprocessing graph
_ALIVE = 4  # values of the largest size: scores before and after the softmax, and as much again in smaller ones
_STARTED = 20 << 20  # code that runs for the first time and the engines' own objects: all that a model of no size adds
_SPARE = 64  # a part of the limit that advice leaves free: the next process never holds exactly what this one does
_STACK = 8 << 20  # address space that a thread reserves
_POOLS = 3  # ONNX Runtime's threads, llama.cpp's, and ours


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one build takes, by what takes them."""

    base: int
    """this process with both engines imported and started, before anything is opened"""
    weights_llm: int
    """the GGUF, mapped and read whole; these pages are a file's"""
    repacked: int
    """copies of those of its weights that the processor reads in another order"""
    kv_cache: int
    """keys and values of n_ctx positions"""
    compute: int
    """llama.cpp's buffers of one batch, and its vocabulary"""
    vision_weights: int
    """tower and connector as ONNX Runtime keeps them"""
    vision_load: int
    """what opening them takes on top for a moment: weights inside the graph's file are parsed into memory first"""
    vision_arena: int
    """values between the tower's nodes, kept from then on"""
    picture: int
    """a picture's pixels on their way to the tower"""
    caches: int
    """bounds of the caches"""
    lazy: bool = False
    """whether the vision graph is opened after the language model, as the engine does; else before it"""

    @property
    def total(self) -> int:
        """Expected peak of the resident set."""
        return self._peak(self.weights_llm)

    @property
    def required(self) -> int:
        """`total` without the pages that are read only once: what a limit on resident memory is compared with."""
        return self._peak(max(0, self.weights_llm - self.repacked))

    @property
    def anonymous(self) -> int:
        """Of the peak, what this process adds that no file stands behind."""
        return self._peak(0) - self.base

    def _peak(self, mapped: int) -> int:
        llm = mapped + self.repacked + self.kv_cache + self.compute + self.caches
        run = self.vision_arena + self.picture
        if self.lazy:
            return self.base + self.vision_weights + llm + max(self.vision_load, run)
        return self.base + self.vision_weights + max(self.vision_load, llm + run)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, `total` and `required` included."""
        return {**asdict(self), "total": self.total, "required": self.required}


@dataclass(frozen=True)
class MemorySettings:
    """What an estimate depends on beside the files."""

    n_ctx: int
    """positions that fit"""
    type_k: str | None = None
    """type of the cached keys; see kv_cache.KV_TYPES"""
    type_v: str | None = None
    """type of the cached values"""
    flash_attention: bool = False
    """llama.cpp's fused attention"""
    n_batch: int = 256
    """rows of one llama_decode"""
    n_threads: int = 1
    """threads of each engine; counted where a limit is on address space"""
    caches_bytes: int = 0
    """most bytes that the caches may take"""
    picture_pixels: int = MEGAPIXEL
    """pixels of a picture as it arrives"""
    lazy: bool = False
    """whether the vision graph is opened with the first picture"""


@dataclass(frozen=True)
class Host:
    """What an estimate depends on that belongs to the machine and the process."""

    base: int
    """bytes that the process holds with both engines imported and started, before anything is opened"""
    system_info: bytes = b""
    """llama.cpp's words on the processor; nothing is repacked without them"""
    trims: bool = True
    """whether freed memory goes back to the system: weights that are parsed while loading don't stay then"""
    gpu: bool = False
    """whether both engines run on a GPU: weights are copied to its memory, and float16 weights stay float16"""


def this_host() -> Host:
    """This process on this machine. Raises DependencyError: an engine isn't installed."""
    onnxruntime_api()
    api = native_api()
    info = api.llama_print_system_info() if repacks(api) else b""
    return Host(held_now().resident + _STARTED, info, give_back())


def estimate(
    bundle: Bundle, build: Build, settings: MemorySettings | None = None, host: Host | None = None
) -> MemoryEstimate:
    """What a build takes, from its files' headers: in this process, or on the host that is given.

    Raises:
        BundleError: a file is missing, truncated, or not what it should be.
        DependencyError: an engine isn't installed; not looked at for another host.
    """
    files = _Files(bundle, this_host() if host is None else host)
    return files.estimate(build, settings or MemorySettings(default_context(bundle.spec)))


def estimate_sizes(llm: GgufSizes, vision: OnnxSizes, settings: MemorySettings, host: Host) -> MemoryEstimate:
    """What two files of these sizes take on a host."""
    kept, parsed = (0, vision.inline) if host.trims else (vision.inline, 0)
    return MemoryEstimate(
        base=host.base,
        weights_llm=llm.mapped,
        repacked=llm.mapped if host.gpu else llm.repacked,
        kv_cache=llm.kv_cache(settings.n_ctx, settings.type_k, settings.type_v),
        compute=llm.compute(settings.n_ctx, settings.n_batch, settings.flash_attention) + llm.vocabulary,
        vision_weights=vision.weights + kept,
        vision_load=parsed,
        vision_arena=_ALIVE * vision.largest,
        picture=_PIXEL * settings.picture_pixels,
        caches=settings.caches_bytes,
        lazy=settings.lazy,
    )


def preflight(
    bundle: Bundle,
    build: Build,
    settings: MemorySettings | None = None,
    limits: Sequence[MemoryLimit] | None = None,
) -> MemoryEstimate:
    """Refuse a build that doesn't fit, before it is loaded.

    Args:
        bundle: its bundle, whose other builds may fit.
        build: the one to open.
        settings: how it will be opened; the runtime's defaults by default.
        limits: what to hold it against; `memory_limits()` by default.

    Raises:
        MemoryLimitError: the message has the need, the limit and the parts; the hint names what fits.
        BundleError: what `estimate` raises.
    """
    chosen = settings or MemorySettings(default_context(bundle.spec))
    files = _Files(bundle, this_host())
    needed = files.estimate(build, chosen)
    held = held_now()
    bounds = memory_limits() if limits is None else limits
    limit = _exceeded(needed, chosen, held, bounds)
    if limit is None:
        return needed
    need = _need(needed, chosen, held, limit)
    raise MemoryLimitError(
        f"{bundle.root}: build {build.name} needs {size_words(need)} of {limit.words} at n_ctx={chosen.n_ctx}, "
        f"{limit.source} leaves {size_words(limit.bytes)}; {_parts(needed)}",
        _what_fits(files, build, chosen, held, bounds),
    )


class _Files:
    """The sizes in a bundle's files, each read once."""

    def __init__(self, bundle: Bundle, host: Host) -> None:
        self.bundle, self.host = bundle, host
        self.gguf = functools.cache(self._gguf)
        self.onnx = functools.cache(self._onnx)

    def _gguf(self, path: str) -> GgufSizes:
        return gguf_sizes(self.bundle.path(self._file(path)), self.host.system_info)

    def _onnx(self, path: str) -> OnnxSizes:
        return onnx_sizes(self.bundle.path(self._file(path)), float16=self.host.gpu)

    def _file(self, path: str) -> BundleFile:
        return next(file for file in self.bundle.files if file.path == path)

    def estimate(self, build: Build, settings: MemorySettings) -> MemoryEstimate:
        return estimate_sizes(self.gguf(build.llm.path), self.onnx(build.vision.path), settings, self.host)


def _exceeded(
    needed: MemoryEstimate, settings: MemorySettings, held: Held, limits: Sequence[MemoryLimit]
) -> MemoryLimit | None:
    """The limit that is exceeded by most; None if all hold."""
    over = [(_need(needed, settings, held, limit) - limit.bytes, number) for number, limit in enumerate(limits)]
    most, number = max(over, default=(0, 0))
    return limits[number] if most > 0 else None


def _need(needed: MemoryEstimate, settings: MemorySettings, held: Held, limit: MemoryLimit) -> int:
    """Bytes of what a limit counts, at the peak."""
    if limit.counts == RESIDENT:
        return needed.required
    stacks = _POOLS * settings.n_threads * _STACK
    if limit.counts == ADDRESSES:
        return held.addresses + needed.total - needed.base + stacks
    if limit.counts == PRIVATE:
        return held.private + needed.anonymous + stacks
    raise ValueError(f"a limit on {limit.counts!r}")


def _what_fits(files: _Files, build: Build, settings: MemorySettings, held: Held, limits: Sequence[MemoryLimit]) -> str:
    """The largest n_ctx of this build and the largest other build that fit, in words."""

    spared = [replace(limit, bytes=limit.bytes - limit.bytes // _SPARE) for limit in limits]

    def fits(other: Build, n_ctx: int) -> bool:
        changed = replace(settings, n_ctx=n_ctx)
        return _exceeded(files.estimate(other, changed), changed, held, spared) is None

    advice = []
    least = files.bundle.spec.visual_tokens + CELLS  # a picture and a question
    for n_ctx in _smaller(settings.n_ctx, least):
        if fits(build, n_ctx):
            advice.append(f"n_ctx={n_ctx} (-c {n_ctx}) fits")
            break
    builds = files.bundle.builds().values()
    sizes = {other.name: files.estimate(other, settings) for other in builds}
    fitting = [other for other in builds if fits(other, settings.n_ctx)]
    if fitting:
        best = max(fitting, key=lambda other: other.bytes)  # the most bits are the nearest to the checkpoint
        advice.append(f"build {best.name} fits ({size_words(sizes[best.name].required)})")
    if advice:
        return "; ".join(advice)
    name, least_build = min(sizes.items(), key=lambda item: item[1].required)
    return f"no build of this bundle fits; the smallest, {name}, needs {size_words(least_build.required)}"


def _smaller(n_ctx: int, least: int) -> Iterator[int]:
    """Multiples of CELLS below n_ctx, largest first."""
    yield from range((n_ctx - 1) // CELLS * CELLS, least - 1, -CELLS)


def _parts(needed: MemoryEstimate) -> str:
    """What `required` is made of, on one line."""
    run = needed.vision_arena + needed.picture
    vision = needed.vision_weights + (max(needed.vision_load, run) if needed.lazy else run)
    parts = {
        "language model": max(needed.weights_llm, needed.repacked),
        "KV cache": needed.kv_cache,
        "compute": needed.compute,
        "vision": vision,
        "caches": needed.caches,
        "Python": needed.base,
    }
    return ", ".join(f"{name} {size_words(size)}" for name, size in parts.items() if size)

"""Which of a profile's files are written: those whose builds fit the device, counted before the long work.

A build's need is `MemoryEstimate.required` with the profile's context, the engine's caches and a picture of a
megapixel, as `run` checks it on the device. Web files are counted as one page, an mmproj as llama-server that opens it
with the smallest text GGUF. What the user named of these is never left out: it fits, or nothing is written. With a
browser's profile only the page is held against the budget. Mobile forms aren't counted: an app opens one of them in
the vision file's place, with the same weights (`ort`) or with float32 ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import checkpoint
from ..bundle import Bundle
from ..errors import ExportError, UsageError
from ..files import scratch_directory
from ..runtimes.caches import Caches
from ..runtimes.gguf_sizes import CELLS, GgufSizes, gguf_sizes
from ..runtimes.memory import Host, MemorySettings, estimate, estimate_sizes
from ..runtimes.memory_limit import size_words
from ..runtimes.onnx_sizes import OnnxSizes
from ..spec import LLM_BACKBONES, VISION_BACKBONES, ModelSpec, named_tokens
from .decoder import DECODER_PRECISIONS
from .early_sizes import LlmSizes, VisionSizes, web_bytes
from .llm_types import FLOAT_LLM_TYPES, LLM_TYPES, llm_type
from .mmproj import MMPROJ_TYPES, check_model
from .mobile.forms import check_forms
from .options import NONE, ExportOptions
from .profiles import PAGE_CONTEXT, DeviceProfile
from .quantize import check_request
from .stock_hosts import SERVER_BATCH
from .vision_quantize import VISION_PRECISIONS
from .web import WEB_PRECISIONS

Progress = Callable[[str], None]
BASE = 84 << 20  # Python with both engines started: the column "Python" of benchmarks/MEMORY.md
MOST = 2  # types of one part that a profile writes
FEWER_TOKENS = "ldpv2-144"  # a connector's name
LOW_BITS = 5  # types below this many bits want an importance matrix


@dataclass(frozen=True)
class Plan:
    """What an export with a profile writes."""

    profile: DeviceProfile
    """the device"""
    options: ExportOptions
    """the user's options, with the types that were chosen"""
    n_ctx: int
    """positions to run with"""
    preferred: str
    """build to run, the first that fits in the profile's order"""
    needs: Mapping[str, int] = field(default_factory=dict)
    """build → bytes that it needs resident, counted early"""
    web: Mapping[str, int] = field(default_factory=dict)
    """precision → bytes that the page needs beside the weights"""
    mmproj: Mapping[str, OnnxSizes] = field(default_factory=dict)
    """type → sizes of the mmproj, counted early"""
    collect: bool = False
    """whether the export collects the importance matrix itself"""


@dataclass(frozen=True)
class _Sizes:
    """What the counting of one export shares."""

    profile: DeviceProfile
    """the device"""
    settings: MemorySettings
    """how the bundle will be run"""
    source: checkpoint.LlmSource
    """the checkpoint's language model"""
    llm: LlmSizes
    """sizes of the text GGUF"""
    vision: VisionSizes
    """sizes of the vision graph"""
    has_imatrix: bool
    """whether there will be an importance matrix"""

    def text(self, name: str) -> GgufSizes:
        return self.llm.sizes(name, self.has_imatrix and name not in FLOAT_LLM_TYPES)

    def build(self, llm: str, vision: str) -> int:
        """Bytes that a build needs resident."""
        return estimate_sizes(self.text(llm), self.vision.sizes(vision), self.settings, host(self.profile)).required

    def stock(self, llm: str, mmproj: str) -> int:
        """The same of a text GGUF and an mmproj in llama.cpp's own programs."""
        return _stock(self.text(llm), self.vision.mmproj(mmproj), self.profile, self.settings)

    def page(self, precision: str) -> int:
        """Bytes of the web graphs' weights, keys and values, logits of a whole prompt, and values between nodes."""
        return web_bytes(self.text("f16"), self.source, self.vision, precision) + self.page_values(precision)

    def page_values(self, precision: str) -> int:
        """The same without the weights."""
        llm, n_ctx = self.text("f16"), min(PAGE_CONTEXT, self.source.spec.max_length)
        kind = "f16" if DECODER_PRECISIONS[precision].values == "FLOAT16" else "f32"
        values = llm.kv_cache(n_ctx, kind, kind) + llm.compute(n_ctx, n_ctx, False) + 4 * n_ctx * llm.vocab
        return values + 4 * self.vision.sizes("fp32").largest


def host(profile: DeviceProfile) -> Host:
    """A profile's device as the estimate asks for it."""
    return Host(BASE, profile.system_info, trims=profile.trims, gpu=profile.device == "cuda")


def settings_of(profile: DeviceProfile, spec: ModelSpec) -> MemorySettings:
    """How `run` opens a bundle with the profile's flags."""
    n_ctx = min(profile.n_ctx, spec.max_length)
    return MemorySettings(n_ctx, n_threads=profile.n_threads, caches_bytes=Caches().bytes, lazy=True)


def _stock(llm: GgufSizes, mmproj: OnnxSizes, profile: DeviceProfile, settings: MemorySettings) -> int:
    """What llama-server needs within PHONE_BOUNDS: it opens the vision part first, and has no caches of ours."""
    settings = replace(settings, n_batch=SERVER_BATCH, caches_bytes=0, lazy=False)
    return estimate_sizes(llm, mmproj, settings, host(profile)).required


def plan_export(root: Path, out: Path, options: ExportOptions, profile: DeviceProfile, tell: Progress) -> Plan:
    """Choose what is written, and say for each type that is left out what it needs.

    Args:
        root: checkpoint directory.
        out: bundle that will be written; only named in hints.
        options: as typed; lists that are empty are the profile's to fill.
        profile: the device.
        tell: told each step.

    Raises:
        UsageError: an unknown type, or no web files for a browser.
        CheckpointError: the checkpoint can't be read.
        ExportError: nothing fits, or something that was typed doesn't; or a matrix is wanted and none can be made here.
    """
    from .bundle_writer import base_type

    _check_types(options)
    _check_page(options, profile)
    source = checkpoint.llm_source(root)
    settings = settings_of(profile, source.spec)
    _check_context(profile, source.spec, settings.n_ctx)
    wants = profile.imatrix and not options.llm and options.imatrix is None
    with scratch_directory() as folder, _about(profile):
        llm = LlmSizes(source, base_type(source), folder, profile.system_info, dict(options.tensor_types))
        config = checkpoint.load_config(root)
        vision = VisionSizes(config, source.spec, float16=profile.device == "cuda")
        sizes = _Sizes(profile, settings, source, llm, vision, wants or options.imatrix is not None)
        _tell_prefill(sizes, tell)
        asked = _mmproj(config, source.spec, options, profile, tell)
        llms, visions, needs = _builds(sizes, options, asked, tell)
        mmproj = _extra(sizes, "mmproj", asked, options, tell, lambda kind: sizes.stock(_smallest(llms), kind))
        typed = _typed(options, "web")
        web = _extra(sizes, "web", profile.web if typed is None else typed, options, tell, sizes.page)
        pages = {kind: sizes.page_values(kind) for kind in web}
        projectors = {kind: vision.mmproj(kind) for kind in mmproj}
    wanted = wants and any(llm_type(name).bits < LOW_BITS for name in llms)
    collect = shlex.join(["tinyllava-edge", "imatrix", str(root), "-o", "imatrix.gguf"])
    again = shlex.join(["tinyllava-edge", "export", str(root), "-o", str(out), "--profile", str(options.profile)])
    if wanted and not is_nano(source.spec):
        raise ExportError(
            f"{root}: profile {profile.name} makes {', '.join(llms)} with an importance matrix, "
            "and only models of the demo's shape come with data to collect one on",
            f"type `{collect} --data YOURS.json --images DIR`, then `{again} --imatrix imatrix.gguf`; "
            f"or name the types yourself: --llm {','.join(llms)}",
        )
    mobile = _typed(options, "mobile")
    chosen = replace(
        options,
        llm=llms,
        vision=visions,
        mmproj=mmproj,
        web=web,
        mobile=profile.mobile if mobile is None else mobile,
        static=options.static or profile.static,
    )
    return Plan(profile, chosen, settings.n_ctx, next(iter(needs)), needs, pages, projectors, wanted)


def is_nano(spec: ModelSpec) -> bool:
    """Whether a model has the shape of the demo's, which easy-VQA fits."""
    side, width = VISION_BACKBONES["NanoSig"].image_size, LLM_BACKBONES["Nano"].config["hidden_size"]
    return (spec.image_size, spec.embedding_dim) == (side, width)


def check_written(bundle: Bundle, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """The needs of a bundle's builds, and of its web files by precision, from what was really written.

    Written mmproj files are held against the budget, too.

    Raises:
        ExportError: what the device runs is over its budget.
    """
    profile, settings = plan.profile, settings_of(plan.profile, bundle.spec)
    builds = {
        name: estimate(bundle, build, settings, host(profile)).required for name, build in bundle.builds().items()
    }
    pages = {
        kind: values + sum(file.total_bytes for file in bundle.files if (file.role, file.precision) == ("web", kind))
        for kind, values in plan.web.items()
    }
    held = {f"web {kind}": need for kind, need in pages.items()}
    if profile.device != "web":
        held |= builds | _written_mmproj(bundle, plan, settings)
    for name, need in held.items():
        if need > profile.budget_bytes:
            raise ExportError(
                f"{name} needs {_of(need, profile)} once it is written",
                "leave it out with --llm, --vision, --mmproj or --web, and report this: the early count was less",
            )
    return builds, pages


def _written_mmproj(bundle: Bundle, plan: Plan, settings: MemorySettings) -> dict[str, int]:
    """What each mmproj needs with the smallest text GGUF, from their files."""
    profile = plan.profile
    texts = {file.precision: file for file in bundle.files if file.role == "llm"}
    llm = gguf_sizes(bundle.path(texts[_smallest(list(texts))]), profile.system_info)
    files = [file for file in bundle.files if file.role == "mmproj"]
    return {
        f"mmproj {file.precision}": _stock(
            llm, replace(plan.mmproj[file.precision], weights=file.total_bytes), profile, settings
        )
        for file in files
    }


@contextmanager
def _about(profile: DeviceProfile) -> Iterator[None]:
    """Name the profile in the errors of what it asks for."""
    try:
        yield
    except ExportError as error:
        raise ExportError(f"profile {profile.name}: {error.message}", error.hint) from error


def _check_types(options: ExportOptions) -> None:
    """Raise UsageError or DependencyError for a type that was typed and can't be written."""
    from .bundle_writer import known_names

    for name in options.llm:
        check_request(name, options.imatrix is not None)
    tables: dict[str, tuple[str, Mapping[str, object]]] = {
        "vision": ("vision precision", VISION_PRECISIONS),
        "mmproj": ("mmproj type", MMPROJ_TYPES),
        "web": ("web precision", WEB_PRECISIONS),
    }
    for name, (what, known) in tables.items():
        if typed := _typed(options, name):
            known_names(what, typed, known)
    check_forms(_typed(options, "mobile") or ())


def _check_page(options: ExportOptions, profile: DeviceProfile) -> None:
    """Raise UsageError if a browser's profile would get a bundle that no page can open."""
    if profile.device == "web" and _typed(options, "web") == ():
        raise UsageError(
            f"--web none: profile {profile.name} is a browser's, and its page opens nothing but web files",
            f"leave --web out for {', '.join(profile.web)}, or export without --profile",
        )


def _check_context(profile: DeviceProfile, spec: ModelSpec, n_ctx: int) -> None:
    if spec.visual_tokens + CELLS > n_ctx and spec.visual_tokens + CELLS <= spec.max_length:
        raise ExportError(
            f"profile {profile.name}: a picture of {spec.visual_tokens} visual tokens and {CELLS} positions of "
            f"question and answer don't fit n_ctx = {n_ctx}",
            "take a model with fewer visual tokens, or a profile of your own with a larger n_ctx",
        )


def _tell_prefill(sizes: _Sizes, tell: Progress) -> None:
    """Visual tokens cost no memory worth naming, but time: every position goes through all weights."""
    profile, tokens = sizes.profile, sizes.source.spec.visual_tokens
    most = profile.max_visual_tokens
    if tokens > most:
        example = f", e.g. {FEWER_TOKENS}" if most >= (named_tokens(FEWER_TOKENS) or 0) else ""
        tell(
            f"note: {tokens} visual tokens, {profile.name} wants {most} at most: a picture takes "
            f"{tokens / most:.1f} times as many positions; a connector with fewer tokens helps{example}"
        )


def _builds(
    sizes: _Sizes, options: ExportOptions, mmproj: Sequence[str], tell: Progress
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
    """Types of both parts, all of whose combinations fit, and what each build needs; the preferred build first.

    Each pair that isn't kept is told, with the reason. A page runs no build: with a browser's profile they are counted
    for the machine that verifies them, not refused. `mmproj` are the types that are asked for, for the refusal's hint.
    """
    profile, budget = sizes.profile, sizes.profile.budget_bytes
    texts, pictures = options.llm, options.vision  # what is typed must be among them
    most_texts, most_pictures = max(MOST, len(texts)), max(MOST, len(pictures))
    needs = {(t, p): sizes.build(t, p) for t in texts or profile.llm for p in pictures or profile.vision}
    over = set() if profile.device == "web" else {pair for pair, need in needs.items() if need > budget}
    lines = {(t, p): f"build {p}+{t}: needs {_of(need, profile)}" for (t, p), need in needs.items()}
    if profile.device == "web":
        lines = {pair: f"build {pair[1]}+{pair[0]}, to be verified here: {size_words(needs[pair])}" for pair in needs}
    for t, p in needs:
        wider = (tuple(dict.fromkeys((*texts, t))), tuple(dict.fromkeys((*pictures, p))))
        fits = not over & {(t, p) for t in wider[0] for p in wider[1]}
        if fits and len(wider[0]) <= most_texts and len(wider[1]) <= most_pictures:
            texts, pictures = wider
    kept = [pair for pair in needs if pair[0] in texts and pair[1] in pictures]
    failed = over & set(kept) if kept else over
    if failed:
        raise ExportError(
            lines[min(failed, key=lambda pair: needs[pair])],
            _hint(sizes, mmproj, typed=_typed(options, "mmproj") is not None),
        )
    for pair in needs:
        full = (pair[0] not in texts and len(texts) >= most_texts) or (
            pair[1] not in pictures and len(pictures) >= most_pictures
        )
        reason = (
            "" if pair in over else f", {MOST} types of a part are the most" if full else ", others with it don't fit"
        )
        tell(lines[pair] + ("" if pair in kept else f": left out{reason}"))
    return texts, pictures, {f"{p}+{t}": needs[t, p] for t, p in kept}


def _mmproj(
    config: object, spec: ModelSpec, options: ExportOptions, profile: DeviceProfile, tell: Progress
) -> tuple[str, ...]:
    """The mmproj types that are asked for; a profile's own give way where stock llama.cpp fails."""
    typed = _typed(options, "mmproj")
    if typed is not None or not profile.mmproj:
        return typed or ()
    try:
        check_model(config, spec, options.clip_workaround)
    except ExportError as error:
        tell(f"mmproj: left out: {error.message}")
        return ()
    if spec.vision_family == "clip" and not options.clip_workaround:
        kinds = ",".join(profile.mmproj)
        tell(
            "mmproj: left out: stock llama.cpp gives CLIP's patches wrong positions (ggml-org/llama.cpp#25814); "
            f"--clip-workaround writes one that gets round it, --mmproj {kinds} the plain one"
        )
        return ()
    return profile.mmproj


def _extra(
    sizes: _Sizes,
    name: str,
    asked: tuple[str, ...],
    options: ExportOptions,
    tell: Progress,
    count: Callable[[str], int],
) -> tuple[str, ...]:
    """Types of files beside the builds, each with its need. A page opens no mmproj: any fits its profile."""
    profile, typed = sizes.profile, _typed(options, name)
    needs = {kind: count(kind) for kind in asked}
    if name == "mmproj" and profile.device == "web":
        for kind in asked:
            tell(f"mmproj {kind}, which the page doesn't open: {size_words(needs[kind])} in llama-server")
        return asked
    fitting = tuple(kind for kind in asked if needs[kind] <= profile.budget_bytes)
    for kind in asked:
        line = f"{name} {kind}: needs {_of(needs[kind], profile)}"
        if kind not in fitting and (typed is not None or (name == "web" and profile.device == "web" and not fitting)):
            raise ExportError(line, "take a smaller variant, or another type")
        tell(line + ("" if kind in fitting else ": left out"))
    return fitting


def _smallest(llms: Sequence[str]) -> str:
    return max(llms, key=list(LLM_TYPES).index)


def _typed(options: ExportOptions, name: str) -> tuple[str, ...] | None:
    """What the user typed; None where that is nothing."""
    value: tuple[str, ...] = getattr(options, name)
    return None if not value else () if value == NONE else value


def _of(need: int, profile: DeviceProfile) -> str:
    return f"{size_words(need)} of {size_words(profile.budget_bytes)} that {profile.name} gives"


def _hint(sizes: _Sizes, mmproj: Sequence[str], typed: bool) -> str:
    """The best build that fits, of types that need no matrix, or the smallest one and what else helps.

    Args:
        sizes: the counts.
        mmproj: types that are asked for; the fitting build may leave no room for them.
        typed: whether the user named them, so that they must be taken back.
    """
    budget = sizes.profile.budget_bytes
    visions = ("fp16",) if sizes.profile.device == "cuda" else ("int8", "w4")
    names = [name for name, kind in LLM_TYPES.items() if not kind.needs_imatrix]
    needs = {(name, vision): sizes.build(name, vision) for name in names for vision in visions}
    fitting = [pair for pair, need in needs.items() if need <= budget]
    if fitting:
        text, picture = fitting[0]
        lost = {kind: need for kind in mmproj if (need := sizes.stock(text, kind)) > budget}
        losing = "; ".join(f"mmproj {kind} then needs {size_words(need)}" for kind, need in lost.items())
        rest = ",".join(kind for kind in mmproj if kind not in lost) or "none"
        return (
            f"--llm {text} --vision {picture}{f' --mmproj {rest}' if lost and typed else ''} fits "
            f"({size_words(needs[text, picture])}){f', but {losing}, and is left out' if lost else ''}"
        )
    llm, vision = min(needs, key=lambda pair: needs[pair])
    return (
        f"the smallest, --llm {llm} --vision {vision}, needs {size_words(needs[llm, vision])}: take a smaller variant, "
        "or a profile of your own with a larger budget_bytes or a smaller n_ctx"
    )

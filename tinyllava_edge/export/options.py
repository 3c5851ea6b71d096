"""What an export can be asked for: the flags of `tinyllava-edge export` and `optimum-cli export tinyllava-edge`.

Nothing heavy is imported here: both commands read it to show their help.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .profiles import PRESETS

LISTS = ("llm", "vision", "mmproj", "web", "mobile")  # fields of types, which a profile fills where nothing is typed
DEFAULTS = {"llm": ("f16", "q8_0", "q4_k_m"), "vision": ("fp32", "int8")}  # without a profile; nothing of the others
NONE = ("none",)  # typed for no types at all, whatever a profile asks for
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def names(text: str) -> tuple[str, ...]:
    """Comma list → names, blanks dropped."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def size(text: str) -> int:
    """`2G`, `500M`, `1000000` → bytes; K, M and G are powers of 1,000, as in llama.cpp. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)B?", text.strip().upper())
    if not match:
        raise UsageError(f"{text!r} is no size", "write it as 500M or 2G")
    return int(match[1]) * _UNITS[match[2]]


def tensor_types(text: str) -> tuple[tuple[str, str], ...]:
    """`PATTERN=TYPE,…` → pairs, in order. Raises UsageError."""
    pairs = [item.rpartition("=") for item in names(text)]
    for item, (pattern, mark, kind) in zip(names(text), pairs, strict=True):
        if not pattern or not mark or not kind:
            raise UsageError(f"{item!r} is no PATTERN=TYPE", "write e.g. ffn_down=q6_k")
    return tuple((pattern, kind) for pattern, _, kind in pairs)


def _option(default: Any, metavar: str, read: Callable[[str], Any] | None, text: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "read": read, "help": text})


@dataclass(frozen=True)
class ExportOptions:
    """Everything about an export but its two directories. A field `a_b` is the flag `--a-b`.

    Lists that are empty were not typed: `resolved` fills them with DEFAULTS, a profile with its own.
    """

    profile: str | None = _option(
        None,
        "NAME|FILE.toml",
        str,
        f"Take what fits a device: {', '.join(PRESETS)}, or your own file. It chooses types, context and threads, and "
        "refuses what needs more memory than the device gives; types that are typed win, `none` leaves files out.",
    )
    """key of profiles.PRESETS, or a TOML file"""
    llm: tuple[str, ...] = _option((), "TYPES", names, "Language-model types, comma list: f32, f16, q8_0, q4_k_m …")
    """keys of quantize.LLM_TYPES"""
    vision: tuple[str, ...] = _option(
        (), "TYPES", names, "Vision precisions, comma list: fp32, fp16, int8, w8, w4, qdq."
    )
    """keys of vision.VISION_PRECISIONS"""
    mmproj: tuple[str, ...] = _option(
        (), "TYPES", names, "Vision part as GGUF for llama-server, Ollama and phone apps: f32, f16, bf16, q8_0."
    )
    """types of the mmproj files; none by default"""
    web: tuple[str, ...] = _option(
        (), "TYPES", names, "ONNX decoder in the layout of transformers.js, comma list: fp32, fp16, q8, q4, q4f16."
    )
    """keys of web.WEB_PRECISIONS; none by default"""
    mobile: tuple[str, ...] = _option(
        (), "FORMS", names, "Vision graph for native hosts, comma list: ort, coreml, executorch, litert."
    )
    """keys of mobile.forms.MOBILE_FORMS; none by default"""
    static: bool = _option(False, "", None, "Fix the vision graphs' batch to 1: the form that CoreML and NPUs ask for.")
    """vision graphs of fixed shapes"""
    max_shard_size: int | None = _option(None, "SIZE", size, "Split GGUFs into files of at most this size, e.g. 2G.")
    """bytes; None writes one file"""
    imatrix: Path | None = _option(
        None, "FILE", Path, "Importance matrix for the quantised types, from `tinyllava-edge imatrix`."
    )
    """file in llama.cpp's GGUF form"""
    tensor_types: tuple[tuple[str, str], ...] = _option(
        (), "LIST", tensor_types, "Types of single tensors, comma list of PATTERN=TYPE, e.g. ffn_down=q6_k."
    )
    """pairs of a regular expression over tensor names and a type"""
    clip_workaround: bool = _option(
        False, "", None, "Write CLIP's mmproj in the form that gets round a defect of llama.cpp's own programs."
    )
    """see mmproj.export_mmproj"""
    force: bool = _option(False, "", None, "Replace what stands at the output path.")
    """replace the output"""
    verify: bool = _option(True, "", None, "Verify every build against the checkpoint afterwards.")
    """stamp the builds that equal their checkpoint"""


FIELDS = {item.name: item for item in dataclasses.fields(ExportOptions)}


def flag(name: str) -> str:
    """Flag of a field."""
    return f"--{name.replace('_', '-')}"


def help_text(name: str) -> str:
    """Help of a field's flag."""
    return str(FIELDS[name].metadata["help"])


def shown_default(name: str) -> str:
    """Default of a field as one would type it; empty where there is none."""
    value = DEFAULTS.get(name, FIELDS[name].default)
    return ",".join(value) if isinstance(value, tuple) else "" if value is None or value is False else str(value)


def read_options(values: Mapping[str, Any]) -> ExportOptions:
    """Field name → text as typed, or a value → options; None and missing ones keep their default. Raises UsageError."""
    unknown = set(values) - set(FIELDS)
    if unknown:
        raise UsageError(f"unknown export option {min(unknown)!r}", f"known: {', '.join(FIELDS)}")
    read = {name: FIELDS[name].metadata["read"] for name in values}
    given = {name: read[name](v) if isinstance(v, str) else v for name, v in values.items() if v is not None}
    for name in DEFAULTS:
        if given.get(name) in ((), NONE):
            raise UsageError(f"{flag(name)} names no type", f"leave it out, or name some: {shown_default(name)}")
    return ExportOptions(**given)


def resolved(options: ExportOptions) -> ExportOptions:
    """The options with defaults where nothing was typed, for an export without a profile."""
    changes: dict[str, Any] = {}
    for name in LISTS:
        value = getattr(options, name)
        changes[name] = () if value == NONE else value or DEFAULTS.get(name, ())
    return dataclasses.replace(options, **changes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every field's flag on an argparse parser; `read_options` reads what it parsed."""
    for name, item in FIELDS.items():
        if item.metadata["read"] is None:
            action = argparse.BooleanOptionalAction if item.default else "store_true"
            parser.add_argument(flag(name), action=action, default=item.default, help=help_text(name))
            continue
        default = shown_default(name)
        text = help_text(name) + (f" Default: {default}." if default else "")
        parser.add_argument(flag(name), metavar=item.metadata["metavar"], help=text)

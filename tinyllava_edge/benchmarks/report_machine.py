"""What was measured on: machines, their ceilings, their state before and after, and where energy came from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyllava_edge.benchmarks import conditions as state
from tinyllava_edge.benchmarks import report_formats as formats
from tinyllava_edge.benchmarks.ceilings import UNITS
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary_types import BuildSummary

RUNTIME_FACTS = {
    "n_threads": "threads",
    "n_ctx": "context",
    "kv_cache": "key-value cache",
    "providers": "providers",
    "precision": "precision",
    "torch": "torch",
    "transformers": "transformers",
}
ENGINES = (
    ("ggml_commit", "llama.cpp", "commit"),
    ("ggml_version", "llama.cpp", "ggml"),
    ("llama_cpp_system_info", "llama.cpp", ""),
    ("onnxruntime_build", "ONNX Runtime", ""),
)  # key of the runtime's facts, the engine that it tells of, what it tells
CEILINGS = {
    "copy_gb_per_s": "memory copied",
    "read_gb_per_s": "memory read",
    "gemm_f32_gflop_per_s": "float32 matrix product",
    "gemm_int8_gop_per_s": "int8 matrix product",
}


def machines(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The machines that were measured on, each once, with its ceilings and what every runtime said of itself.

    Where lines of one machine and runtime differ, say in the number of threads, each of the values is there.
    """
    found: dict[str, dict[str, Any]] = {}
    said: dict[tuple[str, str, str], list[str]] = {}
    for sample in samples:
        if sample.kind != "environment":
            continue
        detail = dict(sample.detail)
        names = ("cpu", "memory_bytes", "limits", "system", "libraries", "git_commit")
        key = json.dumps([sample.target, *(detail.get(name) for name in names)])
        machine = found.setdefault(
            key, {**detail, "runtimes": {}, "ceilings": _ceilings(samples, sample.target), "target": sample.target}
        )
        machine["bounds"] = bounds(detail.get("limits"))
        old = detail.get("ceilings")
        if isinstance(old, dict) and not machine["ceilings"]:
            machine["ceilings"] = [_ceiling(name, value, "", "") for name, value in old.items()]
        runtime = detail.get("runtime")
        runtime = runtime if isinstance(runtime, dict) else {}
        title = f"{runtime.get('runtime', 'runtime')} runtime"
        for name, text in [*_facts(runtime, title), *engines(runtime)]:
            values = said.setdefault((key, *name), [])
            if text not in values:
                values.append(text)
    for (key, title, fact), values in said.items():
        told = found[key]["runtimes"]
        text = f"{fact} {' or '.join(values)}".strip()
        told[title] = f"{told[title]}; {text}" if title in told else text
    return list(found.values())


def bounds(limits: Any) -> str:
    """A container's limits in words: memory in MB, processor time in cores."""
    limits = limits if isinstance(limits, dict) else {}
    memory, quota = limits.get("memory"), str(limits.get("cpu") or "").split()
    parts = []
    if isinstance(memory, str) and memory.isdecimal():
        parts.append(f"memory {formats.mega(int(memory))} MB")
    if len(quota) == 2 and all(word.isdecimal() and int(word) for word in quota):
        parts.append(f"processor {int(quota[0]) / int(quota[1]):g} cores")
    return ", ".join(parts) or "none"


def engines(runtime: Mapping[str, Any]) -> list[tuple[tuple[str, str], str]]:
    """What an environment says of the builds of llama.cpp and ONNX Runtime: (engine, fact) and its text."""
    return [((title, fact), str(runtime[key])) for key, title, fact in ENGINES if runtime.get(key)]


def _facts(runtime: Mapping[str, Any], title: str) -> list[tuple[tuple[str, str], str]]:
    return [((title, name), _flat(runtime[key])) for key, name in RUNTIME_FACTS.items() if key in runtime]


def conditions(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """The machine's state before and after every measurement, and whether it was throttled meanwhile."""
    pairs: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    open_: dict[str, Mapping[str, Any]] = {}
    for sample in samples:
        if sample.kind == "condition" and sample.stage == "before":
            open_[sample.target] = sample.detail
        elif sample.kind == "condition" and sample.stage == "after":
            pairs.append((sample.target, open_.pop(sample.target, {}), sample.detail))
    pairs += [(target, before, {}) for target, before in open_.items()]
    return [
        {
            "target": target,
            "temperature": _span(_highest(before.get("temperature_c")), _highest(after.get("temperature_c")), "°C"),
            "clock": _span(_mean(before.get("cpu_mhz")), _mean(after.get("cpu_mhz")), "MHz"),
            "load": _span(_first(before.get("load_average")), _first(after.get("load_average")), ""),
            "governor": str(after.get("governor") or before.get("governor") or "unknown"),
            "throttled": _throttled(before, after),
        }
        for target, before, after in pairs
    ]


def energy(rows: Sequence[BuildSummary]) -> dict[str, Any]:
    """Energy of an answer per build where it was read, and every reason where it was not."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.energy_notes:
            notes.setdefault(note, []).append(row.label)
    return {"rows": [row for row in rows if row.energy], "notes": notes}


def _ceilings(samples: Iterable[Sample], target: str) -> list[dict[str, Any]]:
    """The latest of each ceiling of a target."""
    found = {}
    for sample in samples:
        if sample.kind == "ceiling" and sample.target == target:
            reason = str(sample.detail.get("reason", "")) if sample.value is None else ""
            found[sample.stage] = _ceiling(sample.stage, sample.value, sample.unit, reason)
    return list(found.values())


def _ceiling(name: str, value: Any, unit: str, reason: str) -> dict[str, Any]:
    return {"name": CEILINGS.get(name, name), "value": value, "unit": unit or UNITS.get(name, ""), "reason": reason}


def _throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool | None:
    try:
        return state.throttled(before, after)
    except (AttributeError, TypeError):  # a line that `bench` did not write
        return None


def _span(before: float | None, after: float | None, unit: str) -> str:
    if before is None and after is None:
        return "–"
    digits = 0 if unit else 2
    first, last = ("?" if value is None else f"{value:,.{digits}f}" for value in (before, after))
    return f"{first} → {last} {unit}".rstrip()


def _numbers(values: Any) -> list[float]:
    found = list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else []
    return [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def _highest(values: Any) -> float | None:
    return max(_numbers(values), default=None)


def _mean(values: Any) -> float | None:
    found = _numbers(values)
    return sum(found) / len(found) if found else None


def _first(values: Any) -> float | None:
    return next(iter(_numbers(values)), None)


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

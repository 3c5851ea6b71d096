"""The machine's state around a measurement: temperatures, clocks, governor, throttling, load.

Everything is read from sysfs and procfs (and NVIDIA's driver, where there is one); what can't be read is null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks import nvml

_CORES = "sys/devices/system/cpu"
_MHZ = re.compile(r"^cpu MHz\s*:\s*([0-9.]+)", re.MULTILINE)


def read(root: Path = Path("/"), *, gpu: bool = True) -> dict[str, Any]:
    """The state now.

    Args:
        root: sysfs and procfs are looked for below it.
        gpu: ask NVIDIA's driver, too; not where nothing runs on a GPU.

    Returns:
        JSON values, each null where it can't be read: `temperature_c` (zone → °C), `cpu_mhz` (core → MHz),
        `governor` (one name, or several joined by a comma), `throttle_counts` (`core`, `package` → events since boot,
        over all cores), `load_average` (1, 5, 15 minutes), `gpu` (per GPU: name, °C, MHz, what slows it down).
    """
    return {
        "temperature_c": temperatures(root) or None,
        "cpu_mhz": frequencies(root) or None,
        "governor": governor(root),
        "throttle_counts": throttle_counts(root) or None,
        "load_average": load_average(root),
        "gpu": nvml.states() or None if gpu and root == Path("/") else None,
    }


def throttled(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool | None:
    """Whether the processor or a GPU was slowed down for heat or power meanwhile; None where nothing tells.

    Processors count such events. A GPU only tells what slows it at this moment, and before and after it is idle: that
    it was slowed then is worth saying, but that it wasn't says nothing.
    """
    gpus = [*(before.get("gpu") or []), *(after.get("gpu") or [])]
    if any(gpu.get("slowed_by") for gpu in gpus):
        return True
    first, last = before.get("throttle_counts"), after.get("throttle_counts")
    if not isinstance(first, Mapping) or not isinstance(last, Mapping):
        return None
    if any(count > first.get(name, count) for name, count in last.items()):
        return True
    return None if gpus else False


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Thermal zone → °C; a second zone of the same type gets its number."""
    found: dict[str, float] = {}
    for zone in _numbered(root / "sys/class/thermal", "thermal_zone"):
        value = number(zone / "temp")
        if value is not None and -100_000 < value < 1_000_000:
            name = text(zone / "type") or zone.name
            found[name if name not in found else f"{name} ({zone.name})"] = value / 1000
    return found


def frequencies(root: Path = Path("/")) -> dict[str, float]:
    """Core → MHz: cpufreq's, else what /proc/cpuinfo says (x86, also in virtual machines)."""
    found = {}
    for core in _numbered(root / _CORES, "cpu"):
        value = number(core / "cpufreq/scaling_cur_freq")
        if value is not None:
            found[core.name] = value / 1000
    if found:
        return found
    info = text(root / "proc/cpuinfo") or ""
    return {f"cpu{n}": float(mhz) for n, mhz in enumerate(_MHZ.findall(info)) if mhz.count(".") < 2 and mhz != "."}


def governor(root: Path = Path("/")) -> str | None:
    """The cores' cpufreq governor."""
    cores = _numbered(root / _CORES, "cpu")
    names = {text(core / "cpufreq/scaling_governor") for core in cores} - {None, ""}
    return ", ".join(sorted(name for name in names if name)) or None


def throttle_counts(root: Path = Path("/")) -> dict[str, int]:
    """Thermal throttling events since boot, added up over cores (Intel); a package's stand on each of its cores."""
    found: dict[str, int] = {}
    for core in _numbered(root / _CORES, "cpu"):
        for kind in ("core", "package"):
            value = number(core / f"thermal_throttle/{kind}_throttle_count")
            if value is not None:
                found[kind] = found.get(kind, 0) + int(value)
    return found


def load_average(root: Path = Path("/")) -> list[float] | None:
    """Runnable processes, averaged over 1, 5 and 15 minutes."""
    words = (text(root / "proc/loadavg") or "").split()[:3]
    try:
        values = [float(word) for word in words]
    except ValueError:
        return None
    return values if len(values) == 3 and all(map(math.isfinite, values)) else None


def text(path: Path) -> str | None:
    """A file's words without the line break; None where it can't be read. Some sysfs files fail at reading only."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except (OSError, ValueError):
        return None


def number(path: Path) -> int | None:
    """A file's whole number; None where it can't be read or is none."""
    word = text(path)
    try:
        return int(word) if word is not None and len(word) <= 30 else None
    except ValueError:
        return None


def _numbered(directory: Path, prefix: str) -> list[Path]:
    """`directory/prefix<number>` in the numbers' order."""
    try:
        names = [path for path in directory.iterdir() if re.fullmatch(rf"{prefix}\d+", path.name, re.ASCII)]
    except OSError:
        return []
    return sorted(names, key=lambda path: int(path.name[len(prefix) :]))

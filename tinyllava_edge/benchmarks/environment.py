"""What a number depends on besides the model: processor, memory, container limits, system, libraries, git commit.

Which providers ran, threads, llama.cpp's build and its words on the processor come from the runtime itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.conditions import governor, number, text
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.work import bundle_work
from tinyllava_edge.bundle import Bundle
from tinyllava_edge.errors import BundleError
from tinyllava_edge.runtimes.base import Runtime
from tinyllava_edge.runtimes.tensor_table import tensor_table

FLAGS = (
    *(
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
    ),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme"),  # asimddp: dot products
)
LIBRARIES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "torch", "transformers")
_UNLIMITED = 1 << 62  # cgroup v1 writes the largest multiple of a page below 2^63 for "no limit"
VOLATILE = ("time", "load_average", "ceilings")  # not part of the environment's identity


def capture(runtime: Runtime | None = None) -> dict[str, Any]:
    """Everything about this machine that is worth keeping beside a number; JSON values, null where unknown."""
    return {
        "cpu": cpu(),
        "board": board(),
        "memory_bytes": _memory_bytes(),
        "limits": cgroup_limits(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": library_versions(),
        "git_commit": git_commit(),
        "runtime": runtime.environment() if runtime else {},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def environment_sample(environment: Mapping[str, Any], target: str = "cpu") -> Sample:
    """The `environment` line; its id is a hash of everything that does not change from minute to minute."""
    stable = {key: value for key, value in environment.items() if key not in VOLATILE}
    stable["runtime"] = {key: value for key, value in environment.get("runtime", {}).items() if key != "verified"}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()[:12]
    detail = json.loads(json.dumps(environment, default=str))
    return Sample("environment", environment_id=digest, target=target, detail=detail)


def bundle_sample(bundle: Bundle, environment_id: str) -> Sample:
    """The `bundle` line: hashes, sizes and the type of every tensor of every file, and each build's work (work.py)."""
    files = [
        {
            "path": file.path,
            "role": file.role,
            "precision": file.precision,
            "sha256": file.sha256,
            "bytes": file.bytes,
            "tensor_types": dict(file.tensor_types),
            "tensors": _tensors(bundle.path(file)) if file.role in ("vision", "llm") else {},
        }
        for file in bundle.files
    ]
    detail = {
        "name": bundle.name,
        "sha256": bundle.sha256,
        "source": dict(bundle.source),
        "tool_versions": dict(bundle.tool_versions),
        "visual_tokens": bundle.spec.visual_tokens,
        "files": files,
        "verified": bundle.verified_builds(),
        "work": _work(bundle),
    }
    return Sample("bundle", environment_id=environment_id, detail=detail)


def cpu(root: Path = Path("/")) -> dict[str, Any]:
    """Model name, instruction sets that matter here, cores of the machine and cores this process may use.

    Args:
        root: procfs and sysfs are looked for below it.
    """
    info = text(root / "proc/cpuinfo") or ""
    fields = dict(_pair(line) for line in reversed(info.splitlines()) if ":" in line)  # first processor wins
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    named = fields.get("model name") or ", ".join(filter(None, (fields.get("Hardware"), _arm_cores(info))))
    return {
        "model": named or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "affinity": affinity,
        "governor": governor(root),
    }


def board(root: Path = Path("/")) -> str | None:
    """A board's or a computer's name: device tree (Raspberry Pi, Jetson, phones), else DMI; null where unknown."""
    named = text(root / "proc/device-tree/model") or text(root / "sys/firmware/devicetree/base/model")
    if named:
        return named
    words = [text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    return " ".join(word for word in words if word) or None


def _arm_cores(info: str) -> str:
    """Arm's `cpuinfo` has numbers for names: `ARM implementer 0x41 part 0xd0b + 0xd05`; empty elsewhere."""
    parts = list(dict.fromkeys(_values(info, "CPU part")))
    implementer = next(iter(_values(info, "CPU implementer")), "")
    return f"ARM implementer {implementer} part {' + '.join(parts)}" if implementer and parts else ""


def _values(info: str, name: str) -> list[str]:
    return [value for key, value in map(_pair, info.splitlines()) if key == name]


def cgroup_limits(root: Path = Path("/")) -> dict[str, str | None]:
    """A container's limits, of control groups v1 and v2: the tightest from this process's own group up.

    Returns:
        `cpu`: quota and period in µs, as in cpu.max; `memory`: bytes; null where there is none.
    """
    quotas, sizes = list[tuple[int, int]](), list[int]()
    for directory in _groups(root, "cpu"):
        words = (text(directory / "cpu.max") or "").split()
        if not words:
            words = [text(directory / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(words) == 2 and all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
            quotas.append((int(words[0]), int(words[1])))
    for directory in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            size = number(directory / name)
            if size is not None and 0 < size < _UNLIMITED:
                sizes.append(size)
    tightest = min(quotas, key=lambda quota: quota[0] / quota[1], default=None)
    return {
        "cpu": f"{tightest[0]} {tightest[1]}" if tightest else None,
        "memory": str(min(sizes)) if sizes else None,
    }


def _groups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's control groups that may hold a controller's limits, innermost first.

    A container sees its own group at the mount's root, whatever /proc/self/cgroup says.
    """
    found = list[Path]()
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy != "0" and controller not in controllers.split(","):
            continue
        parts = [part for part in group.split("/") if part]
        if ".." in parts:
            parts = []
        bases = ("", "unified") if hierarchy == "0" else (controllers, controller)
        for base in dict.fromkeys(bases):
            mount = root / "sys/fs/cgroup" / base
            found += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return found or [root / "sys/fs/cgroup"]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that are installed, of those that matter here."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Commit of the source tree this package runs from; null when installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _tensors(path: Path) -> dict[str, list[str]]:
    """Type → names of the weights kept in it; nothing where a file is missing or damaged."""
    kept: dict[str, list[str]] = {}
    try:
        for name, kind in tensor_table(path).items():
            kept.setdefault(kind, []).append(name)
    except BundleError:
        return {}
    return kept


def _work(bundle: Bundle) -> dict[str, Any]:
    """Each build's work; nothing where a file is missing or damaged, which opening it says better."""
    try:
        return {name: work.to_dict() for name, work in bundle_work(bundle).items()}
    except BundleError:
        return {}


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()

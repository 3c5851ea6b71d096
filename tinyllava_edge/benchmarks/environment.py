"""What a number depends on besides the model: processor, memory, container limits, libraries, threads, ceilings."""

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

import numpy as np

from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.bundle import Bundle
from tinyllava_edge.runtimes.base import Runtime

FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
    "bf16",
)
LIBRARIES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "torch", "transformers")
VOLATILE = ("time", "load_average", "ceilings")  # not part of the environment's identity


def capture(runtime: Runtime | None = None) -> dict[str, Any]:
    """Everything about this machine that is worth keeping beside a number; JSON values, null where unknown."""
    return {
        "cpu": cpu(),
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


def environment_sample(environment: Mapping[str, Any]) -> Sample:
    """The `environment` line; its id is a hash of everything that does not change from minute to minute."""
    stable = {key: value for key, value in environment.items() if key not in VOLATILE}
    stable["runtime"] = {key: value for key, value in environment.get("runtime", {}).items() if key != "verified"}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return Sample("environment", environment_id=digest, detail=json.loads(json.dumps(environment, default=str)))


def bundle_sample(bundle: Bundle, environment_id: str) -> Sample:
    """The `bundle` line: hashes, sizes and tensor types of every file."""
    files = [
        {
            "path": file.path,
            "role": file.role,
            "precision": file.precision,
            "sha256": file.sha256,
            "bytes": file.bytes,
            "tensor_types": dict(file.tensor_types),
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
    }
    return Sample("bundle", environment_id=environment_id, detail=detail)


def cpu() -> dict[str, Any]:
    """Model name, instruction sets that matter here, cores of the machine and cores this process may use."""
    info = _read("/proc/cpuinfo")
    fields = dict(_pair(line) for line in reversed(info.splitlines()) if ":" in line)  # first processor wins
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "model": fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "affinity": affinity,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
    }


def cgroup_limits() -> dict[str, str | None]:
    """A container's limits (cgroup v2): processor quota and memory; null where there is none."""
    names = {"cpu.max": "cpu", "memory.max": "memory"}
    found = {key: _read(f"/sys/fs/cgroup/{name}").strip() or None for name, key in names.items()}
    return {key: None if value is None or value.startswith("max") else value for key, value in found.items()}


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


def ceilings(repetitions: int = 5) -> dict[str, float]:
    """What this machine can do at best, by numpy: copy bandwidth in GB/s and float32 matrix product in GFLOP/s.

    Decoding a token reads every weight once, so bandwidth / LLM bytes bounds tokens per second.
    """
    source, target = np.ones(32 << 20, dtype=np.uint8), np.zeros(32 << 20, dtype=np.uint8)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(repetitions))
    side = 768
    a, b = np.ones((side, side), dtype=np.float32), np.ones((side, side), dtype=np.float32)
    product = min(_seconds(lambda: a @ b) for _ in range(repetitions))
    return {
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9, 2),  # read + write
        "gemm_f32_gflop_per_s": round(2 * side**3 / product / 1e9, 1),
    }


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

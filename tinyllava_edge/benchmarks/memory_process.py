"""Memory and loading of one build, each in a process of its own that does nothing else; the parent sleeps meanwhile.

    python -m tinyllava_edge.benchmarks.memory_process '{"bundle": …, "build": …, "image": …, "question": …}'

First process: open (files are in the page cache: their hashes have just been compared), answer once, read the kernel's
counts. Second process: the same with the build's files put out of the page cache before they are opened. Then more of
both in turns, so that loading has a median: LOADS of each, or as many as begin within LOADING_S.

| stage | what |
|---|---|
| `peak_rss` | largest resident set (VmHWM), living children's added; detail: the peak when loaded |
| `after_load` | resident set once opened |
| `anon`, `file` | the resident set after the answer: what no file stands behind, and pages of mapped files |
| `gpu` | GPU memory after the answer; only where the build runs on one |
| `load_warm_ms`, `load_cold_ms` | opening both engines' files, hashing and imports left out |

The kernel keeps the peak as one number, so its split is the one after the answer. GGUF files are mapped: their pages
count as resident, but the system may drop them and read them again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks import nvml
from tinyllava_edge.benchmarks.bench_grid import MAX_TOKENS
from tinyllava_edge.benchmarks.page_cache import cached_share, drop_cached
from tinyllava_edge.benchmarks.peak_rss import descendants, status
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.bundle import Build, Bundle, WebBuild, read_bundle
from tinyllava_edge.errors import EngineError

LOADS = 5  # cold and warm loads of a build
LOADING_S = 10.0  # seconds after which no further pair of loads begins
TIMEOUT_S = 600  # of each process
STILL_CACHED = 0.01  # a load isn't cold while more of the files is in memory
_TRIES, _PAUSE_S = 5, 0.05  # of emptying the page cache, while another process may still be reading
_MEMORY = ("peak_rss", "after_load", "anon", "file", "gpu")
_LOADING = ("first_ttft_ms", "cached_percent", "reason")
_USAGE = "usage: python -m tinyllava_edge.benchmarks.memory_process JSON"


def measure(
    bundle: Path,
    build: str,
    picture: Path,
    question: str,
    environment_id: str = "",
    n_threads: int | None = None,
    *,
    device: str = "cpu",
    target: str | None = None,
    max_tokens: int = MAX_TOKENS,
    loads: int = LOADS,
) -> list[Sample]:
    """Measure one build's memory, and its loading from the disk and from the page cache.

    Args:
        bundle: directory.
        build: name.
        picture: picture file of the answer.
        question: what is asked.
        environment_id: the environment line that the samples belong to.
        n_threads: threads; all cores by default.
        device: `cpu`, `cuda` or `auto`.
        target: the samples' target; the device by default.
        max_tokens: longest answer.
        loads: how often each kind of loading is measured, once at least; slow models are loaded less often.

    Returns:
        Memory samples in bytes, and latency samples `load_warm_ms` and `load_cold_ms`; the latter's value is null, with
        a reason, where the files can't be put out of the page cache.

    Raises:
        EngineError: a process failed, ran longer than ten minutes, or printed something else.
    """
    asked = {"bundle": str(bundle), "build": build, "image": str(picture), "question": question}
    given = {**asked, "n_threads": n_threads, "device": device, "max_tokens": max_tokens}
    begun = time.monotonic()
    short = {**given, "max_tokens": 1}
    warm, cold = [_child(given, build)], [_child({**short, "cold": True}, build)]
    while len(warm) < loads and time.monotonic() - begun < LOADING_S:
        warm.append(_child(short, build))
        cold.append(_child({**short, "cold": True}, build))
    place = Sample("memory", "edge", build, environment_id=environment_id, target=target or device)
    samples = [
        replace(place, stage=stage, value=size, unit="bytes", detail=warm[0]["detail"].get(stage, {}))
        for stage in _MEMORY
        if (size := warm[0]["memory"].get(stage)) is not None
    ]
    for stage, processes in (("load_warm_ms", warm), ("load_cold_ms", cold)):
        line = replace(place, kind="latency", stage=stage, unit="ms")
        for number, found in enumerate(processes):
            detail = {str(key): found[key] for key in _LOADING if key in found}
            samples.append(replace(line, value=found["load_ms"], sample=number, detail=detail))
    return samples


def _child(given: Mapping[str, Any], build: str) -> dict[str, Any]:
    """What a process of its own printed. The parent waits in one system call."""
    command = [sys.executable, "-m", "tinyllava_edge.benchmarks.memory_process", json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{build}: no answer within {TIMEOUT_S} s", "time it once with `run`; it may not fit in memory"
        ) from error
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode == 0 and isinstance(found, dict) and {"memory", "detail", "load_ms"} <= set(found):
            return found
    except (ValueError, IndexError):
        pass
    told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no output"])[-1]
    raise EngineError(f"{build}: the memory measurement failed: {told}", "run the build once with `run`")


@dataclass(frozen=True)
class _Cold(Bundle):
    """A bundle whose files leave the page cache once their hashes have been compared."""

    found: dict[str, Any] = field(default_factory=dict)
    """`cached_percent` at that moment, and the `reason` why loading isn't cold"""

    def check(self, build: Build | WebBuild | None = None) -> None:
        """Compare the hashes, which reads the files, then drop what was read."""
        super().check(build)
        files = [path for file in (build or self.build()).files for path in self.paths(file)]
        for _ in range(_TRIES):
            if not all([drop_cached(path) for path in files]):
                self.found["reason"] = "this system has no posix_fadvise, so the page cache can't be emptied"
                return
            shares = [(cached_share(path), path.stat().st_size) for path in files]
            left = sum((share or 0.0) * size for share, size in shares) / max(1, sum(size for _, size in shares))
            if left <= STILL_CACHED:
                break
            time.sleep(_PAUSE_S)
        if all(share is not None for share, _ in shares):
            self.found["cached_percent"] = round(100 * left, 2)
        if left > STILL_CACHED:
            self.found["reason"] = "the system keeps the files: another process has them open, or they lie in memory"


def child(given: Mapping[str, Any]) -> dict[str, Any]:
    """Open a build, answer once, and report: what the process prints.

    Args:
        given: bundle, build, image, question, n_threads, device, max_tokens; `cold`.
    """
    from tinyllava_edge.runtimes.devices import choose_device
    from tinyllava_edge.runtimes.edge import open_edge
    from tinyllava_edge.runtimes.llama import native_api
    from tinyllava_edge.runtimes.providers import onnxruntime_api

    bundle = read_bundle(given["bundle"])
    chosen = bundle.build(given["build"])
    plan = choose_device(given["device"])
    onnxruntime_api(), native_api()  # imported here, so that loading is the files' alone
    found: dict[str, Any] = {}
    if given.get("cold"):
        bundle = _Cold(**{item.name: getattr(bundle, item.name) for item in fields(Bundle)}, found=found)
    with ExitStack() as stack:
        library = stack.enter_context(nvml.session()) if given["device"] != "cpu" else None
        gpu_before = _used(library)
        runtime = open_edge(bundle, chosen.name, n_threads=given["n_threads"], plan=plan, allow_unverified=True)
        stack.callback(runtime.close)
        loaded = status()
        answer = runtime.answer(given["image"], given["question"], max_tokens=given["max_tokens"])
        memory, detail = _counts(loaded)
        if library:
            memory["gpu"], detail["gpu"] = _gpu(library, gpu_before)
    load_ms = None if "reason" in found else answer.timings.load_ms
    return {**found, "memory": memory, "detail": detail, "load_ms": load_ms, "first_ttft_ms": answer.timings.ttft_ms}


def _counts(loaded: Mapping[str, int]) -> tuple[dict[str, int | None], dict[str, Any]]:
    """Bytes by stage, living children's added, and what belongs beside them."""
    done, children = status(), descendants(os.getpid())
    living = [found for found in map(status, children) if found]
    peak = done["VmHWM"] + sum(found.get("VmHWM", 0) for found in living)
    memory: dict[str, int | None] = {"peak_rss": peak, "after_load": loaded.get("VmRSS", loaded["VmHWM"])}
    detail: dict[str, Any] = {"peak_rss": {"at_load": loaded["VmHWM"], "children": len(living)}}
    if "RssAnon" in done:
        everyone = [done, *living]
        memory["anon"] = sum(found.get("RssAnon", 0) + found.get("RssShmem", 0) for found in everyone)
        memory["file"] = sum(found.get("RssFile", 0) for found in everyone)
    ended = _ended_children()
    if ended:
        detail["peak_rss"]["largest_ended_child"] = ended
        memory["peak_rss"] = max(peak, ended)
    return memory, detail


def _ended_children() -> int:
    """Largest resident set of a child that has ended, in bytes; Linux counts what it shared before its exec, too."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _used(library: nvml.Nvml | None) -> int | None:
    if library is None:
        return None
    found = [library.used_bytes(index) for index in range(len(library))]
    return None if None in found else sum(size for size in found if size is not None)


def _gpu(library: nvml.Nvml, before: int | None) -> tuple[int | None, dict[str, str]]:
    """This process's GPU memory; where the driver doesn't know its number, what all use more than before."""
    own = library.process_bytes(os.getpid())
    if own is not None:
        return own, {"source": "nvml: this process"}
    after = _used(library)
    if before is None or after is None:
        return None, {}
    return max(0, after - before), {"source": "nvml: all processes, less what they held before"}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(_USAGE)
    print(json.dumps(child(json.loads(sys.argv[1]))))

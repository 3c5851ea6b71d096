"""What a build is expected to take in memory against what it took: all builds of bundles, each in a process of its own.

    python benchmarks/memory_estimate.py BUNDLE... --out benchmarks/results/memory_estimate.jsonl \\
        --write benchmarks/MEMORY.md

Each process opens one build through `open_edge`, hashes and all, and answers one question about one picture. The peak
is the kernel's (VmHWM): pages of mapped files count. The estimate is made in the same process, before anything is
opened. Samples are added to --out as JSON lines; --write makes the table from all samples in that file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.files import write_text

N_CTX = 2048
SIDE = 1000  # pixels of the picture's side
TOLERANCE = 0.15
MIB = 2**20
PARTS = {
    "Python": ("base",),
    "GGUF": ("weights_llm",),
    "repacked": ("repacked",),
    "KV": ("kv_cache",),
    "compute": ("compute",),
    "tower": ("vision_weights",),
    "its run": ("vision_arena", "picture"),
}
INTRODUCTION = """\
# Memory: estimated and measured

`python benchmarks/memory_estimate.py BUNDLE... --out benchmarks/results/memory_estimate.jsonl --write
benchmarks/MEMORY.md`: full-size architectures with random weights, n_ctx {n_ctx}, one question about one picture of
{side} x {side} pixels, on the CPU. Each line is a process of its own. "Expected" is `MemoryEstimate.total`, made from
the files' headers before anything is opened; "measured" is the largest resident set that the kernel saw, pages of
mapped files included (VmHWM), the median of a build's samples. "Required" is what a limit is compared with: the peak
without pages that are read once and never again. "Without a file" is RssAnon after the answer. All in MiB.
"""


def measure(bundle: Path, build: str, lazy: bool, threads: int) -> dict[str, Any]:
    """Open one build in this process, answer, and read the kernel's figures."""
    import numpy as np

    from tinyllava_edge.runtimes.edge import open_edge
    from tinyllava_edge.runtimes.memory import MemorySettings, estimate

    opened = read_bundle(bundle)
    settings = MemorySettings(N_CTX, n_threads=threads, picture_pixels=SIDE * SIDE, lazy=lazy)
    start = time.perf_counter()
    expected = estimate(opened, opened.build(build), settings)
    seconds = time.perf_counter() - start
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with open_edge(opened, build, n_ctx=N_CTX, n_threads=threads, allow_unverified=True, lazy=lazy) as runtime:
        loaded = status()
        runtime.answer(jpeg(image), "What is in this picture?", max_tokens=4)
        answered = status()  # before closing gives memory back
        environment = runtime.environment()
    return {
        "bundle": opened.name,
        "build": build,
        "lazy": lazy,
        "n_ctx": N_CTX,
        "n_threads": threads,
        "estimate": expected.to_dict(),
        "estimate_ms": round(1000 * seconds),
        "loaded": loaded,
        "answered": answered,
        "llama_cpp_buffers_mib": environment["llama_cpp_buffers_mib"],
        "onnxruntime": environment["onnxruntime"],
        "llama_cpp_python": environment["llama_cpp_python"],
        "machine": machine(),
    }


def jpeg(image: Any) -> bytes:
    """The picture as a file, as it would arrive."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


def status() -> dict[str, int]:
    """The kernel's figures for this process, in bytes."""
    wanted = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in wanted:
            found[wanted[key]] = 1024 * int(value.split()[0])
    return found


def machine() -> str:
    """Processor and kernel in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, Linux {platform.release()}"


def table(samples: Iterable[Mapping[str, Any]]) -> str:
    """Markdown of all samples: per bundle and order of loading, a line for each build."""
    groups: dict[tuple[str, bool], dict[str, list[Mapping[str, Any]]]] = {}
    for sample in samples:
        groups.setdefault((sample["bundle"], sample["lazy"]), {}).setdefault(sample["build"], []).append(sample)
    text = [INTRODUCTION.format(n_ctx=N_CTX, side=SIDE)]
    for (name, lazy), builds in groups.items():
        text += [f"## {name}, tower opened {'with the first picture' if lazy else 'first'}", ""]
        heads = ["build", *PARTS, "expected", "measured", "ratio", "required", "without a file"]
        text += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
        ratios = {build: line(found) for build, found in builds.items()}
        text += [cells for cells, _ in ratios.values()]
        worst = max(ratios, key=lambda build: abs(ratios[build][1] - 1))
        inside = sum(abs(ratio - 1) <= TOLERANCE for _, ratio in ratios.values())
        first = next(iter(builds.values()))[0]
        text += [
            "",
            f"{inside} of {len(ratios)} builds within {TOLERANCE:.0%}; the farthest is {worst}: "
            f"{ratios[worst][1]:.3f} of what was measured. {sum(len(found) for found in builds.values())} samples; "
            f"{first['machine']}; onnxruntime {first['onnxruntime']}, llama-cpp-python {first['llama_cpp_python']}; "
            f"an estimate took {statistics.median(s['estimate_ms'] for f in builds.values() for s in f):.0f} ms.",
            "",
        ]
    return "\n".join(text)


def line(samples: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """One build's cells, and estimate / measured."""
    expected = samples[-1]["estimate"]
    measured = statistics.median(sample["answered"]["peak"] for sample in samples)
    anonymous = statistics.median(sample["answered"]["anonymous"] for sample in samples)
    sizes = [sum(expected[part] for part in parts) for parts in PARTS.values()]
    ratio = expected["total"] / measured
    shown = [f"{size / MIB:,.0f}" for size in (*sizes, expected["total"], measured)]
    shown += [f"{ratio:.3f}", f"{expected['required'] / MIB:,.0f}", f"{anonymous / MIB:,.0f}"]
    return f"| {samples[0]['build']} | {' | '.join(shown)} |", ratio


def run(bundles: Sequence[Path], only: Sequence[str], lazy: bool, threads: int, out: Path) -> None:
    """Measure every build in a fresh process and add its sample to the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for bundle in bundles:
        for build in only or read_bundle(bundle).builds():
            command = [sys.executable, __file__, str(bundle), "--build", build, "--child", "--threads", str(threads)]
            done = subprocess.run([*command, *(["--lazy"] if lazy else [])], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{bundle}: build {build} failed")
            sample = json.loads(done.stdout)
            with out.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(sample) + "\n")
            print(line([sample])[0], file=sys.stderr)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="*", help="bundle directories")
    parser.add_argument("--build", action="append", default=[], help="measure this build only; may be given again")
    parser.add_argument("--lazy", action="store_true", help="open the tower with the first picture, as the engine does")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--write", type=Path, help="write the table of all samples in --out to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.bundles[0], asked.build[0], asked.lazy, asked.threads)))
        return
    if asked.out is None:
        parser.error("--out is missing: raw samples are kept")
    run(asked.bundles, asked.build, asked.lazy, asked.threads, asked.out)
    if asked.write is not None:
        samples = [json.loads(text) for text in asked.out.read_text(encoding="utf-8").splitlines()]
        write_text(asked.write, table(samples))


if __name__ == "__main__":
    main()

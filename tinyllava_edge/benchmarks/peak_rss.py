"""Memory of one build in a process of its own.

    python -m tinyllava_edge.benchmarks.peak_rss BUNDLE BUILD IMAGE QUESTION [THREADS]

Prints one JSON object in bytes. GGUF files are mapped, so the resident set counts weights that the system may drop and
read again; `anon` (taken after the answer) is what it can't drop.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def status() -> dict[str, int]:
    """VmHWM, VmRSS and RssAnon of this process in bytes. Off Linux only VmHWM is known (getrusage)."""
    path = Path("/proc/self/status")
    if not path.is_file():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"VmHWM": peak if sys.platform == "darwin" else peak * 1024}
    # not getrusage: on Linux its maximum survives exec, so a child would start with the parent's
    lines = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:")
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts and parts[0] in wanted}


def measure(bundle: str, build: str, image: str, question: str, n_threads: int | None = None) -> dict[str, int]:
    """Open a build, answer once, and report memory in bytes."""
    from tinyllava_edge.runtimes.edge import open_edge

    runtime = open_edge(Path(bundle), build, n_threads=n_threads, allow_unverified=True)
    try:
        loaded = status()
        runtime.answer(image, question, max_tokens=16)
        done = status()
    finally:
        runtime.close()
    return {
        "peak_rss": done["VmHWM"],
        "after_load": loaded.get("VmRSS", loaded["VmHWM"]),
        "anon": done.get("RssAnon", done["VmHWM"]),
    }


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit("usage: python -m tinyllava_edge.benchmarks.peak_rss BUNDLE BUILD IMAGE QUESTION [THREADS]")
    threads = int(sys.argv[5]) if len(sys.argv) == 6 else None
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], threads)))

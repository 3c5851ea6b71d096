"""Runs on the other machine, inside its environment: the same `bench` as everywhere, results into the run's directory.

python -m tinyllava_edge.benchmarks.targets.remote DIR/runs/ID
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tinyllava_edge.errors import TinyLlavaEdgeError
from tinyllava_edge.files import write_json


def main(run: Path) -> int:
    """Measure what job.json says. An error that a person can mend goes into error.json, others into the log."""
    from tinyllava_edge.benchmarks.latency import bench
    from tinyllava_edge.benchmarks.results import write_results
    from tinyllava_edge.benchmarks.targets.job import decode

    try:
        job = json.loads((run / "job.json").read_text(encoding="utf-8"))
        options = decode(job["options"], run / "inputs")
        samples = bench(Path(job["bundle"]), **options, progress=lambda line: print(line, flush=True))
        write_results(run / "results.jsonl", samples)
    except TinyLlavaEdgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        write_json(run / "error.json", {"kind": type(error).__name__, "message": error.message, "hint": error.hint})
        return error.exit_code
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tinyllava_edge.benchmarks.targets.remote RUN")
    sys.exit(main(Path(sys.argv[1])))

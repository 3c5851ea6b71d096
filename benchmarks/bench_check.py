"""What `bench` may claim: that it hardly costs anything, that equal builds look equal, that 10 % slower is seen.

    python benchmarks/bench_check.py BUNDLE [--build int8+q4_k_m] [--tries 10] [--rounds 80] [--threads 1] [--out FILE]

1. Overhead: the clocks that an answer reads, timed alone, as a share of the answer.
2. Equal builds: the same build opened twice, measured in turns, compared; `tries` times.
3. A slowed build: one of the two computes for 10 % of an answer's time more after its vision graph, in every answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.bench_grid import Task
from tinyllava_edge.benchmarks.latency_compare import compare_samples
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.rounds import Arm, Question, StopRule, measure
from tinyllava_edge.data.scenes import render
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge
from tinyllava_edge.runtimes.stopwatch import Stopwatch

STAGE = "total_ms"
STAGES_PER_ANSWER = 8  # that an answer opens besides one a decoding step
QUESTION = Question("what color is the shape?", max_tokens=16)


def overhead(answer_ms: float, steps: int) -> float:
    """Share of an answer that reading its clocks takes."""
    watch, repetitions = Stopwatch(), 20_000
    start = time.perf_counter()
    for _ in range(repetitions):
        with watch.stage("decode_ms"):
            pass
    each_ms = 1000 * (time.perf_counter() - start) / repetitions
    return each_ms * (STAGES_PER_ANSWER + steps) / answer_ms


def slow_down(runtime: EdgeRuntime, milliseconds: float) -> None:
    """Let it compute for so long after each picture."""
    embed = runtime.vision.embed

    def slowed(*arguments: Any, **options: Any) -> Any:
        found = embed(*arguments, **options)
        end = time.perf_counter() + milliseconds / 1000
        while time.perf_counter() < end:
            pass
        return found

    runtime.vision.embed = slowed  # type: ignore[method-assign]


def lines(samples: list[Sample], name: str) -> list[Sample]:
    """One arm's lines of the compared stage."""
    return [sample for sample in samples if sample.kind == "latency" and (sample.build, sample.stage) == (name, STAGE)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--build", default="int8+q4_k_m")
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "scene.png"
        render(seed=0).image.save(picture)
        task = Task("answer", picture=picture)
        first, second, slowed = (
            open_edge(options.bundle, options.build, n_threads=options.threads, allow_unverified=True) for _ in range(3)
        )
        alone = measure([Arm(first, "A")], [task], QUESTION, StopRule(30))
        times = [sample.value or 0.0 for sample in lines(alone.samples, "A")]
        answer_ms = statistics.median(times)
        steps = max(len(s.detail.get("token_ms", [])) for s in lines(alone.samples, "A"))
        slow_down(slowed, 0.1 * answer_ms)
        found: dict[str, Any] = {"answer_ms": answer_ms, "overhead_share": overhead(answer_ms, steps)}
        print(f"overhead: {found['overhead_share']:.3%} of an answer of {answer_ms:.2f} ms", flush=True)
        for title, other in (("equal", second), ("slowed", slowed)):
            verdicts = []
            for number in range(options.tries):
                arms = [Arm(first, "A"), Arm(other, "B")]
                got = measure(arms, [task], QUESTION, StopRule(options.rounds), run=f"{title}-{number}")
                verdicts.append(compare_samples(lines(got.samples, "A"), lines(got.samples, "B")).to_dict())
                print(f"{title} {number + 1}: {verdicts[-1]['verdict']}, ratio {verdicts[-1]['ratio']:.3f}", flush=True)
            found[title] = verdicts
        equal = sum(verdict["verdict"] == "not distinguishable" for verdict in found["equal"])
        caught = sum(verdict["verdict"].startswith("slower") for verdict in found["slowed"])
        print(f"equal builds not distinguishable in {equal} of {options.tries}; slowed build caught in {caught}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

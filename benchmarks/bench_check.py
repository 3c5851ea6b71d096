"""What `bench` may claim: that it hardly costs anything, that equal builds look equal, that 10 % slower is seen.

    python benchmarks/bench_check.py BUNDLE [--build int8+q4_k_m] [--tries 10] [--threads 1] [--out FILE]

1. Overhead: the clocks that an answer reads, timed alone, as a share of the answer.
2. Equal builds: the same build opened twice, measured together, compared; `tries` times.
3. A slowed build: one of the two computes 10 % more in every answer, after its vision graph. That is processor time,
   which other programs don't change; what they add to it by the clock, they add to the rest alike.
4. The same two questions to separate runs: each try beside the one before it, which costs no further measuring.

Rounds end as those of `bench` without flags do; --rounds, --min-time and --resolution change that.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks import bench_grid
from tinyllava_edge.benchmarks.bench_grid import Task
from tinyllava_edge.benchmarks.conditions import load_average
from tinyllava_edge.benchmarks.latency_compare import SAME, compare_samples
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.rounds import Arm, Question, measure
from tinyllava_edge.benchmarks.stop_rule import StopRule
from tinyllava_edge.data.scenes import render
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge
from tinyllava_edge.runtimes.stopwatch import Stopwatch

STAGE = "total_ms"
QUESTION = Question(bench_grid.QUESTION)


def stages_opened(runtime: EdgeRuntime, picture: Path) -> int:
    """Stages that one answer opens, counted; each reads the clock twice."""
    opened, stage = list[tuple[str, ...]](), Stopwatch.stage

    @contextlib.contextmanager
    def counted(watch: Stopwatch, *names: str) -> Iterator[None]:
        opened.append(names)
        with stage(watch, *names):
            yield

    Stopwatch.stage = counted  # type: ignore[method-assign]
    try:
        runtime.answer(picture, QUESTION.text, max_tokens=QUESTION.max_tokens)
    finally:
        Stopwatch.stage = stage  # type: ignore[method-assign]
    return len(opened)


def overhead(answer_ms: float, clocked: int) -> float:
    """Share of an answer that reading its clocks takes: so many stages, decoding steps and whole times."""
    watch, repetitions, found = Stopwatch(), 500, list[float]()
    for _ in range(50):  # the median of stretches: another program's turn would count thousands of times
        start = time.perf_counter()
        for _ in range(repetitions):
            with watch.stage("decode_ms"):
                pass
        found.append(1000 * (time.perf_counter() - start) / repetitions)
    return statistics.median(found) * clocked / answer_ms


def processor_ms(runtime: EdgeRuntime, picture: Path, answers: int = 20) -> float:
    """Median processor time of an answer."""
    found = []
    for _ in range(answers):
        start = time.process_time()
        runtime.answer(picture, QUESTION.text, max_tokens=QUESTION.max_tokens)
        found.append(1000 * (time.process_time() - start))
    return statistics.median(found)


def slow_down(runtime: EdgeRuntime, milliseconds: float) -> None:
    """Let it compute for so long, in processor time, after each picture."""
    embed = runtime.vision.embed

    def slowed(*arguments: Any, **options: Any) -> Any:
        found = embed(*arguments, **options)
        end = time.process_time() + milliseconds / 1000
        while time.process_time() < end:
            pass
        return found

    runtime.vision.embed = slowed  # type: ignore[method-assign]


def lines(samples: list[Sample], name: str) -> list[Sample]:
    """One arm's lines of the compared stage."""
    return [sample for sample in samples if sample.kind == "latency" and (sample.build, sample.stage) == (name, STAGE)]


def separate_runs(tries: Sequence[Sequence[Sample]], other: str) -> list[dict[str, Any]]:
    """Each try's first arm beside the next try's arm `other`, as two runs that share nothing."""
    return [compare_samples(lines(a, "A"), lines(b, other)).to_dict() for a, b in itertools.pairwise(tries)]


def same(verdicts: Sequence[dict[str, Any]]) -> int:
    """How many say that nothing can be told apart."""
    return sum(verdict["verdict"] == SAME for verdict in verdicts)


def slower(verdicts: Sequence[dict[str, Any]]) -> int:
    """How many call the second one slower."""
    return sum(verdict["verdict"].startswith("slower") for verdict in verdicts)


def check(bundle: Path, build: str, tries: int, threads: int, rule: StopRule) -> dict[str, Any]:
    """All four parts: what goes into the file."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        picture = Path(scratch) / "scene.png"
        render(seed=0).image.save(picture)
        task = Task("answer", picture=picture)
        runtimes = [open_edge(bundle, build, n_threads=threads, allow_unverified=True) for _ in range(3)]
        for runtime in runtimes:
            stack.callback(runtime.close)
        first, second, slowed = runtimes
        before = load_average()
        alone = measure([Arm(first, "A")], [task], QUESTION, StopRule(30))
        answer_ms = statistics.median([sample.value or 0.0 for sample in lines(alone.samples, "A")])
        steps = max(len(s.detail.get("token_ms", [])) for s in lines(alone.samples, "A"))
        stages = stages_opened(first, picture)
        found: dict[str, Any] = {
            "answer_ms": answer_ms,
            "stages": stages,
            "steps": steps,
            "overhead_share": overhead(answer_ms, stages + steps + 2),  # and the first and the last token
        }
        print(f"overhead: {found['overhead_share']:.3%} of an answer of {answer_ms:.2f} ms", flush=True)
        for title, other in (("equal", second), ("slowed", slowed)):
            verdicts, measured = list[dict[str, Any]](), list[list[Sample]]()
            if title == "slowed":
                found["processor_ms"] = processor_ms(slowed, picture)
                slow_down(slowed, 0.1 * found["processor_ms"])
            for number in range(tries):
                arms = [Arm(first, "A"), Arm(other, "B")]
                rounds = measure(arms, [task], QUESTION, rule, run=f"{title}-{number}")
                verdict = compare_samples(lines(rounds.samples, "A"), lines(rounds.samples, "B")).to_dict()
                verdicts.append({**verdict, "rounds": rounds.rounds, "stopped_by": rounds.stopped_by})
                measured.append(rounds.samples)
                print(
                    f"{title} {number + 1}: {verdict['verdict']}, ratio {verdict['ratio']:.3f}, "
                    f"{rounds.rounds} rounds, resolution {verdict['resolution'] or 1:.1%}",
                    flush=True,
                )
            found[title] = verdicts
            found[f"{title}_runs"] = separate_runs(measured, "B")
        return {**found, "load_average": [before, load_average()]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--build", default="int8+q4_k_m")
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=bench_grid.REPETITIONS)
    parser.add_argument("--min-time", type=float, default=bench_grid.MIN_TIME_S)
    parser.add_argument("--resolution", type=float, default=100 * bench_grid.RESOLUTION, help="percent, 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rule = StopRule(options.rounds, options.min_time, bench_grid.MAX_TIME_S, options.resolution / 100)
    found = check(options.bundle, options.build, options.tries, options.threads, rule)
    for title, where in (("", "one run"), ("_runs", "separate runs")):
        equal, slowed = found[f"equal{title}"], found[f"slowed{title}"]
        print(
            f"{where}: equal builds not distinguishable in {same(equal)} of {len(equal)}; "
            f"slowed build caught in {slower(slowed)} of {len(slowed)}"
        )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

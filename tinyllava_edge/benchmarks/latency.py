"""Latency and memory of a bundle's builds in one run, interleaved, so that all meet the same conditions.

Protocol: every build is opened once; WARM_UP whole answers each (vision graph included; the first is kept as the cold
sample); then `repetitions` rounds in which each build answers once, the order rotated by one each round. The number of
rounds is fixed beforehand and no sample is dropped. Memory is measured afterwards, each build in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllava_edge.benchmarks.environment import bundle_sample, capture, ceilings, environment_sample
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.bundle import ROLES, Build, Bundle, open_bundle
from tinyllava_edge.errors import EngineError, UsageError
from tinyllava_edge.runtimes.base import Answer, Runtime

WARM_UP = 2
REPETITIONS = 15
_MEMORY_TIMEOUT_S = 600
Progress = Callable[[str], None] | None


def bench(
    bundle: Path,
    builds: Sequence[str] | None = None,
    *,
    picture: Path,
    question: str,
    repetitions: int = REPETITIONS,
    max_tokens: int = 16,
    memory: bool = True,
    n_threads: int | None = None,
    progress: Progress = None,
) -> list[Sample]:
    """Measure builds of a bundle on one picture and question.

    Args:
        bundle: directory; a build needs no `verified` stamp to be measured, and the report says which ones have it.
        builds: names; all of them by default.
        picture: picture file, decoded anew for every answer.
        question: what is asked.
        repetitions: rounds, at least 1; medians need 10 or more to mean something.
        max_tokens: longest answer.
        memory: also measure peak memory, which opens each build once more in a fresh process.
        n_threads: threads of every build; all cores by default.
        progress: receives a line per round.

    Returns:
        Lines for results.jsonl: environment, bundle, size, latency and memory samples.

    Raises:
        UsageError: an unknown build, or fewer than one repetition.
        EngineError: a measuring process failed.
    """
    if repetitions < 1:
        raise UsageError(f"{repetitions} repetitions", "give --repetitions 1 or more")
    opened = open_bundle(bundle)
    chosen = [opened.build(name) for name in builds] if builds else list(opened.builds().values())
    runtimes = _open(opened, chosen, n_threads)
    try:
        environment = {**capture(next(iter(runtimes.values()))), "ceilings": ceilings()}
        first = environment_sample(environment)
        samples = [first, bundle_sample(opened, first.environment_id)]
        samples += [sample for build in chosen for sample in sizes(build, first.environment_id)]
        samples += interleaved(
            runtimes, picture, question, repetitions, max_tokens, environment_id=first.environment_id, progress=progress
        )
    finally:
        for runtime in runtimes.values():
            runtime.close()
    if memory:
        for build in chosen:
            samples += peak_memory(bundle, build.name, picture, question, first.environment_id, n_threads)
            _say(progress, f"{build.name}: peak memory measured")
    return samples


def interleaved(
    runtimes: dict[str, Runtime],
    picture: Path,
    question: str,
    repetitions: int,
    max_tokens: int,
    *,
    environment_id: str = "",
    progress: Progress = None,
) -> list[Sample]:
    """Warm up, then answer in rounds A B C, B C A, C A B … and keep every stage of every answer."""
    samples: list[Sample] = []
    for name, runtime in runtimes.items():
        cold = runtime.answer(picture, question, max_tokens=max_tokens)
        for stage, value in (("load_ms", cold.timings.load_ms), ("cold_ttft_ms", cold.timings.ttft_ms)):
            samples.append(Sample("latency", runtime.name, name, stage, value, "ms", 0, environment_id))
        for _ in range(WARM_UP - 1):
            runtime.answer(picture, question, max_tokens=max_tokens)
        _say(progress, f"{name}: warm")
    names = list(runtimes)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for order, name in enumerate(names[turn:] + names[:turn]):
            answer = runtimes[name].answer(picture, question, max_tokens=max_tokens)
            samples += _stages(answer, runtimes[name].name, name, repetition, order, environment_id)
        _say(progress, f"round {repetition + 1} of {repetitions}")
    return samples


def sizes(build: Build, environment_id: str = "") -> list[Sample]:
    """Bytes on the device's disk, by role and in total."""
    files = {role: getattr(build, role).bytes for role in ROLES} | {"total": build.bytes}
    return [Sample("size", "edge", build.name, role, size, "bytes", 0, environment_id) for role, size in files.items()]


def peak_memory(
    bundle: Path,
    build: str,
    picture: Path,
    question: str,
    environment_id: str = "",
    n_threads: int | None = None,
) -> list[Sample]:
    """Memory of one build, measured in a process that does nothing else.

    Raises:
        EngineError: the process failed, ran longer than ten minutes, or printed something else.
    """
    command = [sys.executable, "-m", "tinyllava_edge.benchmarks.peak_rss", str(bundle), build, str(picture), question]
    command += [] if n_threads is None else [str(n_threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MEMORY_TIMEOUT_S)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        sizes = {stage: int(size) for stage, size in found.items()}
        return [Sample("memory", "edge", build, s, size, "bytes", 0, environment_id) for s, size in sizes.items()]
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{build}: no answer within {_MEMORY_TIMEOUT_S} s", "time it once with `run`; it may not fit in memory"
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError(f"{build}: the memory measurement failed: {last}", "run the build once with `run`") from error


def _stages(answer: Answer, runtime: str, build: str, number: int, order: int, environment_id: str) -> list[Sample]:
    values = [(stage, value, "ms") for stage, value in answer.timings.to_dict().items() if stage != "load_ms"]
    if answer.decode_tokens_per_s is not None:
        values.append(("decode_tokens_per_s", answer.decode_tokens_per_s, "tokens/s"))
    detail = {"order": order, "prompt_tokens": answer.n_prompt_tokens, "image_tokens": answer.n_image_tokens}
    return [
        Sample("latency", runtime, build, stage, value, unit, number, environment_id, detail=detail)
        for stage, value, unit in values
    ]


def _open(bundle: Bundle, builds: Sequence[Build], n_threads: int | None) -> dict[str, Runtime]:
    from tinyllava_edge.runtimes.edge import open_edge

    runtimes: dict[str, Runtime] = {}
    try:
        for build in builds:
            runtimes[build.name] = open_edge(bundle, build.name, n_threads=n_threads, allow_unverified=True)
    except BaseException:
        for runtime in runtimes.values():
            runtime.close()
        raise
    return runtimes


def _say(progress: Progress, line: str) -> None:
    if progress:
        progress(line)

"""Latency, energy and memory of a bundle's builds in one run, interleaved, so that all meet the same conditions.

Protocol: every build is opened once and warmed up with whole answers (vision graph included; the first is kept as the
cold sample); then rounds in which each build answers once, in an order drawn anew each round, until the stop rule is
met (see `rounds`, `stop_rule`). No sample is dropped. The machine's state is noted before and after, its ceilings are
measured in the same run, and memory and loading afterwards, each build in fresh processes.
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tinyllava_edge.benchmarks import bench_grid as grid
from tinyllava_edge.benchmarks import ceilings, conditions, memory_process
from tinyllava_edge.benchmarks.energy import open_meter
from tinyllava_edge.benchmarks.environment import bundle_sample, capture, environment_sample
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.rounds import Arm, Progress, Question, Rounds, measure
from tinyllava_edge.benchmarks.stop_rule import StopRule
from tinyllava_edge.bundle import ROLES, Build, Bundle, read_bundle


def bench(
    bundle: Path,
    builds: Sequence[str] | None = None,
    *,
    picture: Path | None = None,
    question: str = grid.QUESTION,
    repetitions: int = grid.REPETITIONS,
    min_time_s: float = 0.0,
    max_time_s: float | None = None,
    resolution: float = 0.0,
    max_tokens: int = grid.MAX_TOKENS,
    prompt_tokens: Sequence[int] = (),
    gen_tokens: Sequence[int] = (),
    threads: Sequence[int] = (),
    image_sizes: Sequence[str | int | Sequence[int]] = (),
    devices: Sequence[str] = ("cpu",),
    memory: bool = True,
    loads: int = memory_process.LOADS,
    progress: Progress = None,
) -> list[Sample]:
    """Measure builds of a bundle over a grid. Every argument but `bundle`, `picture` and `progress` is a JSON value.

    The grid's first number of threads and first picture give stages their plain names (`ttft_ms`); further ones are
    told by a mark (`ttft_ms@t4`, `ttft_ms@640x480`), so that no two of them are ever pooled.

    Args:
        bundle: directory; a build needs no `verified` stamp to be measured, and the report says which ones have it.
        builds: names; all of them by default.
        picture: picture file, decoded anew for every answer; a generated scene by default.
        question: what is asked.
        repetitions: rounds at least; medians need 10 or more to mean something.
        min_time_s: seconds of measuring at least.
        max_time_s: seconds after which no round begins, even if a minimum isn't met; None is no cap.
        resolution: go on until a change this large between builds (0.05 is 5 %) would be found in four of five such
            runs, for ten times `repetitions` rounds at most; 0 doesn't ask for it.
        max_tokens: longest answer.
        prompt_tokens: sizes of llama-bench's `pp` tests; with these or `gen_tokens`, answers are measured only for
            `image_sizes` or a `picture`.
        gen_tokens: sizes of its `tg` tests.
        threads: numbers of threads; all cores by default.
        image_sizes: sizes of generated pictures, `64` or `640x480`.
        devices: `cpu`, `cuda` or both; each is its samples' target.
        memory: also measure memory and loading, which opens each build once more in a fresh process.
        loads: times that loading is measured, as far as `memory_process.LOADING_S` reaches.
        progress: receives a line now and then.

    Returns:
        Lines for results.jsonl: environment, bundle, size, condition, ceiling, latency, energy and memory samples.

    Raises:
        UsageError: an unknown build, or an argument out of range.
        EngineError: an engine refused, or a measuring process failed.
    """
    rule = StopRule(repetitions, min_time_s, math.inf if max_time_s is None else max_time_s, resolution)
    counts: list[int | None] = list(dict.fromkeys(threads)) or [None]
    opened = read_bundle(bundle)
    chosen = [opened.build(name) for name in builds] if builds else list(opened.builds().values())
    with tempfile.TemporaryDirectory() as scratch:
        sizes_asked = grid.image_sizes(image_sizes)
        work = grid.tasks(picture, sizes_asked, prompt_tokens, gen_tokens, Path(scratch))
        where = grid.devices(devices)
        lines: list[Sample] = []
        arms = _open(opened, chosen, where, counts, lines)
        try:
            first = lines[0].environment_id
            grid.check_fits(work, min(arm.runtime.n_ctx for arm in arms))
            lines.append(bundle_sample(opened, first))
            lines += [sample for target in where for build in chosen for sample in sizes(build, first, target)]
            lines += _measured(arms, work, Question(question, max_tokens), rule, where, progress)
            own = [line for line in lines if line.kind == "ceiling" and line.environment_id == first]
            reached = {line.stage: line.value for line in own}
            lines[0] = replace(lines[0], detail={**lines[0].detail, "ceilings": reached})
        finally:
            for arm in arms:
                arm.runtime.close()
        if memory:
            shown = picture or next((task.picture for task in work if task.picture), None) or _small(Path(scratch))
            for build in chosen:
                for target in where:
                    lines += memory_process.measure(
                        bundle,
                        build.name,
                        shown,
                        question,
                        first,
                        counts[0],
                        device=target,
                        max_tokens=max_tokens,
                        loads=loads,
                    )
                if progress:
                    progress(f"{build.name}: memory and loading measured")
    return lines


def sizes(build: Build, environment_id: str = "", target: str = "cpu") -> list[Sample]:
    """Bytes on the device's disk, by role and in total."""
    files = {role: getattr(build, role).total_bytes for role in ROLES} | {"total": build.bytes}
    return [
        Sample("size", "edge", build.name, role, size, "bytes", 0, environment_id, target)
        for role, size in files.items()
    ]


def _measured(
    arms: Sequence[Arm],
    work: Sequence[grid.Task],
    question: Question,
    rule: StopRule,
    targets: Sequence[str],
    progress: Progress,
) -> list[Sample]:
    """Ceilings, the state before, the rounds, the state after."""
    first, run, gpu = arms[0].environment_id, secrets.token_hex(4), "cuda" in targets
    lines = _ceilings(arms)
    lines.append(_condition("before", first, {"run": run}, gpu))
    with ExitStack() as stack:
        meters = {target: stack.enter_context(open_meter(gpu=target == "cuda")) for target in targets}
        found = measure(arms, work, question, rule, run=run, meters=meters, progress=progress)
    return [*lines, *found.samples, _condition("after", first, {"run": run, **_ended(found, rule)}, gpu)]


def _ceilings(arms: Sequence[Arm]) -> list[Sample]:
    """The CPU's ceilings for each number of threads; none for a GPU. The plain one last: a report shows the latest."""
    counts = {arm.environment_id: arm.n_threads or 1 for arm in arms if arm.target == "cpu"}
    return [line for name, count in reversed(counts.items()) for line in ceilings.ceiling_samples(count, name)]


def _condition(stage: str, environment_id: str, detail: dict[str, object], gpu: bool) -> Sample:
    state = conditions.read(gpu=gpu)
    return Sample("condition", stage=stage, environment_id=environment_id, detail={**state, **detail})


def _ended(found: Rounds, rule: StopRule) -> dict[str, object]:
    cap = None if math.isinf(rule.max_time_s) else rule.max_time_s
    return {
        "rounds": found.rounds,
        "seconds": round(found.seconds, 3),
        "stopped_by": found.stopped_by,
        "repetitions": rule.repetitions,
        "min_time_s": rule.min_time_s,
        "max_time_s": cap,
        "resolution": found.resolution,
        "resolution_asked": rule.resolution,
    }


def _open(
    bundle: Bundle, builds: Sequence[Build], devices: Sequence[str], threads: Sequence[int | None], lines: list[Sample]
) -> list[Arm]:
    """Open every build on every device with every number of threads; environment lines are added to `lines`."""
    from tinyllava_edge.runtimes.devices import choose_device
    from tinyllava_edge.runtimes.edge import open_edge

    plans = {device: choose_device(device) for device in devices}
    arms: list[Arm] = []
    try:
        for device, plan in plans.items():
            for number, count in enumerate(threads):
                environment_id = ""
                for build in builds:
                    runtime = open_edge(bundle, build.name, n_threads=count, plan=plan, allow_unverified=True)
                    arm = Arm(runtime, build.name, "", device, f"@t{count}" if number else "")
                    arms.append(arm)
                    if not environment_id:
                        line = replace(environment_sample(capture(runtime)), target=device)
                        environment_id = line.environment_id
                        lines.append(line)
                    found = int(runtime.environment()["n_threads"])
                    arms[-1] = replace(arm, environment_id=environment_id, n_threads=found)
    except BaseException:
        for arm in arms:
            arm.runtime.close()
        raise
    return arms


def _small(scratch: Path) -> Path:
    return grid.scene((64, 64), scratch)

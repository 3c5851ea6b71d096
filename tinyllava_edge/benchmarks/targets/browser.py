"""`bench --target browser`: a bundle's web precisions in headless Chromium, in one page, interleaved.

The rounds are those of every other target; only what answers is the page. Samples carry runtime `web`, target
`browser`, and builds named `web-q4` after the precision. Memory comes from a fresh browser for each build.
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks import bench_grid as grid
from tinyllava_edge.benchmarks import conditions
from tinyllava_edge.benchmarks.environment import bundle_sample, capture, environment_sample
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.rounds import Arm, Progress, Question, Rounds, measure
from tinyllava_edge.benchmarks.stop_rule import StopRule
from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.benchmarks.targets.browser_runtime import WebRuntime
from tinyllava_edge.bundle import WEB, Bundle, read_bundle
from tinyllava_edge.errors import BundleError, UsageError

TARGET = "browser"


def web_builds(bundle: Bundle) -> list[str]:
    """Names of the builds that a browser can run, in the manifest's order. Raises BundleError where there is none."""
    found = list(bundle.web_builds())
    if not found:
        raise BundleError(f"{bundle.root}: holds no web files", "export it again with --web q4")
    return found


def choose_builds(bundle: Bundle, asked: Sequence[str] | None, allow_unverified: bool) -> list[str]:
    """The builds to measure.

    Raises:
        BundleError: the bundle has no web files.
        UsageError: an unknown name.
        UnverifiedError: a build without a stamp, and nobody allowed that.
    """
    known = web_builds(bundle)
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise UsageError(f"{bundle.root}: no browser build {unknown[0][:80]!r}", f"it holds: {', '.join(known)}")
    chosen = list(asked or known)
    for name in chosen:
        bundle.require_verified(bundle.web_builds()[name], allow_unverified)
    return chosen


def run(
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
    memory: bool = True,
    allow_unverified: bool = False,
    dist: Path | None = None,
    progress: Progress = None,
) -> list[Sample]:
    """Measure web builds of a bundle. Arguments as in `latency.bench`; `threads` are WebAssembly's.

    Args:
        dist: directory of the built page; `make web`'s by default.

    Returns:
        Lines for results.jsonl: environment, bundle, size, condition, latency and memory samples.

    Raises:
        UsageError: an unknown build, or a test of the decoder alone, which the page doesn't offer.
        BundleError, UnverifiedError: see `choose_builds`.
        DependencyError: playwright, Chromium or the built page is missing.
        EngineError: the page refused.
    """
    if prompt_tokens or gen_tokens:
        raise UsageError(
            "-p and -n test llama.cpp's decoder, which no browser runs", "leave them out for --target browser"
        )
    rule = StopRule(repetitions, min_time_s, math.inf if max_time_s is None else max_time_s, resolution)
    opened = read_bundle(bundle)
    chosen = choose_builds(opened, builds, allow_unverified)
    counts: list[int | None] = list(dict.fromkeys(threads)) or [None]
    name = secrets.token_hex(4)
    with tempfile.TemporaryDirectory() as scratch:
        work = grid.tasks(picture, grid.image_sizes(image_sizes), (), (), Path(scratch))
        with BrowserPage(bundle, dist=dist) as page:
            arms, environments = _open(page, opened, chosen, counts)
            first = environments[0].environment_id
            lines = [*environments, replace(bundle_sample(opened, first), target=TARGET)]
            lines += [sample for build in chosen for sample in _sizes(opened, build, first)]
            lines.append(_condition("before", first, {"run": name}))
            found = measure(arms, work, Question(question, max_tokens), rule, run=name, progress=progress)
            lines += [*found.samples, _condition("after", first, {"run": name, **_ended(found, rule)})]
        if memory:
            for build in chosen:
                lines += _memory(bundle, opened, build, work[0].picture, question, max_tokens, counts[0], dist, first)
                if progress:
                    progress(f"{build}: memory measured")
    return [
        line if line.kind in ("environment", "bundle", "condition") else replace(line, runtime="web") for line in lines
    ]


def _open(
    page: BrowserPage, bundle: Bundle, builds: Sequence[str], counts: Sequence[int | None]
) -> tuple[list[Arm], list[Sample]]:
    """Every build with every number of threads; one environment line per number, with each build's provider."""
    arms: list[Arm] = []
    lines: list[Sample] = []
    for number, count in enumerate(counts):
        opened = [WebRuntime(page, bundle, name.removeprefix(WEB), threads=count) for name in builds]
        shared = opened[0].environment()
        engines = {runtime.build: _engine(runtime.facts) for runtime in opened}
        described = {key: value for key, value in shared.items() if key not in _OF_A_BUILD}
        line = environment_sample({**capture(), "runtime": {**described, "builds": engines}}, TARGET)
        lines.append(line)
        mark = f"@t{count}" if number else ""
        for runtime in opened:
            threads = int(runtime.facts["threads"])
            arms.append(Arm(runtime, runtime.build, line.environment_id, TARGET, mark, threads))
    return arms, lines


_ENGINE = ("provider", "self_test")
_OF_A_BUILD = ("build", "files", "verified", "precision", *_ENGINE)


def _engine(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in _ENGINE}


def _sizes(bundle: Bundle, build: str, environment_id: str) -> list[Sample]:
    """Bytes that the page loads for a build, by role and in total."""
    files = bundle.web_builds()[build]
    sizes = {
        "preprocess": files.preprocess.total_bytes,
        "vision": files.vision.total_bytes,
        "llm": sum(file.total_bytes for file in (files.embed, files.decoder, *files.texts)),
    }
    sizes["total"] = files.bytes
    return [Sample("size", "web", build, role, n, "bytes", 0, environment_id, TARGET) for role, n in sizes.items()]


def _memory(
    bundle: Path,
    opened: Bundle,
    build: str,
    picture: Path | None,
    question: str,
    max_tokens: int,
    threads: int | None,
    dist: Path | None,
    environment_id: str,
) -> list[Sample]:
    """Peak of the page's process over loading, the self-test and one answer, in a fresh browser."""
    with BrowserPage(bundle, dist=dist) as page:
        WebRuntime(page, opened, build.removeprefix(WEB), threads=threads).answer(
            picture, question, max_tokens=max_tokens
        )
        peak = page.peak_rss()
    if peak is None:
        return []
    detail = {"of": "the renderer process, page and engine"}
    return [Sample("memory", "web", build, "peak_rss", peak, "bytes", 0, environment_id, TARGET, detail)]


def _ended(found: Rounds, rule: StopRule) -> dict[str, Any]:
    """Why the rounds ended, in the words of `latency.bench`."""
    return {
        "rounds": found.rounds,
        "seconds": round(found.seconds, 3),
        "stopped_by": found.stopped_by,
        "repetitions": rule.repetitions,
        "min_time_s": rule.min_time_s,
        "max_time_s": None if math.isinf(rule.max_time_s) else rule.max_time_s,
        "resolution": found.resolution,
        "resolution_asked": rule.resolution,
    }


def _condition(stage: str, environment_id: str, detail: Mapping[str, Any]) -> Sample:
    found = {**conditions.read(), **detail}
    return Sample("condition", stage=stage, environment_id=environment_id, target=TARGET, detail=found)

"""What `bench` does between the command line and the measuring: check everything first, measure, keep, print, gate."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .bundle import WEB
from .errors import UsageError
from .export.options import names

LOCAL = ("cpu", "cuda")
BROWSER = "browser"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run of `bench` gave."""

    text: str
    """the table, in the form that was asked for"""
    value: Mapping[str, Any]
    """the same for `--json`"""
    budget: tuple[str, ...]
    """a line for each build and limit"""
    passed: bool
    """whether every build is within the budget"""


def bench_bundle(
    bundle: Path,
    *,
    image: Path | None,
    grid: Mapping[str, str],
    options: Mapping[str, Any],
    target: str,
    ssh: Mapping[str, Any],
    outputs: Sequence[str],
    budget: str,
    allow_unverified: bool,
    progress: Progress,
) -> Outcome:
    """Measure builds wherever they are asked to run, append the raw samples to the results files, and compare.

    Args:
        bundle: directory.
        image: picture file to measure with; None takes generated ones.
        grid: the flags' comma lists: `builds`, `prompt`, `gen`, `threads`, `image_sizes`, `devices`.
        options: further arguments of `latency.bench`.
        target: comma list of `cpu`, `cuda`, `browser` and `ssh://…` addresses.
        ssh: how to reach an ssh target (`ssh_options`, `remote_python`).
        outputs: one of `bench_formats.FORMATS` for the text, and paths of results files; see split_outputs.
        budget: limits, see `budget.parse_budget`; empty for none.
        allow_unverified: measure builds without a `verified` stamp.
        progress: receives lines for stderr.

    Raises:
        UsageError: a flag that can't be read, before anything is measured.
        UnverifiedError: a build without a stamp.
        What `latency.bench` and `targets.run` raise.
    """
    from .benchmarks import bench_formats, bench_notes
    from .benchmarks.bench_grid import image_sizes as read_sizes
    from .benchmarks.budget import check, check_measured, parse_budget
    from .benchmarks.out_file import append_results, check_writable
    from .benchmarks.results import Sample, read_results
    from .bundle import read_bundle

    form, paths = split_outputs(outputs)
    limits = parse_budget(budget) if budget else None
    arguments = _arguments(grid, options)
    if limits is not None:  # what this run can't tell is said before minutes of measuring
        decoder_alone = bool(arguments["prompt_tokens"] or arguments["gen_tokens"])
        answers = not decoder_alone or image is not None or bool(arguments["image_sizes"])
        check_measured(limits, answers=answers, memory=options["memory"])
    if image is not None and read_sizes(arguments["image_sizes"]):
        raise UsageError("--image has a size of its own", "give --image or --image-size, not both")
    places = _places(target, grid["devices"])
    most = 4 * (os.cpu_count() or 1)
    if "" in places and max(arguments["threads"], default=0) > most:
        raise UsageError(f"-t {max(arguments['threads'])}: {os.cpu_count()} cores are here", f"at most {most}")
    opened = read_bundle(bundle)
    asked = _builds(arguments["builds"], places)
    if BROWSER in places:
        from .benchmarks.targets.browser import choose_builds

        choose_builds(opened, asked[BROWSER], allow_unverified)
    for place in [place for place in places if place != BROWSER]:
        for name in asked[place] or opened.builds():
            opened.require_verified(opened.build(name), allow_unverified)
    for path in paths:  # what would stop the results from being kept is said before they are made
        check_writable(path)
        if path.is_file():
            read_results([path])
    samples: list[Sample] = []
    for place, devices in places.items():
        given = {**arguments, "builds": asked[place], "devices": devices}
        samples += _measure(place, bundle, image, given, ssh, allow_unverified, progress)
    command = Sample("command", detail={"command": shlex.join(["tinyllava-edge", *sys.argv[1:]])})
    for path in paths:
        append_results(path, [command, *samples])
        progress(f"results: {path}")
    rows = bench_formats.rows(samples)
    text = bench_formats.FORMATS[form](rows)
    if form == "md":
        text += bench_notes.resolution(samples) + bench_notes.load(samples) + bench_notes.roofline(samples)
    checks = check(limits, samples) if limits is not None else []
    value = {
        "rows": [{key: item for key, item in asdict(row).items() if key != "samples"} for row in rows],
        "budget": [{**asdict(found), "passed": found.passed} for found in checks],
        "passed": all(found.passed for found in checks),
        "results": [str(path) for path in paths],
    }
    return Outcome(text, value, tuple(found.line() for found in checks), bool(value["passed"]))


def split_outputs(outputs: Sequence[str]) -> tuple[str, list[Path]]:
    """Values of -o → the text's form and the results files. Raises UsageError for two forms, or for a directory."""
    from .benchmarks.bench_formats import FORMATS

    forms = list(dict.fromkeys(word for word in outputs if word in FORMATS))
    if len(forms) > 1:
        raise UsageError(f"-o {forms[0]} and -o {forms[1]}", "one of them can go to stdout")
    paths = [Path(word) for word in dict.fromkeys(outputs) if word not in FORMATS]
    for word in (path for path in paths if path.is_dir() or not path.name):
        raise UsageError(f"-o {word} is a directory", f"name a file, or one of {', '.join(FORMATS)}")
    return forms[0] if forms else "md", paths


def _arguments(grid: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `latency.bench`, JSON values all."""
    from .benchmarks import bench_grid
    from .benchmarks.stop_rule import StopRule

    question = options.get("question") or ""
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise UsageError(f"--question {ascii(question)[:80]}: not Unicode text", "write it in UTF-8")
    StopRule(options["repetitions"], options["min_time_s"], options["max_time_s"], options["resolution"])
    return {
        **options,
        "builds": list(names(grid["builds"])) or None,
        "prompt_tokens": list(bench_grid.counts(grid["prompt"], "-p")),
        "gen_tokens": list(bench_grid.counts(grid["gen"], "-n")),
        "threads": list(bench_grid.counts(grid["threads"], "-t", bench_grid.MOST_THREADS)),
        "image_sizes": [bench_grid.spelled(size) for size in bench_grid.image_sizes(grid["image_sizes"])],
    }


def _places(target: str, devices: str) -> dict[str, list[str]]:
    """Target → devices there; everything on this machine is one run, so that its devices are interleaved."""
    from .benchmarks import bench_grid
    from .benchmarks.targets import is_remote

    known = f"{', '.join(LOCAL)}, {BROWSER}, ssh://user@host[:port]/dir"
    asked = list(bench_grid.devices(devices)) if devices else []
    found: dict[str, list[str]] = {}
    for name in names(target):
        if name in LOCAL:
            here = found.setdefault("", [])
            here += [device for device in (asked if asked and name == "cpu" else [name]) if device not in here]
        elif name == BROWSER:
            found[name] = []  # the page itself chooses between WebGPU and WebAssembly
        elif is_remote(name):
            found[name] = asked or ["cpu"]
        else:
            raise UsageError(f"--target {name[:80]!r}", f"known: {known}")
    if not found:
        raise UsageError("--target names none", f"known: {known}")
    return found


def _builds(names: Sequence[str] | None, places: Mapping[str, Sequence[str]]) -> dict[str, list[str] | None]:
    """Place → builds to measure there, None for all: a browser's are named `web-…`, other places take the rest."""
    web = [name for name in names or () if name.startswith(WEB)]
    rest = [name for name in names or () if name not in web]
    found: dict[str, list[str] | None] = {}
    for place in places:
        # One target alone takes every name, so that a wrong one is said with the names that it knows.
        mine = list(names or ()) if len(places) == 1 else web if place == BROWSER else rest
        if names and not mine:
            raise UsageError(
                f"--build names none for --target {place or 'cpu'}", "name one for each target: browsers run web-q4 …"
            )
        found[place] = mine or None
    return found


def _measure(
    place: str,
    bundle: Path,
    image: Path | None,
    arguments: Mapping[str, Any],
    ssh: Mapping[str, Any],
    allow_unverified: bool,
    progress: Progress,
) -> list[Any]:
    if not place:
        from .benchmarks.latency import bench

        return list(bench(bundle, picture=image, **arguments, progress=progress))
    if place == BROWSER:
        from .benchmarks.targets import browser

        here = {name: value for name, value in arguments.items() if name != "devices"}
        return browser.run(bundle, picture=image, **here, allow_unverified=allow_unverified, progress=progress)
    from .benchmarks.targets import run

    picture = {} if image is None else {"picture": image}
    return run(place, bundle, {**arguments, **picture, **ssh, "allow_unverified": allow_unverified}, progress)

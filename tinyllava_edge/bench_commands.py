"""What `bench` does between the command line and the measuring: check everything first, measure, keep, print, gate."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .export.options import names

FORMATS = ("md", "csv", "json", "jsonl", "sql")
LOCAL = ("cpu", "cuda")
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
        target: comma list of `cpu`, `cuda` and `ssh://…` addresses.
        ssh: how to reach an ssh target (`ssh_options`, `remote_python`).
        outputs: one of FORMATS for the text, and paths of results files; see split_outputs.
        budget: limits, see `budget.parse_budget`; empty for none.
        allow_unverified: measure builds without a `verified` stamp.
        progress: receives lines for stderr.

    Raises:
        UsageError: a flag that can't be read, before anything is measured.
        UnverifiedError: a build without a stamp.
        What `latency.bench` and `targets.run` raise.
    """
    from .benchmarks import bench_formats
    from .benchmarks.bench_grid import image_sizes as read_sizes
    from .benchmarks.budget import check, parse_budget
    from .benchmarks.results import Sample, read_results, write_results
    from .bundle import read_bundle

    form, paths = split_outputs(outputs)
    limits = parse_budget(budget) if budget else None
    if limits is not None:
        check(limits, [])  # a limit that this command can't hold is said before minutes of measuring
    arguments = _arguments(grid, options)
    if image is not None and read_sizes(arguments["image_sizes"]):
        raise UsageError("--image has a size of its own", "give --image or --image-size, not both")
    places = _places(target, grid["devices"])
    opened = read_bundle(bundle)
    for name in arguments["builds"] or opened.builds():
        opened.require_verified(opened.build(name), allow_unverified)
    before = {path: read_results([path]) if path.is_file() else [] for path in paths}  # damage is said now, too
    samples: list[Sample] = []
    for place, devices in places.items():
        samples += _measure(place, bundle, image, {**arguments, "devices": devices}, ssh, allow_unverified, progress)
    command = Sample("command", detail={"command": shlex.join(["tinyllava-edge", *sys.argv[1:]])})
    for path, old in before.items():
        write_results(path, [*old, command, *samples])
        progress(f"results: {path}")
    rows = bench_formats.rows(samples)
    text = bench_formats.FORMATS[form](rows) + (_roofline(samples) if form == "md" else "")
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
    from .benchmarks.rounds import StopRule

    StopRule(options["repetitions"], options["min_time_s"], options["max_time_s"])
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

    asked = list(bench_grid.devices(devices)) if devices else []
    found: dict[str, list[str]] = {}
    for name in names(target):
        if name in LOCAL:
            here = found.setdefault("", [])
            here += [device for device in (asked if asked and name == "cpu" else [name]) if device not in here]
        elif is_remote(name):
            found[name] = asked or ["cpu"]
        else:
            raise UsageError(f"--target {name[:80]!r}", f"known: {', '.join(LOCAL)}, ssh://user@host[:port]/dir")
    if not found:
        raise UsageError("--target names none", f"known: {', '.join(LOCAL)}, ssh://user@host[:port]/dir")
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
    from .benchmarks.targets import run

    picture = {} if image is None else {"picture": image}
    return run(place, bundle, {**arguments, **picture, **ssh, "allow_unverified": allow_unverified}, progress)


def _roofline(samples: Sequence[Any]) -> str:
    """Each stage as a share of what this machine can do at best; nothing where no ceiling stands beside it."""
    from .benchmarks.roofline import shares

    found = [share for share in shares(samples) if share.share_percent is not None]
    if not found:
        return ""
    lines = ["", "| test | build | target | share of the roofline | work | ceiling |", "|---|---|---|---:|---:|---:|"]
    for share in sorted(found, key=lambda share: share.stage):
        lines.append(
            f"| {share.stage} | {share.build} | {share.target} | {share.share_percent:.1f} % | "
            f"{share.work:.4g} {share.unit} | {share.ceiling:.4g} {share.unit}/s |"
        )
    return "\n".join(lines) + "\n"

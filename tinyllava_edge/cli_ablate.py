"""`ablate`: train and evaluate a grid, and draw the paper's comparisons."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_device import Json
from .cli_frame import emit, talk
from .errors import TinyLlavaEdgeError, UsageError

if TYPE_CHECKING:
    from .ablate.run import Estimate


def ablate(
    grid: Annotated[
        Path, typer.Argument(metavar="GRID.toml|RESULTS.jsonl", help="What to cross; or finished results, to draw.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory; a grid interrupted there goes on.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print cells, steps and estimated time.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Stages and evaluations done at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Train and evaluate a grid of towers, LLMs, connectors, recipes and data, and draw the paper's comparisons.

    Writes results.jsonl (every answer of every cell), ABLATION.md, ablation.html and figures/. Exit 1 if a cell failed.
    """
    from .ablate import page, run
    from .ablate.grid_toml import read_grid
    from .benchmarks.results import read_results

    if grid.suffix == ".jsonl":
        if dry_run:
            raise UsageError(f"--dry-run needs a grid, {grid} holds results", "name a .toml file")
        samples = read_results([grid])
    else:
        wanted = read_grid(grid)
        if dry_run:
            estimates = run.dry_run(wanted, out)
            _tell(estimates, as_json)
            if refused := [item for item in estimates if item.failed]:
                raise TinyLlavaEdgeError(
                    f"{len(refused)} cells and seeds can't be done, first {refused[0].run}: {refused[0].state}",
                    f"mend {grid}",
                )
            return
        command = shlex.join(["tinyllava-edge", *sys.argv[1:]])
        samples = run.run_grid(wanted, out, jobs=jobs, command=command, progress=talk)
    failed = run.failures(samples)
    finished = any(sample.kind == "answer" for sample in samples)
    if finished:
        found = page.draw(samples, out)
        for item in found.effects:
            change = item.paired.difference.estimate if item.paired.difference else 0.0
            talk(f"{item.axis}: {item.before} → {item.after}: {change:+.1f} points on {item.task}, {item.verdict}")
        talk(f"table: {out / page.TABLE}, figures: {out / page.PAGE}")
        if as_json:
            emit(page.as_json(found))
    if failed:
        first = failed[0]
        raise TinyLlavaEdgeError(
            f"{len(failed)} cells and seeds failed, first {first.build}: {first.detail['error']}",
            f"{first.detail['hint'] or 'see the lines above'}; then run the same command again: finished work is kept",
        )


def _tell(estimates: list[Estimate], as_json: bool) -> None:
    """One line per cell and seed, and the sum."""
    from dataclasses import asdict

    from .ablate.run import clock

    if as_json:
        emit([asdict(item) for item in estimates])
        return
    for item in estimates:
        steps = " + ".join(f"{name} {count}" for name, count in item.steps.items())
        print(f"{item.run}: {item.state}; steps: {steps or '-'}; about {clock(item.seconds)} left")
    print(f"{len(estimates)} cells and seeds, about {clock(sum(item.seconds for item in estimates))} left")

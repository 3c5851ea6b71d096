"""Run a grid: plan it, do what is not done yet, collect the results, draw. A second run goes on where one stopped."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarks.results import Sample, read_results, write_results
from ..errors import StorageError, TinyLlavaEdgeError, UsageError
from ..files import storage_errors, write_text
from .data import prepare_data
from .grid import Grid
from .plan import RESULTS, Init, Plan, Run, Train, Unit, make_plan, waiting
from .work import GRID, Outcome, do_unit, failure, limit_threads, slim

TIMES = "times.jsonl"  # one line per unit done: flop, seconds
FLOP_PER_S = 4e10  # of two CPU cores training the nano models; until this grid's own times are known
Say = Callable[[str], None]


@dataclass(frozen=True)
class Estimate:
    """What a dry run says about one run."""

    run: str
    """cell and seed"""
    state: str
    """`done`, `to do`, `begun` or the reason why it can't be done"""
    steps: Mapping[str, int]
    """stage → optimiser steps"""
    seconds: float
    """estimate of what is left, shared stages counted with the first cell that needs them"""
    failed: bool = False
    """whether it can't be done"""


def dry_run(grid: Grid, out: Path) -> list[Estimate]:
    """Cells, steps and an estimate of the time, without writing anything. Raises what `prepare_data` raises."""
    with tempfile.TemporaryDirectory() as scratch:
        data = {item.name: prepare_data(item, Path(scratch), grid.scale.pictures) for item in grid.data}
        plan = make_plan(grid, data, count_questions(grid), out)
    rate = _rate(out)
    counted: set[str] = set()
    estimates = []
    left = {unit.key for unit in waiting(plan)}
    for run in plan.runs:
        units = [plan.units[key] for key in run.units]
        mine = [unit for unit in units if unit.key in left and unit.key not in counted]
        counted |= {unit.key for unit in mine}
        steps = {unit.work.stage.name: unit.work.steps for unit in units if isinstance(unit.work, Train)}
        error = plan.refused.get(run.name)
        begun = run.directory.exists() or any(unit.done for unit in units)
        done = bool(units) and units[-1].done
        state = error.message if error else "done" if done else "begun" if begun else "to do"
        estimates.append(Estimate(run.name, state, steps, sum(unit.flop for unit in mine) / rate, error is not None))
    return estimates


def run_grid(grid: Grid, out: Path, *, jobs: int = 1, command: str, progress: Say) -> list[Sample]:
    """Train and evaluate every cell that is not finished; writes `out/results.jsonl` after each.

    Args:
        grid: what to run.
        out: directory; a grid that was interrupted there goes on.
        jobs: units done at a time, each in a process with its share of the cores.
        command: as typed, kept with the results.
        progress: receives lines for people.

    Returns:
        The lines of results.jsonl.

    Raises:
        DataError, UsageError: data or questions that can't be used at all; a single cell's failure is recorded.
        KeyboardInterrupt, Interrupted: Ctrl-C; what was learnt is kept.
    """
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}", "1 or more")
    data = {item.name: prepare_data(item, out / "data", grid.scale.pictures) for item in grid.data}
    plan = make_plan(grid, data, count_questions(grid), out)
    _check_place(plan)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    clock = _Clock(plan, out, jobs, progress)
    failed: dict[str, Outcome] = {}  # unit's key → what went wrong with it
    for unit, outcome in _outcomes(plan, jobs, command, clock):
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.error:
            failed[unit.key] = outcome
            progress(f"failed: {unit.label}: {outcome.error}")
        clock.count(unit, outcome)
        if unit.out.name == RESULTS and not outcome.error:
            _collect(grid, plan, failed, out, command)
    return _collect(grid, plan, failed, out, command)


def count_questions(grid: Grid) -> int:
    """Questions that each model is asked. Raises UsageError or DataError when a task can't be asked at all."""
    from ..benchmarks.evaluation import sample_questions
    from ..eval_commands import load_task

    asked = 0
    for name in grid.eval.tasks:
        task, questions = load_task(name, grid.eval.data, grid.eval.images)
        if task.judging is not None:
            raise UsageError(f"[eval] tasks: {name} needs a judge", "evaluate its checkpoints with `eval --judge-url`")
        asked += len(sample_questions(questions, grid.eval.limit))
    return asked


def failures(samples: Sequence[Sample]) -> list[Sample]:
    """Lines of runs that failed."""
    return [sample for sample in samples if sample.kind == "command" and sample.stage == "failed"]


def _check_place(plan: Plan) -> None:
    """A finished cell of another grid under the same name is neither reused nor overwritten."""
    for run in plan.runs:
        if not run.units:
            continue
        record, wanted = run.directory / "cell.json", {"units": list(run.units)}
        found = _read(record)
        if found is not None and found != wanted:
            raise StorageError(
                f"{run.directory}: holds cell {run.cell.name} with another recipe, scale, data, backbone or questions",
                "name another directory with -o, or delete this one",
            )
        if found is None:
            write_text(record, json.dumps(wanted) + "\n")


def _outcomes(plan: Plan, jobs: int, command: str, clock: _Clock) -> Iterator[tuple[Unit, Outcome]]:
    """Do the waiting units, each after the one it needs; those behind a failed one are left out."""
    if jobs == 1:
        broken: set[str] = set()
        for unit in waiting(plan):
            if unit.after in broken:
                broken.add(unit.key)
                continue
            clock.begin(unit)
            outcome = do_unit(unit, command, True, clock.say)
            if outcome.error:
                broken.add(unit.key)
            yield unit, outcome
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    left = {unit.key: unit for unit in waiting(plan)}
    with concurrent.futures.ProcessPoolExecutor(jobs, context, limit_threads, (threads,)) as pool:
        going: dict[concurrent.futures.Future[Outcome], Unit] = {}
        try:
            while left or going:
                open_keys = set(left) | {unit.key for unit in going.values()}
                for key in [key for key, unit in left.items() if unit.after not in open_keys][: jobs - len(going)]:
                    unit = left.pop(key)
                    clock.begin(unit)
                    going[pool.submit(do_unit, unit, command, False)] = unit
                ended, _ = concurrent.futures.wait(going, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    unit, outcome = going.pop(future), _outcome(future, going)
                    if outcome.error:
                        for key in _behind(unit.key, left):
                            left.pop(key)
                    yield unit, outcome
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _outcome(future: concurrent.futures.Future[Outcome], going: Mapping[Any, Unit]) -> Outcome:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        names = ", ".join(unit.label for unit in going.values())
        raise TinyLlavaEdgeError(
            f"a process was killed while these were at work: {names}",
            "out of memory? Run again with fewer --jobs: finished work is kept",
        ) from error


def _behind(key: str, left: Mapping[str, Unit]) -> list[str]:
    """Units that wait for `key`, directly or not."""
    found = [unit.key for unit in left.values() if unit.after == key]
    return [*found, *(deeper for near in found for deeper in _behind(near, left))]


def _collect(grid: Grid, plan: Plan, failed: Mapping[str, Outcome], out: Path, command: str) -> list[Sample]:
    """All finished runs and all failures in one file, in the grid's order."""
    lines = [Sample("command", stage=GRID, detail={"command": command, **grid.facts()})]
    environments: set[str] = set()
    for run in plan.runs:
        if run.units and plan.units[run.units[-1]].done:
            for sample in read_results([run.directory / RESULTS]):
                if sample.kind == "environment" and sample.environment_id in environments:
                    continue
                environments |= {sample.environment_id} if sample.kind == "environment" else set()
                lines.append(slim(sample))
        elif (outcome := _failure(run, plan, failed)) is not None:
            lines.append(failure(run.name, command, outcome, run.cell.axes, run.seed))
    write_results(out / RESULTS, lines)
    return lines


def _failure(run: Run, plan: Plan, failed: Mapping[str, Outcome]) -> Outcome | None:
    if (error := plan.refused.get(run.name)) is not None:
        return Outcome("", 0.0, error=error.message, hint=error.hint)
    return next((failed[key] for key in run.units if key in failed), None)


class _Clock:
    """Progress lines: which unit, how far the grid is, how long it will still take."""

    def __init__(self, plan: Plan, out: Path, jobs: int, progress: Say) -> None:
        self.plan, self.out, self.jobs, self.progress = plan, out, jobs, progress
        self.flop = sum(unit.flop for unit in waiting(plan))
        self.number, self.units = 0, len(waiting(plan))
        done = sum(bool(run.units) and plan.units[run.units[-1]].done for run in plan.runs)
        progress(f"{len(plan.runs)} cells and seeds, {done} finished; {self.units} steps left, {self._left()}")
        for name, error in plan.refused.items():
            progress(f"failed: {name}: {error.message}")

    def begin(self, unit: Unit) -> None:
        """Say what begins."""
        self.number += 1
        steps = f", {unit.work.steps} steps" if isinstance(unit.work, Train) else ""
        self.progress(f"[{self.number}/{self.units}] {unit.label}{steps}; {self._left()}")

    def count(self, unit: Unit, outcome: Outcome) -> None:
        """Take the unit off what is left, and keep its time for estimates."""
        self.flop -= unit.flop
        if outcome.error:
            behind = [u for u in self.plan.units.values() if u.after == unit.key]
            for other in behind:
                self.count(other, outcome)
        elif not outcome.resumed and not isinstance(unit.work, Init):  # that is start-up, not arithmetic
            line = {"key": unit.key, "label": unit.label, "flop": unit.flop, "seconds": round(outcome.seconds, 2)}
            with storage_errors(self.out), (self.out / TIMES).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        """A line from inside a unit."""
        self.progress(f"  {text}")

    def _left(self) -> str:
        return f"about {clock(max(0.0, self.flop) / _rate(self.out) / self.jobs)} left"


def clock(seconds: float) -> str:
    """For people: `48 s`, `12 min`, `3.4 h`, `2.5 days`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _rate(out: Path) -> float:
    """Floating-point operations a second, from the units that this grid has done, else a guess."""
    flop = seconds = 0.0
    try:
        lines = (out / TIMES).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        value = _parsed(line)
        if isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in ("flop", "seconds")):
            flop, seconds = flop + value["flop"], seconds + value["seconds"]
    return flop / seconds if flop > 0 and seconds > 1 else FLOP_PER_S


def _read(path: Path) -> Any:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except OSError:
        return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None

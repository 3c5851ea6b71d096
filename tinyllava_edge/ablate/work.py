"""Do one unit: write an untrained model, train a stage, or evaluate a trained model; also in another process."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..benchmarks.results import Sample, read_results, write_results
from ..errors import TinyLlavaEdgeError
from .plan import Evaluate, Init, Train, Unit

CELL, FAILED, GRID = "cell", "failed", "grid"  # stages of our `command` lines
HEAVY = ("prompt_sha256", "image_sha256", "token_ids", "margins", "timings_ms", "n_prompt_tokens")


@dataclass(frozen=True)
class Outcome:
    """What became of a unit."""

    key: str
    """the unit's"""
    seconds: float
    """wall time"""
    resumed: bool = False
    """whether it went on from a saved state, so that its time says little"""
    error: str = ""
    """why it failed; empty for good"""
    hint: str = ""
    """what to do then"""
    interrupted: bool = False
    """Ctrl-C: not the unit's fault"""


def do_unit(unit: Unit, command: str, progress: bool, say: Callable[[str], None] | None = None) -> Outcome:
    """Do the unit and say what became of it; only Ctrl-C is raised."""
    from ..train.progress import Interrupted

    start = time.monotonic()
    resumed = False
    try:
        if isinstance(unit.work, Init):
            _init(unit.work, unit.out)
        elif isinstance(unit.work, Train):
            resumed = _train(unit.work, unit.out, progress)
        else:
            _evaluate(unit.work, unit.out, command, say)
    except Interrupted as error:
        return Outcome(unit.key, time.monotonic() - start, error=str(error), hint=error.hint, interrupted=True)
    except TinyLlavaEdgeError as error:
        return Outcome(unit.key, time.monotonic() - start, error=str(error), hint=error.hint)
    except Exception as error:  # a bug that one cell meets must not cost the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        return Outcome(unit.key, time.monotonic() - start, error=" ".join(said.split())[:500])
    return Outcome(unit.key, time.monotonic() - start, resumed)


def limit_threads(count: int) -> None:
    """Of this process: so many CPU threads for torch."""
    import torch

    torch.set_num_threads(count)


def _init(work: Init, out: Path) -> None:
    from ..train.backbones import init_checkpoint

    cell = work.cell
    init_checkpoint(
        work.spec,
        out,
        vision_dir=cell.tower.path,
        llm_dir=cell.llm.path,
        connector_options=cell.connector.options,
        seed=work.seed,
    )


def _train(work: Train, out: Path, progress: bool) -> bool:
    from ..train.monitor import Monitor
    from ..train.trainer import train

    monitor = Monitor(track=("jsonl",), samples=0)  # a grid has many runs
    result = train(work.source, work.stage, work.data, work.images, out, force=True, progress=progress, monitor=monitor)
    return result.resumed_from > 0


def _evaluate(work: Evaluate, out: Path, command: str, say: Callable[[str], None] | None) -> None:
    """Answers of every task, each in a file that a killed run resumes; joined and named when all are there."""
    from ..benchmarks.environment import capture, environment_sample
    from ..benchmarks.evaluation import evaluate
    from ..benchmarks.scoring import finish_file
    from ..eval_commands import load_task
    from ..runtimes.reference import open_reference

    start = time.monotonic()
    name = f"{work.cell.name}@{work.seed}"
    parts: list[Path] = []
    runtime = open_reference(work.checkpoint)
    try:
        here = environment_sample(capture(runtime)).environment_id
        for number, wanted in enumerate(work.plan.tasks):
            task, questions = load_task(wanted, work.plan.data, work.plan.images)
            part = out.parent / f"answers-{number}.jsonl"
            if _machine(part) not in ("", here):
                part.unlink()  # begun on another machine or with other libraries
            result = evaluate(runtime, questions, task, limit=work.plan.limit, out=part, progress=say)
            finish_file(part, task, result, name)
            parts.append(part)
        parameters = sum(tensor.numel() for tensor in runtime.model.parameters())
    finally:
        runtime.close()
    answers = [sample for part in parts for sample in read_results([part])]
    detail: dict[str, Any] = {
        "command": command,
        "axes": work.cell.axes,
        "cell": work.cell.name,
        "seed": work.seed,
        "parameters": parameters,
        "stages": [_stage(path) for path in work.stages],
        "eval_seconds": round(time.monotonic() - start, 1),
    }
    first = Sample("command", "reference", name, CELL, detail=detail)
    write_results(out, [first, *(replace(s, build=name) if s.build else s for s in answers)])
    for part in parts:
        part.unlink()


def _machine(part: Path) -> str:
    """Id of the environment that a file of answers was begun in; empty for no file."""
    if not part.is_file() or not part.stat().st_size:
        return ""
    lines = read_results([part], tolerate_cut=True)
    return lines[0].environment_id if lines else "unknown"


def _stage(checkpoint: Path) -> dict[str, Any]:
    """What the trainer's log says about a stage, without the losses of its steps."""
    path = checkpoint.parent / f"{checkpoint.name}.train.json"
    log = json.loads(path.read_text(encoding="utf-8"))
    keys = ("rows", "packs", "steps", "seconds", "images_per_s", "final_loss")
    changed = {key: log["recipe"][key] for key in ("name", "learning_rate", "batch_size", "epochs", "seed")}
    return changed | {key: round(log[key], 4) if isinstance(log[key], float) else log[key] for key in keys}


def slim(sample: Sample) -> Sample:
    """An answer line without what no comparison of cells needs; other lines as they are."""
    if sample.kind != "answer":
        return sample
    detail = {key: value for key, value in sample.detail.items() if key not in HEAVY}
    if detail.get("parsed") == detail["given"]:
        detail.pop("parsed")
    return replace(sample, detail=detail)


def failure(name: str, command: str, outcome: Outcome, axes: dict[str, str], seed: int) -> Sample:
    """The line of a run that failed."""
    detail = {"command": command, "axes": axes, "seed": seed, **asdict(outcome)}
    return Sample("command", "reference", name, FAILED, detail=detail)

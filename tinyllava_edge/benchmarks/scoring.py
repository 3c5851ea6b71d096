"""Records → the figures that are published, as `accuracy` lines, each with its protocol; and whole files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyllava_edge.benchmarks.evaluation import EvalResult
from tinyllava_edge.benchmarks.out_file import without_companions
from tinyllava_edge.benchmarks.results import AnswerRecord, Sample, answered_on, read_results, write_results
from tinyllava_edge.benchmarks.run_file import BLIND, PICTURE, Run
from tinyllava_edge.benchmarks.tasks.base import Task
from tinyllava_edge.errors import DataError

JSON_TASK = "llava_json"  # in a score's name, where the task has none
_MODEL = ("bundle", "bundle_sha256", "files", "model", "checkpoint_sha256")  # of a runtime's facts: whose answers


def metrics_of(task: Task, records: Sequence[AnswerRecord]) -> dict[str, float]:
    """The task's figures, or nothing where labels or the judge's replies are missing."""
    if task.judging is not None:
        return task.metrics(records) if all("replies" in record.facts for record in records) else {}
    return task.metrics(records) if all(record.value is not None for record in records) else {}


def score_samples(
    task: Task, records: Sequence[AnswerRecord], runtime: str, build: str, stage: str, environment_id: str, model: str
) -> list[Sample]:
    """`accuracy` lines, named `task/metric`; of a blind run `blind/task/metric`.

    Args:
        task: whose metrics.
        records: all answers of a run, in the set's order.
        runtime, build, stage, environment_id: as on the answers' lines.
        model: name of the model, for tables that set models side by side.
    """
    common = {"protocol": task.protocol, "model": model}
    judges = sorted({str(record.facts["judge"]) for record in records if "judge" in record.facts})
    if judges:
        common |= {"judge": ", ".join(judges)}
    prefix = "blind/" if stage == BLIND else ""
    return [
        Sample(
            "accuracy",
            runtime,
            build,
            f"{prefix}{task.name or JSON_TASK}/{name}",
            value,
            task.units.get(name.rpartition("/")[2], task.unit),
            0,
            environment_id,
            answered_on(runtime),
            detail={
                **common,
                "n": sum(task.rests_on(name, record) for record in records),
                "headline": name == task.headline and stage == PICTURE,
            },
        )
        for name, value in metrics_of(task, records).items()
    ]


def finish_file(path: Path, task: Task, result: EvalResult, model: str) -> dict[str, float]:
    """Put a whole run's file in order: answers by their number in the set, judged scores filled in, figures at the end.

    Answers of a larger sample that the file holds besides stay there.

    Returns:
        The figures; none for a shard, which is scored after `eval merge`.
    """
    samples = [sample for sample in read_results([path]) if sample.kind != "accuracy"]
    records = {record.id: record for record in result.records}
    answers: dict[int, Sample] = {}
    for sample in samples:
        if sample.kind == "answer":
            record = records.get(str(sample.detail["id"])) or AnswerRecord.from_sample(sample)
            key = (sample.runtime, sample.build, sample.stage, sample.sample, sample.environment_id)
            answers[sample.sample] = record.to_sample(*key)
    head = [sample for sample in samples if sample.kind != "answer"]
    whole = result.run is None or result.run.shard is None
    scores: list[Sample] = []
    if whole:
        environment_id = next((sample.environment_id for sample in head if sample.kind == "environment"), "")
        scores = score_samples(task, result.records, result.runtime, result.build, result.stage, environment_id, model)
    write_results(path, [*head, *(answers[number] for number in sorted(answers)), *scores])
    return {sample.stage.rpartition(f"{task.name or JSON_TASK}/")[2]: sample.value or 0.0 for sample in scores}


def merge_files(paths: Sequence[Path]) -> tuple[list[Sample], Run, list[AnswerRecord]]:
    """Join the shards of one evaluation.

    Returns:
        Lines of the joined file without figures, the run as if it had not been spread, and its answers in order.

    Raises:
        DataError: parts of different evaluations or models, a part twice or missing, answers that are missing, there
            twice or of another run than their file.
    """
    paths = without_companions(paths)
    environments: dict[str, Sample] = {}
    parts: dict[int, Path] = {}
    answers: dict[int, Sample] = {}
    first: tuple[Run, tuple[str, str, str]] | None = None
    model: dict[str, object] = {}
    seen: set[str] = set()
    for path in paths:
        samples = read_results([path], tolerate_cut=True)  # what a killed shard lacks is counted below
        runs = [sample for sample in samples if sample.kind == "run"]
        if len(runs) != 1:
            raise DataError(f"{path}: holds {len(runs)} evaluations", "name files that `eval --shard i/n -o` wrote")
        run, key = _run(path, runs[0]), _key(runs[0])
        if run.shard is None:
            raise DataError(f"{path}: is no shard", "name files that `eval --shard i/n -o` wrote")
        base = replace(run, shard=None)
        if first is None:
            first = (base, key)
        if (base, key) != first:
            raise DataError(f"{path}: shard of another evaluation than {paths[0]}", "name the shards of one evaluation")
        if run.shard[1] != len(paths):
            raise DataError(
                f"{path}: shard {run.shard[0]}/{run.shard[1]}, which is another count than the {len(paths)} files",
                "name all shards of one evaluation, each once",
            )
        machines = [sample for sample in samples if sample.kind == "environment"]
        for machine in machines:
            facts = machine.detail.get("runtime", {})
            own = {name: facts.get(name) for name in _MODEL}
            model = model or own
            if own != model:
                raise DataError(f"{path}: answers of another model than {paths[0]}", "name the shards of one model")
        if run.shard[0] in parts:
            raise DataError(f"{path}: the same shard as {parts[run.shard[0]]}", "name every shard once")
        parts[run.shard[0]] = path
        environments |= {sample.environment_id: sample for sample in machines}
        own_answers = [sample for sample in samples if sample.kind == "answer"]
        _check_answers(path, run, key, own_answers, seen)
        answers |= {sample.sample: sample for sample in own_answers}
    if first is None:
        raise DataError("no files to merge", "name the shards")
    whole, key = first
    if len(answers) != whole.asked:
        raise DataError(
            f"{', '.join(map(str, paths))}: {len(answers):,} of {whole.asked:,} answers",
            "let the unfinished shard go on: the same command resumes it",
        )
    ordered = [answers[number] for number in sorted(answers)]
    head = [*environments.values(), whole.to_sample(*key, next(iter(environments), ""))]
    return [*head, *ordered], whole, [AnswerRecord.from_sample(sample) for sample in ordered]


def _run(path: Path, sample: Sample) -> Run:
    try:
        return Run.from_sample(sample)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error


def _key(sample: Sample) -> tuple[str, str, str]:
    return sample.runtime, sample.build, sample.stage


def _check_answers(path: Path, run: Run, key: tuple[str, str, str], answers: Sequence[Sample], seen: set[str]) -> None:
    """Raises DataError for an answer of another run than its file, or to a question that has one; fills `seen`."""
    for sample in answers:
        try:
            record = AnswerRecord.from_sample(sample)
        except DataError as error:
            raise DataError(f"{path}: {error.message}", error.hint) from error
        if _key(sample) != key or (record.task, record.protocol) != (run.task, run.protocol):
            raise DataError(f"{path}: answer {record.id!r} belongs to another run", "evaluate this shard again")
        if record.id in seen or not 0 <= sample.sample < run.n:
            raise DataError(
                f"{path}: question {record.id!r} twice, or out of place", "let the same command finish this shard"
            )
        seen.add(record.id)

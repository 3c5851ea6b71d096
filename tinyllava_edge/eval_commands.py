"""What `eval` does between its flags and the benchmarks: find the data, open the runtimes, ask, judge, score, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import MANIFEST, WEB, Bundle, read_bundle
from .errors import BundleError, DataError, DependencyError, UsageError

if TYPE_CHECKING:
    from .benchmarks.evaluation import EvalResult
    from .benchmarks.judge import Judge
    from .benchmarks.run_file import Shard
    from .benchmarks.tasks.base import Question, Task
    from .runtimes.base import Runtime

Progress = Callable[[str], None]
RUNTIMES = ("edge", "mtmd", "web", "reference")


@dataclass(frozen=True)
class Opening:
    """How runtimes are opened."""

    runtime: str = ""
    """one of RUNTIMES; by default a bundle's builds run where their names say (`web-…` in a browser, others on `edge`)
    and a checkpoint on `reference`"""
    device: str = "cpu"
    """of the edge runtime: cpu, cuda or auto"""
    n_threads: int | None = None
    """CPU threads; all cores by default"""
    n_ctx: int | None = None
    """positions that fit; the model's own by default"""
    allow_unverified: bool = False
    """also builds without a stamp"""


@dataclass(frozen=True)
class Asking:
    """What is asked, and where the answers go."""

    limit: int | None = None
    """fixed sample of so many questions"""
    blind: bool = False
    """shuffled pictures"""
    shard: Shard | None = None
    """only this part"""
    out: Path | None = None
    """per-sample file; tasks and builds are put into its name where there are several"""
    judge: Judge | None = None
    """judges the tasks that want one"""
    answers: Path | None = None
    """answers file that is scored, and so not written over"""


def load_task(name: str, data: Path | None, images: Path | None) -> tuple[Task, list[Question]]:
    """A task by name with its questions, or a LLaVA JSON file.

    Raises:
        UsageError: an unknown task, or a directory that it needs was not named.
        DataError: something is missing there; what, and where it is published.
    """
    from .benchmarks.tasks import find
    from .benchmarks.tasks.llava_json import EXACT, load_rows

    if name.endswith(".json") or "/" in name:
        if images is None:
            raise UsageError(f"--task {name} needs --images", "name the directory that its image paths start from")
        return EXACT, load_rows(Path(name), images)
    task = find(name)
    if data is None:
        if any(file.needed for file in task.files):
            lines = "; ".join(f"{' or '.join(f.paths)}: {f.what}, {f.source}" for f in task.files if f.needed)
            raise UsageError(f"--task {name} needs --data, a directory with {lines}", "name it with --data DIR")
        return task, task.load(Path())
    if not data.is_dir():
        raise DataError(f"{data}: no directory", "name the task's data directory with --data")
    inner = data / task.folder
    return task, task.load(inner if task.folder and inner.is_dir() else data)


def evaluate_model(
    model: Path,
    tasks: Sequence[str],
    data: Path | None,
    images: Path | None,
    *,
    builds: Sequence[str],
    opening: Opening,
    asking: Asking,
    progress: Progress,
) -> dict[str, Any]:
    """Score a checkpoint, or builds of a bundle, on every task; prints one line each."""
    from .benchmarks.evaluation import evaluate

    tasks = list(dict.fromkeys(tasks))
    wanted = list(dict.fromkeys(build_names(model, builds, opening.runtime)))
    loaded = {name: load_task(name, data, images) for name in tasks}  # bad data is said before a model is opened
    check_judge([task for task, _ in loaded.values()], asking)
    results: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    for build, runtime in open_runtimes(model, wanted, opening):
        try:
            for name, (task, questions) in loaded.items():
                label = [task.name or Path(name).stem] * (len(tasks) > 1) + [build] * (len(wanted) > 1)
                out = named(asking.out, label)
                found = evaluate(
                    runtime,
                    questions,
                    task,
                    shuffle_pictures_seed=0 if asking.blind else None,
                    limit=asking.limit,
                    shard=asking.shard,
                    out=out,
                    progress=progress,
                )
                results[name][build] = conclude(task, questions, found, runtime.spec.name, out, asking, progress)
        finally:
            runtime.close()
    return {"model": str(model), "results": results}


def score_answers(
    path: Path, tasks: Sequence[str], data: Path | None, images: Path | None, *, asking: Asking, progress: Progress
) -> dict[str, Any]:
    """Score a file of answers that was made elsewhere. Raises DataError when it does not fit the questions."""
    from .benchmarks.answer_files import read_answers
    from .benchmarks.environment import capture, environment_sample
    from .benchmarks.evaluation import EvalResult
    from .benchmarks.out_file import check_replaceable, check_target
    from .benchmarks.results import write_results
    from .benchmarks.run_file import PICTURE, Run

    if len(tasks) != 1:
        raise UsageError("--answers goes with one task", "name the one that the answers belong to")
    if asking.limit or asking.shard or asking.blind:
        raise UsageError("--answers goes without --limit, --shard and --blind", "an answers file is scored whole")
    task, questions = load_task(tasks[0], data, images)
    check_judge([task], asking)
    if asking.out is not None:
        check_target(asking.out, [path])
    records = tuple(read_answers(path, task, questions))
    run = Run.of(task, questions, asked=len(questions), limit=None, shard=None)
    asking = replace(asking, answers=path)
    result = EvalResult("answers", path.stem, PICTURE, records, capture(), run)
    if asking.out is not None:
        key = (result.runtime, result.build, run.to_sample("", "", "", "").detail)
        check_replaceable(
            asking.out, lambda old: [(s.runtime, s.build, s.detail) for s in old if s.kind == "run"] == [key]
        )
        first = environment_sample(result.environment)
        line = run.to_sample(result.runtime, result.build, result.stage, first.environment_id)
        write_results(asking.out, [first, line, *result.samples()[1:]])
    found = conclude(task, questions, result, path.stem, asking.out, asking, progress)
    return {"answers": str(path), "results": {tasks[0]: {path.stem: found}}}


def conclude(
    task: Task,
    questions: Sequence[Question],
    result: EvalResult,
    model: str,
    out: Path | None,
    asking: Asking,
    progress: Progress,
) -> dict[str, Any]:
    """Judge where a judge is needed and named, score, and write the run's file, its answers and its submission."""
    from .benchmarks.scoring import finish_file, metrics_of

    if task.judging is not None and asking.judge is not None:
        result = judged(task, questions, result, out, asking.judge, progress)
    shard = asking.shard
    figures = {} if shard else metrics_of(task, result.records)
    written: list[str] = []
    if out is not None:
        finish_file(out, task, result, model)
        keep_command(out)
        written = [
            str(path)
            for path in write_official(task, result, out, model, progress, whole=shard is None, given=asking.answers)
        ]
    progress(line_of(task, result, figures, shard))
    return {
        "task": task.name,
        "protocol": task.protocol,
        "runtime": result.runtime,
        "build": result.build,
        "pictures": result.stage,
        "n": len(result.records),
        "scores": figures,
        **intervals(task, result, figures),
        "files": ([str(out)] if out else []) + written,
    }


def keep_command(out: Path) -> None:
    """Put the command line into a finished run's file, once, so that a report can show it."""
    from .benchmarks.results import Sample, read_results, write_results
    from .commands import typed

    line = Sample("command", detail={"command": typed()})
    samples = read_results([out])
    if line not in samples:
        place = 1 + max((k for k, sample in enumerate(samples) if sample.kind in ("environment", "run")), default=-1)
        write_results(out, [*samples[:place], line, *samples[place:]])


def check_judge(tasks: Sequence[Task], asking: Asking) -> None:
    """Say before hours of answering what would fail after them.

    Raises:
        UsageError: a judge without -o, or for tasks that no model judges.
    """
    if asking.judge is None:
        return
    if all(task.judging is None for task in tasks):
        raise UsageError("a judge is named, but no task here is judged by a model", "drop --judge-url, --judge-replies")
    if asking.out is None:
        raise no_place_for_replies()


def no_place_for_replies() -> UsageError:
    """The error for a judge without -o."""
    return UsageError("a judge's replies are kept beside the answers", "name a file with -o")


def judged(
    task: Task,
    questions: Sequence[Question],
    result: EvalResult,
    out: Path | None,
    judge: Judge,
    progress: Progress,
) -> EvalResult:
    """The result with the judge's scores. Raises UsageError where the replies would have no file."""
    from .benchmarks.judge import judge_records

    if out is None:
        raise no_place_for_replies()
    replies = out.with_name(f"{out.stem}.replies.jsonl")
    asked = {question.id: question for question in questions}
    chosen = [asked[record.id] for record in result.records]
    records = judge_records(task, chosen, result.records, judge, replies, progress=progress)
    return replace(result, records=tuple(records))


def write_official(
    task: Task, result: EvalResult, out: Path, model: str, progress: Progress, *, whole: bool, given: Path | None = None
) -> list[Path]:
    """The answers in LLaVA's format, and, of a whole set, the file that the official evaluator or server takes.

    Answers that were `given` in the very file stay as they are.
    """
    from .benchmarks.answer_files import write_answers

    answers = out.with_name(f"{out.stem}.answers.jsonl")
    written = []
    if given is None or given.resolve() != answers.resolve():
        write_answers(answers, task, result.records, model)
        written = [answers]
    complete = result.run is not None and len(result.records) == result.run.n
    if task.submission is not None and whole and complete:
        try:
            written.append(task.submission(result.records, out.with_name(f"{out.stem}.submission")))
        except DependencyError as error:  # the answers and scores are there already
            progress(f"no file for the official evaluator: {error.message}; {error.hint}, then the same command again")
    return written


def merge_shards(paths: Sequence[Path], out: Path, *, judge: Judge | None, progress: Progress) -> dict[str, Any]:
    """Join the files of all shards and score them as if they had been one run."""
    from .benchmarks.answer_files import question_of
    from .benchmarks.evaluation import EvalResult
    from .benchmarks.out_file import check_replaceable, check_target
    from .benchmarks.results import read_results, write_results
    from .benchmarks.scoring import merge_files
    from .benchmarks.tasks import find

    check_target(out, paths)
    samples, run, records = merge_files(paths)
    samples += [line for path in paths for line in read_results([path], tolerate_cut=True) if line.kind == "command"]
    line = next(sample for sample in samples if sample.kind == "run")
    task = find(run.task)
    if task.protocol != run.protocol:
        raise DataError(
            f"{paths[0]}: was evaluated as {run.protocol}, this version's is {task.protocol}", "evaluate again"
        )
    check_judge([task], Asking(out=out, judge=judge))
    whole = [(line.runtime, line.build, line.stage, line.detail)]
    check_replaceable(
        out, lambda old: [(s.runtime, s.build, s.stage, s.detail) for s in old if s.kind == "run"] == whole
    )
    write_results(out, samples)
    environment = next((dict(sample.detail) for sample in samples if sample.kind == "environment"), {})
    result = EvalResult(line.runtime, line.build, line.stage, tuple(records), environment, run)
    facts = environment.get("runtime", {})
    model = str(facts.get("bundle") or facts.get("model") or "")
    questions = [question_of(record) for record in records]
    return conclude(task, questions, result, model, out, Asking(out=out, judge=judge), progress)


def list_tasks() -> list[dict[str, Any]]:
    """Every task: title, protocol, and the files that it reads with where they are published."""
    from .benchmarks.tasks import TASKS, find

    found = []
    for name in TASKS:
        task = find(name)
        files = [
            {"path": " or ".join(f.paths), "what": f.what, "source": f.source, "needed": f.needed} for f in task.files
        ]
        found.append(
            {
                "task": name,
                "title": task.title,
                "protocol": task.protocol,
                "headline": task.headline,
                "folder": task.folder,
                "judge": task.judging.official_model if task.judging else "",
                "files": files,
            }
        )
    return found


def named(out: Path | None, labels: Sequence[str]) -> Path | None:
    """`results.jsonl` and (`pope`, `int8+q8_0`) → `results-pope-int8+q8_0.jsonl`."""
    if out is None or not labels:
        return out
    return out.with_name("-".join([out.stem, *labels]) + out.suffix)


def build_names(model: Path, builds: Sequence[str], runtime: str = "") -> list[str]:
    """The builds to run: those asked for, or all of a bundle's; none for a checkpoint."""
    if runtime and runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime {runtime!r}", f"known: {', '.join(RUNTIMES)}")
    is_bundle = (model / MANIFEST).is_file()
    if runtime and is_bundle == (runtime == "reference"):
        kind = "bundle" if is_bundle else "checkpoint"
        raise UsageError(f"{model} is a {kind}, which the {runtime} runtime does not open", "drop --runtime")
    if not is_bundle:
        if builds:
            raise UsageError(f"{model} is no bundle, so it has no builds", "drop --build, or name a bundle")
        return []
    bundle = read_bundle(model)
    if runtime == "web" and not bundle.web_builds():
        raise BundleError(f"{model}: holds no web files", "export it again with --web q4")
    chosen = builds or list(bundle.web_builds() if runtime == "web" else bundle.builds())
    for name in chosen:
        bundle.any_build(name)
        if runtime and name.startswith(WEB) != (runtime == "web"):
            raise UsageError(f"the {runtime} runtime does not run build {name}", "drop --runtime, or name other builds")
    return list(chosen)


def check_browser(bundle: Bundle, builds: Sequence[str], opening: Opening) -> None:
    """Say before other builds are run what a browser would refuse.

    Raises:
        UsageError: a device or a context size, which the page chooses itself.
        UnverifiedError: a build without a stamp.
    """
    found = [build for name, build in bundle.web_builds().items() if name in builds]
    if found and (opening.device != "cpu" or opening.n_ctx is not None):
        flag = "--ctx-size" if opening.n_ctx is not None else "--device"
        raise UsageError(f"{flag} means nothing to a browser", f"leave it out for {found[0].name}")
    for build in found:
        bundle.require_verified(build, opening.allow_unverified)


def open_runtimes(model: Path, builds: Sequence[str], opening: Opening) -> Iterator[tuple[str, Runtime]]:
    """Runtimes of a bundle's builds, one at a time, or the reference runtime of a checkpoint."""
    if not builds:
        from .runtimes.reference import open_reference

        reference = open_reference(model, n_threads=opening.n_threads, n_ctx=opening.n_ctx)
        yield f"reference-{reference.build}", reference
        return
    bundle = read_bundle(model)
    check_browser(bundle, builds, opening)
    for name in builds:
        if name.startswith(WEB):
            from .benchmarks.targets.browser_runtime import open_web

            page: Any = open_web(bundle, bundle.web_builds()[name], threads=opening.n_threads)
            yield name, page
        elif opening.runtime == "mtmd":
            from .runtimes.edge import sizes
            from .runtimes.mtmd import open_mtmd

            threads, context = sizes(bundle.spec, opening.n_threads, opening.n_ctx)
            yield name, open_mtmd(bundle, name, n_threads=threads, n_ctx=context)
        else:
            from .runtimes.devices import choose_device
            from .runtimes.edge import open_edge

            yield (
                name,
                open_edge(
                    bundle,
                    name,
                    n_threads=opening.n_threads,
                    n_ctx=opening.n_ctx,
                    allow_unverified=opening.allow_unverified,
                    plan=choose_device(opening.device),
                ),
            )


def intervals(task: Task, result: EvalResult, figures: Mapping[str, float]) -> dict[str, Any]:
    """Share of full scores with its 95 % interval, overall and by group; nothing where a score may be a fraction.

    Wilson's interval takes questions for independent; `compare` draws pictures.
    """
    values = {record.value for record in result.records}
    if not figures or not values <= {0.0, 1.0} or task.judging is not None:
        return {}

    def interval(value: Any) -> dict[str, float]:
        return {"accuracy": value.estimate, "low": value.low, "high": value.high}

    return {
        **interval(result.accuracy),
        "by_type": {name: interval(value) for name, value in result.by_type.items()},
        "by_tier": {name: interval(value) for name, value in result.by_tier.items()},
    }


def line_of(task: Task, result: EvalResult, figures: Mapping[str, float], shard: Shard | None) -> str:
    """One line for people."""
    who = f"{result.runtime} {result.build}"
    n = f"{len(result.records):,} answers"
    if shard is None and result.run is not None and len(result.records) < result.run.n:
        n += f", a sample of {result.run.n:,}"
    title = f"{task.title} " if task.name else ""
    if shard is not None:
        return f"{who}: {n} of shard {shard.index}/{shard.count}; `tinyllava-edge eval merge` scores all of them"
    if not figures:
        missing = "a judge: --judge-url, or --judge-replies" if task.judging else "labels: the server has them"
        return f"{who}: {title}{n}; no score without {missing}"
    rest = [f"{name} {value:.2f}" for name, value in figures.items() if name != task.headline]
    unit = "" if task.unit == "points" else " %"
    more = f" · {', '.join(rest[:6])}" + (f" and {len(rest) - 6} more" if len(rest) > 6 else "") if rest else ""
    score = f"{figures[task.headline]:.2f}{unit}" if task.headline in figures else f"no {task.headline}"
    return f"{who}: {title}{score} of {n} ({result.stage}){more} · {task.protocol}"


def diverge(
    bundle: Path,
    checkpoint: Path,
    tasks: Sequence[str],
    data: Path | None,
    images: Path | None,
    *,
    builds: Sequence[str],
    limit: int | None,
    max_tokens: int,
    out: Path | None,
    allow_unverified: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the image-conditioned divergence of builds, print its table, and write its samples."""
    from .benchmarks.divergence import measure_divergence
    from .benchmarks.divergence_summary import divergence_lines, summarise_divergence
    from .benchmarks.out_file import check_replaceable, check_target
    from .benchmarks.results import Sample, write_results
    from .commands import typed

    if len(tasks) != 1:
        raise UsageError("divergence takes one task", "measure the others in runs of their own")
    read_bundle(bundle)  # a wrong path is said before the data is read
    if out is not None:
        check_target(out)
        check_replaceable(out, lambda old: not any(sample.kind in ("run", "answer", "latency") for sample in old))
    task, questions = load_task(tasks[0], data, images)
    samples = measure_divergence(
        bundle,
        checkpoint,
        questions,
        builds=builds,
        max_tokens=max_tokens,
        limit=limit,
        allow_unverified=allow_unverified,
        task=task.name,
        progress=progress,
    )
    if out is not None:
        write_results(out, [*samples, Sample("command", detail={"command": typed()})])
    report = summarise_divergence(samples)
    for line in divergence_lines(report):
        progress(line)
    return report.to_dict()

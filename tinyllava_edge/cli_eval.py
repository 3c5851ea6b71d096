"""`eval`, `compare` and `divergence`: what a model scores, and what conversion did to its answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .cli_device import AllowUnverified, ContextSize, Device, Json, Threads
from .cli_frame import emit, talk
from .errors import UsageError
from .export.options import names

if TYPE_CHECKING:
    from .benchmarks.judge import Judge

Task = Annotated[
    str,
    typer.Option("--task", "--tasks", help="Comma list of names (`eval tasks` lists them), or a LLaVA JSON file."),
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Data directory: the task's own, or LLaVA's playground/data/eval.")
]
Images = Annotated[Path | None, typer.Option("--images", help="Picture directory of a LLaVA JSON file.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Per-sample JSON lines; a cut run goes on here.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Ask a fixed sample of so many questions.")]
JudgeUrl = Annotated[
    str, typer.Option("--judge-url", help="OpenAI-compatible endpoint that judges MM-Vet and LLaVA-W; none by default.")
]
JudgeModel = Annotated[str, typer.Option("--judge-model", help="Judge's model name, stored with the scores.")]
JudgeReplies = Annotated[
    Path | None, typer.Option("--judge-replies", help="Replay these judge's replies instead of asking.")
]


class DefaultRun(TyperGroup):
    """`eval MODEL …` is `eval run MODEL …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in front unless a command is named; `--explain` without a file reads stdin."""
        for place, word in enumerate(args):
            following = args[place + 1] if place + 1 < len(args) else "--"
            if word == "--explain" and following.startswith("-") and following != "-":
                args = [*args[: place + 1], "-", *args[place + 1 :]]
                break
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=DefaultRun,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Score a checkpoint, any build of a bundle, or a file of answers on the paper's benchmarks.\n\n"
    "`eval MODEL --task pope --data DIR` asks and scores (`eval run --help` has all options); `eval tasks` lists the "
    "benchmarks, their protocols and where their files are published; `eval merge` joins the shards of a run.",
)


def judge_of(url: str, model: str, replies: Path | None) -> Judge | None:
    """The judge that the flags name. Raises UsageError for a contradiction."""
    if replies is not None and url:
        raise UsageError("--judge-url asks and --judge-replies replays", "give one of the two")
    if not url and replies is None:
        if model:
            raise UsageError("--judge-model needs --judge-url", "name the endpoint that serves it")
        return None
    from .benchmarks.judge import EndpointJudge, ReplayJudge

    if replies is not None:
        return ReplayJudge(replies, model)
    if not model:
        raise UsageError("--judge-url needs --judge-model", "the judge's name is part of the protocol")
    return EndpointJudge(url, model)


@eval_app.command("run")
def evaluate(
    model: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE|CKPT", help="A bundle, or a checkpoint (reference runtime).")
    ] = None,
    task: Task = "easy_vqa",
    data: Data = None,
    images: Images = None,
    build: Annotated[
        str,
        typer.Option("--build", help="Builds, comma list; by default all but a browser's, which are named web-q4 …"),
    ] = "",
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime", help="edge, mtmd (llama.cpp alone, from the mmproj), web (in a browser), or reference."
        ),
    ] = "",
    device: Device = "cpu",
    threads: Threads = None,
    ctx_size: ContextSize = None,
    limit: Limit = None,
    blind: Annotated[bool, typer.Option("--blind", help="Shuffle the pictures: the blind baseline.")] = False,
    shard: Annotated[
        str,
        typer.Option("--shard", metavar="I/N", help="Only part I of N, from 0; `auto` asks torchrun's or Slurm's env."),
    ] = "",
    answers: Annotated[
        Path | None, typer.Option("--answers", help="Score this file of answers (LLaVA's format) instead of a model.")
    ] = None,
    explain: Annotated[
        str,
        typer.Option("--explain", metavar="FILE", help="Show what answers become: JSON lines with text; `-`: stdin."),
    ] = "",
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_replies: JudgeReplies = None,
    out: Out = None,
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Ask the questions of one or several benchmarks and score the answers as the official evaluators do.

    Answers go to -o line by line, and beside it in LLaVA's answer format and as the official evaluator's file.
    """
    from . import eval_commands as commands
    from .benchmarks.run_file import parse_shard

    tasks = names(task)
    if not tasks:
        raise UsageError("--task names no task", "`tinyllava-edge eval tasks` lists them")
    if explain == "-" and model is not None and not model.is_dir():  # `eval answers.jsonl --task T --explain`
        model, explain = None, str(model)
    given = sum([model is not None, answers is not None, bool(explain)])
    if not given and data is not None:  # what is missing is worth knowing before there is a model
        for name in tasks:
            _, questions = commands.load_task(name, data, images)
            talk(f"{name}: complete, {len(questions):,} questions; name a bundle or checkpoint to ask them")
        return
    if given != 1:
        raise UsageError(
            "nothing to score, or more than one thing", "name a bundle or checkpoint, --answers or --explain"
        )
    if explain:
        if out or limit or blind or shard or judge_url or judge_replies:
            raise UsageError("--explain only shows what answers become", "give it --task and --json alone")
        explain_lines(tasks, explain, as_json)
        return
    asking = commands.Asking(
        limit=limit,
        blind=blind,
        shard=parse_shard(shard, os.environ),
        out=out,
        judge=judge_of(judge_url, judge_model, judge_replies),
    )
    if answers is not None:
        if build or runtime:
            raise UsageError("--answers goes without --build and --runtime", "no model is run")
        result = commands.score_answers(answers, tasks, data, images, asking=asking, progress=talk)
    else:
        opening = commands.Opening(runtime, device, threads, ctx_size, allow_unverified)
        result = commands.evaluate_model(
            model or Path(), tasks, data, images, builds=names(build), opening=opening, asking=asking, progress=talk
        )
    if as_json:
        emit(result)


@eval_app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARDS...", help="Files of `eval --shard I/N -o`, all N.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The joined file, scored.")],
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_replies: JudgeReplies = None,
    as_json: Json = False,
) -> None:
    """Join the shards of one evaluation; scores equal those of a run that was not spread, bit for bit."""
    from .eval_commands import merge_shards

    result = merge_shards(shards, out, judge=judge_of(judge_url, judge_model, judge_replies), progress=talk)
    if as_json:
        emit(result)


@eval_app.command()
def tasks(as_json: Json = False) -> None:
    """The benchmarks: names, protocols, files, and where they are published."""
    from .eval_commands import list_tasks

    found = list_tasks()
    if as_json:
        emit(found)
        return
    for entry in found:
        print(f"{entry['task']}  {entry['title']}\n  protocol {entry['protocol']}; headline {entry['headline']}")
        if entry["judge"]:
            print(f"  judged by a model; published scores used {entry['judge']}")
        for file in entry["files"]:
            need = "" if file["needed"] else " (optional)"
            print(f"  {file['path'] or '-'}{need}: {file['what']}; {file['source']}")


def explain_lines(tasks: Sequence[str], source: str, as_json: bool) -> None:
    """`--explain`: each line for people, or with --json as JSON lines."""
    import json

    from .benchmarks.explain import explain, read_input, readable
    from .benchmarks.tasks import find

    if len(tasks) != 1:
        raise UsageError("--explain goes with one task", "name the one whose rules you want to see")
    name = "" if tasks[0].endswith(".json") or "/" in tasks[0] else tasks[0]  # a LLaVA JSON file: exact match
    for found in explain(find(name), read_input(source)):
        print(json.dumps(found, ensure_ascii=False) if as_json else readable(found), flush=True)


def compare(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="results.jsonl of the reference, or lmms-eval's sample log.")
    ],
    builds: Annotated[
        list[Path] | None, typer.Argument(metavar="BUILDS...", help="Files of the builds; the first one by default.")
    ] = None,
    task: Annotated[str, typer.Option("--task", help="Only this benchmark.")] = "",
    build: Annotated[str, typer.Option("--build", help="Only these builds, comma list.")] = "",
    reference_build: Annotated[
        str, typer.Option("--reference-build", help="Compare with this build instead of the reference runtime.")
    ] = "",
    noise: Annotated[
        Path | None, typer.Option("--noise", help="The reference run again, e.g. with other --threads: noise floor.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", min=0, help="Points that a build may lose; exit 1 if it loses more.")
    ] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Of intervals and verdicts.")] = 0.95,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 also where the answers can't show that the loss is allowed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a build's answers lost against the reference's, question by question, with tests that name themselves.

    For CI: `compare reference.jsonl build.jsonl --max-drop 0.5 --confidence 0.95` exits 1 when the build is worse
    than allowed.
    """
    from .benchmarks.compare import compare_files
    from .benchmarks.compare_text import comparison_text

    found = compare_files(
        reference,
        builds or [],
        noise=noise,
        max_drop=max_drop,
        confidence=confidence,
        strict=strict,
        task=task or None,
        reference_build=reference_build or None,
        names=names(build),
    )
    if as_json:
        emit(found.to_dict())
    else:
        print(comparison_text(found))
    if found.failed():
        raise typer.Exit(1)


def divergence(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle whose builds are measured.")],
    against: Annotated[Path, typer.Option("--against", metavar="CKPT", help="The checkpoint it was exported from.")],
    task: Task = "easy_vqa",
    data: Data = None,
    images: Images = None,
    build: Annotated[str, typer.Option("--build", help="Builds, comma list; all by default.")] = "",
    limit: Limit = 100,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Answer tokens compared.")] = 16,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="results.jsonl to write.")] = None,
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """KL divergence from the checkpoint on its own answers to pictures, split by cause: LLM, vision, both, runtime."""
    from .eval_commands import diverge

    found = diverge(
        bundle,
        against,
        names(task),
        data,
        images,
        builds=names(build),
        limit=limit,
        max_tokens=max_tokens,
        out=out,
        allow_unverified=allow_unverified,
        progress=talk,
    )
    if as_json:
        emit(found)

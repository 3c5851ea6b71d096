"""The command line. Each command imports its stage inside its body, so that `--help` stays instant.

stdout is data, stderr is talk; `--json` prints one JSON document; exit codes: 0 good, 1 failed, 2 wrong arguments.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import TinyLlavaEdgeError, UsageError

app = typer.Typer(
    name="tinyllava-edge",
    help="Train a TinyLLaVA, turn it into files that run on a device, and prove what each step cost.\n\n"
    "Start with `tinyllava-edge demo`: it trains a small model, exports it, verifies it, measures it "
    "and ends with a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "accelerate": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "onnx": "export",
    "onnxscript": "export",
    "gguf": "export",
    "easy_vqa": "data",
    "matplotlib": "report",
    "onnxruntime": "cpu",
}
_TYPER_INTERRUPTED = 130  # typer swallows Ctrl-C and returns this

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at the output path.")]
AllowUnverified = Annotated[
    bool, typer.Option("--allow-unverified", help="Run a build without a `verified` stamp; results record it.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; all cores by default.")]
BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory written by `tinyllava-edge export`.")]


def main() -> None:
    """Entry point: run the app and turn every expected failure into one line, its hint, and an exit code."""
    try:
        code = app(standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except TinyLlavaEdgeError as error:
        fail(str(error), error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        interrupted()
    except MemoryError:
        fail("out of memory", "close other programs, or choose a smaller build", 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        fail(f"this command needs the package {error.name}", f"pip install 'tinyllava-edge[{extra}]'", 1)
    except OSError as error:
        fail(
            f"{error.filename or 'file'}: {error.strerror or error}", "check the path, its permissions and the disk", 1
        )
    except Exception as error:
        usage_exit(error)


def usage_exit(error: Exception) -> None:
    """Typer's own usage errors print their usual text and exit with 2; anything else is a bug and is raised."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or code is None:
        raise error
    show()
    sys.exit(code)


def interrupted() -> None:
    """Say so and leave at once: after Ctrl-C inside exec'd code Python would end itself by signal, not with a code."""
    explain("interrupted; nothing was left half-written", "run the same command again to continue")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def fail(message: str, hint: str, code: int) -> None:
    """Explain and leave."""
    explain(message, hint)
    sys.exit(code)


def explain(message: str, hint: str) -> None:
    """Print `error: …` and, after it, `hint: …` on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def talk(message: str) -> None:
    """One line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def names(text: str) -> list[str]:
    """Comma list → names, blanks dropped."""
    return [name.strip() for name in text.split(",") if name.strip()]


def version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a TinyLLaVA, turn it into files that run on a device, and prove what each step cost."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("demo"),
    force: Annotated[bool, typer.Option("--force", help="Start over instead of resuming.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Score every build on all 9,673 test questions (slower).")
    ] = False,
    as_json: Json = False,
) -> None:
    """The whole road on the embedded default: train, export, verify, measure, report. Resumes where it stopped."""
    from .demo import DEFAULT, FULL, run_demo

    summary = run_demo(out, force=force, size=FULL if full else DEFAULT, progress=talk)
    if as_json:
        emit(summary)


@app.command()
def train(
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint directory to write.")],
    data: Annotated[Path, typer.Option("--data", help="LLaVA JSON with the conversations.")],
    images: Annotated[Path, typer.Option("--images", help="Directory that the rows' image paths start from.")],
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Checkpoint to continue from; a new model if absent.")
    ] = None,
    variant: Annotated[str, typer.Option("--variant", help="Variant of a new model; see `info --variants`.")] = "",
    vision: Annotated[
        Path | None, typer.Option("--vision", help="Hugging Face directory of a new model's tower.")
    ] = None,
    llm: Annotated[
        Path | None, typer.Option("--llm", help="Hugging Face directory of a new model's language model.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe name or TOML file.")] = "base-nano",
    stage: Annotated[str, typer.Option("--stage", help="Stage of the recipe: pretrain or finetune.")] = "finetune",
    max_bad_rows: Annotated[int, typer.Option("--max-bad-rows", min=0, help="Bad rows to skip before stopping.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train one stage: `pretrain` fits the connector on captions, `finetune` connector and LLM on answers."""
    from .commands import train_stage

    result = train_stage(
        out,
        data,
        images,
        checkpoint,
        variant,
        vision=vision,
        llm=llm,
        recipe=recipe,
        stage=stage,
        max_bad_rows=max_bad_rows,
        force=force,
    )
    emit(result) if as_json else talk(f"checkpoint: {out}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle directory to write.")],
    llm: Annotated[str, typer.Option("--llm", help="Language-model types, comma list.")] = "f16,q8_0,q4_k_m",
    vision: Annotated[str, typer.Option("--vision", help="Vision precisions, comma list.")] = "fp32,int8",
    verify_after: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Verify every build against the checkpoint afterwards.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle: preprocessing and vision ONNX, quantised GGUF, hashes; then verify it."""
    from .commands import describe_bundle, print_verify
    from .export.bundle_writer import export_bundle

    bundle = export_bundle(checkpoint, out, llm=names(llm), vision=names(vision), force=force, progress=talk)
    report = None
    if verify_after:
        from .export.verify import verify as run_verify

        report = run_verify(out, checkpoint, progress=talk)
        print_verify(report)
    value = describe_bundle(bundle)
    emit(value) if as_json else talk(f"bundle: {out} ({', '.join(value['builds'])})")
    if report is not None and not report.passed:
        raise typer.Exit(1)


@app.command()
def verify(
    bundle: BundleArg,
    against: Annotated[
        Path, typer.Option("--against", metavar="CKPT", help="Checkpoint the bundle was exported from.")
    ],
    build: Annotated[str, typer.Option("--build", help="Builds to verify, comma list; all by default.")] = "",
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Pictures to verify on, instead of the default set.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its checkpoint stage by stage; names the first stage that diverges. Exit 1 if one does."""
    from .commands import print_verify
    from .export.verify import verify as run_verify

    report = run_verify(bundle, against, builds=names(build) or None, pictures=image or None, progress=talk)
    emit(report.to_dict()) if as_json else print_verify(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def run(
    bundle: BundleArg,
    question: Annotated[str, typer.Argument(help="The question; `-` reads it from stdin.")],
    image: Annotated[Path | None, typer.Option("--image", help="Picture to ask about.")] = None,
    build: Annotated[
        str | None, typer.Option("--build", help="Build, e.g. int8+q4_k_m; the most exact by default.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Longest answer in tokens.")] = 128,
    n_ctx: Annotated[int | None, typer.Option("-c", "--ctx-size", min=8, help="Context length in tokens.")] = None,
    threads: Threads = None,
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Ask one question about a picture; the answer streams to stdout, timings go to stderr."""
    from .commands import ask

    text = sys.stdin.read() if question == "-" else question
    result = ask(
        bundle,
        text,
        image,
        build=build,
        max_tokens=max_tokens,
        n_ctx=n_ctx,
        threads=threads,
        allow_unverified=allow_unverified,
        stream=not as_json,
    )
    if as_json:
        emit(result)


@app.command("eval")
def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="BUNDLE|CKPT", help="A bundle, or a checkpoint (reference runtime).")
    ],
    task: Annotated[str, typer.Option("--task", help="easy_vqa, or a LLaVA JSON file with answers.")] = "easy_vqa",
    images: Annotated[Path | None, typer.Option("--images", help="Picture directory of a JSON task.")] = None,
    build: Annotated[str, typer.Option("--build", help="Builds, comma list; all by default.")] = "",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score a fixed sample of so many questions.")
    ] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Shuffle the pictures: the blind baseline.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Per-sample JSON lines.")] = None,
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Accuracy, overall and by question type, of a checkpoint or of any build of a bundle."""
    from .commands import evaluate_model

    result = evaluate_model(
        model,
        task,
        images,
        builds=names(build),
        limit=limit,
        blind=blind,
        out=out,
        allow_unverified=allow_unverified,
        progress=talk,
    )
    if as_json:
        emit(result)


@app.command()
def bench(
    bundle: BundleArg,
    image: Annotated[
        Path | None, typer.Option("--image", help="Picture to measure with; a built-in one by default.")
    ] = None,
    question: Annotated[str, typer.Option("--question", help="Question to measure with.")] = "what color is the shape?",
    build: Annotated[str, typer.Option("--build", help="Builds, comma list; all by default.")] = "",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Measured answers per build.")] = 20,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Longest answer in tokens.")] = 16,
    out: Annotated[Path, typer.Option("-o", "--out", help="results.jsonl to append to.")] = Path("results.jsonl"),
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Stage latencies of every build, interleaved in one run, and peak memory in a fresh process each."""
    from .commands import bench_bundle

    result = bench_bundle(
        bundle,
        image,
        question,
        builds=names(build),
        repetitions=repetitions,
        max_tokens=max_tokens,
        out=out,
        allow_unverified=allow_unverified,
        progress=talk,
    )
    if as_json:
        emit(result)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="results.jsonl files.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file; .md and .png go beside it.")] = Path(
        "report.html"
    ),
    images: Annotated[
        Path | None, typer.Option("--images", help="Pictures that were evaluated, to show flips.")
    ] = None,
) -> None:
    """One self-contained HTML page: which build to ship, Pareto plots, flips, parity, environment."""
    from .commands import write_report

    write_report(results, out, images)
    talk(f"report: {out}")


@app.command()
def info(
    path: Annotated[Path | None, typer.Argument(metavar="[CKPT|BUNDLE]", help="What to describe.")] = None,
    variants: Annotated[
        bool, typer.Option("--variants", help="List the family: sizes, parameters, visual tokens.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint or bundle is, what this machine is, what is installed, and what is wrong with it."""
    from .info import describe_path, doctor, list_variants, print_info, print_variants

    if variants and path is not None:
        raise UsageError("--variants lists the family and takes no path", "drop one of the two")
    if variants:
        rows = list_variants()
        emit(rows) if as_json else print_variants(rows)
        return
    value = describe_path(path) if path is not None else doctor()
    emit(value) if as_json else print_info(value)


if __name__ == "__main__":
    main()

"""The command line. Each command imports its stage inside its body, so that `--help` stays instant.

stdout is data, stderr is talk; `--json` prints one JSON document; exit codes: 0 good, 1 failed, 2 wrong arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .cli_ablate import ablate
from .cli_bench import bench
from .cli_device import BundleArg, Json, Threads, run, serve
from .cli_eval import compare, divergence, eval_app
from .cli_frame import emit, run_app, talk
from .cli_train import Force, merge, train
from .errors import UsageError
from .export.options import DEFAULTS, FIELDS, flag, help_text, names, shown_default

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


def main() -> None:
    """Entry point of `tinyllava-edge`."""
    run_app(app)


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


app.command()(train)
app.command()(merge)


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Directory of a released model, or its Hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint directory to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="Tokenizer files, where the model has none.")
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option("--vision", metavar="DIR", help="The tower's directory, where the model lacks its parts."),
    ] = None,
    vision2: Annotated[
        Path | None, typer.Option("--vision2", metavar="DIR", help="The second tower's directory, of a mixture of two.")
    ] = None,
    llm: Annotated[
        Path | None,
        typer.Option(
            "--llm", metavar="DIR", help="The language model's directory, where its configuration is missing."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template", help="llama, phi, gemma, qwen2_base or qwen2_instruct, where the default is not the model's."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Label of the model; the directory's by default.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take a released TinyLLaVA: Factory, Factory LoRA, legacy or Hugging Face layout, found out from its contents."""
    from .commands import import_source

    value = import_source(
        source,
        out,
        tokenizer=tokenizer,
        vision=vision,
        vision2=vision2,
        llm=llm,
        template=template,
        name=name,
        force=force,
        tell=talk,
    )
    emit(value) if as_json else talk(f"checkpoint: {out} ({value['status']}, {value['layout']})")


def option(name: str, *flags: str) -> Any:
    """Flag of a field of ExportOptions, with the one help text that both export commands show.

    A default that a profile may replace is only shown: what isn't typed must be seen.
    """
    return typer.Option(
        *(flags or (flag(name),)),
        metavar=FIELDS[name].metadata["metavar"] or None,
        help=help_text(name),
        show_default=shown_default(name) if name in DEFAULTS else True,
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Bundle directory to write.")],
    profile: Annotated[str | None, option("profile")] = None,
    llm: Annotated[str | None, option("llm")] = None,
    vision: Annotated[str | None, option("vision")] = None,
    mmproj: Annotated[str, option("mmproj")] = "",
    web: Annotated[str, option("web")] = "",
    mobile: Annotated[str, option("mobile")] = "",
    static: Annotated[bool, option("static")] = False,
    max_shard_size: Annotated[str | None, option("max_shard_size")] = None,
    imatrix: Annotated[Path | None, option("imatrix")] = None,
    tensor_types: Annotated[str, option("tensor_types")] = "",
    clip_workaround: Annotated[bool, option("clip_workaround")] = False,
    verify_after: Annotated[bool, option("verify", "--verify/--no-verify")] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into a bundle: preprocessing and vision ONNX, quantised GGUF, hashes; then verify it."""
    from .commands import export_checkpoint

    values = {
        "profile": profile,
        "llm": llm,
        "vision": vision,
        "mmproj": mmproj,
        "web": web,
        "mobile": mobile,
        "static": static,
        "max_shard_size": max_shard_size,
        "imatrix": imatrix,
        "tensor_types": tensor_types,
        "clip_workaround": clip_workaround,
        "verify": verify_after,
        "force": force,
    }
    value, passed = export_checkpoint(checkpoint, out, values, tell=talk)
    emit(value) if as_json else talk(f"bundle: {out} ({', '.join(value['builds'])})")
    if not passed:
        raise typer.Exit(1)


@app.command()
def imatrix(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, in llama.cpp's GGUF form.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="LLaVA JSON to calibrate on; easy-VQA, for nano models, by default.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Directory of its pictures.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Most conversations to run.")] = 128,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the pictures out, for comparison.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Collect an importance matrix over pictures and text: which inputs of the language model carry weight."""
    from .commands import collect_imatrix

    value = collect_imatrix(checkpoint, out, data, images, samples=samples, text_only=text_only, force=force, tell=talk)
    talk(f"importance matrix: {out} ({value['samples']} conversations, {value['image_share']:.0%} image positions)")
    if as_json:
        emit(value)


@app.command()
def quantize(
    bundle: BundleArg,
    llm: Annotated[str, typer.Option("--llm", help="Types to add, comma list, e.g. iq4_xs,q3_k_m.")],
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Written by `tinyllava-edge imatrix`.")
    ] = None,
    tensor_types: Annotated[str, option("tensor_types")] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New bundle; in place of the old one by default.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="CKPT", help="Where the weights come from if the bundle holds no float LLM."),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add language-model types to a bundle. Files that stay keep their stamps; new builds want `verify`."""
    from .commands import quantize_more

    value = quantize_more(
        bundle, names(llm), imatrix, tensor_types, out=out, checkpoint=against, threads=threads, force=force, tell=talk
    )
    emit(value) if as_json else talk(f"bundle: {value['path']} ({', '.join(value['builds'])})")


@app.command()
def verify(
    bundle: BundleArg,
    against: Annotated[
        Path, typer.Option("--against", metavar="CKPT", help="Checkpoint the bundle was exported from.")
    ],
    build: Annotated[
        str, typer.Option("--build", help="Builds to verify, comma list, e.g. web-q4; all by default.")
    ] = "",
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Pictures to verify on, instead of the default set.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its checkpoint stage by stage; names the first stage that diverges. Exit 1 if one does."""
    from .commands import keep_command, print_verify
    from .export.verify import verify as run_verify

    report = run_verify(bundle, against, builds=names(build) or None, pictures=image or None, progress=talk)
    keep_command(bundle, report)
    emit(report.to_dict()) if as_json else print_verify(report)
    if not report.passed:
        raise typer.Exit(1)


app.command()(run)
app.command()(serve)


app.add_typer(eval_app, name="eval")
app.command()(compare)
app.command()(divergence)
app.command()(ablate)


app.command()(bench)


@app.command()
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(metavar="RESULTS...", help="results.jsonl files; none with --training alone.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file; .md and .png go beside it.")] = Path(
        "report.html"
    ),
    images: Annotated[
        Path | None, typer.Option("--images", help="Pictures that were evaluated, to show flips.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            "--budget", help="Decide for this budget: ttft=500ms,total=2s,rss=1.2GB,size=900MB,energy=5J,drop=0.5."
        ),
    ] = "",
    against: Annotated[
        Path | None, typer.Option("--against", help="Results of another run, shown beside these with significance.")
    ] = None,
    training: Annotated[
        list[Path] | None,
        typer.Option(
            "--training", metavar="FILE", help="CKPT.train.json of a training stage, shown with its curves; repeatable."
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The measured scores beside the paper's and Factory's tables; .html or .md.")
    ] = False,
) -> None:
    """One self-contained HTML page: which build to ship, Pareto plots, flips, parity, environment.

    Several files are joined; two files that hold the same measurements are two runs, shown side by side.
    """
    if paper:
        from .benchmarks.paper import write_paper_report

        if budget or against or images or training or not results:
            raise UsageError("--paper takes results alone", "drop --budget, --against, --images and --training")
        write_paper_report(results, out)
    else:
        from .benchmarks.out_file import without_companions
        from .benchmarks.report_commands import write_report

        files = without_companions(results) if results else []
        shown = training or []
        talk(write_report(files, out, images, budget=budget or None, against=against, training=shown))
    talk(f"report: {out}")


@app.command()
def publish(
    source: Annotated[Path, typer.Argument(metavar="CKPT|BUNDLE", help="What to publish.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write, ready to upload.")],
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="results.jsonl whose figures the model card shows.")
    ] = None,
    base_model: Annotated[str, typer.Option("--base-model", help="Hub id of the model that this one comes from.")] = "",
    licence: Annotated[str, typer.Option("--licence", help="SPDX name of the weights' licence.")] = "apache-2.0",
    push: Annotated[
        str, typer.Option("--push", metavar="OWNER/NAME", help="Upload afterwards; lists the files and asks first.")
    ] = "",
    public: Annotated[bool, typer.Option("--public", help="A new repository is public instead of private.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """A Hugging Face directory with a model card that carries the measured table; uploads only after asking."""
    from .publish import push as upload
    from .publish import write_hf_layout

    write_hf_layout(source, out, results=results or (), base_model=base_model, licence=licence, force=force)
    talk(f"model directory: {out}")
    address = None
    if push:
        address = upload(out, push, confirm=lambda text: typer.confirm(text, err=True), private=not public)
        talk(f"uploaded: {address}" if address else "nothing was uploaded")
    if as_json:
        emit({"directory": str(out), "uploaded": address})


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

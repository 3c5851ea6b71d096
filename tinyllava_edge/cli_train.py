"""`train` and `merge`: one stage of a recipe, or what it would take, and an adapter into its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_device import Json
from .cli_frame import emit, talk

Force = Annotated[bool, typer.Option("--force", help="Replace what stands at the output path.")]


def train(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Checkpoint directory to write; needed to train.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="LLaVA JSON with the conversations; may be repeated. Needed to train."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Directory that the rows' image paths start from; needed with --data."),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Held-out conversations to score at the end; same --images.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Checkpoint to continue from; a new model if absent.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="Adapter of --checkpoint to train further, as an earlier LoRA stage wrote it."),
    ] = None,
    variant: Annotated[str, typer.Option("--variant", help="Variant of a new model; see `info --variants`.")] = "",
    vision: Annotated[
        Path | None, typer.Option("--vision", help="Hugging Face directory of a new model's tower.")
    ] = None,
    llm: Annotated[
        Path | None, typer.Option("--llm", help="Hugging Face directory of a new model's language model.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", help="Recipe name or TOML file; by default the one in the variant's name, else base-nano."
        ),
    ] = "",
    stage: Annotated[
        str,
        typer.Option("--stage", help="Stage of the recipe, e.g. pretrain; finetune by default, a dry run shows all."),
    ] = "",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a number of the stage, e.g. epochs=3 or llm=lora; repeatable."
        ),
    ] = None,
    max_bad_rows: Annotated[int, typer.Option("--max-bad-rows", min=0, help="Bad rows to skip before stopping.")] = 0,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that decode pictures; 0 decodes between the steps.")
    ] = 0,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=1, help="Stop training after this time, keep what was learnt.")
    ] = None,
    force: Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: print stages, trainable parameters, steps, tokens, memory and time. Needs no weights "
            "and no data; the options below are its own.",
        ),
    ] = False,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", min=1, help="Conversations of a stage; those of --data, or of the recipe's own data, by default."
        ),
    ] = None,
    text_tokens: Annotated[
        int,
        typer.Option("--text-tokens", min=1, help="Tokens of a row besides its picture, where --data is not given."),
    ] = 200,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices, one process each.")] = 1,
    device_memory: Annotated[
        str, typer.Option("--device-memory", metavar="SIZE", help="Memory of each device, e.g. 24GB: does it fit?")
    ] = "",
    engine: Annotated[
        str, typer.Option("--engine", help="How states are divided over devices: ddp, zero2, zero3 or fsdp.")
    ] = "ddp",
    peak_tflops: Annotated[
        float | None,
        typer.Option("--peak-tflops", help="Dense peak of one device in the stage's precision; without it, no time."),
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", help="Share of the peak that training reaches; an assumption, measure yours.")
    ] = 0.4,
    as_json: Json = False,
) -> None:
    """Train one stage: `pretrain` fits the connector on captions, `finetune` connector and LLM on answers.

    With --dry-run, say what a recipe takes: `train --variant TinyLLaVA-share-Sig-Phi --devices 8 --dry-run`.
    """
    from .train_commands import Source, plan_training, train_stage

    source = Source(checkpoint, adapter, variant, vision, llm, recipe, stage, tuple(changes or ()))
    files = tuple(data or ())
    if dry_run:
        machine = {
            "devices": devices,
            "memory": device_memory,
            "engine": engine,
            "peak_tflops": peak_tflops,
            "mfu": mfu,
        }
        value, lines = plan_training(
            source, files, images, max_bad_rows=max_bad_rows, rows=rows, text_tokens=text_tokens, machine=machine
        )
        emit(value) if as_json else print("\n".join(lines))
        return
    result = train_stage(
        source,
        out,
        files,
        images,
        eval_data=eval_data,
        max_bad=max_bad_rows,
        workers=workers,
        max_seconds=max_seconds,
        force=force,
    )
    emit(result) if as_json else talk(f"checkpoint: {out}")


def merge(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter directory, as `train` or PEFT wrote it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint directory to write.")],
    force: Force = False,
) -> None:
    """Add a LoRA adapter to the weights it was trained on: `merge CKPT CKPT.adapter -o MERGED`."""
    from .train.adapters import merge_checkpoint

    merge_checkpoint(checkpoint, adapter, out, force=force)
    talk(f"checkpoint: {out}")

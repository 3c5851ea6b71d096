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
        typer.Option(
            "--data",
            help="Conversations: LLaVA or `messages` JSON, JSON lines, WebDataset shards, a folder, or a "
            "mixture's TOML file (docs/data.md); repeatable. Needed to train.",
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images", help="Folder, zip or tar that the rows' image paths are looked up in; repeatable, in order."
        ),
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
        list[Path] | None,
        typer.Option("--vision", help="Hugging Face directory of a new model's tower; twice for a mixture of two."),
    ] = None,
    llm: Annotated[
        Path | None,
        typer.Option("--llm", help="Hugging Face directory of a new model's language model, any causal one."),
    ] = None,
    connector: Annotated[
        str,
        typer.Option("--connector", help="Connector of a new model, e.g. mlp2x_gelu, resampler, ldpv2-144."),
    ] = "",
    template: Annotated[
        str, typer.Option("--template", help="Conversation template of a new model; by the language model's type.")
    ] = "",
    name: Annotated[str, typer.Option("--name", help="Name of a new model that is no variant.")] = "",
    max_length: Annotated[
        int,
        typer.Option("--max-length", min=0, help="Longest sequence of a new model, picture included."),
    ] = 0,
    image_policy: Annotated[
        str, typer.Option("--image-policy", help="How a new model's pictures become square: warp, crop or pad.")
    ] = "",
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
    max_bad_rows: Annotated[
        str,
        typer.Option("--max-bad-rows", metavar="N|P%", help="Bad rows to skip before stopping: so many, or 1% of all."),
    ] = "0",
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that decode pictures; 0 decodes between the steps.")
    ] = 0,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=1, help="Stop training after this time, keep what was learnt.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder where tokens and tower features are kept for other runs too."),
    ] = None,
    cache_size: Annotated[
        str, typer.Option("--cache-size", metavar="SIZE", help="The most that kept tower features may take.")
    ] = "2GiB",
    feature_type: Annotated[
        str, typer.Option("--feature-type", help="How they are kept: float32, bfloat16 or float16.")
    ] = "float32",
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Log to wandb, trackio or mlflow too, beside JSON lines and TensorBoard."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Rows that are answered now and then while it trains.")
    ] = 4,
    sample_every: Annotated[
        int | None,
        typer.Option(
            "--sample-every", min=0, help="Steps between those answers, 0: never; at saved states by default."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option("--engine", help="How states are divided over processes: ddp, zero2, zero3 or fsdp."),
    ] = "ddp",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep what zero2, zero3 or fsdp divide in the host's memory.")
    ] = False,
    engine_config: Annotated[
        Path | None, typer.Option("--engine-config", help="DeepSpeed JSON file of one's own, for zero2 and zero3.")
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option("--peak-tflops", help="Dense peak of one device in the stage's precision, for MFU and time."),
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
    mfu: Annotated[
        float,
        typer.Option("--mfu", help="Share of the peak that is reached, recomputation counted; an assumption."),
    ] = 0.4,
    as_json: Json = False,
) -> None:
    """Train one stage: `pretrain` fits the connector on captions, `finetune` connector and LLM on answers.

    With --dry-run, say what a recipe takes: `train --variant TinyLLaVA-share-Sig-Phi --devices 8 --dry-run`.
    """
    from .train_commands import Source, ending, parse_bad, plan_training, train_stage

    source = Source(
        checkpoint, adapter, variant, tuple(vision or ()), llm, recipe, stage, tuple(changes or ()),
        connector=connector, template=template, name=name, max_length=max_length, image_policy=image_policy,
    )  # fmt: skip
    files, places, max_bad = tuple(data or ()), tuple(images or ()), parse_bad(max_bad_rows)
    if dry_run:
        machine = {
            "devices": devices,
            "memory": device_memory,
            "engine": engine,
            "peak_tflops": peak_tflops,
            "mfu": mfu,
        }
        value, lines = plan_training(
            source, files, places, max_bad=max_bad, rows=rows, text_tokens=text_tokens, machine=machine,
            cache_size=cache_size, feature_type=feature_type,
        )  # fmt: skip
        emit(value) if as_json else print("\n".join(lines))
        return
    result = train_stage(
        source,
        out,
        files,
        places,
        eval_data=eval_data,
        max_bad=max_bad,
        workers=workers,
        max_seconds=max_seconds,
        force=force,
        cache=cache,
        cache_size=cache_size,
        feature_type=feature_type,
        monitor={
            "track": tuple(track or ()),
            "samples": samples,
            "sample_every": sample_every,
            "peak_tflops": peak_tflops,
        },
        engine={"name": engine, "offload": offload, "config": engine_config},
    )
    if result is not None:  # of several processes, one speaks
        emit(result) if as_json else talk(ending(result))


def merge(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter directory, as `train` or PEFT wrote it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint directory to write.")],
    force: Force = False,
) -> None:
    """Add a LoRA adapter to the weights it was trained on: `merge work/stage-1 work/lora.adapter -o work/merged`."""
    from .train.adapters import merge_checkpoint

    merge_checkpoint(checkpoint, adapter, out, force=force)
    talk(f"checkpoint: {out}")

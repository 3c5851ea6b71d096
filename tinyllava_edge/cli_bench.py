"""`bench`: how fast each build is, what it takes, and whether it stays within a budget; `cli.py` takes it in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .benchmarks import bench_grid as defaults
from .cli_device import AllowUnverified, BundleArg, Json
from .cli_frame import emit, talk
from .errors import UsageError


def bench(
    bundle: BundleArg,
    build: Annotated[str, typer.Option("--build", help="Builds, comma list; all by default.")] = "",
    image: Annotated[
        Path | None, typer.Option("--image", help="Picture to measure with; generated ones by default.")
    ] = None,
    image_size: Annotated[
        str, typer.Option("--image-size", metavar="LIST", help="Sizes of generated pictures, e.g. 64,640x480.")
    ] = "",
    question: Annotated[str, typer.Option("--question", help="Question to measure with.")] = defaults.QUESTION,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest answer in tokens.")
    ] = defaults.MAX_TOKENS,
    prompt: Annotated[
        str,
        typer.Option("-p", "--n-prompt", metavar="LIST", help="llama-bench's ppN: prefill of N text tokens, e.g. 512."),
    ] = "",
    gen: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="LIST", help="llama-bench's tgN: N tokens decoded, e.g. 128.")
    ] = "",
    threads: Annotated[
        str, typer.Option("-t", "--threads", metavar="LIST", help="Numbers of CPU threads, e.g. 1,2; all by default.")
    ] = "",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, help="Measured rounds at least.")
    ] = defaults.REPETITIONS,
    min_time: Annotated[
        float, typer.Option("--min-time", min=0, help="Seconds of rounds at least.")
    ] = defaults.MIN_TIME_S,
    max_time: Annotated[
        float, typer.Option("--max-time", min=0.001, help="Seconds after which no round begins, -r met or not.")
    ] = defaults.MAX_TIME_S,
    resolution: Annotated[
        float,
        typer.Option(
            "--resolution", metavar="PERCENT", min=0, max=99,
            help="Go on, for 10 times -r rounds at most, until 4 of 5 such runs would tell such a change; 0: don't.",
        ),
    ] = 100 * defaults.RESOLUTION,
    target: Annotated[
        str, typer.Option("--target", metavar="LIST", help="Where: cpu, cuda, browser, ssh://user@host[:port]/dir.")
    ] = "cpu",
    device: Annotated[
        str, typer.Option("--device", metavar="LIST", help="Devices of each target: cpu,cuda; cpu by default.")
    ] = "",
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Memory and loading, in a fresh process per build.")
    ] = True,
    out: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--out", metavar="FORM|FILE",
            help="md, csv, json, jsonl or sql on stdout (md by default), or a results.jsonl to append to; repeatable.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", metavar="LIMITS", help="Exit 1 if a build exceeds ttft=500ms,rss=1.2GB,size=900MB …"),
    ] = "",
    ssh_option: Annotated[
        list[str] | None, typer.Option("--ssh-option", metavar="NAME=VALUE", help="As in ssh_config; repeatable.")
    ] = None,
    remote_python: Annotated[
        str, typer.Option("--remote-python", metavar="PATH", help="Interpreter there that has the dependencies.")
    ] = "",
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Stage latencies of every build, interleaved in one run; energy, memory, loading, ceilings; a gate for CI."""
    from .bench_commands import bench_bundle
    from .benchmarks import bench_formats

    if as_json and any(word in bench_formats.FORMATS for word in out or ()):
        raise UsageError("--json and -o with a form both want stdout", "give one of the two")
    found = bench_bundle(
        bundle,
        image=image,
        grid={
            "builds": build,
            "prompt": prompt,
            "gen": gen,
            "threads": threads,
            "image_sizes": image_size,
            "devices": device,
        },
        options={
            "question": question,
            "max_tokens": max_tokens,
            "repetitions": repetitions,
            "min_time_s": min_time,
            "max_time_s": max_time,
            "resolution": resolution / 100,
            "memory": memory,
        },
        target=target,
        ssh={"ssh_options": ssh_option or [], "remote_python": remote_python},
        outputs=out or [],
        budget=budget,
        allow_unverified=allow_unverified,
        progress=talk,
    )
    emit(found.value) if as_json else print(found.text, end="")
    for line in found.budget:
        talk(f"budget: {line}")
    if not found.passed:
        raise typer.Exit(1)

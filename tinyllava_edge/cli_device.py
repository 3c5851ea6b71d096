"""The commands of every day on the device: `run` and `serve`; `cli.py` takes them in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_frame import emit, talk
from .errors import UsageError
from .export.options import names
from .runtimes.server.options import FIELDS, ServerOptions, flag, help_text

DEFAULTS = ServerOptions()

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
MemoryCheck = Annotated[
    bool, typer.Option("--memory-check/--no-memory-check", help="Refuse a build that needs more memory than there is.")
]
AllowUnverified = Annotated[
    bool, typer.Option("--allow-unverified", help="Run a build without a `verified` stamp; results record it.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="CPU threads; all cores by default.")]
BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory written by `tinyllava-edge export`.")]
BuildName = Annotated[str | None, typer.Option("--build", help="Build, e.g. int8+q4_k_m; the most exact by default.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu; cuda, an error unless all of it runs there; auto, the best there is.")
]
GpuLayers = Annotated[
    int | None, typer.Option("-ngl", "--gpu-layers", min=0, help="Language-model layers on the GPU; all by default.")
]
ContextSize = Annotated[int | None, typer.Option("-c", "--ctx-size", min=8, help="Context length in tokens.")]
FlashAttention = Annotated[bool, typer.Option("-fa", "--flash-attn", help="llama.cpp's fused attention.")]
TypeK = Annotated[
    str | None, typer.Option("-ctk", "--cache-type-k", help="Type of the cached keys: f16, bf16, q8_0, q4_0 …")
]
TypeV = Annotated[
    str | None, typer.Option("-ctv", "--cache-type-v", help="Type of the cached values; quantised ones need -fa.")
]
ImageCache = Annotated[
    Path | None, typer.Option("--image-cache", metavar="DIR", help="Keep image embeddings here between runs.")
]


def run(
    bundle: BundleArg,
    question: Annotated[str, typer.Argument(help="The question; `-` reads it from stdin.")] = "",
    image: Annotated[list[Path] | None, typer.Option("--image", help="Picture to ask about; may be repeated.")] = None,
    interactive: Annotated[
        bool, typer.Option("-i", "--interactive", help="Chat: history, /image PATH, /new, /help.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System text, instead of the model's own.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", help="0 takes the likeliest token, above it draws.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among this many tokens; 0 is no limit.")] = 0,
    seed: Annotated[int | None, typer.Option("-s", "--seed", help="Seed of the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text.")] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar-file", help="GBNF grammar that the answer must follow.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="JSON schema that the answer must follow.")
    ] = None,
    build: BuildName = None,
    device: Device = "cpu",
    n_gpu_layers: GpuLayers = None,
    n_ctx: ContextSize = None,
    threads: Threads = None,
    flash_attention: FlashAttention = False,
    type_k: TypeK = None,
    type_v: TypeV = None,
    image_cache: ImageCache = None,
    check_memory: MemoryCheck = True,
    allow_unverified: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Ask about pictures: one question, or a chat with -i. The answer streams to stdout, timings go to stderr."""
    from .terminal import answer_once, chat, read_limited, read_schema

    engine = engine_arguments(
        build,
        device,
        n_gpu_layers,
        n_ctx,
        threads,
        flash_attention,
        type_k,
        type_v,
        image_cache,
        allow_unverified,
        check_memory,
    )
    from .runtimes.sampling import Sampling

    request = {
        "system": system,
        "max_tokens": max_tokens,
        "sampling": Sampling(temperature, top_p, top_k, seed),
        "stop": tuple(stop or ()),
        "grammar": None if grammar is None else read_limited(grammar),
        "json_schema": None if json_schema is None else read_schema(json_schema),
    }
    if interactive:
        if question or as_json:
            raise UsageError("-i takes neither a question nor --json", "type the question at the prompt")
        chat(bundle, image or [], engine, request)
        return
    text = sys.stdin.read() if question == "-" else question
    result = answer_once(bundle, text, image or [], engine, request, not as_json)
    if as_json:
        emit(result)


def engine_arguments(
    build: str | None,
    device: str,
    n_gpu_layers: int | None,
    n_ctx: int | None,
    threads: int | None,
    flash_attention: bool,
    type_k: str | None,
    type_v: str | None,
    image_cache: Path | None,
    allow_unverified: bool,
    check_memory: bool,
) -> dict[str, Any]:
    """Flags that `run` and `serve` share → arguments of open_bundle."""
    from .runtimes.caches import Caches

    return {
        "build": build,
        "device": device,
        "n_gpu_layers": n_gpu_layers,
        "n_ctx": n_ctx,
        "n_threads": threads,
        "flash_attention": flash_attention,
        "type_k": type_k,
        "type_v": type_v,
        "caches": Caches(image_dir=image_cache),
        "allow_unverified": allow_unverified,
        "check_memory": check_memory,
    }


def setting(name: str, *flags: str) -> Any:
    """Flag of a field of ServerOptions, with the help text that stands beside it."""
    metavar = FIELDS[name].metadata["metavar"]
    return typer.Option(*(flags or (flag(name),)), metavar=metavar or None, help=help_text(name))


def serve(
    bundle: BundleArg,
    host: Annotated[str, setting("host")] = DEFAULTS.host,
    port: Annotated[int, setting("port")] = DEFAULTS.port,
    build: BuildName = None,
    device: Device = "cpu",
    n_gpu_layers: GpuLayers = None,
    n_ctx: ContextSize = None,
    threads: Threads = None,
    flash_attention: FlashAttention = False,
    type_k: TypeK = None,
    type_v: TypeV = None,
    image_cache: ImageCache = None,
    check_memory: MemoryCheck = True,
    allow_unverified: AllowUnverified = False,
    api_key_file: Annotated[Path | None, setting("api_key_file")] = None,
    insecure_no_key: Annotated[bool, setting("insecure_no_key")] = False,
    allowed_hosts: Annotated[str, setting("allowed_hosts")] = "",
    allowed_origins: Annotated[str, setting("allowed_origins")] = "",
    page: Annotated[bool, setting("page", "--page/--no-page")] = DEFAULTS.page,
    web: Annotated[bool, setting("web", "--web")] = False,
    web_dist: Annotated[Path | None, setting("web_dist")] = None,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Requests that may wait; more get 429.")] = 32,
    default_max_tokens: Annotated[int, setting("default_max_tokens")] = DEFAULTS.default_max_tokens,
    max_body_mb: Annotated[int, setting("max_body_mb")] = DEFAULTS.max_body_mb,
    max_memory_mb: Annotated[int, setting("max_memory_mb")] = DEFAULTS.max_memory_mb,
    max_picture_mb: Annotated[int, setting("max_picture_mb")] = DEFAULTS.max_picture_mb,
    max_pictures: Annotated[int, setting("max_pictures")] = DEFAULTS.max_pictures,
    max_messages: Annotated[int, setting("max_messages")] = DEFAULTS.max_messages,
    max_connections: Annotated[int, setting("max_connections")] = DEFAULTS.max_connections,
    request_timeout_s: Annotated[float, setting("request_timeout_s")] = DEFAULTS.request_timeout_s,
    read_timeout_s: Annotated[float, setting("read_timeout_s")] = DEFAULTS.read_timeout_s,
    keep_alive_s: Annotated[float, setting("keep_alive_s")] = DEFAULTS.keep_alive_s,
    grace_s: Annotated[float, setting("grace_s")] = DEFAULTS.grace_s,
    warm_up: Annotated[bool, setting("warm_up", "--warm-up/--no-warm-up")] = DEFAULTS.warm_up,
    log_requests: Annotated[bool, setting("log_requests")] = False,
) -> None:
    """OpenAI-compatible API and a chat page for one build, on this machine: /v1/chat/completions, /metrics, /."""
    options = ServerOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        insecure_no_key=insecure_no_key,
        allowed_hosts=names(allowed_hosts),
        allowed_origins=names(allowed_origins),
        page=page,
        web=web,
        web_dist=web_dist,
        default_max_tokens=default_max_tokens,
        max_body_mb=max_body_mb,
        max_memory_mb=max_memory_mb,
        max_picture_mb=max_picture_mb,
        max_pictures=max_pictures,
        max_messages=max_messages,
        max_connections=max_connections,
        request_timeout_s=request_timeout_s,
        read_timeout_s=read_timeout_s,
        keep_alive_s=keep_alive_s,
        grace_s=grace_s,
        warm_up=warm_up,
        log_requests=log_requests,
    )
    if web:
        from .runtimes.server.web_serve import serve_web

        serve_web(bundle, options, say=talk)
        return
    from .runtimes.engine import open_bundle
    from .runtimes.server.serve import serve as run_server

    engine = engine_arguments(
        build,
        device,
        n_gpu_layers,
        n_ctx,
        threads,
        flash_attention,
        type_k,
        type_v,
        image_cache,
        allow_unverified,
        check_memory,
    )
    run_server(lambda: open_bundle(bundle, max_queue=max_queue, **engine), options, say=talk)

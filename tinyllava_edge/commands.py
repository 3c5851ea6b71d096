"""What the commands do between the command line and the stages: open, call, print. `cli.py` only declares flags."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle import MANIFEST, Bundle, open_bundle
from .errors import UsageError

if TYPE_CHECKING:
    from .benchmarks.tasks import EvalResult
    from .runtimes.base import Answer, Runtime

Progress = Callable[[str], None]


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """A bundle as JSON values: model, files, builds with their size and whether they are verified."""
    return {
        "kind": "bundle",
        "path": str(bundle.root),
        "name": bundle.name,
        "sha256": bundle.sha256,
        "source": dict(bundle.source),
        "model": bundle.spec.to_dict(),
        "files": [
            {
                "path": file.path,
                "precision": file.precision,
                "bytes": file.bytes,
                "tensor_types": dict(file.tensor_types),
                "sha256": file.sha256,
            }
            for file in bundle.files
        ],
        "builds": {
            name: {"bytes": build.bytes, "verified": bundle.is_verified(build)}
            for name, build in bundle.builds().items()
        },
        "tool_versions": dict(bundle.tool_versions),
    }


def ask(
    bundle: Path,
    question: str,
    image: Path | None,
    *,
    build: str | None,
    max_tokens: int,
    n_ctx: int | None,
    threads: int | None,
    allow_unverified: bool,
    stream: bool,
) -> dict[str, Any]:
    """Answer one question; with `stream` the text goes to stdout as it is decoded and the timings to stderr."""
    from .runtimes.edge import open_edge

    opened = open_bundle(bundle)
    runtime = open_edge(opened, build, n_threads=threads, n_ctx=n_ctx, allow_unverified=allow_unverified)

    def show(text: str) -> None:
        print(text, end="", flush=True)

    try:
        answer = runtime.answer(image, question, max_tokens=max_tokens, on_text=show if stream else None)
    finally:
        runtime.close()
    if stream:
        print(flush=True)
        print(timing_line(answer, runtime.build), file=sys.stderr)
    return {
        "answer": answer.text,
        "build": runtime.build,
        "verified": opened.is_verified(opened.build(runtime.build)),
        "finish_reason": answer.finish_reason,
        "n_prompt_tokens": answer.n_prompt_tokens,
        "n_image_tokens": answer.n_image_tokens,
        "n_generated_tokens": len(answer.token_ids),
        "timings_ms": answer.timings.to_dict(),
        "decode_tokens_per_s": answer.decode_tokens_per_s,
    }


def timing_line(answer: Answer, build: str) -> str:
    """One line for people: where the time of an answer went."""
    t = answer.timings
    rate = answer.decode_tokens_per_s
    return (
        f"[{build}] load {t.load_ms:.0f} ms · first token after {t.ttft_ms:.1f} ms "
        f"(decode image {t.decode_image_ms:.1f}, preprocess {t.preprocess_ms:.1f}, vision {t.vision_ms:.1f}, "
        f"prefill {t.prefill_ms:.1f} for {answer.n_prompt_tokens} tokens, {answer.n_image_tokens} of them image)"
        + (f" · {rate:.0f} tokens/s" if rate else "")
    )


def train_stage(
    out: Path,
    data: Path,
    images: Path,
    checkpoint: Path | None,
    variant: str,
    *,
    vision: Path | None,
    llm: Path | None,
    recipe: str,
    stage: str,
    max_bad_rows: int,
    force: bool,
) -> dict[str, Any]:
    """Train one stage of a recipe from a checkpoint, or from the backbones of a variant."""
    from .checkpoint_spec import load_spec
    from .spec import DEFAULT_VARIANT
    from .spec import variant as find_variant
    from .train import recipes
    from .train.trainer import init_checkpoint, train

    chosen = recipes.load(recipe).stage(stage)
    if checkpoint is not None and (variant or vision or llm):
        raise UsageError("--variant starts a new model and --checkpoint continues one", "give one of the two")
    if checkpoint is not None and checkpoint.resolve() == out.resolve():
        raise UsageError(f"{out} is the checkpoint to start from", "name another place with -o")
    if checkpoint is None:
        name = find_variant(variant or DEFAULT_VARIANT).name
        checkpoint = out.parent / f"{out.name}.init"
        if not checkpoint.exists() or load_spec(checkpoint).name != name:
            init_checkpoint(name, checkpoint, vision_dir=vision, llm_dir=llm, force=True)
    return train(checkpoint, chosen, data, images, out, max_bad=max_bad_rows, force=force).to_dict()


def evaluate_model(
    model: Path,
    task: str,
    images: Path | None,
    *,
    builds: Sequence[str],
    limit: int | None,
    blind: bool,
    out: Path | None,
    allow_unverified: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Score a checkpoint, or builds of a bundle, on easy-VQA or on a LLaVA JSON file; prints one line each."""
    import tempfile

    from .benchmarks.tasks import evaluate, load_rows

    wanted = build_names(model, builds)
    alone = len(wanted) < 2
    with tempfile.TemporaryDirectory() as scratch:
        if task == "easy_vqa":
            from .data.easy_vqa import convert

            paths = convert(scratch)
            rows = load_rows(paths.test_qa, paths.images)
        else:
            if images is None:
                raise UsageError(f"--task {task} needs --images", "name the directory that its image paths start from")
            rows = load_rows(Path(task), images)
        results = {}
        for name, runtime in open_runtimes(model, wanted, allow_unverified):
            path = None if out is None else out if alone else out.parent / f"{out.stem}-{name}{out.suffix}"
            try:
                result = evaluate(
                    runtime, rows, shuffle_pictures_seed=0 if blind else None, limit=limit, out=path, progress=progress
                )
            finally:
                runtime.close()
            results[name] = eval_to_dict(result)
            progress(eval_line(name, result))
    return {"task": task, "model": str(model), "results": results}


def build_names(model: Path, builds: Sequence[str]) -> list[str]:
    """The builds to run: those asked for, or all of a bundle's; none for a checkpoint."""
    if not (model / MANIFEST).is_file():
        if builds:
            raise UsageError(f"{model} is no bundle, so it has no builds", "drop --build, or name a bundle")
        return []
    bundle = open_bundle(model)
    return [bundle.build(name).name for name in builds or bundle.builds()]


def open_runtimes(model: Path, builds: Sequence[str], allow_unverified: bool) -> Iterator[tuple[str, Runtime]]:
    """Runtimes of a bundle's builds, one at a time, or the reference runtime of a checkpoint."""
    if not builds:
        from .runtimes.reference import open_reference

        reference = open_reference(model)
        yield f"reference-{reference.build}", reference
        return
    from .runtimes.edge import open_edge

    bundle = open_bundle(model)
    for name in builds:
        yield name, open_edge(bundle, name, allow_unverified=allow_unverified)


def eval_to_dict(result: EvalResult) -> dict[str, Any]:
    """Scores as JSON values, each with its 95 % interval."""

    def interval(value: Any) -> dict[str, float]:
        return {"accuracy": value.estimate, "low": value.low, "high": value.high}

    return {
        "n": len(result.records),
        "pictures": result.stage,
        **interval(result.accuracy),
        "by_type": {name: interval(value) for name, value in result.by_type.items()},
        "by_tier": {name: interval(value) for name, value in result.by_tier.items()},
    }


def eval_line(name: str, result: EvalResult) -> str:
    """One line for people."""
    score = result.accuracy
    parts = {**result.by_type, **result.by_tier}
    detail = ", ".join(f"{key} {value.estimate:.1%}" for key, value in parts.items())
    return f"{name}: {score.estimate:.2%} of {len(result.records):,} ({result.stage})" + (
        f" · {detail}" if detail else ""
    )


def print_verify(report: Any) -> None:
    """The parity table of a verify report on stderr."""
    for line in report.lines():
        print(line, file=sys.stderr)


def bench_bundle(
    bundle: Path,
    image: Path | None,
    question: str,
    *,
    builds: Sequence[str],
    repetitions: int,
    max_tokens: int,
    out: Path,
    allow_unverified: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Measure builds, append the raw samples to `out` and return the medians."""
    import tempfile

    from .benchmarks.latency import bench
    from .benchmarks.results import read_results, write_results
    from .benchmarks.summary import summarise

    opened = open_bundle(bundle)
    for name in builds or opened.builds():
        opened.require_verified(opened.build(name), allow_unverified)
    with tempfile.TemporaryDirectory() as scratch:
        picture = image or sample_picture(Path(scratch))
        before = read_results([out]) if out.is_file() else []  # a damaged file is said before minutes of measuring
        samples = bench(
            bundle,
            list(builds) or None,
            picture=picture,
            question=question,
            repetitions=repetitions,
            max_tokens=max_tokens,
            progress=progress,
        )
    write_results(out, [*before, *samples])
    return {
        summary.build: {
            "ttft_ms": summary.ttft.estimate if summary.ttft else None,
            "stages_ms": dict(summary.stages),
            "memory_bytes": dict(summary.memory),
            "bytes": summary.bytes,
        }
        for summary in summarise(samples).builds
    }


def sample_picture(directory: Path) -> Path:
    """A generated scene as a PNG, for measuring when the user names no picture."""
    from .data.scenes import render

    path = directory / "scene.png"
    render(seed=0).image.save(path)
    return path


def write_report(results: Sequence[Path], out: Path, images: Path | None) -> None:
    """Draw report.html, its table as Markdown and its plots as PNG from results files."""
    from .benchmarks.report import render_report
    from .benchmarks.results import read_results

    if out.suffix != ".html":
        raise UsageError(f"{out} is no HTML file's name", "name a file that ends in .html; .md and .png go beside it")
    render_report(
        read_results(list(results)), out, images=images, markdown=out.with_suffix(".md"), png=out.with_suffix(".png")
    )


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Equal-width columns for the terminal."""
    if not rows:
        return ""
    head = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in head]
    lines = ["  ".join(name.ljust(width) for name, width in zip(head, widths, strict=True))]
    lines += ["  ".join(row[name].rjust(width) for name, width in zip(head, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)

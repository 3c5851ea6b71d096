"""What the commands do between the command line and the stages: open, call, print. `cli.py` only declares flags."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bundle import Bundle, read_bundle
from .errors import StorageError, UsageError

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


def import_source(
    source: str,
    out: Path,
    *,
    tokenizer: Path | None,
    vision: Path | None,
    llm: Path | None,
    template: str | None,
    name: str | None,
    force: bool,
    tell: Progress,
) -> dict[str, Any]:
    """Import a released model from a directory or the Hub."""
    from .hub import local_model
    from .importer.run import import_checkpoint

    root = local_model(source)
    label = name or (None if Path(source).is_dir() else source.rpartition("/")[2])  # the cache names it by a hash
    result = import_checkpoint(
        root,
        out,
        tokenizer=tokenizer,
        vision=vision,
        llm=llm,
        template=template,
        name=label,
        force=force,
        progress=tell,
    )
    for note in result.notes:
        tell(f"note: {note}")
    return {
        "status": result.status,
        "checkpoint": str(result.out),
        "layout": result.layout,
        "bytes": result.bytes,
        "model": result.spec.to_dict(),
        "notes": list(result.notes),
    }


def export_checkpoint(
    root: Path, out: Path, values: Mapping[str, Any], *, tell: Progress
) -> tuple[dict[str, Any], bool]:
    """Export and, unless told not to, verify; returns the bundle's description and whether every build passed."""
    from .export.options import read_options
    from .export.run import run_export

    bundle, report = run_export(root, out, read_options(values), progress=tell)
    if report is not None:
        keep_command(bundle.root, report)
        print_verify(report)
    return describe_bundle(bundle), report is None or report.passed


def collect_imatrix(
    checkpoint: Path,
    out: Path,
    data: Path | None,
    images: Path | None,
    *,
    samples: int,
    text_only: bool,
    force: bool,
    tell: Progress,
) -> dict[str, Any]:
    """Collect an importance matrix and write it."""
    from .export.calibrate import calibration_rows, collect
    from .export.imatrix import save_imatrix

    if out.exists() and not force:
        raise StorageError(f"{out} exists already", "name another place with -o, or replace it with --force")
    if out.resolve().is_relative_to(checkpoint.resolve()):
        raise UsageError(f"{out} lies in the checkpoint, whose hash it would change", "name another place with -o")
    if images is not None and data is None:
        raise UsageError(f"{images}: pictures without conversations", "name the LLaVA JSON with --data")
    rows = calibration_rows(data, images, samples)
    found = collect(checkpoint, rows, text_only=text_only, progress=tell)
    saved = save_imatrix(found, out)
    return {
        "imatrix": str(out),
        "sha256": saved.sha256,
        "samples": saved.samples,
        "image_share": saved.image_share,
        "datasets": list(saved.datasets),
    }


def quantize_more(
    bundle: Path,
    types: Sequence[str],
    imatrix: Path | None,
    overrides: str,
    *,
    out: Path | None,
    checkpoint: Path | None,
    threads: int | None,
    force: bool,
    tell: Progress,
) -> dict[str, Any]:
    """Add language-model types to a bundle."""
    from .export.imatrix import load_imatrix
    from .export.options import tensor_types
    from .export.requantize import quantize_bundle

    made = quantize_bundle(
        bundle,
        types,
        imatrix=None if imatrix is None else load_imatrix(imatrix),
        overrides=dict(tensor_types(overrides)),
        out=out,
        checkpoint=checkpoint,
        n_threads=threads,
        force=force,
        progress=tell,
    )
    return describe_bundle(made)


def train_stage(
    out: Path | None,
    data: Path | None,
    images: Path | None,
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
    if out is None or data is None or images is None:
        lacking = [flag for flag, given in (("--out", out), ("--data", data), ("--images", images)) if given is None]
        raise UsageError(f"training needs {', '.join(lacking)}", "or see what it would do, with --dry-run")
    from .checkpoint_spec import load_spec
    from .spec import DEFAULT_VARIANT
    from .spec import variant as find_variant
    from .train import recipes
    from .train.trainer import init_checkpoint, train

    chosen = recipes.load(recipe or recipe_of(variant)).stage(stage or "finetune")
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


def recipe_of(variant: str) -> str:
    """The recipe in a paper variant's name; base-nano for everything else."""
    from .spec import VARIANTS

    return VARIANTS[variant].recipe if variant in VARIANTS else "base-nano"


def plan_training(
    data: Path | None,
    images: Path | None,
    checkpoint: Path | None,
    variant: str,
    *,
    llm: Path | None,
    recipe: str,
    stage: str,
    max_bad_rows: int,
    rows: int | None,
    text_tokens: int,
    machine: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """What training would do, as JSON values and as lines for people; needs no weights.

    Args:
        machine: fields of train.plan.Machine, `memory` as text.
    """
    from .spec import DEFAULT_VARIANT
    from .train import recipes
    from .train.plan import Machine, make_plan
    from .train.plan_source import checkpoint_model, data_lengths, plan_tokenizer, variant_model
    from .train.plan_text import parse_memory, plan_lines

    if checkpoint is not None and (variant or llm):
        raise UsageError("--variant starts a new model and --checkpoint continues one", "give one of the two")
    if (data is None) != (images is None):
        raise UsageError("--data and --images belong together", "give both to measure rows, or none")
    if data is not None and not stage:
        raise UsageError(f"{data} holds the rows of one stage", "name it with --stage")
    chosen = recipes.load(recipe or recipe_of(variant))
    name = variant or DEFAULT_VARIANT
    model, spec = variant_model(name) if checkpoint is None else checkpoint_model(checkpoint)
    lengths = None
    if data is not None and images is not None:
        tokenizer = plan_tokenizer(checkpoint, llm, name)
        lengths = data_lengths(data, images, spec, tokenizer, max_bad=max_bad_rows)
    memory = machine.get("memory")
    plan = make_plan(
        model,
        spec,
        chosen,
        Machine(**{**machine, "memory": parse_memory(memory) if memory else None}),
        stages=[stage] if stage else (),
        rows=rows,
        text_tokens=text_tokens,
        lengths=lengths,
    )
    return plan.to_dict(), plan_lines(plan)


def typed() -> str:
    """The command line of this process, as the results keep it; without a password in an address."""
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://", shlex.join(["tinyllava-edge", *sys.argv[1:]]))


def keep_command(bundle: Path, report: Any) -> None:
    """Note in the stamps of the builds that just passed which command verified them, for the report."""
    opened = read_bundle(bundle)
    passed = {build.build for build in report.builds if build.passed}
    stamps = opened.verified_builds()
    kept = {name: {**stamp, "command": typed()} if name in passed else stamp for name, stamp in stamps.items()}
    if kept != stamps:
        opened.stamp(kept)


def print_verify(report: Any) -> None:
    """The parity table of a verify report on stderr."""
    for line in report.lines():
        print(line, file=sys.stderr)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Equal-width columns for the terminal."""
    if not rows:
        return ""
    head = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in head]
    lines = ["  ".join(name.ljust(width) for name, width in zip(head, widths, strict=True))]
    lines += ["  ".join(row[name].rjust(width) for name, width in zip(head, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)

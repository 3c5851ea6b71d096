"""What the commands do between the command line and the stages: open, call, print. `cli.py` only declares flags."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bundle import Bundle, read_bundle
from .errors import BundleError, StorageError, UsageError

Progress = Callable[[str], None]


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """A bundle as JSON values: model, files, builds (a browser's apart) with size and stamp, device profile."""
    from .export.profile_record import read_record

    try:
        record = read_record(bundle)
    except BundleError as error:  # a bundle that is damaged is described too
        record = {"problem": error.message}
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
        "web_builds": {
            name: {"bytes": build.bytes, "verified": bundle.is_verified(build)}
            for name, build in bundle.web_builds().items()
        },
        "tool_versions": dict(bundle.tool_versions),
        **({} if record is None else {"profile": record}),
    }


def import_source(
    source: str,
    out: Path,
    *,
    tokenizer: Path | None,
    vision: Path | None,
    vision2: Path | None,
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
        vision2=vision2,
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

"""An export as both commands run it: write the bundle, then verify it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import Bundle
from .options import ExportOptions

if TYPE_CHECKING:
    from .verify import VerifyReport


def run_export(
    root: Path, out: Path, options: ExportOptions, *, progress: Callable[[str], None] | None = None
) -> tuple[Bundle, VerifyReport | None]:
    """Export a checkpoint and, unless told not to, verify every build of the bundle against it.

    Args:
        root: checkpoint directory.
        out: bundle directory to write.
        options: what to write.
        progress: told each step.

    Returns:
        The bundle, and the report of the verification if there was one.

    Raises:
        TinyLlavaEdgeError: what `export_bundle` and `verify` raise.
    """
    from .bundle_writer import export_bundle
    from .verify import verify

    bundle = export_bundle(
        root,
        out,
        llm=options.llm,
        vision=options.vision,
        mmproj=options.mmproj,
        web=options.web,
        static=options.static,
        max_shard_bytes=options.max_shard_size,
        imatrix=options.imatrix,
        overrides=dict(options.tensor_types),
        clip_workaround=options.clip_workaround,
        force=options.force,
        progress=progress,
    )
    report = verify(out, root, progress=progress) if options.verify else None
    return bundle, report

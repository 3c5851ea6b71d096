"""An export as both commands run it: choose what fits a profile's device, write the bundle, then verify it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import Bundle
from ..files import scratch_directory
from .options import ExportOptions, resolved
from .profiles import load

if TYPE_CHECKING:
    from .imatrix import Imatrix
    from .profile_fit import Plan
    from .verify import VerifyReport

Progress = Callable[[str], None]


def run_export(
    root: Path, out: Path, options: ExportOptions, *, progress: Progress | None = None
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
    from .bundle_writer import check_place, export_bundle
    from .verify import verify

    plan: Plan | None = None
    matrix: Path | Imatrix | None = options.imatrix
    if options.profile is None:
        options = resolved(options)
    else:
        from .profile_fit import plan_export

        profile, tell = load(options.profile), progress or (lambda _text: None)
        check_place(root, out, options.force)
        plan = plan_export(root, out, options, profile, tell)
        options = plan.options
        matrix = _collected(root, tell) if plan.collect else matrix
    bundle = export_bundle(
        root,
        out,
        llm=options.llm,
        vision=options.vision,
        mmproj=options.mmproj,
        web=options.web,
        mobile=options.mobile,
        static=options.static,
        max_shard_bytes=options.max_shard_size,
        imatrix=matrix,
        overrides=dict(options.tensor_types),
        clip_workaround=options.clip_workaround,
        force=options.force,
        plan=plan,
        progress=progress,
    )
    report = verify(out, root, progress=progress) if options.verify else None
    return bundle, report


def _collected(root: Path, tell: Progress) -> Imatrix:
    """An importance matrix over easy-VQA, as `tinyllava-edge imatrix` makes it, with its file's hash."""
    from .calibrate import calibration_rows, collect
    from .imatrix import save_imatrix

    rows = calibration_rows()
    tell(f"importance matrix: {len(rows.rows)} conversations of {rows.name}")
    with scratch_directory() as folder:
        return save_imatrix(collect(root, rows), folder / "imatrix.gguf")

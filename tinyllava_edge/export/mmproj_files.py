"""What stock llama.cpp hosts need beside the text GGUF: mmproj files, each measured, a Modelfile and a guide."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bundle import BundleFile, describe_file
from ..errors import ExportError
from ..prompt import get_template
from ..runtimes.text import FIRST_SPACE
from ..spec import ModelSpec
from .gguf_header import read_header
from .mmproj import export_mmproj, mmproj_name, unpacked
from .mmproj_check import MmprojReport, check_mmproj
from .stock_hosts import write_stock_files


def write_mmproj_files(
    root: Path,
    model: Any,
    spec: ModelSpec,
    types: Sequence[str],
    llm: Path,
    *,
    clip_workaround: bool = False,
    run_with: tuple[int, int] | None = None,
    tell: Callable[[str], None],
) -> tuple[list[BundleFile], list[MmprojReport]]:
    """Write and measure every asked type.

    Args:
        root: bundle under construction.
        model: anything with `model.vision_tower`, `model.multi_modal_projector` and `config`, in float32.
        spec: how the model must be fed.
        types: keys of MMPROJ_TYPES, at least one.
        llm: text GGUF below `root` that the Modelfile names; the first part of a split one.
        clip_workaround: see export_mmproj.
        run_with: positions and threads that the guide names; the model's own context and no threads by default.
        tell: told each step and each measurement.

    Raises:
        ExportError: a tower or connector without this form, or mtmd doesn't compute what the file says.
    """
    files, reports = [], []
    for name in types:
        tell(f"mmproj: {name}")
        target = root / mmproj_name(spec.name, name)
        kinds = export_mmproj(model, spec, target, name, clip_workaround=clip_workaround)
        left = unpacked(target) if name == "q8_0" else []
        if left:
            tell(f"mmproj: {name}: {len(left)} matrices don't fit its blocks and stayed f16")
        report = check_mmproj(target, llm, model, spec, n_threads=os.cpu_count() or 1)
        for line in report.lines():
            tell(f"  {line}")
        if not report.passed:
            raise ExportError(
                f"{target.name}: llama.cpp's own encoder differs from the model",
                "export without --mmproj and report this",
            )
        files.append(describe_file(root, target.name, "mmproj", name, kinds))
        reports.append(report)
    if "-of-" in llm.name:
        tell(f"note: the Modelfile names {llm.name}; a host that can't read split files wants --max-shard-size off")
    template = get_template(spec.template)
    if not template.caption_only:
        written = write_stock_files(
            root,
            name=spec.name,
            llm_file=llm.name,
            mmproj_file=files[0].path,
            spec=spec,
            template=template,
            report=reports[0],
            run_with=run_with,
            first_space=bool(read_header(llm).values.get(FIRST_SPACE)),
        )
        files += [describe_file(root, path.name, "text", "text", {}) for path in written]
    return files, reports

"""The tables of docs/profiles.md are what the code counts; `python -m tests.export.test_profile_tables` prints them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.options import read_options
from tinyllava_edge.export.profile_fit import plan_export
from tinyllava_edge.export.profiles import GIB, PRESETS, DeviceProfile

from .sparse_checkpoint import sparse_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "profiles.md"
VARIANTS = ("TinyLLaVA-base-C-TL", "TinyLLaVA-base-Sig-TL", "TinyLLaVA-base-Sig-SLM", "TinyLLaVA-base-Sig-Phi")
ROWS = {
    "context": lambda profile: str(profile.n_ctx),
    "threads": lambda profile: str(profile.n_threads),
    "one program may take": lambda profile: f"{profile.budget_bytes // GIB} GiB",
    "visual tokens, advised": lambda profile: str(profile.max_visual_tokens),
    "`--llm`, preferred first": lambda profile: ", ".join(profile.llm),
    "`--vision`": lambda profile: ", ".join(profile.vision),
    "C library gives memory back": lambda profile: "yes" if profile.trims else "no",
}


def cell(root: Path, profile: DeviceProfile) -> str:
    """The preferred build and its need, or the refusal's two numbers; of a page its files instead."""
    told: list[str] = []
    options = read_options({"profile": profile.name, "imatrix": "i.gguf"})  # only asked for, not read
    try:
        plan = plan_export(root, root.parent / "out", options, profile, told.append)
    except ExportError as error:
        found = re.search(r"needs ([\d.]+) GiB of ([\d.]+) GiB", error.message)
        assert found is not None, error.message
        return f"refused: {found[1]} of {found[2]}"
    if profile.device == "web":
        need = next(line for line in told if line.startswith("web "))
        return f"{plan.options.web[0]}, {need.split('needs ')[1].split(' ')[0]}"
    mmproj = f", mmproj {plan.options.mmproj[0]}" if plan.options.mmproj else ""
    return f"{plan.preferred}{mmproj}, {plan.needs[plan.preferred] / GIB:.2f}"


def fits(folder: Path) -> list[str]:
    """Rows of the table `What fits where`, in GiB."""
    rows = [f"| variant | {' | '.join(PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    for name in VARIANTS:
        root = sparse_checkpoint(folder / name / "checkpoint", name)
        rows.append(f"| {name} | {' | '.join(cell(root, profile) for profile in PRESETS.values())} |")
    return rows


def test_what_fits_where(tmp_path: Path) -> None:
    assert "\n".join(fits(tmp_path)) in PAGE.read_text()


def test_the_six() -> None:
    page = PAGE.read_text()
    for title, words in ROWS.items():
        assert f"| {title} | {' | '.join(words(profile) for profile in PRESETS.values())} |" in page


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print("\n".join(fits(Path(scratch))))

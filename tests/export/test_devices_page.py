"""The sizes that docs/devices.md states, counted again; and the files that it says a phone's profile writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyllava_edge import checkpoint
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.export.bundle_writer import base_type
from tinyllava_edge.export.early_sizes import LlmSizes, VisionSizes, web_bytes

from .sparse_checkpoint import sparse_checkpoint

PAGE = Path(__file__).parents[2] / "docs/devices.md"


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_sizes(rows: list[list[str]], tmp_path: Path) -> None:
    """Rounded to megabytes; each road is the sum of what it copies."""
    root = sparse_checkpoint(tmp_path / "c", "TinyLLaVA-base-Sig-TL")
    source = checkpoint.llm_source(root)
    early = LlmSizes(source, base_type(source), tmp_path, b"")
    vision = VisionSizes(checkpoint.load_config(root), source.spec)
    llm = {name: early.sizes(name, name == "q4_0").mapped for name in ("q4_0", "q4_k_m", "q8_0")}
    mmproj, graph = vision.mmproj("f16").weights, vision.file_bytes
    files = [llm["q4_0"], llm["q4_k_m"], llm["q8_0"], mmproj, graph("int8"), graph("fp16"), graph("fp32")]
    roads = [
        llm["q4_0"] + mmproj,
        llm["q4_k_m"] + mmproj,
        llm["q4_0"] + graph("int8"),
        llm["q4_0"] + graph("fp32"),
        llm["q4_k_m"] + graph("int8"),
        llm["q4_k_m"] + graph("fp16"),
        web_bytes(early.sizes("f16"), source, vision, "q4"),
    ]
    stated = [(int(row[1]), int(row[4])) for row in rows if len(row) == 5 and re.fullmatch(r"\d+", row[1])]
    assert stated == [(round(file / 1e6), round(road / 1e6)) for file, road in zip(files, roads, strict=True)]


def test_links(rows: list[list[str]]) -> None:
    """Every guide and every heading that a row names is there."""
    for name, anchor in re.findall(r"\]\(([\w.]+)(?:#([\w-]+))?\)", PAGE.read_text(encoding="utf-8")):
        text = (PAGE.parent / name).read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()]
        assert not anchor or anchor in headings, (name, anchor)
    assert len(rows) > 15


def test_the_phones_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As the section lists them, for a model that brings no importance matrix."""
    from tinyllava_edge.export.options import ExportOptions
    from tinyllava_edge.export.run import run_export

    out = tmp_path / "bundle"
    run_export(tiny_checkpoint, out, ExportOptions(llm=("q4_0", "q4_k_m"), profile="phone-arm64", verify=False))
    section = PAGE.read_text(encoding="utf-8").split("## What `--profile phone-arm64` writes")[1].split("\n- ")[0]
    named = set(re.findall(r"`([\w.-]+\.\w+|Modelfile)`", section))
    written = {file.path.removeprefix("mobile/") for file in read_bundle(out).files}
    checks = {name for name in written if name.startswith("check")}
    assert len(checks) == 4
    name = read_bundle(out).spec.name
    assert {file.replace("NAME", name) for file in named} == written - checks

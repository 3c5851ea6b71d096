"""Publish a demo's measurements: raw samples into results/, and the figures of RESULTS.md and README.md made from them.

python benchmarks/publish.py DEMO_DIRECTORY    # store a finished demo's raw samples, then write the figures
python benchmarks/publish.py                   # write the figures anew from what is stored
python benchmarks/publish.py --check           # exit 1 when a document's figures differ from what is stored
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.report import markdown_table
from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.benchmarks.summary import summarise
from tinyllava_edge.demo import Paths, summarise_demo

HERE = Path(__file__).parent
RESULTS, README = HERE / "RESULTS.md", HERE.parent / "README.md"
NAME = "nano-x86"
STORED = {"results.jsonl": f"{NAME}.jsonl.gz", "reference.jsonl": f"{NAME}-reference.jsonl.gz"}
BEGIN, END = "<!-- figures: python benchmarks/publish.py -->", "<!-- end of figures -->"


def store(demo: Path) -> None:
    """Copy a finished demo's raw samples, its steps' seconds and its plots."""
    parts = {"results.jsonl": demo / "results.jsonl", "reference.jsonl": Paths(demo).part("reference")}
    for part, path in parts.items():
        packed = gzip.compress(path.read_bytes(), mtime=0)
        (HERE / "results" / STORED[part]).write_bytes(packed)
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    steps = {name: summary[name] for name in ("seconds", "seconds_total")}
    (HERE / "results" / f"{NAME}-steps.json").write_text(json.dumps(steps, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(demo / "pareto.png", HERE.parent / "docs" / "pareto.png")


def stored() -> dict[str, list[Sample]]:
    """The stored raw samples."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part, name in STORED.items():
            path = Path(scratch) / part
            with gzip.open(HERE / "results" / name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            found[part] = read_results([path])
    return found


def documents() -> dict[Path, str]:
    """The text of each document with the figures of the stored samples."""
    samples = stored()
    summary = summarise_demo(samples["results.jsonl"], samples["reference.jsonl"])
    steps = json.loads((HERE / "results" / f"{NAME}-steps.json").read_text(encoding="utf-8"))
    machines = [sample.detail for sample in samples["results.jsonl"] if sample.kind == "environment"]
    machine = machines[-1].get("cpu", {})
    page = README.read_text(encoding="utf-8")
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{README}: the marks around the figures are gone")
    block = readme_block(summary, steps, machine)
    table = markdown_table(summarise(samples["results.jsonl"]))
    return {README: f"{head}{BEGIN}\n{block}{END}{tail}", RESULTS: results_text(summary, steps, machine, table)}


def readme_block(summary: dict[str, Any], steps: dict[str, Any], machine: dict[str, Any]) -> str:
    """What the demo gave, in sentences."""
    reference, builds, ship = summary["reference"], summary["builds"], summary["ship"]
    largest = max(builds, key=lambda name: builds[name]["bundle_bytes"])
    chosen = builds[ship]
    tiers = reference["by_tier"]
    blind = {"ocr", "left_right", "relation"} & set(tiers)
    weak = ", ".join(f"{name.replace('_', '/')} {tiers[name]:.0%}" for name in sorted(blind))
    cores = len(machine.get("affinity") or []) or machine.get("cores")
    verified = sum(build["verified"] for build in builds.values())
    text = (
        f"On {cores} cores of a shared x86 server ({machine.get('model', 'unknown')}) the whole road took "
        f"{steps['seconds_total'] / 60:.1f} minutes. The trained model answers **{reference['accuracy']:.2%}** of "
        f"easy-VQA's {reference['n']:,} test questions (published CNNs: 93.8 % and 99.5 %; with shuffled pictures "
        f"{summary['blind_accuracy']:.1%}). {verified} of {len(builds)} builds pass `verify`; to ship: **{ship}**, "
        f"{chosen['bundle_bytes'] / 1e6:.1f} MB instead of {builds[largest]['bundle_bytes'] / 1e6:.1f} ({largest}), "
        f"{chosen['ttft_ms']:.1f} ms to the first token. Of the {chosen['n']:,} test questions that every build is "
        f"asked it answers {chosen['accuracy']:.2%} right, the reference {chosen['accuracy_reference']:.2%}; "
        f"{chosen['flips']} answers differ, and {chosen['flips_tiers']} on the generated scenes' graded questions, "
        f"which show where such a model ends: {weak}."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False) + "\n"


def results_text(summary: dict[str, Any], steps: dict[str, Any], machine: dict[str, Any], table: str) -> str:
    """RESULTS.md."""
    reference = summary["reference"]
    tiers = list(reference["by_tier"])
    asked = next(iter(summary["builds"].values()))["n"]
    types = ", ".join(f"{key} {value:.2%}" for key, value in reference["by_type"].items())
    text = [
        "# Results",
        "",
        "Generated by `python benchmarks/publish.py` from the raw samples of one `tinyllava-edge demo`,",
        f"`results/{NAME}.jsonl.gz`; a test fails when this page and they differ.",
        f"Machine: {machine.get('model', 'unknown')}, shared and noisy: ratios are what lasts.",
        "",
        "![Accuracy against time, size and memory](../docs/pareto.png)",
        "",
        table.rstrip(),
        "",
        f"The table's accuracy is over {asked:,} of easy-VQA's test questions, the same ones for every row.",
        f"On all {reference['n']:,} the reference answers {reference['accuracy']:.2%} ({types});",
        f"with shuffled pictures {summary['blind_accuracy']:.2%}.",
        f"To ship: **{summary['ship']}**. {' '.join(summary['why'])}",
        "",
        "## Generated scenes, by tier",
        "",
        "| | " + " | ".join(tiers) + " |",
        "|---" * (len(tiers) + 1) + "|",
        "| reference | " + " | ".join(f"{reference['by_tier'][tier]:.0%}" for tier in tiers) + " |",
        *(
            f"| {build} | " + " | ".join(f"{row['by_tier'].get(tier, 0):.0%}" for tier in tiers) + " |"
            for build, row in summary["builds"].items()
        ),
        "",
        "## Where the time went",
        "",
        "| step | seconds |",
        "|---|---:|",
        *(f"| {step} | {seconds:.0f} |" for step, seconds in steps["seconds"].items()),
        f"| total | {steps['seconds_total']:.0f} |",
        "",
    ]
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    """Store, write or check."""
    if len(arguments) > 1:
        sys.exit(__doc__)
    check = arguments == ["--check"]
    if arguments and not check:
        store(Path(arguments[0]))
    wrong = 0
    for path, text in documents().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path}: its figures are not those of the stored results; run python benchmarks/publish.py")
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

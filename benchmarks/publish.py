"""Publish measurements: a demo's raw samples into results/, and the figures of the documents made from what is stored.

Written are RESULTS.md and RUNTIME.md whole, and the marked parts of EVALUATION.md and README.md.

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

from tinyllava_edge.benchmarks.report_tables import legend, markdown_table
from tinyllava_edge.benchmarks.results import Sample, read_results
from tinyllava_edge.benchmarks.summary import summarise
from tinyllava_edge.benchmarks.summary_types import Summary
from tinyllava_edge.demo import Paths, summarise_demo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import eval_throughput  # noqa: E402
import runtime_report  # noqa: E402

RESULTS, README, EVALUATION, RUNTIME = (
    HERE / "RESULTS.md",
    HERE.parent / "README.md",
    HERE / "EVALUATION.md",
    HERE / "RUNTIME.md",
)
NAME = "nano-x86"
STORED = {"results.jsonl": f"{NAME}.jsonl.gz", "reference.jsonl": f"{NAME}-reference.jsonl.gz"}
BEGIN, END = "<!-- {}: python benchmarks/publish.py -->", "<!-- end of {} -->"


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
    throughput = json.loads((HERE / "results" / "eval-throughput.json").read_text(encoding="utf-8"))
    stored_runtime = (HERE / "results" / "runtime-x86.jsonl").read_text(encoding="utf-8")
    runtime = [json.loads(line) for line in stored_runtime.splitlines()]
    figures = f"{readme_block(summary, steps, machine)}\n{fill(throughput_text(throughput))}"
    page = between(README, README.read_text(encoding="utf-8"), "figures", figures)
    return {
        README: between(README, page, "runtime", fill(runtime_text(runtime))),
        RESULTS: results_text(summary, steps, machine, summarise(samples["results.jsonl"])),
        EVALUATION: between(
            EVALUATION, EVALUATION.read_text(encoding="utf-8"), "throughput", eval_throughput.table(throughput)
        ),
        RUNTIME: runtime_report.report(runtime),
    }


def between(path: Path, page: str, name: str, text: str) -> str:
    """A page with the text between a part's marks replaced. Exits where the marks are gone."""
    first, last = BEGIN.format(name), END.format(name)
    head, begin, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        sys.exit(f"{path}: the marks around {name} are gone")
    return f"{head}{first}\n{text}{last}{tail}"


def fill(text: str) -> str:
    """A paragraph in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False) + "\n"


def throughput_text(found: dict[str, Any]) -> str:
    """What evaluating costs, in a sentence."""
    return f"{eval_throughput.sentence(found)} [benchmarks/EVALUATION.md](benchmarks/EVALUATION.md) has the table."


def runtime_text(samples: list[dict[str, Any]]) -> str:
    """How fast the runtime is beside llama.cpp's, in sentences."""
    found = runtime_report.targets(samples)

    def span(what: str) -> str:
        values = sorted({f"{target.value:.2f}" for target in found if target.what == what})
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    pairs = [target for target in found if target.what == "TTFT, ours / mtmd"]
    models, counts = {target.model for target in pairs}, min(target.n for target in pairs)
    bare, cached = span("TTFT, ours without any cache / mtmd"), span("TTFT, ours / mtmd")
    return (
        f"On two x86 cores without VNNI, beside llama.cpp's own multimodal code on {len(models)} models, {counts} "
        f"repetitions each: a new picture takes {bare} x its time to the first token without any cache of ours, "
        f"{cached} x with the system prompt's prefix cached, which its side does not do (vision alone "
        f"{span('vision, ours / mtmd')} x); a second question on a picture takes "
        f"{span('second question / first, TTFT')} x the time of the first one. "
        "[benchmarks/RUNTIME.md](benchmarks/RUNTIME.md) has the tables."
    )


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
    return fill(text)


def results_text(summary: dict[str, Any], steps: dict[str, Any], machine: dict[str, Any], found: Summary) -> str:
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
        f"Machine: {machine.get('model', 'unknown')}, shared and noisy: the ratio column lasts longer than the "
        "milliseconds.",
        "",
        "![Accuracy against time, size and memory](../docs/pareto.png)",
        "",
        markdown_table(found).rstrip(),
        "",
        *(f"- {sentence}" for sentence in legend(found)),
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

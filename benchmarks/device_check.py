"""The same questions on every device of this machine, in turns: what ran where, whether answers agree, how fast.

    python benchmarks/device_check.py BUNDLE --devices cpu,cuda --builds fp16+q4_0,fp16+f16 --out device_check.jsonl

Every pair of device and build is opened once; one that can't be had is reported with its reason and left out. Each
round asks every one of them, so that all meet the same machine; nothing is cached between answers. Stages are the
runtime's own clocks. Medians go to stdout as Markdown; raw samples and what ran where go to --out as JSON lines.
The first device listed is the one that the others' embeddings, logits and answers are compared with, build by build.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import TinyLlavaEdgeError
from tinyllava_edge.files import new_file
from tinyllava_edge.runtimes.base import Probe
from tinyllava_edge.runtimes.devices import choose_device
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge

STAGES = ("ttft_ms", "preprocess_ms", "vision_ms", "prefill_ms")
QUESTION = "Describe the picture in detail: what is in it, where is it, and which colours do you see?"


@dataclass
class Runner:
    """One build on one device."""

    device: str
    """what was asked for"""
    build: str
    """name of the build"""
    runtime: EdgeRuntime
    """opened"""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """one answer each"""

    def ask(self, image: Any, tokens: int) -> None:
        """One answer and its timings."""
        answer = self.runtime.answer(image, QUESTION, max_tokens=tokens)
        rate = answer.decode_tokens_per_s
        stages = {**answer.timings.to_dict(), "decode_tokens_per_s": rate, "prompt_tokens": answer.n_prompt_tokens}
        prefill = answer.timings.prefill_ms
        stages["prefill_tokens_per_s"] = 1000 * answer.n_prompt_tokens / prefill if prefill else None
        self.samples.append(stages)

    def median(self, stage: str) -> float:
        """Of all samples that have the stage."""
        values = [sample[stage] for sample in self.samples if sample[stage] is not None]
        return statistics.median(values) if values else float("nan")


def open_all(root: Path, builds: list[str], devices: list[str], options: dict[str, Any]) -> list[Runner]:
    """Every pair that can be had; the others' reasons go to stderr."""
    bundle, found = read_bundle(root), []
    for build in builds or bundle.builds():
        for device in devices:
            try:
                plan = choose_device(device)
                found.append(Runner(device, build, open_edge(bundle, build, plan=plan, **options)))
            except TinyLlavaEdgeError as error:
                print(f"{device} {build}: left out. {error} ({error.hint})", file=sys.stderr)
    return found


def agreement(ours: Probe, theirs: Probe) -> dict[str, Any]:
    """How far two devices are apart on one picture and one question."""

    def relative(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    same = sum(a == b for a, b in zip(ours.answer.token_ids, theirs.answer.token_ids, strict=False))
    return {
        "embeds_relative": relative(ours.image_embeds, theirs.image_embeds),
        "logits_relative": relative(ours.first_logits, theirs.first_logits),
        "first_token_equal": ours.answer.token_ids[:1] == theirs.answer.token_ids[:1],
        "tokens_equal": f"{same}/{len(theirs.answer.token_ids)}",
    }


def table(runners: list[Runner]) -> str:
    """Medians, and the ratio of each to the same build on the first device."""
    heads = [
        "build",
        "device",
        "TTFT, ms",
        "pixels, ms",
        "vision, ms",
        "prefill, ms",
        "prefill, tok/s",
        "decode, tok/s",
    ]
    lines = ["| " + " | ".join(heads) + " | TTFT ratio |", "|---|---|" + "---:|" * 7]
    for runner in runners:
        first = next(other for other in runners if other.build == runner.build)
        cells = [f"{runner.median(stage):.2f}" for stage in STAGES]
        cells += [f"{runner.median(stage):,.0f}" for stage in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        ratio = runner.median("ttft_ms") / first.median("ttft_ms")
        lines.append(f"| {runner.build} | {runner.device} | {' | '.join(cells)} | {ratio:.3f} |")
    return "\n".join(lines)


def where(runner: Runner) -> str:
    """One line: what really ran where."""
    facts = runner.runtime.environment()
    nodes = ", ".join(f"{name} {count}" for name, count in facts["vision_nodes"].items()) or ", ".join(
        facts["providers"]
    )
    layers = f"{facts['llama_cpp_layers_on_gpu']}/{facts['llama_cpp_layers']} layers on a GPU"
    return f"{runner.build} on {runner.device}: vision {nodes}; {layers}; {facts['llama_cpp_buffers_mib']}"


def main() -> None:
    """Open, warm up, compare, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--builds", default="", help="comma-separated; all by default")
    parser.add_argument("--devices", default="cpu,cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64, help="generated by each answer")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    parser.add_argument("--flash-attention", action="store_true")
    parser.add_argument("--image", type=Path, help="a picture; noise of 640 x 480 by default")
    parser.add_argument("--out", type=Path, help="JSON lines")
    given = parser.parse_args()
    image: Any = given.image or np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    options = {"allow_unverified": True, "n_threads": given.threads, "flash_attention": given.flash_attention}
    builds = [name for name in given.builds.split(",") if name]
    runners = open_all(given.bundle, builds, given.devices.split(","), options)
    records: list[dict[str, Any]] = []
    try:
        probes: dict[str, Probe] = {}
        for runner in runners:
            runner.ask(image, given.tokens)
            runner.samples.clear()
            probe = runner.runtime.probe(image, QUESTION, max_tokens=given.tokens)
            first = probes.setdefault(runner.build, probe)
            record = {"device": runner.device, "build": runner.build, **agreement(probe, first)}
            print(where(runner), record, sep="\n", file=sys.stderr)
            records.append({**record, "environment": runner.runtime.environment()})
        for _ in range(given.rounds):
            for runner in runners:
                runner.ask(image, given.tokens)
    finally:
        for runner in runners:
            runner.runtime.close()
    if not runners:
        sys.exit("no device could be had")
    print(table(runners))
    if given.out:
        with new_file(given.out) as path:
            lines = records + [{"device": r.device, "build": r.build, "samples": r.samples} for r in runners]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()

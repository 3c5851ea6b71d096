"""Export, quantise and verify a full-size architecture; beside it llama.cpp's own converter on the same language model.

    python benchmarks/full_size.py --variant TinyLLaVA-base-Sig-Phi --work /tmp/full --llama-cpp SOURCES

The checkpoint has random float16 weights (random_checkpoint.py). Each step runs in a process of its own; its wall time
and the largest resident set among it and its children are the kernel's (wait4). Pages of mapped files count in it. Ours
and theirs take turns, so that both meet the same machine. Results go to stdout as Markdown and, as JSON lines, to
--out. SOURCES is an unpacked source distribution of llama-cpp-python, whose `conversion` package is the converter;
the quantiser is the same function of the same library for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TYPE, VISION = "q4_k_m", "fp32,int8"
CLASSES = {"llama": "LlamaForCausalLM", "phi": "PhiForCausalLM", "stablelm": "StableLmForCausalLM"}

OUR_F16 = """
import sys
from pathlib import Path
from tinyllava_edge.checkpoint import llm_source
from tinyllava_edge.export.llm import export_llm
export_llm(llm_source(Path(sys.argv[1])), Path(sys.argv[2]), "f16")
"""
OUR_QUANTISED = """
import sys
from pathlib import Path
from tinyllava_edge.export.quantize import quantize_gguf
quantize_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""
SAME = """
import sys
import gguf
mine, other = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in sys.argv[1:])
if set(mine) != set(other):
    print(f"other tensors: {sorted(set(mine) ^ set(other))[:4]}")
else:
    same = [name for name in mine if memoryview(mine[name].data) == memoryview(other[name].data)]
    print(f"{len(same)} of {len(mine)} equal byte by byte")
"""
# The random tokenizer has no fingerprint that the converter knows; it splits text as GPT-2's does.
THEIR_F16 = """
import sys
from pathlib import Path
import gguf, conversion
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
chosen = conversion.get_model_class(sys.argv[3])
chosen(Path(sys.argv[1]), gguf.LlamaFileType.MOSTLY_F16, Path(sys.argv[2])).write()
"""
THEIR_QUANTISED = """
import ctypes, os, sys
import llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, os.cpu_count()
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""
PICTURES = """
import sys
from pathlib import Path
from tinyllava_edge.export.verify_pictures import photograph
sizes = ((640, 480), (333, 500), (1024, 768))
for number in range(int(sys.argv[2])):
    Path(sys.argv[1], f"{number}.jpg").write_bytes(photograph(*sizes[number % 3], number))
"""
BUNDLE = """
import sys
from pathlib import Path
from tinyllava_edge.export.bundle_writer import export_bundle
root, out, vision, llm = sys.argv[1:5]
export_bundle(Path(root), Path(out), llm=(llm,), vision=vision.split(","), progress=lambda t: print(t, file=sys.stderr))
"""
VERIFY = """
import json, sys
from pathlib import Path
from tinyllava_edge.export.verify import verify
bundle, checkpoint, *pictures = sys.argv[1:]
say = lambda text: print(text, file=sys.stderr)
report = verify(Path(bundle), Path(checkpoint), pictures=[Path(p) for p in pictures], progress=say)
print("\\n".join(report.lines()), file=sys.stderr)
print(json.dumps(report.to_dict()))
"""


@dataclass(frozen=True)
class Step:
    """One measured process."""

    variant: str
    """what was exported"""
    who: str
    """`ours` or `theirs`"""
    step: str
    """what was done"""
    round: int
    """number of the round, from 0"""
    seconds: float
    """wall time of the process, start of Python included"""
    peak_rss: int
    """largest resident set of the process or one of its children, in bytes"""
    bytes: int
    """size of what was written"""
    detail: dict[str, Any] = field(default_factory=dict)
    """what else belongs to it"""


class Runner:
    """Runs steps and keeps their numbers."""

    def __init__(self, variant: str, out: Path | None) -> None:
        self._variant, self._out = variant, out
        self.steps: list[Step] = []

    def run(
        self,
        who: str,
        step: str,
        number: int,
        code: str,
        arguments: list[str],
        writes: Path | None,
        path: str = "",
        judge: Callable[[str], dict[str, Any]] | None = None,
    ) -> Step:
        """Run a snippet in a new interpreter; its stderr passes through. Ends the program where it fails."""
        print(f"{who} {step} (round {number + 1}) …", file=sys.stderr, flush=True)
        paths = [path, os.environ.get("PYTHONPATH", ""), str(HERE.parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{who} {step} failed with exit code {process.returncode}")
        done = Step(
            variant=self._variant,
            who=who,
            step=step,
            round=number,
            seconds=seconds,
            peak_rss=usage.ru_maxrss * 1024,
            bytes=size(writes) if writes else 0,
            detail=judge(said) if judge else {},
        )
        print(f"  {done.seconds:.1f} s, {done.peak_rss / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        self.steps.append(done)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": "full_size", **asdict(done)}) + "\n")
        return done


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def verdict(said: str) -> dict[str, Any]:
    """What a report of verify comes to: per build its verdict, and the numbers of each gated stage."""
    builds = {}
    for build in json.loads(said)["builds"]:
        shown = ("relative", "cosine", "max_abs", "share", "passed")
        stages = {f"{c['stage']}, {c['input']}": {k: c[k] for k in shown} for c in build["checks"] if c["gated"]}
        kept = ("passed", "first_divergence", "samples")
        builds[build["build"]] = {**{key: build[key] for key in kept}, "checks": stages}
    return {"builds": builds}


def same_tensors(ours: Path, theirs: Path) -> str:
    """Whether two GGUFs hold the same tensors, byte by byte.

    In a process of its own: what this one's memory once was counts as the peak of every process it starts later.
    """
    done = subprocess.run([sys.executable, "-c", SAME, ours, theirs], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def run(variant: str, work: Path, sources: Path | None, rounds: int, pictures: int, out: Path | None) -> str:
    """Measure one variant. Returns Markdown."""
    runner = Runner(variant, out)
    checkpoint, alone, bundle = work / "checkpoint", work / "llm", work / "bundle"
    if not checkpoint.is_dir():
        subprocess.run([sys.executable, HERE / "random_checkpoint.py", variant, checkpoint], check=True)
    equal = "not compared"
    if sources is not None:
        subprocess.run(
            [sys.executable, HERE / "random_checkpoint.py", "--language-model", checkpoint, alone], check=True
        )
        kind = CLASSES[json.loads((alone / "config.json").read_text(encoding="utf-8"))["model_type"]]
        conversion = os.pathsep.join([str(sources), str(sources / "gguf-py")])
        for number in range(rounds):
            files = {who: (work / f"{who}-f16.gguf", work / f"{who}-{TYPE}.gguf") for who in ("ours", "theirs")}
            plans = {
                "ours": (OUR_F16, [str(checkpoint)], [], OUR_QUANTISED, [TYPE], ""),
                "theirs": (THEIR_F16, [str(alone)], [kind], THEIR_QUANTISED, [], conversion),
            }
            for who in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
                convert, source, extra, quantise, wanted, path = plans[who]
                f16, small = files[who]
                runner.run(who, "f16", number, convert, [*source, str(f16), *extra], f16, path)
                runner.run(who, TYPE, number, quantise, [str(f16), str(small), *wanted], small)
            if number == 0:
                equal = f"f16: {same_tensors(*(files[who][0] for who in files))}; "
                equal += f"{TYPE}: {same_tensors(*(files[who][1] for who in files))}"
            for pair in files.values():
                for path_ in pair:
                    path_.unlink()
        shutil.rmtree(alone)
    room = work / "pictures"
    room.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", PICTURES, room, str(pictures)], check=True)
    runner.run("ours", "bundle", 0, BUNDLE, [str(checkpoint), str(bundle), VISION, TYPE], bundle)
    chosen = [str(path) for path in sorted(room.iterdir())]
    runner.run("ours", "verify", 0, VERIFY, [str(bundle), str(checkpoint), *chosen], None, judge=verdict)
    return report(variant, runner.steps, size(checkpoint), equal)


def report(variant: str, steps: list[Step], weights: int, equal: str) -> str:
    """Markdown: medians of the rounds, the ratios, what verify said."""

    def values(who: str, step: str) -> tuple[float, float]:
        found = [s for s in steps if (s.who, s.step) == (who, step)]
        return statistics.median(s.seconds for s in found), max(s.peak_rss for s in found) / 2**30

    text = [f"## {variant}", "", f"Random float16 weights, {weights / 1e9:.2f} GB; {machine()}.", ""]
    if any(s.who == "theirs" for s in steps):
        rounds = 1 + max(s.round for s in steps)
        text += [
            f"Language model, median of {rounds} rounds taken in turns; peak is the largest of them.",
            "",
            "| step | ours, s | llama.cpp, s | ratio | ours, GiB | llama.cpp, GiB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        pairs = {step: (values("ours", step), values("theirs", step)) for step in ("f16", TYPE)}
        both = tuple((sum(p[k][0] for p in pairs.values()), max(p[k][1] for p in pairs.values())) for k in (0, 1))
        for name, (mine, other) in {**pairs, "both": both}.items():
            numbers = (f"{mine[0]:.1f}", f"{other[0]:.1f}", f"{mine[0] / other[0]:.2f}", f"{mine[1]:.2f}")
            text.append(f"| {name} | {' | '.join(numbers)} | {other[1]:.2f} |")
        text += ["", f"Tensors: {equal}.", ""]
    text += ["| step | seconds | peak, GiB | written, GB |", "|---|---:|---:|---:|"]
    for step in ("bundle", "verify"):
        done = next(s for s in steps if s.step == step)
        text.append(f"| {step} | {done.seconds:.0f} | {done.peak_rss / 2**30:.2f} | {done.bytes / 1e9:.2f} |")
    checked = next(s for s in steps if s.step == "verify").detail["builds"]
    for name, build in checked.items():
        said = "passed" if build["passed"] else f"diverges at {build['first_divergence']}"
        text += ["", f"`{name}` {said} on {build['samples']} pictures:", ""]
        text += ["| stage, input | relative error | lowest cosine | agree |", "|---|---:|---:|---:|"]
        for stage, numbers in build["checks"].items():
            shown = (numbers["relative"], numbers["cosine"], numbers["share"])
            text.append(f"| {stage} | " + " | ".join("" if n is None else f"{n:.4g}" for n in shown) + " |")
    return "\n".join([*text, ""])


def machine() -> str:
    """Processor, cores and memory in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def main() -> None:
    """Read the command line, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", required=True, help="name in the family, e.g. TinyLLaVA-base-C-TL")
    parser.add_argument("--work", type=Path, required=True, help="directory for the files; 15 bytes a parameter")
    parser.add_argument("--llama-cpp", type=Path, help="unpacked sources; without them only our side is measured")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of ours and theirs")
    parser.add_argument("--pictures", type=int, default=3, help="pictures that verify looks at")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--keep", action="store_true", help="leave the files in --work")
    asked = parser.parse_args()
    sources = asked.llama_cpp
    if sources is not None:
        sources = next((p for p in (sources, sources / "vendor/llama.cpp") if (p / "conversion").is_dir()), None)
        if sources is None:
            sys.exit(f"{asked.llama_cpp}: holds no `conversion` package")
    work = asked.work / asked.variant
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "bundle", ignore_errors=True)
    shutil.rmtree(work / "llm", ignore_errors=True)
    try:
        print(run(asked.variant, work, sources, asked.rounds, asked.pictures, asked.out))
    finally:
        if not asked.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()

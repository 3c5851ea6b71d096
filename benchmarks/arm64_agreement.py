"""Does the edge runtime answer on ARM64 as on this machine? Easy-VQA test questions, greedy, answer by answer.

    python benchmarks/arm64_agreement.py BUNDLE [--questions 200] [--cpu max,cortex-a53]
        [--build fp32+f16,int8+q4_k_m] [--llama DIR] [--out F.json]

`tinyllava-edge eval` runs here, and with the same arguments in the arm64 root under qemu, which imitates one core after
another (runtimes/native/arm64-run.sh). Every answer of both sides stands in the result. Nothing is timed. Exit code 1
if a build answers less than 99.5 % of the questions alike on a core.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyllava_edge.benchmarks.out_file import check_writable
from tinyllava_edge.benchmarks.results import AnswerRecord, read_results
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import EngineError, TinyLlavaEdgeError, UsageError
from tinyllava_edge.files import write_json

LEAST = 0.995
BUILDS = "fp32+f16,int8+q4_k_m"
ROOT = Path(__file__).resolve().parents[1]
RUN_THERE = ROOT / "runtimes" / "native" / "arm64-run.sh"
TASK = "easy_vqa"
REFUSED = re.compile(r"^error: (.+)\nhint: (.+)\n\Z", re.MULTILINE)  # how our programs end with an error
SAID = ("tinyllava_edge", "python", "numpy", "onnxruntime", "llama_cpp_python", "llama_cpp_system_info", "ggml_version")


def there(
    arguments: Sequence[str | Path],
    *,
    cpu: str = "max",
    bundle: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    llama: Path | None = None,
    limit_s: float = 3000,
) -> str:
    """Run the arm64 Python with these arguments and return what it wrote to stdout.

    Args:
        arguments: of python3.11.
        cpu: a core that qemu knows.
        bundle: directory that is /bundle there.
        data: directory that is /data there.
        out: directory that is /out there.
        llama: llama.cpp's libraries; build/arm64/llama by default.
        limit_s: seconds after which it is ended; not a measurement.

    Raises:
        EngineError: it ended with another code than 0, or not in time.
        UsageError: the script refused its arguments, e.g. the core.
    """
    places = {"--cpu": cpu, "--bundle": bundle, "--data": data, "--out": out, "--llama": llama}
    options = [str(word) for name, value in places.items() if value is not None for word in (name, value)]
    return _run([str(RUN_THERE), *options, "--", *map(str, arguments)], limit_s)


def here(arguments: Sequence[str | Path], limit_s: float = 3000) -> str:
    """The same with this Python on this machine. Raises EngineError, UsageError."""
    return _run([sys.executable, *map(str, arguments)], limit_s)


def _run(command: Sequence[str], limit_s: float) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{Path(command[0]).name}: not done after {limit_s:.0f} s", "ask fewer questions") from error
    except OSError as error:
        raise EngineError(f"{command[0]}: can't be started ({error.strerror})", "see docs/arm64.md") from error
    if done.returncode:
        kind = UsageError if done.returncode == UsageError.exit_code else EngineError
        if said := REFUSED.search(done.stderr):
            raise kind(f"{Path(command[0]).name}: {said[1]}", said[2])
        words = " ".join(done.stderr.split())[-600:]
        raise kind(f"{Path(command[0]).name} ended with code {done.returncode}: {words}", "see docs/arm64.md")
    return done.stdout


def eval_command(bundle: str | Path, builds: Sequence[str], limit: int, out: str | Path) -> list[str]:
    """Arguments of Python that ask the questions; one thread, since sums may depend on how work is shared."""
    asked = ["--task", TASK, "--limit", str(limit), "--build", ",".join(builds), "-t", "1", "--allow-unverified"]
    return ["-m", "tinyllava_edge", "eval", "run", str(bundle), *asked, "-o", str(out), "--json"]


def answers(folder: Path, build: str, only_build: bool) -> tuple[list[AnswerRecord], dict[str, Any]]:
    """A build's answers by id, and what its runtime says of itself."""
    samples = read_results([folder / ("answers.jsonl" if only_build else f"answers-{build}.jsonl")])
    records = [AnswerRecord.from_sample(sample) for sample in samples if sample.kind == "answer"]
    said = next(sample.detail["runtime"] for sample in samples if sample.kind == "environment")
    return sorted(records, key=lambda record: record.id), {name: said[name] for name in SAID if name in said}


def agreement(here_: Sequence[AnswerRecord], there_: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Shares of equal answers, of equal tokens and of right answers, and what differs with the margin here.

    Raises:
        EngineError: the two sides answered other questions, or none.
    """
    if not here_ or [one.id for one in here_] != [other.id for other in there_]:
        raise EngineError(f"{len(here_)} answers here, {len(there_)} there: not the same questions", "run both again")
    pairs = list(zip(here_, there_, strict=True))
    differ = [
        {
            "id": one.id,
            "question": one.question,
            "expected": one.expected,
            "here": one.given,
            "there": other.given,
            "least_margin_here": min(one.margins, default=None),
        }
        for one, other in pairs
        if one.given != other.given
    ]
    return {
        "equal": 1 - len(differ) / len(pairs),
        "equal_tokens": sum(one.token_ids == other.token_ids for one, other in pairs) / len(pairs),
        "right_here": sum(record.correct for record in here_) / len(pairs),
        "right_there": sum(record.correct for record in there_) / len(pairs),
        "differ": differ,
    }


def compare(
    bundle: Path, builds: Sequence[str], cpus: Sequence[str], limit: int, llama: Path | None = None
) -> dict[str, Any]:
    """Ask here once and there on every core; a core or build that is named twice counts once.

    Raises:
        BundleError: not a bundle.
        EngineError: a side ended with an error, or nothing can be run there.
        UsageError: the bundle has no such build, or qemu no such core.
    """
    builds, cpus = list(dict.fromkeys(builds)), list(dict.fromkeys(cpus))
    bundle, llama = bundle.resolve(), llama.resolve() if llama else None  # the commands run elsewhere
    opened = read_bundle(bundle)
    for build in builds:
        opened.build(build)
    for cpu in cpus:
        there(["-V"], cpu=cpu, bundle=bundle, llama=llama)  # what is missing is said before minutes of questions
    qemu = _run(["qemu-aarch64-static", "--version"], 60).splitlines()[0]
    found: dict[str, Any] = {"bundle": opened.name, "bundle_sha256": opened.sha256, "task": TASK, "qemu": qemu}
    found["cores"], found["there"] = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        here(eval_command(bundle, builds, limit, folder / "answers.jsonl"))
        ours = {build: answers(folder, build, len(builds) == 1) for build in builds}
        found["here"] = next(iter(ours.values()))[1]
        found["questions"] = len(next(iter(ours.values()))[0])
        found["answers"] = {
            build: [{**_asked(record), "here": record.given} for record in records]
            for build, (records, _) in ours.items()
        }
        for cpu in cpus:
            out = folder / cpu
            out.mkdir()
            there(
                eval_command("/bundle", builds, limit, "/out/answers.jsonl"),
                cpu=cpu,
                bundle=bundle,
                out=out,
                llama=llama,
            )
            found["cores"][cpu] = {}
            for build in builds:
                records, said = answers(out, build, len(builds) == 1)
                core = agreement(ours[build][0], records)
                found["cores"][cpu][build] = core
                found["there"][cpu] = said  # of the process, so the same for every build
                for row, record in zip(found["answers"][build], records, strict=True):
                    row[cpu] = record.given
                print(
                    f"{cpu} {build}: {core['equal']:.1%} of {len(records)} equal; "
                    f"right {core['right_there']:.1%}, here {core['right_here']:.1%}",
                    flush=True,
                )
    return found


def _asked(record: AnswerRecord) -> dict[str, str]:
    return {"id": record.id, "image": record.image, "question": record.question, "expected": record.expected}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--cpu", default="max,cortex-a53", help="comma list of cores that qemu knows")
    parser.add_argument("--build", default=BUILDS, help="comma list")
    parser.add_argument("--llama", type=Path, default=None, help="llama.cpp's libraries; default: build/arm64/llama")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    cpus, builds = ([word for word in text.split(",") if word] for text in (asked.cpu, asked.build))
    try:
        if asked.questions < 1 or not cpus or not builds:
            raise UsageError("nothing to compare", "ask at least one question of one build on one core")
        if asked.out is not None:
            check_writable(asked.out)
        found = compare(asked.bundle, builds, cpus, asked.questions, asked.llama)
        if asked.out is not None:
            write_json(asked.out, found)
    except TinyLlavaEdgeError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return int(any(core["equal"] < LEAST for builds in found["cores"].values() for core in builds.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Speed of the on-device runtime against its peers, taken in turns within one run.

    python benchmarks/runtime_speed.py --bundle BUNDLE --checkpoint CHECKPOINT --nano NANO_BUNDLE \\
        --out runtime.jsonl --markdown RUNTIME.md
    python benchmarks/runtime_speed.py --parts ttft,second --repetitions 1 --bundle BUNDLE --checkpoint CHECKPOINT
    python benchmarks/runtime_speed.py --report runtime.jsonl     # the tables of an earlier run

Parts: `cold` (fresh processes), `ttft` and `second` (ours, ours without caches, llama.cpp's mtmd), `decode` (ours, a
plain llama_decode loop), `ceilings`, `transformers`, `nano`; and `size`, only when asked for. In a repetition every
participant gets the same new picture and question; the order is rotated. Raw samples are written as they come, so a
part that fails loses nothing of the others. The peers are described in runtime_peers.py, the yardsticks in
runtime_ceilings.py, the tables in runtime_report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import runtime_ceilings as ceilings  # noqa: E402
import runtime_peers as peers  # noqa: E402
from full_size import machine  # noqa: E402
from runtime_report import report  # noqa: E402

PARTS = ("cold", "ttft", "second", "decode", "ceilings", "transformers", "nano", "size")
DEFAULT_PARTS = PARTS[:-1]
LOOPS = {"llama_decode": False, "llama_decode, fused attention": True}
PACKAGES = ("numpy", "onnxruntime", "llama-cpp-python", "torch", "transformers", "pillow")


@dataclass(frozen=True)
class Settings:
    """How everything is measured."""

    build: str | None
    """build of ours, and whose GGUF the peers take; None is the bundle's first"""
    threads: int = 2
    """CPU threads of each participant"""
    repetitions: int = 3
    """of ttft and second"""
    decode_repetitions: int = 2
    """of decode"""
    tokens: int = 32
    """answered to a question about a picture"""
    decode_tokens: int = 64
    """single tokens of one decode sample"""
    question_tokens: int = 30
    """least tokens of a question"""
    cold_builds: tuple[str, ...] = ()
    """opened in fresh processes; none means all"""
    hf_repetitions: int = 1
    """of Hugging Face's generate, per type"""
    hf_types: tuple[str, ...] = ("float32", "bfloat16")
    """its types"""
    timeout_s: float = 240
    """most seconds of a process of its own"""
    nano_repetitions: int = 40
    """of nano"""


class Recorder:
    """Keeps samples, and adds each to a JSON-lines file at once."""

    def __init__(self, out: Path | None = None) -> None:
        self.samples: list[dict[str, Any]] = []
        self._file = out.open("w", encoding="utf-8") if out else None

    def add(self, part: str, model: str, who: str, repetition: int, values: dict[str, Any], **facts: Any) -> None:
        """One sample; `at` numbers them in the order of measuring."""
        place = {"at": len(self.samples), "load": load_average()}
        sample = {"part": part, "model": model, "who": who, "repetition": repetition, **facts, **values, **place}
        self.samples.append(sample)
        if self._file:
            self._file.write(json.dumps(sample) + "\n")
            self._file.flush()


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; None where the system doesn't say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same names, another one first."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def measure_ttft(bundle: Path, settings: Settings, record: Recorder, parts: Sequence[str]) -> None:
    """Questions about new pictures to ours, ours without caches and mtmd; a second one on the same picture to ours."""
    threads, build = settings.threads, settings.build
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(peers.open_ours(bundle, build, threads))
        who: dict[str, Any] = {"ours": ours}
        if "ttft" in parts:
            who["ours, no caches"] = stack.enter_context(peers.open_ours(bundle, build, threads, caches=False))
            who["mtmd"] = stack.enter_context(peers.open_theirs(bundle, build, threads))
        count = _counter(ours)
        for repetition in range(settings.repetitions):
            picture = peers.photo(1000 + repetition)
            first, second = (peers.question(settings.question_tokens, count, 2 * repetition + k) for k in (0, 1))
            for name in rotated(list(who), repetition):
                _say(f"{bundle.name}: ttft, {name}")
                values = peers.ask(who[name], picture, first, settings.tokens)
                record.add("ttft", bundle.name, name, repetition, values, build=ours.build)
                if name == "ours" and "second" in parts:
                    again = peers.ask(ours, picture, second, settings.tokens)
                    record.add("second", bundle.name, name, repetition, again, build=ours.build)
        facts = ours.environment()
        kept = ("providers", "n_threads", "n_ctx", "n_batch", "flash_attention", "kv_cache", "llama_cpp_repack")
        values = {name: facts[name] for name in (*kept, "llama_cpp_system_info") if name in facts}
        record.add("settings", bundle.name, "ours", 0, values, build=ours.build)


def measure_decode(bundle: Path, settings: Settings, record: Recorder) -> None:
    """Tokens per second after a prompt with a picture: ours, and the plain loop on the same file at the same depth."""
    from tinyllava_edge.bundle import read_bundle

    opened = read_bundle(bundle)
    paths = list(opened.paths(opened.build(settings.build).llm))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(peers.open_ours(bundle, settings.build, settings.threads))
        loop = peers.PlainLoop(paths[0], ours.n_ctx, settings.threads, LOOPS)
        stack.callback(loop.close)
        text = peers.question(settings.question_tokens, _counter(ours))
        _say(f"{bundle.name}: decode, filling the context")
        depth = peers.ask(ours, peers.photo(1), text, 2)["n_prompt_tokens"]
        loop.fill(depth, {"llama_decode": ours._runtime.llama.save(0)})  # the other attention keeps another layout
        for repetition in range(settings.decode_repetitions):
            for name in rotated(["ours", *LOOPS], repetition):
                _say(f"{bundle.name}: decode, {name}")
                if name == "ours":
                    values = peers.ask(ours, peers.photo(1), text, settings.decode_tokens + 1)
                else:
                    values = {"tokens_per_s": loop.rate(name, settings.decode_tokens)}
                record.add("decode", bundle.name, name, repetition, {**values, "depth": depth}, build=ours.build)


def measure_ceilings(bundle: Path, checkpoint: Path, settings: Settings, record: Recorder) -> None:
    """The machine's rates, and the work of this model's stages."""
    from tinyllava_edge.bundle import read_bundle

    opened = read_bundle(bundle)
    build = opened.build(settings.build)
    work, shapes = ceilings.vision_work(checkpoint)
    values: dict[str, Any] = {"vision_ops": work, **ceilings.gguf_work(opened.paths(build.llm))}
    values["vision_precision"] = build.vision.precision
    values["read_bytes_per_s"] = ceilings.read_bandwidth(settings.threads)
    for kind in ("fp32", "int8"):
        rates = {"x".join(map(str, s)): ceilings.gemm_rate(s, kind, settings.threads) for s in shapes}
        values[f"{kind}_rates"], values[f"{kind}_ops_per_s"] = rates, max(rates.values())
    record.add("ceilings", bundle.name, "machine", 0, values, build=build.name)


def measure_cold(bundle: Path, settings: Settings, record: Recorder) -> None:
    """Fresh processes: open to first token, for each build; without the hash check for the first of them only."""
    from tinyllava_edge.bundle import read_bundle

    builds = read_bundle(bundle).builds()
    wanted = [name for name in settings.cold_builds or builds if name in builds]
    for number, build in enumerate(wanted):
        for hashes in (True, False) if number == 0 else (True,):
            _say(f"{bundle.name}: cold, {build}, hashes {'checked' if hashes else 'not checked'}")
            arguments = {
                "bundle": str(bundle.absolute()),
                "build": build,
                "threads": settings.threads,
                "check_hashes": hashes,
                "question": f"{peers.TEXT}?",
                "picture": peers.photo(2).hex(),
            }
            values = peers.child("cold", arguments, settings.timeout_s)
            record.add("cold", bundle.name, "ours", 0, values, build=build, hashes=hashes)


def measure_transformers(bundle: Path, checkpoint: Path, settings: Settings, record: Recorder) -> None:
    """Hugging Face's generate on the checkpoint, in a process for each type."""
    with peers.open_ours(bundle, settings.build, settings.threads) as ours:
        text = peers.question(settings.question_tokens, _counter(ours))
    for dtype in settings.hf_types:
        _say(f"{bundle.name}: transformers, {dtype}")
        arguments = {
            "checkpoint": str(checkpoint.absolute()),
            "dtype": dtype,
            "threads": settings.threads,
            "question": text,
            "pictures": [peers.photo(1000 + number).hex() for number in range(settings.hf_repetitions)],
        }
        try:
            found = peers.child("generate", arguments, settings.timeout_s)
        except TimeoutError as error:  # a type that the processor has no instructions for
            record.add("transformers", bundle.name, dtype, 0, {"error": str(error)})
            continue
        for repetition, ms in enumerate(found.pop("ttft_ms")):
            record.add("transformers", bundle.name, dtype, repetition, {"ttft_ms": ms, **found})


def measure_nano(bundle: Path, settings: Settings, record: Recorder) -> None:
    """First tokens of a small model, new picture each time: how much of the clock is not the two engines'."""
    import numpy as np

    with peers.open_ours(bundle, None, settings.threads) as ours:
        side = ours.spec.image_size
        draw = np.random.default_rng(0)
        makers: dict[str, Callable[[int], Any]] = {
            "pixels": lambda n: draw.integers(0, 256, (side, side, 3), dtype=np.uint8),
            "JPEG of 640 x 480": lambda n: peers.photo(2000 + n),
        }
        text = peers.question(settings.question_tokens, _counter(ours))
        with peers.inside(ours) as spent:
            for repetition in range(-3, settings.nano_repetitions):  # three to warm up
                for name in rotated(list(makers), repetition):
                    picture = makers[name](repetition)
                    spent.update(ort_ms=0.0, llama_ms=0.0)
                    values = {**peers.ask(ours, picture, text, 1), **spent}
                    values["engines_ms"] = spent["ort_ms"] + spent["llama_ms"]
                    values["overhead_ms"] = values["ttft_ms"] - values["engines_ms"]
                    values["overhead_by_clock_ms"] = values["wall_ms"] - values["engines_ms"]
                    if repetition >= 0:
                        record.add("nano", bundle.name, name, repetition, values, build=ours.build)


def measure_size(record: Recorder) -> None:
    """Bytes of a fresh environment with nothing but the device runtime, package by package."""
    code = (
        "import importlib.metadata as m, json; print(json.dumps({d.metadata['Name']: sum(p.stat().st_size for f in "
        "d.files or () if (p := f.locate()).is_file()) for d in m.distributions()}))"
    )
    root = HERE.parent
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        source = room / "source"
        for folder in ("tinyllava_edge", "optimum"):
            shutil.copytree(root / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(root / file, source)
        pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "-w", room, source], check=True, stdout=sys.stderr)
        wheel = next(room.glob("*.whl"))
        subprocess.run([sys.executable, "-m", "venv", room / "venv"], check=True)
        python = room / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [python, "-m", "pip", "--quiet", "install", "--prefer-binary", f"{wheel}[cpu]"]
        subprocess.run(install, check=True, stdout=sys.stderr)
        found = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
        for tool in ("pip", "setuptools"):
            found.pop(tool, None)
        record.add("size", "", "environment", 0, {"bytes": found, "wheel_bytes": wheel.stat().st_size})


def environment() -> dict[str, Any]:
    """What everything ran on."""
    from tinyllava_edge.runtimes.llama import llama_facts

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "machine": machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **llama_facts(),
    }


def run(
    pairs: Sequence[tuple[Path, Path | None]],
    nano: Sequence[Path],
    settings: Settings,
    parts: Sequence[str],
    record: Recorder,
    command: str = "",
) -> list[str]:
    """Measure; a part that fails is recorded and said, and the others go on. Returns what failed."""
    failed = []

    def attempt(part: str, model: str, measure: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            measure()
        except Exception as error:  # whatever a part meets, the others are worth having
            line = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            record.add("failed", model, part, 0, {"error": line})
            failed.append(f"{model} {part}: {line}")
            _say(f"FAILED {failed[-1]}")
        record.add("seconds", model, part, 0, {"seconds": round(time.perf_counter() - start, 1)})

    record.add("environment", "", "", 0, {**environment(), "command": command, "threads": settings.threads})
    for bundle, checkpoint in pairs:
        if "cold" in parts:
            attempt("cold", bundle.name, lambda b=bundle: measure_cold(b, settings, record))
        if "ttft" in parts or "second" in parts:
            attempt("ttft", bundle.name, lambda b=bundle: measure_ttft(b, settings, record, parts))
        if "decode" in parts:
            attempt("decode", bundle.name, lambda b=bundle: measure_decode(b, settings, record))
        if "ceilings" in parts and checkpoint:
            attempt("ceilings", bundle.name, lambda b=bundle, c=checkpoint: measure_ceilings(b, c, settings, record))
        if "transformers" in parts and checkpoint:
            attempt(
                "transformers", bundle.name, lambda b=bundle, c=checkpoint: measure_transformers(b, c, settings, record)
            )
    if "nano" in parts:
        for bundle in nano:
            attempt("nano", bundle.name, lambda b=bundle: measure_nano(b, settings, record))
    if "size" in parts:
        attempt("size", "", lambda: measure_size(record))
    record.add("end", "", "", 0, {})
    return failed


def _counter(engine: Any) -> Callable[[str], int]:
    return lambda text: len(engine._runtime.llama.tokenize(text))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _names(value: str) -> tuple[str, ...]:
    return tuple(filter(None, value.split(",")))


def _command(arguments: Sequence[str]) -> str:
    """The command without the directories of this machine."""
    return " ".join(["python benchmarks/runtime_speed.py", *(Path(a).name if "/" in a else a for a in arguments)])


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="with an mmproj; may be repeated")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="of the bundle in the same place")
    parser.add_argument("--nano", type=Path, action="append", default=[], help="bundle of a small model")
    parser.add_argument("--build", help="e.g. int8+q4_0; the bundle's first by default")
    parser.add_argument("--parts", type=_names, default=DEFAULT_PARTS, help=f"of {','.join(PARTS)}; all but size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="of ttft and second")
    parser.add_argument("--decode-repetitions", type=int, default=2)
    parser.add_argument("--cold-builds", type=_names, default=(), help="the bundle's builds by default")
    parser.add_argument("--hf-types", type=_names, default=Settings.hf_types)
    parser.add_argument("--hf-repetitions", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=240, help="seconds of a process of its own")
    parser.add_argument("--out", type=Path, help="raw samples, JSON lines; written anew")
    parser.add_argument("--markdown", type=Path, help="the tables, beside stdout")
    parser.add_argument(
        "--report", type=Path, action="append", help="measure nothing; tables of samples; may be repeated"
    )
    asked = parser.parse_args()
    if unknown := sorted(set(asked.parts) - set(PARTS)):
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if asked.checkpoint and len(asked.checkpoint) != len(asked.bundle):
        parser.error(f"{len(asked.bundle)} bundles and {len(asked.checkpoint)} checkpoints")
    failed: list[str] = []
    if asked.report:
        lines = [line for path in asked.report for line in path.read_text(encoding="utf-8").splitlines()]
        samples = [json.loads(line) for line in lines]
    else:
        settings = Settings(
            build=asked.build,
            threads=asked.threads,
            repetitions=asked.repetitions,
            decode_repetitions=asked.decode_repetitions,
            cold_builds=asked.cold_builds,
            hf_types=asked.hf_types,
            hf_repetitions=asked.hf_repetitions,
            timeout_s=asked.timeout,
        )
        record = Recorder(asked.out)
        pairs = list(zip(asked.bundle, asked.checkpoint or [None] * len(asked.bundle), strict=True))
        failed = run(pairs, asked.nano, settings, asked.parts, record, _command(sys.argv[1:]))
        samples = record.samples
    text = report(samples)
    print(text)
    if asked.markdown:
        asked.markdown.write_text(text, encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""The whole road on the embedded default, in steps that resume: data, training, export, verify, measuring, report.

Each step writes its result whole or not at all and is then recorded in `state.json` with the seconds it took, so that a
second run goes on where the first one stopped, or says that everything is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__
from .benchmarks.results import Sample, read_results, write_results
from .errors import StorageError
from .files import new_directory, write_json

LLM_TYPES = ("f16", "q8_0", "q4_k_m")
VISION_TYPES = ("fp32", "int8")
BENCH_QUESTION = "Describe the image."
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much of everything the demo does."""

    scenes_train: int = 1500
    """generated pictures to train on"""
    scenes_eval: int = 240
    """generated pictures to score on, spread over the tiers"""
    train_pictures: int | None = None
    """easy-VQA training pictures; None takes all 4,000"""
    training: float = 1.0
    """share of the recipe's epochs"""
    reference_questions: int | None = None
    """easy-VQA test questions that the reference answers; None asks all 9,673"""
    build_questions: int | None = 1000
    """easy-VQA test questions that every build answers; None asks all 9,673"""
    repetitions: int = 15
    """measured answers per build"""


DEFAULT = Size()
FULL = replace(DEFAULT, build_questions=None)


@dataclass(frozen=True)
class Paths:
    """Where the demo keeps what."""

    root: Path
    """the demo's directory"""

    @property
    def state(self) -> Path:
        """Steps that are done."""
        return self.root / "state.json"

    @property
    def data(self) -> Path:
        """Questions, captions and pictures."""
        return self.root / "data"

    @property
    def work(self) -> Path:
        """Untrained model and the checkpoint of stage 1."""
        return self.root / "work"

    @property
    def checkpoint(self) -> Path:
        """The trained model."""
        return self.root / "checkpoint"

    @property
    def bundle(self) -> Path:
        """What would go to a device."""
        return self.root / "bundle"

    @property
    def results(self) -> Path:
        """Raw samples of everything that was measured."""
        return self.root / "results.jsonl"

    @property
    def report(self) -> Path:
        """The page to decide from."""
        return self.root / "report.html"

    @property
    def summary(self) -> Path:
        """The figures per build."""
        return self.root / "summary.json"

    def part(self, name: str) -> Path:
        """Raw samples of one measuring step."""
        return self.work / f"{name}.jsonl"


def run_demo(out: Path, *, force: bool = False, size: Size = DEFAULT, progress: Progress) -> dict[str, Any]:
    """Run or resume the demo in `out`.

    Args:
        out: directory; created when missing.
        force: start over; only a directory that a demo made is emptied.
        size: how much of everything to do.
        progress: receives lines for people.

    Returns:
        The content of summary.json.

    Raises:
        StorageError: `out` holds something else.
    """
    paths = Paths(out)
    _prepare(paths, force)
    state = _read_state(paths, size)
    steps: list[tuple[str, str, Callable[[], None]]] = [
        ("data", "easy-VQA and generated scenes as LLaVA JSON", lambda: _data(paths, size)),
        ("model", "nano backbones and a random connector", lambda: _model(paths)),
        ("stage 1", "connector learns from captions (Eq. 1-2)", lambda: _train(paths, "pretrain", size)),
        ("stage 2", "connector and language model learn from answers (Eq. 3)", lambda: _train(paths, "finetune", size)),
        ("export", "ONNX, GGUF, quantised builds", lambda: _export(paths, progress)),
        ("verify", "bundle against checkpoint, stage by stage", lambda: _verify(paths, progress)),
        ("eval", "accuracy of the reference and of every build", lambda: _eval(paths, size, progress)),
        ("bench", "latency and memory of every build", lambda: _bench(paths, size, progress)),
        ("report", "report.html and summary.json", lambda: _report(paths, size)),
    ]
    todo = [name for name, _, _ in steps if name not in state["seconds"]]
    if not todo:
        progress("everything is done already; --force starts over")
    for number, (name, purpose, work) in enumerate(steps, 1):
        if name not in todo:
            continue
        progress(f"[{number}/{len(steps)}] {name}: {purpose}")
        start = time.perf_counter()
        work()
        state["seconds"][name] = round(time.perf_counter() - start, 2)
        write_json(paths.state, state)
    summary: dict[str, Any] = json.loads(paths.summary.read_text(encoding="utf-8"))
    summary["seconds_total"] = round(sum(state["seconds"].values()), 1)
    summary["seconds"] = state["seconds"]
    write_json(paths.summary, summary)
    for line in closing_lines(summary):
        progress(line)
    progress(f"report: {paths.report}")
    return summary


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """The short table that the demo ends with."""
    from .commands import table

    rows = [
        {
            "build": name,
            "accuracy": f"{build['accuracy']:.2%}",
            "flips": f"{build['flips']} of {build['n']}",
            "TTFT": f"{build['ttft_ms']:.1f} ms",
            "decode": f"{build['decode_tokens_per_s']:.0f} tok/s" if build["decode_tokens_per_s"] else "-",
            "size": f"{build['bundle_bytes'] / 1e6:.1f} MB",
            "peak RSS": f"{build['peak_rss_bytes'] / 1e6:.0f} MB",
            "verified": "yes" if build["verified"] else "NO",
        }
        for name, build in summary["builds"].items()
    ]
    reference = summary["reference"]
    return [
        "",
        *table(rows).splitlines(),
        "",
        f"reference: {reference['accuracy']:.2%} of {reference['n']:,} easy-VQA test questions; "
        f"pictures shuffled: {summary['blind_accuracy']:.2%}",
        f"to ship: {summary['ship'] or 'none'}",
        f"{summary['seconds_total']:.0f} s in all",
    ]


# what a demo writes; the state last, because it says whose directory this is
OWN = (
    *("data", "work", "bundle", "results.jsonl", "checkpoint", "checkpoint.work", "checkpoint.cache"),
    *(f"checkpoint.{suffix}" for suffix in ("train.json", "log.jsonl", "samples.jsonl", "tensorboard")),
    *("report.html", "table.md", "pareto.png", "summary.json", "state.json"),
)


def _prepare(paths: Paths, force: bool) -> None:
    """Make the directory, or check that a demo made it; with `force` remove what a demo writes, and nothing else."""
    if paths.root.exists() and any(paths.root.iterdir()) and not _is_state(_json(paths.state)):
        raise StorageError(f"{paths.root} holds something that no demo made", "name an empty directory with -o")
    for name in OWN if force else ():
        entry = paths.root / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    paths.root.mkdir(parents=True, exist_ok=True)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict) and set(value) == {"version", "size", "seconds"} and isinstance(value["seconds"], dict)
    )


def _read_state(paths: Paths, size: Size) -> dict[str, Any]:
    fresh: dict[str, Any] = {"version": __version__, "size": asdict(size), "seconds": {}}
    if not paths.state.is_file():
        write_json(paths.state, fresh)
        paths.work.mkdir(exist_ok=True)
        return fresh
    paths.work.mkdir(exist_ok=True)
    state: dict[str, Any] = _json(paths.state)
    seconds = dict(state["seconds"])
    if state.get("version") != __version__:
        raise StorageError(f"{paths.state}: made by version {state.get('version')}", "start over with --force")
    if state.get("size") != fresh["size"]:
        keep = _still_good(state.get("size"), fresh["size"])
        seconds = {name: took for name, took in seconds.items() if name in keep}
    return {**fresh, "seconds": seconds}


def _still_good(old: Any, new: dict[str, Any]) -> tuple[str, ...]:
    """Steps that another size leaves as they are: all but the measuring, when only that differs."""
    measuring = {"reference_questions", "build_questions", "repetitions"}
    if isinstance(old, dict) and all(old.get(key) == value for key, value in new.items() if key not in measuring):
        return ("data", "model", "stage 1", "stage 2", "export", "verify")
    return ()


def _data(paths: Paths, size: Size) -> None:
    from .data import easy_vqa, scenes
    from .data.scene_text import TIERS

    with new_directory(paths.data, force=True) as temporary:
        paths_in = easy_vqa.convert(temporary)
        for path in (paths_in.train_qa, paths_in.train_captions):
            _keep_pictures(path, size.train_pictures)
        scenes.write_split(temporary, size.scenes_train, seed=1, split="train")
        scenes.write_split(temporary, size.scenes_eval, seed=1, split="eval", tiers=TIERS)


def _keep_pictures(path: Path, count: int | None) -> None:
    """Drop the rows of all but the first `count` pictures."""
    if count is None:
        return
    rows = json.loads(path.read_text(encoding="utf-8"))
    kept = set(list(dict.fromkeys(row["image"] for row in rows))[:count])
    write_json(path, [row for row in rows if row["image"] in kept])


def _model(paths: Paths) -> None:
    from .spec import DEFAULT_VARIANT
    from .train.trainer import init_checkpoint

    init_checkpoint(DEFAULT_VARIANT, paths.work / "init", force=True)


def _train(paths: Paths, stage: str, size: Size) -> None:
    """Both stages of the recipe; stage 2 also keeps captions, as one more question on each picture."""
    from .train import recipes
    from .train.trainer import train

    chosen = recipes.load("base-nano").stage(stage)
    chosen = replace(chosen, epochs=chosen.epochs * size.training)
    captions = paths.data / "train_captions.json"
    source, data, out = {
        "pretrain": (paths.work / "init", [captions], paths.work / "stage-1"),
        "finetune": (
            paths.work / "stage-1",
            [paths.data / "train_qa.json", captions, paths.data / "train.json"],
            paths.checkpoint,
        ),
    }[stage]
    train(source, chosen, data, paths.data / "images", out, force=True)


def _export(paths: Paths, progress: Progress) -> None:
    from .export.bundle_writer import export_bundle

    export_bundle(paths.checkpoint, paths.bundle, llm=LLM_TYPES, vision=VISION_TYPES, force=True, progress=progress)


def _verify(paths: Paths, progress: Progress) -> None:
    from .commands import print_verify
    from .export.verify import verify

    report = verify(paths.bundle, paths.checkpoint, progress=progress)
    write_results(paths.part("verify"), report.samples())
    if not report.passed:  # the table says which stage; the demo goes on, because the report shows it too
        print_verify(report)


def _eval(paths: Paths, size: Size, progress: Progress) -> None:
    """The reference answers every test question once; builds answer a fixed sample of them, and all scenes."""
    from .benchmarks.evaluation import evaluate, sample_questions
    from .benchmarks.tasks.llava_json import load_rows
    from .bundle import read_bundle
    from .runtimes.edge import open_edge
    from .runtimes.reference import open_reference

    images = paths.data / "images"
    questions = sample_questions(load_rows(paths.data / "test_qa.json", images), size.reference_questions)
    scenes = load_rows(paths.data / "eval.json", images)
    asked = [*sample_questions(questions, size.build_questions), *scenes]
    reference = open_reference(paths.checkpoint)
    try:
        every = evaluate(reference, [*questions, *scenes], progress=progress)
        blind = evaluate(reference, asked, shuffle_pictures_seed=0, progress=progress)
    finally:
        reference.close()
    write_results(paths.part("reference"), every.samples())
    wanted = {row.id for row in asked}
    same = replace(every, records=tuple(record for record in every.records if record.id in wanted))
    samples = [*same.samples(), *blind.samples()]
    for name in read_bundle(paths.bundle).builds():
        runtime = open_edge(paths.bundle, name, allow_unverified=True)
        try:
            samples += evaluate(runtime, asked, progress=progress).samples()
        finally:
            runtime.close()
    write_results(paths.part("eval"), samples)


def _bench(paths: Paths, size: Size, progress: Progress) -> None:
    from .benchmarks.latency import bench

    picture = next(iter(sorted((paths.data / "images").glob("test-*.png"))))
    samples = bench(
        paths.bundle, picture=picture, question=BENCH_QUESTION, repetitions=size.repetitions, progress=progress
    )
    write_results(paths.part("bench"), samples)


def _report(paths: Paths, size: Size) -> None:
    from .benchmarks.report import render_report
    from .benchmarks.report_training import training_section

    command = Sample("command", detail={"command": "tinyllava-edge demo" + (" --full" if size == FULL else "")})
    parts = read_results([paths.part(name) for name in ("verify", "eval", "bench")])
    samples = [command, *parts]
    write_results(paths.results, samples)
    markdown, png = paths.root / "table.md", paths.root / "pareto.png"
    training = training_section([paths.work / "stage-1.train.json", paths.root / "checkpoint.train.json"])
    render_report(samples, paths.report, images=paths.data / "images", markdown=markdown, png=png, training=training)
    write_json(paths.summary, summarise_demo(samples, read_results([paths.part("reference")])))


def summarise_demo(samples: Sequence[Sample], reference: Iterable[Sample]) -> dict[str, Any]:
    """summary.json: one entry per build, the reference on all test questions, the blind baseline."""
    from .benchmarks.evaluation import accuracy
    from .benchmarks.summary import headline, summarise

    found, whole = summarise(samples), summarise(list(reference)).reference
    if found.reference is None or found.reference.accuracy is None or whole is None or whole.accuracy is None:
        raise StorageError("the demo's results hold no reference answers", "start over with --force")
    builds = {}
    for build in found.builds:
        if build.accuracy is None or build.ttft is None or build.flips is None:
            raise StorageError(f"the demo's results lack figures of build {build.build}", "start over with --force")
        builds[build.build] = {
            "accuracy": build.accuracy.estimate,
            "accuracy_reference": found.reference.accuracy.estimate,
            "n": build.n,
            "flips": len(build.flips.changed),
            "by_tier": {name: value.estimate for name, value in build.by_tier.items()},
            "flips_tiers": len(build.tier_flips.changed) if build.tier_flips else 0,
            "ttft_ms": build.ttft.estimate,
            "decode_tokens_per_s": build.stages.get("decode_tokens_per_s"),
            "bundle_bytes": build.bytes,
            "peak_rss_bytes": build.memory.get("peak_rss"),
            "verified": bool(build.verified),
        }
    return {
        "version": __version__,
        "ship": found.decision.build,
        "why": list(found.decision.reasons),
        "builds": builds,
        "reference": {
            "accuracy": whole.accuracy.estimate,
            "n": whole.n,
            "by_type": {name: value.estimate for name, value in whole.by_type.items()},
            "by_tier": {name: value.estimate for name, value in whole.by_tier.items()},
        },
        "blind_accuracy": accuracy(headline(found.blind)).estimate,
    }

"""How far a build's distribution over the next token is from its checkpoint's, on pictures, split by cause.

The reference (torch, float32) answers greedily; its answer, end token included, is then forced on every variant, and
KL(reference‖variant) is taken at each of its tokens. A variant differs from the reference in one thing:

    again       nothing: prompt and answer in one pass instead of token by token, which shows what rounding does
    preprocess  the bundle's preprocessing graph → torch tower and LLM
    vision      the build's preprocessing and vision graphs → torch LLM
    llm         the reference's image embeddings → the build's GGUF
    both        the build as shipped, its own tokenizer included
    runtime     the most precise build as shipped (fp32 vision, f32 or f16 LLM): runtime and preprocessing alone

One model is loaded at a time: the vision graphs first, then the reference, then build after build. What they hand on
lies in a temporary directory: logits of every answer, embeddings of every picture and vision graph.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tinyllava_edge.benchmarks.divergence_math import kl_divergence
from tinyllava_edge.benchmarks.divergence_runs import Follower, Run, Say, Spool
from tinyllava_edge.benchmarks.divergence_summary import (
    CAUSES,
    DivergenceReport,
    DivergenceRow,
    divergence_lines,
    summarise_divergence,
)
from tinyllava_edge.benchmarks.evaluation import by_picture, sample_questions
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.bundle import Build, Bundle, read_bundle
from tinyllava_edge.checkpoint_spec import load_spec
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.export.verify_spec import spec_checks
from tinyllava_edge.files import sha256_tree
from tinyllava_edge.runtimes.text import check_max_tokens

__all__ = [
    "CAUSES",
    "DivergenceReport",
    "DivergenceRow",
    "Follower",
    "divergence_lines",
    "kl_divergence",
    "measure_divergence",
    "summarise_divergence",
]

EXACT_VISION, EXACT_LLM = "fp32", ("f32", "f16")  # the most precise build, best first


def measure_divergence(
    bundle: Path,
    checkpoint: Path,
    questions: Sequence[Question],
    *,
    builds: Sequence[str],
    max_tokens: int,
    limit: int | None = None,
    allow_unverified: bool = False,
    task: str = "",
    n_threads: int | None = None,
    progress: Say | None = None,
) -> list[Sample]:
    """Measure the divergence of a bundle's builds from their checkpoint.

    Args:
        bundle: directory.
        checkpoint: directory of the reference that the bundle was exported from.
        questions: what is asked; those without exactly one picture are left out.
        builds: names; all of them when empty.
        max_tokens: longest answer of the reference, in tokens.
        limit: measure a fixed sample of so many questions, see `evaluation.sample_questions`.
        allow_unverified: measure builds without a `verified` stamp, and against a checkpoint of another hash.
        task: name of the benchmark that the questions belong to.
        n_threads: threads of the edge runtime and of torch; their own defaults when None.
        progress: receives a line now and then.

    Returns:
        Lines for results.jsonl: the reference's `environment` line, the bundle's, then `divergence` lines, those of a
        build behind an `environment` line of their own. Their value is the mean KL of an answer's tokens in nats, their
        detail {id, image, task, tokens} and `Positions.detail`. Where there is no build that may stand for the
        runtime, one line of cause `runtime` has no value and says why in `absent`.

    Raises:
        UsageError: an unknown build, or a number out of range.
        UnverifiedError: a build without a stamp.
        BundleError: a file is missing or was changed.
        DataError: no question with one picture, or the checkpoint is another model's.
        ImageError: a picture can't be used.
        ContextError: a prompt doesn't fit.
        EngineError: an engine refused, or gave something that is not finite.
        StorageError: the temporary directory is full.
    """
    say = progress or (lambda line: None)
    check_max_tokens(max_tokens)
    opened = read_bundle(bundle)
    chosen = [opened.build(name) for name in dict.fromkeys(builds)] if builds else list(opened.builds().values())
    exact, reason = _most_precise(opened, allow_unverified)
    every = list({build.name: build for build in [*chosen, *([exact] if exact else [])]}.values())
    for build in every:
        opened.require_verified(build, allow_unverified)
    wanted = _sample(questions, limit, say)
    digest = _same_model(opened, checkpoint, allow_unverified)
    opened.check_files(list({file.path: file for build in every for file in build.files}.values()))
    with tempfile.TemporaryDirectory(prefix="tinyllava-divergence-") as scratch:
        run = Run(opened, wanted, Spool(Path(scratch)), task, n_threads, say)
        for build in {build.vision.path: build for build in every}.values():
            run.encode(build)
        samples = run.reference(checkpoint, digest, {build.vision.path: build.vision for build in chosen}, max_tokens)
        for build in every:
            samples += run.build(build, build in chosen, build == exact, allow_unverified)
    if exact is None:
        samples.append(Sample("divergence", "edge", stage="runtime", unit="nats", detail={"absent": reason}))
    return samples


def _most_precise(bundle: Bundle, allow_unverified: bool) -> tuple[Build | None, str]:
    """The build that stands for the runtime alone, or None and why there is none."""
    builds = bundle.builds()
    names = [name for name in (f"{EXACT_VISION}+{llm}" for llm in EXACT_LLM) if name in builds]
    if not names:
        return None, f"the bundle holds no {EXACT_VISION} vision with an {' or '.join(EXACT_LLM)} LLM"
    allowed = [name for name in names if allow_unverified or bundle.is_verified(builds[name])]
    return (builds[allowed[0]], "") if allowed else (None, f"no `verified` stamp: {', '.join(names)}")


def _sample(questions: Sequence[Question], limit: int | None, say: Say) -> list[Question]:
    """Questions with one picture, the fixed sample of `eval --limit`, a picture's questions side by side."""
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}", "ask at least one question")
    found = [question for question in questions if len(question.pictures) == 1]
    if not found:
        raise DataError(f"none of {len(questions)} questions has exactly one picture", "name a task with pictures")
    twice = next((name for name, n in Counter(question.id for question in found).items() if n > 1), None)
    if twice is not None:
        raise DataError(f"question id {twice!r} occurs twice", "measure one task at a time")
    if len(found) < len(questions):
        say(f"{len(questions) - len(found)} of {len(questions)} questions left out: they have no picture, or several")
    return [question for group in by_picture(sample_questions(found, limit)).values() for question in group]


def _same_model(bundle: Bundle, checkpoint: Path, allow_other: bool) -> str:
    """The checkpoint's hash. Raises DataError when it can't be, or is not, what the bundle was exported from."""
    other = next((check for check in spec_checks(bundle.spec, load_spec(checkpoint)) if not check.passed), None)
    if other is not None:
        raise DataError(
            f"{checkpoint}: another model than {bundle.root}: {other.worst}", "name the checkpoint it was exported from"
        )
    digest = sha256_tree(checkpoint)
    if digest != bundle.source.get("sha256") and not allow_other:
        raise DataError(
            f"{checkpoint}: not the checkpoint that {bundle.root} was exported from, by its hash",
            "name that one, or pass --allow-unverified",
        )
    return digest

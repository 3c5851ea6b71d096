"""Does a bundle compute what its checkpoint computes? Stage by stage, on real pictures; the first difference is named.

    pixels → image_features → image_embeds → prompt_ids → first_logits → answer

Each stage is compared twice: with the reference's input, so that it is blamed for its own error only, and with the
build's own input, which shows what the errors before it add up to. The limits are in tolerances.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllava_edge import __version__
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.bundle import Build, Bundle, open_bundle
from tinyllava_edge.export import tolerances
from tinyllava_edge.export.compare import Check, Difference, Equal, Floats, Pixels
from tinyllava_edge.export.verify_pictures import Case, cases
from tinyllava_edge.prompt import get_template
from tinyllava_edge.runtimes.base import IMAGE_PLACE, Answer, Probe
from tinyllava_edge.runtimes.llama import Llama
from tinyllava_edge.runtimes.vision import Vision

MAX_TOKENS = 16
REFERENCE, OWN = "reference", "own"  # whose output the stage was given


@dataclass(frozen=True)
class BuildReport:
    """Verdict on one build."""

    build: str
    """build name"""
    passed: bool
    """every gated check passed"""
    first_divergence: str | None
    """first stage that did not pass"""
    checks: tuple[Check, ...]
    """in the order of the road"""
    samples: int
    """pictures compared"""
    tie_margin: float
    """logit distance up to which two tokens count as tied: twice the build's largest logit error; 0 when quantised"""


@dataclass(frozen=True)
class VerifyReport:
    """Verdict on a bundle."""

    bundle: str
    """model name"""
    bundle_sha256: str
    """digest of bundle.json"""
    checkpoint: str
    """the checkpoint's directory name"""
    version: str
    """version that verified"""
    builds: tuple[BuildReport, ...]
    """one per build"""

    @property
    def passed(self) -> bool:
        """Whether every build passed."""
        return all(build.passed for build in self.builds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """The parity table for a terminal: one line per stage and build."""
        table = []
        for build in self.builds:
            verdict = "passed" if build.passed else f"DIVERGES at {build.first_divergence}"
            table.append(f"{build.build}: {verdict}, {build.samples} pictures")
            table += [f"  {check.line()}" for check in build.checks]
        return table

    def samples(self, environment_id: str = "") -> list[Sample]:
        """One `verify` line per build for results.jsonl."""
        return [
            Sample("verify", "edge", b.build, environment_id=environment_id, detail=_record(b, self.checkpoint))
            for b in self.builds
        ]


def verify(
    bundle: Path,
    checkpoint: Path,
    *,
    builds: Sequence[str] | None = None,
    pictures: Sequence[Path] | None = None,
    questions: Sequence[str] | None = None,
    n_threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare builds of a bundle with the checkpoint they came from, and stamp those that pass.

    A build loses its old stamp before anything is computed, so that a failure, or a run that was cut off, leaves none.

    Args:
        bundle: directory; its files are checked against their hashes first.
        checkpoint: directory of the reference.
        builds: names; all of them by default.
        pictures: files; by default 64 easy-VQA test pictures and two photographs of odd sizes.
        questions: one for all pictures, or one each.
        n_threads: threads of the edge runtime; all cores by default.
        progress: receives a line per build and now and then between.

    Raises:
        BundleError: a file is missing or was changed.
        UsageError: an unknown build, or questions that don't fit the pictures.
        VerifyError: a precision without a stated tolerance.
    """
    opened = open_bundle(bundle)
    chosen = [opened.build(name) for name in builds] if builds else list(opened.builds().values())
    wanted = cases(pictures, questions)
    stamps = {name: record for name, record in opened.verified_builds().items() if name not in {b.name for b in chosen}}
    opened.stamp(stamps)
    say = progress or (lambda line: None)
    with tempfile.TemporaryDirectory(prefix="tinyllava-verify-") as spool:
        references = _reference_probes(checkpoint, wanted, Path(spool), say)
        reports = []
        for build in chosen:
            opened.check(build)
            report = _verify_build(opened, build, wanted, references, n_threads)
            outcome = "passed" if report.passed else f"diverges at {report.first_divergence}"
            say(f"{build.name}: {outcome} ({report.samples} pictures)")
            reports.append(report)
            if report.passed:  # at once, so that a run that is cut off keeps what it has shown
                stamps[build.name] = _record(report, checkpoint.name)
                opened.stamp(stamps)
    return VerifyReport(opened.name, opened.sha256, checkpoint.name, __version__, tuple(reports))


class _Spooled:
    """Reference probes on disk: at full size, 66 of them would take a gigabyte of memory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answers: list[tuple[tuple[int, ...], Answer]] = []

    def add(self, probe: Probe) -> None:
        arrays = (probe.pixel_values, probe.image_features, probe.image_embeds, probe.first_logits)
        np.savez(self._root / f"{len(self._answers)}.npz", *arrays)
        self._answers.append((probe.prompt_ids, probe.answer))

    def __getitem__(self, number: int) -> Probe:
        ids, answer = self._answers[number]
        with np.load(self._root / f"{number}.npz", allow_pickle=False) as arrays:
            pixels, features, embeds, logits = (arrays[f"arr_{k}"] for k in range(4))
        return Probe(pixels, features, embeds, ids, logits, answer)


def _reference_probes(checkpoint: Path, wanted: Sequence[Case], spool: Path, say: Callable[[str], None]) -> _Spooled:
    from tinyllava_edge.runtimes.reference import open_reference

    runtime = open_reference(checkpoint)
    probes = _Spooled(spool)
    try:
        for number, case in enumerate(wanted, 1):
            probes.add(runtime.probe(case.picture, case.question, max_tokens=MAX_TOKENS))
            if number % 16 == 0 or number == len(wanted):
                say(f"reference: {number} of {len(wanted)} pictures")
    finally:
        runtime.close()
    return probes


def _verify_build(
    bundle: Bundle, build: Build, wanted: Sequence[Case], references: _Spooled, n_threads: int | None
) -> BuildReport:
    """Legend: p pixels, f features, e embeddings, l logits; `alone` is a stage given the reference's input."""
    from tinyllava_edge.runtimes.edge import open_edge

    kinds = (build.vision.precision, build.llm.precision)
    road = tolerances.whole_road(*kinds)
    f_limit = tolerances.known(tolerances.FEATURES, kinds[0], "vision")
    e_limit = tolerances.known(tolerances.EMBEDS, kinds[0], "vision")
    l_limit = tolerances.known(tolerances.LOGITS, kinds[1], "LLM")
    p, ids, said = Pixels(bundle.spec.image_std), Equal(), Equal()
    f_alone, f_own, e_alone, e_own = (Difference() for _ in range(4))
    l_alone, l_own = Difference(l_limit), Difference(road)
    changed: list[tuple[int, Probe]] = []
    runtime = open_edge(bundle, build.name, n_threads=n_threads, allow_unverified=True, check_hashes=False)
    parts = _Parts(bundle, build, n_threads or 1)
    try:
        for number, case in enumerate(wanted):
            ours, theirs = runtime.probe(case.picture, case.question, max_tokens=MAX_TOKENS), references[number]
            embeds, features = parts.vision.encode(theirs.pixel_values)
            p.add(case.name, ours.pixel_values, theirs.pixel_values)
            f_alone.add(case.name, features, theirs.image_features)
            f_own.add(case.name, ours.image_features, theirs.image_features)
            e_alone.add(case.name, embeds, theirs.image_embeds)
            e_own.add(case.name, ours.image_embeds, theirs.image_embeds)
            ids.add(case.name, ours.prompt_ids == theirs.prompt_ids)
            if ours.prompt_ids == theirs.prompt_ids:  # else the logits answer different questions
                l_alone.add_logits(case.name, parts.logits(theirs.prompt_ids, theirs.image_embeds), theirs.first_logits)
                l_own.add_logits(case.name, ours.first_logits, theirs.first_logits)
            if ours.answer.token_ids != theirs.answer.token_ids:
                changed.append((number, ours))
        margin = 2 * l_own.max_abs if road.max_abs is not None else 0.0  # quantised builds have no ties
        ties = {n for n, ours in changed if margin and ids.all and parts.gap(ours, references[n].answer) <= margin}
        different = {n for n, _ in changed}
        for number, case in enumerate(wanted):
            said.add(case.name, number not in different, tie=number in ties)
    finally:
        runtime.close()
        parts.close()
    checks = (
        p.check("pixels", OWN, tolerances.PIXELS),
        f_alone.check("image_features", REFERENCE, f_limit),
        f_own.check("image_features", OWN, None),
        e_alone.check("image_embeds", REFERENCE, e_limit),
        e_own.check("image_embeds", OWN, None),
        ids.check("prompt_ids", OWN, tolerances.PROMPT_IDS),
        l_alone.check("first_logits", REFERENCE, l_limit),
        l_own.check("first_logits", OWN, road),
        said.check("answer", OWN, tolerances.answers(*kinds)),
    )
    first = next((check.stage for check in checks if check.gated and not check.passed), None)
    return BuildReport(build.name, first is None, first, checks, len(wanted), margin)


class _Parts:
    """A build's graphs opened one by one, to feed them the reference's outputs."""

    def __init__(self, bundle: Bundle, build: Build, n_threads: int) -> None:
        files = (bundle.path(build.preprocess), bundle.path(build.vision))
        self.vision = Vision(*files, bundle.spec, n_threads=n_threads)
        self._llama = Llama(bundle.path(build.llm), n_ctx=bundle.spec.max_length, n_threads=n_threads)
        end = get_template(bundle.spec.template).end_of_turn
        self._stop = self._llama.special_id(end) if end else self._llama.eos

    def logits(self, ids: Sequence[int], embeds: Floats, answer: Sequence[int] = ()) -> Floats:
        """Prompt ids with IMAGE_PLACE, embeddings (T, D), answer so far → logits (vocab,) of the next token."""
        place = ids.index(IMAGE_PLACE)
        before, after = list(ids[:place]), [*ids[place + 1 :], *answer]
        self._llama.clear()
        if before:
            self._llama.decode_tokens(before, range(place))
        start = place + len(embeds)
        if not after:
            return self._llama.decode_embeddings(embeds, place, wanted=[len(embeds) - 1])[0]
        self._llama.decode_embeddings(embeds, place)
        return self._llama.decode_tokens(after, range(start, start + len(after)), wanted=[len(after) - 1])[0]

    def gap(self, ours: Probe, theirs: Answer) -> float:
        """Where two answers part: distance of the build's logits of its own token and the reference's."""
        mine, other = [*ours.answer.token_ids, self._stop], [*theirs.token_ids, self._stop]
        same = next(k for k, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
        logits = self.logits(ours.prompt_ids, ours.image_embeds, mine[:same])
        return abs(float(logits[mine[same]] - logits[other[same]]))

    def close(self) -> None:
        self._llama.close()


def _record(report: BuildReport, checkpoint: str) -> dict[str, Any]:
    """What the stamp and the results keep of one build."""
    return {**asdict(report), "checkpoint": checkpoint, "version": __version__}

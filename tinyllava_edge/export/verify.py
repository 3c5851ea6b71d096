"""Does a bundle compute what its checkpoint computes? Stage by stage, on real pictures; the first difference is named.

    pixels → image_features → image_embeds → prompt_ids → first_logits → answer

Each stage is compared twice: with the reference's input, so that it is blamed for its own error only, and with the
build's own input, which shows what the errors before it add up to. What bundle and checkpoint say of themselves is
compared too (verify_spec.py), and what other hosts make of the GGUF's chat template (embedded_template.py). The limits
are in tolerances.py. What browsers run is compared in verify_web.py.

The checkpoint is loaded once, run over all pictures and let go before a build is opened, so the peak is the larger of
the two: the float32 reference, 4 bytes a parameter. What it gave lies on disk meanwhile.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tinyllava_edge import __version__
from tinyllava_edge.benchmarks.peak_rss import status
from tinyllava_edge.bundle import Build, Bundle, WebBuild, read_bundle
from tinyllava_edge.checkpoint_spec import load_spec
from tinyllava_edge.errors import EngineError
from tinyllava_edge.export import tolerances
from tinyllava_edge.export.compare import Check, Difference, Equal, Floats, Pixels
from tinyllava_edge.export.embedded_template import HostPrompts
from tinyllava_edge.export.verify_pictures import Case, cases
from tinyllava_edge.export.verify_probes import Spooled
from tinyllava_edge.export.verify_report import BuildReport, VerifyReport
from tinyllava_edge.export.verify_spec import MAX_TOKENS, STAGES, spec_checks
from tinyllava_edge.export.verify_web import check_web, verify_web
from tinyllava_edge.files import scratch_directory
from tinyllava_edge.prompt import get_template
from tinyllava_edge.runtimes.base import IMAGE_PLACE, Answer, Probe
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge
from tinyllava_edge.runtimes.picture import read_picture

__all__ = ["BuildReport", "VerifyReport", "verify"]

NOISE_PICTURES = 2  # pictures on which the reference's own rounding is measured
TEMPLATE_QUESTIONS = 4  # different questions that the chat template is rendered with
REFERENCE, OWN, TEMPLATE = "reference", "own", "template"  # whose output the stage was given


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
        builds: names; all of them by default, a browser's included.
        pictures: files; by default 64 easy-VQA test pictures and two photographs of odd sizes.
        questions: one for all pictures, or one each.
        n_threads: threads of the edge runtime; all cores by default.
        progress: receives a line per build and now and then between.

    Raises:
        BundleError: a file is missing or was changed.
        UsageError: an unknown build, or questions that don't fit the pictures.
        VerifyError: a precision without a stated tolerance.
    """
    opened = read_bundle(bundle)
    everything = [*opened.builds(), *opened.web_builds()]
    chosen = [opened.any_build(name) for name in dict.fromkeys(builds or everything)]
    wanted = cases(pictures, questions)
    reference_spec = load_spec(checkpoint)  # a mistyped directory costs no stamp
    stamps = {name: record for name, record in opened.verified_builds().items() if name not in {b.name for b in chosen}}
    opened.stamp(stamps)
    say = progress or (lambda line: None)
    for build in chosen:  # before the long work
        if isinstance(build, WebBuild):
            check_web(build)
        else:
            tolerances.whole_road(build.vision.precision, build.llm.precision)
        opened.check(build)
    said_of_themselves = spec_checks(opened.spec, reference_spec)
    with scratch_directory() as spool:
        references = _reference_probes(checkpoint, wanted, spool, say)
        reports = []
        for build in chosen:
            given = (wanted, references, said_of_themselves, n_threads, say)
            if isinstance(build, WebBuild):
                report = verify_web(opened, build, *given)
            else:
                report = _verify_build(opened, build, *given)
            outcome = "passed" if report.passed else f"diverges at {report.first_divergence}"
            say(f"{build.name}: {outcome} ({report.samples} pictures)")
            reports.append(report)
            if report.passed:  # at once, so that a run that is cut off keeps what it has shown
                stamps[build.name] = report.record(checkpoint.name)
                opened.stamp(stamps)
    peak = status().get("VmHWM", 0)
    return VerifyReport(opened.name, opened.sha256, checkpoint.name, __version__, tuple(reports), peak)


def _reference_probes(checkpoint: Path, wanted: Sequence[Case], spool: Path, say: Callable[[str], None]) -> Spooled:
    from tinyllava_edge.runtimes.reference import open_reference

    runtime = open_reference(checkpoint)
    probes = Spooled(spool)
    try:
        for number, case in enumerate(wanted, 1):
            probe = runtime.probe(case.picture, case.question, max_tokens=MAX_TOKENS)
            probes.add(probe)
            if number <= NOISE_PICTURES:
                probes.noise = max(probes.noise, runtime.rounding_noise(probe))
            if number % 16 == 0 or number == len(wanted):
                say(f"reference: {number} of {len(wanted)} pictures")
    finally:
        runtime.close()
        del runtime
        gc.collect()  # modules refer to each other: without this the weights stay until Python next looks
    return probes


def _verify_build(
    bundle: Bundle,
    build: Build,
    wanted: Sequence[Case],
    references: Spooled,
    said_of_themselves: Sequence[Check],
    n_threads: int | None,
    say: Callable[[str], None],
) -> BuildReport:
    """Legend: p pixels, f features, e embeddings, l logits; `alone` is a stage given the reference's input."""
    kinds = (build.vision.precision, build.llm.precision)
    road = tolerances.whole_road(*kinds)
    exact = tolerances.float32_features(references.noise) if kinds[0] in tolerances.EXACT_VISION else None
    f_limit = exact or tolerances.known(tolerances.FEATURES, kinds[0], "vision")
    e_limit = exact or tolerances.known(tolerances.EMBEDS, kinds[0], "vision")
    l_limit = tolerances.known(tolerances.LOGITS, kinds[1], "LLM")
    p, ids, said = Pixels(bundle.spec.image_std), Equal(), Equal()
    f_alone, f_own, e_alone, e_own = (Difference() for _ in range(4))
    l_alone, l_own = Difference(l_limit), Difference(road)
    changed: list[tuple[int, Probe]] = []
    unanswered: set[int] = set()
    with open_edge(bundle, build.name, n_threads=n_threads, allow_unverified=True, check_hashes=False) as runtime:
        alone = _Alone(runtime)
        for number, case in enumerate(wanted):
            if number and number % 16 == 0:
                say(f"{build.name}: {number} of {len(wanted)} pictures")
            theirs = references[number]
            embeds, features = alone.encode(theirs.pixel_values)
            f_alone.add(case.name, features, theirs.image_features)
            e_alone.add(case.name, embeds, theirs.image_embeds)
            if not np.isfinite(embeds).all():  # the decoder would refuse them
                rgb = read_picture(case.picture, bundle.spec)
                p.add(case.name, runtime.vision.pixel_values(rgb), theirs.pixel_values)
                unanswered.add(number)
                continue
            ours = runtime.probe(case.picture, case.question, max_tokens=MAX_TOKENS)
            p.add(case.name, ours.pixel_values, theirs.pixel_values)
            f_own.add(case.name, ours.image_features, theirs.image_features)
            e_own.add(case.name, ours.image_embeds, theirs.image_embeds)
            ids.add(case.name, ours.prompt_ids == theirs.prompt_ids)
            if ours.prompt_ids == theirs.prompt_ids:  # else the logits answer different questions
                l_alone.add_logits(case.name, alone.logits(theirs.prompt_ids, theirs.image_embeds), theirs.first_logits)
                l_own.add_logits(case.name, ours.first_logits, theirs.first_logits)
            if ours.answer.token_ids != theirs.answer.token_ids:
                changed.append((number, ours))
        margin = 2 * l_own.max_abs if road.max_abs is not None else 0.0  # quantised builds have no ties
        margin = margin if np.isfinite(margin) else 0.0
        ties = {n for n, ours in changed if margin and ids.all and alone.gap(ours, references[n].answer) <= margin}
        different = unanswered | {n for n, _ in changed}
        for number, case in enumerate(wanted):
            said.add(case.name, number not in different, tie=number in ties)
    checks = [
        *said_of_themselves,
        p.check("pixels", OWN, tolerances.PIXELS),
        f_alone.check("image_features", REFERENCE, f_limit),
        f_own.check("image_features", OWN, None),
        e_alone.check("image_embeds", REFERENCE, e_limit),
        e_own.check("image_embeds", OWN, None),
        ids.check("prompt_ids", OWN, tolerances.PROMPT_IDS),
        *_template_check(bundle, build, wanted, references),
        l_alone.check("first_logits", REFERENCE, l_limit),
        l_own.check("first_logits", OWN, road),
        said.check("answer", OWN, tolerances.answers(*kinds)),
    ]
    checks.sort(key=lambda check: STAGES.index(check.stage))  # stable: what they say of themselves stays in front
    first = next((check.stage for check in checks if check.gated and not check.passed), None)
    return BuildReport(build.name, first is None, first, tuple(checks), len(wanted), margin)


def _template_check(bundle: Bundle, build: Build, wanted: Sequence[Case], references: Spooled) -> list[Check]:
    """Prompt ids of other hosts against the reference's; no check where the template has no place for a question."""
    if get_template(bundle.spec.template).caption_only:
        return []
    asked = {case.question: references.ids(number) for number, case in enumerate(wanted)}
    count = Equal()
    hosts = HostPrompts(bundle.path(build.llm))
    try:
        chosen = [question for question in asked if hosts.is_plain(question)][:TEMPLATE_QUESTIONS]
        for way, found in hosts.ids(chosen).items():
            for question, ids in zip(chosen, found, strict=True):
                count.add(f"{way}: {question!r}", ids == asked[question])
    except EngineError as error:
        count.add(error.message, False)
    finally:
        hosts.close()
    return [count.check("prompt_ids", TEMPLATE, tolerances.PROMPT_IDS)] if count.samples else []


class _Alone:
    """A build's graphs one by one, to feed them the reference's outputs. What doesn't fit comes back empty."""

    def __init__(self, runtime: EdgeRuntime) -> None:
        self._vision, self._llama, self._side = runtime.vision, runtime.llama, runtime.spec.image_size
        end = get_template(runtime.spec.template).end_of_turn
        self._stop = self._llama.special_id(end) if end else self._llama.eos

    def encode(self, pixels: Floats) -> tuple[Floats, Floats]:
        """Pixels (3, S, S) → embeddings (T, D) and features (T, V)."""
        if pixels.shape != (3, self._side, self._side):
            return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)
        return self._vision.encode(pixels)

    def logits(self, ids: Sequence[int], embeds: Floats, answer: Sequence[int] = ()) -> Floats:
        """Prompt ids with IMAGE_PLACE, embeddings (T, D), answer so far → logits (vocab,) of the next token."""
        place = ids.index(IMAGE_PLACE)
        before, after = list(ids[:place]), [*ids[place + 1 :], *answer]
        start = place + len(embeds)
        if embeds.shape[1] != self._llama.n_embd or start + len(after) > self._llama.n_ctx:
            return np.zeros(0, np.float32)
        self._llama.clear()
        if before:
            self._llama.decode_tokens(before, range(place))
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

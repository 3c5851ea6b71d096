"""Does what a browser runs compute what its checkpoint computes? Stage by stage, as verify.py compares other builds.

    pixels → image_embeds → prompt_ids → first_logits → answer

The web files' own graphs and tokenizer run here in ONNX Runtime, on the CPU. So a stamp speaks of the files: what a
browser's WebAssembly or WebGPU makes of them, the page tests itself at each start, and `eval run --runtime web` counts.
The 8- and 4-bit graphs round activations to 8 bits in a way that depends on the processor, so their figures, and
answers whose tokens are nearly as likely, differ a little from one machine to another; the limits leave room for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..bundle import Bundle, WebBuild
from ..errors import EngineError
from ..runtimes.base import Answer
from ..runtimes.picture import read_picture
from . import tolerances
from .compare import Check, Difference, Equal, Floats, Pixels
from .verify_pictures import Case
from .verify_probes import Spooled
from .verify_report import BuildReport
from .verify_spec import MAX_TOKENS, STAGES
from .web_graphs import WebGraphs

REFERENCE, OWN = "reference", "own"  # whose output the stage was given


def check_web(build: WebBuild) -> None:
    """Raises VerifyError for a precision without stated tolerances."""
    tolerances.whole_road(*_kinds(build))


def verify_web(
    bundle: Bundle,
    build: WebBuild,
    wanted: Sequence[Case],
    references: Spooled,
    said_of_themselves: Sequence[Check],
    n_threads: int | None,
    say: Callable[[str], None],
) -> BuildReport:
    """Compare a browser's build with what the reference gave for each picture.

    Args:
        bundle: the bundle.
        build: one of its web builds, its files checked against their hashes.
        wanted: the pictures and questions.
        references: what the checkpoint made of them, in the same order.
        said_of_themselves: checks of the spec's fields.
        n_threads: threads of ONNX Runtime; all cores by default.
        say: receives a line now and then.

    Raises:
        BundleError, EngineError: a graph or the tokenizer can't be opened.
    """
    kinds = _kinds(build)
    exact = tolerances.float32_features(references.noise) if kinds[0] in tolerances.EXACT_VISION else None
    e_limit = exact or tolerances.known(tolerances.EMBEDS, kinds[0], "vision")
    l_limit, road = tolerances.known(tolerances.LOGITS, kinds[1], "LLM"), tolerances.whole_road(*kinds)
    pixels, ids, said = Pixels(bundle.spec.image_std), Equal(), Equal()
    e_alone, e_own = Difference(), Difference()
    l_alone, l_own = Difference(l_limit), Difference(road)
    changed: dict[int, tuple[Floats, list[int]]] = {}  # number → image embeddings and tokens of another answer
    unanswered: set[int] = set()
    graphs = WebGraphs(bundle, build, n_threads)
    for number, case in enumerate(wanted):
        if number and number % 16 == 0:
            say(f"{build.name}: {number} of {len(wanted)} pictures")
        theirs = references[number]
        values = graphs.pixel_values(read_picture(case.picture, bundle.spec))
        pixels.add(case.name, values, theirs.pixel_values)
        with _blamed(e_alone, case.name):
            e_alone.add(case.name, graphs.embeds(theirs.pixel_values), theirs.image_embeds)
        prompt = graphs.prompt(case.question)
        ids.add(case.name, prompt == theirs.prompt_ids)
        if prompt == theirs.prompt_ids:  # else the logits answer different questions
            with _blamed(l_alone, case.name):
                l_alone.add_logits(case.name, graphs.logits(prompt, theirs.image_embeds), theirs.first_logits)
        unanswered.add(number)
        with _blamed(e_own, case.name):
            embeds = graphs.embeds(values)
            e_own.add(case.name, embeds, theirs.image_embeds)
            if embeds.shape != theirs.image_embeds.shape:  # the decoder would stop, or read something else
                continue
            with _blamed(l_own, case.name):
                first, tokens = graphs.answer(prompt, embeds, MAX_TOKENS)
                unanswered.remove(number)
                if prompt == theirs.prompt_ids:
                    l_own.add_logits(case.name, first, theirs.first_logits)
                if tuple(tokens) != theirs.answer.token_ids or graphs.text(tokens) != theirs.answer.text:
                    changed[number] = embeds, tokens
    margin = 2 * l_own.max_abs if road.max_abs is not None and np.isfinite(l_own.max_abs) else 0.0
    for number, case in enumerate(wanted):
        tie = False
        if number in changed and margin and ids.all:
            tie = _gap(graphs, references.ids(number), *changed[number], references[number].answer) <= margin
        said.add(case.name, number not in changed and number not in unanswered, tie=tie)
    checks = [
        *said_of_themselves,
        pixels.check("pixels", OWN, tolerances.PIXELS),
        e_alone.check("image_embeds", REFERENCE, e_limit),
        e_own.check("image_embeds", OWN, None),
        ids.check("prompt_ids", OWN, tolerances.PROMPT_IDS),
        l_alone.check("first_logits", REFERENCE, l_limit),
        l_own.check("first_logits", OWN, road),
        said.check("answer", OWN, tolerances.answers(*kinds)),
    ]
    checks.sort(key=lambda check: STAGES.index(check.stage))  # stable: what they say of themselves stays in front
    failed = next((check.stage for check in checks if check.gated and not check.passed), None)
    return BuildReport(build.name, failed is None, failed, tuple(checks), len(wanted), margin)


@contextmanager
def _blamed(stage: Difference, name: str) -> Iterator[None]:
    """A graph that stops fails its stage: what was found before and in other builds is still told."""
    try:
        yield
    except EngineError as error:
        stage.failed(name, error.message)


def _kinds(build: WebBuild) -> tuple[str, str]:
    """Keys of the tolerances for the picture's part and for the language model's."""
    from .web import WEB_PRECISIONS

    known = WEB_PRECISIONS.get(build.precision)
    return known.vision if known else build.precision, build.name


def _gap(graphs: WebGraphs, ids: Sequence[int], embeds: Floats, tokens: Sequence[int], theirs: Answer) -> float:
    """Where two answers part: distance of the build's logits of its own token and the reference's.

    Infinite where they are the same up to the build's end: its end token is a word of the reference.
    """
    mine, other = [*tokens, graphs.stops[0]], [*theirs.token_ids, graphs.stops[0]]
    same = next((k for k, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
    if same is None:
        return float("inf")
    logits = graphs.logits([*ids, *mine[:same]], embeds)
    return abs(float(logits[mine[same]] - logits[other[same]]))

"""One divergence measurement, model after model; what they hand on lies on disk. See divergence.py."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.benchmarks import divergence_torch as passes
from tinyllava_edge.benchmarks.divergence_math import Positions, compare
from tinyllava_edge.benchmarks.environment import bundle_sample, capture, environment_sample
from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.bundle import Build, Bundle, BundleFile
from tinyllava_edge.errors import EngineError
from tinyllava_edge.files import is_full, no_space, storage_errors
from tinyllava_edge.prompt import Turn, get_template
from tinyllava_edge.runtimes.base import Picture
from tinyllava_edge.runtimes.devices import ON_CPU
from tinyllava_edge.runtimes.edge import EdgeRuntime, open_edge, sizes
from tinyllava_edge.runtimes.picture import read_picture
from tinyllava_edge.runtimes.text import conversation_ids, gguf_vocabulary, split_at_image
from tinyllava_edge.runtimes.vision import Vision

if TYPE_CHECKING:
    from tinyllava_edge.runtimes.reference import ReferenceRuntime

_PROGRESS_EVERY = 16  # questions or pictures between two progress lines
Floats = npt.NDArray[np.float32]
Say = Callable[[str], None]


class Follower:
    """A build's decoder, made to say what the reference said. Not for several threads at once.

    Every stretch is computed as when the build answers: the text before the picture, the picture, the text after it,
    then token after token. A picture's cells stay for the next question about it.
    """

    def __init__(self, runtime: EdgeRuntime) -> None:
        self._llama, self._template = runtime.llama, get_template(runtime.spec.template)
        end, llama = self._template.end_of_turn, runtime.llama
        stop = llama.special_id(end) if end else llama.eos
        self._vocabulary = gguf_vocabulary(llama.tokenize, llama.header, llama.bos, stop, llama.eos)
        self._held: tuple[Any, list[int]] | None = None
        self._last = np.zeros((0, 0), np.float32)

    def prompt(self, question: str) -> tuple[int, ...]:
        """Ids of a prompt about one picture by the GGUF's tokenizer; IMAGE_PLACE marks the picture's place."""
        return conversation_ids([Turn(question, images=1)], self._template, self._vocabulary)

    def logits(self, picture: Any, prompt: Sequence[int], embeds: Floats, answer: Sequence[int]) -> Floats:
        """Logits (n, vocab) before each of an answer's n tokens.

        Args:
            picture: key of the embeddings; the same key means the same embeddings.
            prompt: ids with one IMAGE_PLACE.
            embeds: image embeddings (t, d), as the vision graph gives them; the decoder scales them for Gemma.
            answer: n token ids.

        Raises:
            ContextError: prompt and answer don't fit.
            EngineError: an id that doesn't exist, embeddings that are not finite, or llama.cpp refused.
        """
        before, after = split_at_image(prompt)
        place = len(before) + len(embeds)
        if self._held == (picture, before):
            self._llama.remove(0, place)
        else:
            self._held = None
            self._llama.clear()
            if before:
                self._llama.decode_tokens(before, range(len(before)))
            wanted = [] if after else [len(embeds) - 1]
            self._last = self._llama.decode_embeddings(embeds, len(before), wanted=wanted)
            self._held = (picture, before)
        rows = self._last
        if after:
            rows = self._llama.decode_tokens(after, range(place, place + len(after)), wanted=[len(after) - 1])
            place += len(after)
        found = [rows[0]]
        for number, token in enumerate(answer[:-1]):
            found.append(self._llama.decode_tokens([token], [place + number], wanted=[0])[0])
        return np.stack(found)


class Spool:
    """Arrays on disk: at full size, an answer's logits and a picture's embeddings take megabytes each."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, array: Floats) -> None:
        """Keep an array. Raises StorageError when the disk is full."""
        path = self._root / f"{name}.npy"
        try:
            with storage_errors(path):
                np.save(path, array, allow_pickle=False)
        except OSError as error:
            if is_full(path, array.nbytes):
                raise no_space(path) from error
            raise

    def get(self, name: str) -> Floats:
        """The array of that name."""
        array: Floats = np.load(self._root / f"{name}.npy", allow_pickle=False)
        return array


class Run:
    """One measurement: questions, their pictures by number, and what the models have said so far."""

    def __init__(
        self, bundle: Bundle, questions: Sequence[Question], spool: Spool, task: str, n_threads: int | None, say: Say
    ) -> None:
        self._bundle, self._questions, self._spool = bundle, questions, spool
        self._task, self._threads, self._say = task, n_threads, say
        numbers: dict[str, int] = {}
        self._pictures: list[Picture] = []
        self._shown: list[int] = []  # picture of each question
        for question in questions:
            key = _key(question.pictures[0])
            if key not in numbers:
                numbers[key] = len(self._pictures)
                self._pictures.append(question.pictures[0])
            self._shown.append(numbers[key])
        self._prompts: list[tuple[int, ...]] = []
        self._answers: list[tuple[int, ...]] = []
        self._vision: dict[str, list[Positions]] = {}  # file → each question's
        self._llm: dict[str, list[Positions]] = {}

    def encode(self, build: Build) -> None:
        """Run a build's two graphs on every picture."""
        spec, threads = self._bundle.spec, sizes(self._bundle.spec, self._threads, None)[0]
        vision = Vision(
            self._bundle.path(build.preprocess),
            self._bundle.path(build.vision),
            spec,
            n_threads=threads,
            providers=ON_CPU.vision_providers(build.vision.precision),
            parts=[Path(part.path).name for part in build.vision.parts],
        )
        for number, picture in enumerate(self._pictures):
            pixels = vision.pixel_values(read_picture(picture, spec))
            self._spool.put(f"pixels-{number}", pixels)
            embeds = vision.embed(pixels)
            if not np.isfinite(embeds).all():
                raise EngineError(
                    f"{self._bundle.path(build.vision)}: image embeddings of picture {number} are not finite",
                    "verify the bundle; try another vision precision",
                )
            self._spool.put(f"{_name(build.vision)}-{number}", embeds)
            self._tell(f"{build.vision.path}", number, len(self._pictures), "pictures")
        vision.close()

    def reference(self, checkpoint: Path, digest: str, visions: dict[str, BundleFile], max_tokens: int) -> list[Sample]:
        """Answer every question with the checkpoint, and measure what needs its language model."""
        from tinyllava_edge.runtimes.reference import open_reference

        runtime = open_reference(checkpoint, n_threads=self._threads)
        environment = capture(runtime)
        environment["runtime"] |= {"checkpoint_sha256": digest, "task": self._task, "max_tokens": max_tokens}
        first = environment_sample(environment)
        samples = [first, bundle_sample(self._bundle, first.environment_id)]
        self._vision = {path: [] for path in visions}
        same: dict[int, bool] = {}  # picture → whether both preprocess it to the same last bit
        for number, question in enumerate(self._questions):
            shown = self._shown[number]
            if shown not in same:
                pixels, theirs = runtime.pixel_values(self._pictures[shown]), self._spool.get(f"pixels-{shown}")
                same[shown] = np.array_equal(pixels, theirs)
                self._spool.put(f"reference-{shown}", passes.image_embeds(runtime, pixels))
                if not same[shown]:
                    self._spool.put(f"preprocess-{shown}", passes.image_embeds(runtime, theirs))
            embeds = self._spool.get(f"reference-{shown}")
            prompt = runtime.prompt(question.prompt)
            answer, logits = passes.greedy(runtime, prompt, embeds, max_tokens)
            self._prompts.append(prompt)
            self._answers.append(answer)
            self._spool.put(f"logits-{number}", logits)
            again = self._forced(runtime, number, "reference")
            preprocess = again if same[shown] else self._forced(runtime, number, "preprocess")
            for cause, found in (("again", again), ("preprocess", preprocess)):
                samples.append(self._line(number, runtime, cause, found, first.environment_id))
            for path, file in visions.items():
                self._vision[path].append(self._forced(runtime, number, _name(file)))
            self._tell("reference", number, len(self._questions), "questions")
        runtime.close()
        del runtime
        gc.collect()  # modules refer to each other: without this the weights stay until Python next looks
        return samples

    def build(self, build: Build, chosen: bool, exact: bool, allow_unverified: bool) -> list[Sample]:
        """Force the answers on a build: `vision`, `llm`, `both` where it was chosen, `runtime` where it is exact."""
        with open_edge(self._bundle, build.name, n_threads=self._threads, allow_unverified=allow_unverified) as runtime:
            first = environment_sample(capture(runtime))
            follower, samples = Follower(runtime), [first]
            alone = self._llm.get(build.llm.path) if chosen else []
            if alone is None:
                alone = self._llm[build.llm.path] = self._follow(follower, build, "reference")
            both = self._follow(follower, build, _name(build.vision))
            parts = {"vision": self._vision[build.vision.path], "llm": alone, "both": both} if chosen else {}
            for cause, found in {**parts, **({"runtime": both} if exact else {})}.items():
                samples += [self._line(n, runtime, cause, f, first.environment_id) for n, f in enumerate(found)]
        return samples

    def _forced(self, runtime: ReferenceRuntime, number: int, embeds: str) -> Positions:
        """An answer forced on the reference's language model, with embeddings of that name."""
        picture = self._spool.get(f"{embeds}-{self._shown[number]}")
        logits = passes.forced(runtime, self._prompts[number], picture, self._answers[number])
        return self._compare(number, logits)

    def _follow(self, follower: Follower, build: Build, embeds: str) -> list[Positions]:
        """Every answer forced on a decoder: with the reference's embeddings and prompts, or the build's own."""
        found, otherwise, own = [], 0, embeds != "reference"
        for number, answer in enumerate(self._answers):
            shown = self._shown[number]
            prompt = follower.prompt(self._questions[number].prompt) if own else self._prompts[number]
            otherwise += prompt != self._prompts[number]
            picture = self._spool.get(f"{embeds}-{shown}")
            found.append(self._compare(number, follower.logits((embeds, shown), prompt, picture, answer)))
            self._tell(f"{build.name}, {'both' if own else 'llm'}", number, len(self._answers), "questions")
        if otherwise:
            self._say(
                f"{build.name}: tokenises {otherwise} of {len(self._answers)} prompts otherwise than the reference"
            )
        return found

    def _compare(self, number: int, logits: Floats) -> Positions:
        return compare(self._spool.get(f"logits-{number}"), logits, self._answers[number])

    def _line(self, number: int, runtime: Any, cause: str, found: Positions, environment_id: str) -> Sample:
        question = self._questions[number]
        detail = {"id": question.id, "image": question.image, "task": self._task, **found.detail()}
        detail["tokens"] = list(self._answers[number])
        return Sample(
            "divergence", runtime.name, runtime.build, cause, found.mean, "nats", number, environment_id, detail=detail
        )

    def _tell(self, what: str, number: int, n: int, unit: str) -> None:
        if (number + 1) % _PROGRESS_EVERY == 0 or number + 1 == n:
            self._say(f"{what}: {number + 1} of {n} {unit}")


def _key(picture: Path | bytes) -> str:
    return hashlib.sha256(picture).hexdigest() if isinstance(picture, bytes) else str(picture)


def _name(file: BundleFile) -> str:
    """A vision file's arrays in the spool."""
    return f"vision-{file.precision}"

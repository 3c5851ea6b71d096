"""A browser's build in ONNX Runtime on this machine's CPU, fed exactly as the page feeds it (runtimes/web/src/engine).

The tokenizer is read from the web files, too: nothing of the checkpoint and nothing of the GGUF takes part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..bundle import Bundle, BundleFile, WebBuild
from ..errors import BundleError, EngineError
from ..image import RgbImage
from ..prompt import get_template
from ..runtimes.base import IMAGE_PLACE
from ..runtimes.decoder import Decoder
from ..runtimes.edge import sizes
from ..runtimes.providers import CPU
from ..runtimes.text import TextStream, Vocabulary, count_positions, prompt_ids
from ..runtimes.vision import one_line, open_session
from ..tokenizer_sections import SectionTokenizer, token_bytes
from .chat_template import FIRST_SPACE
from .compare import Floats


class WebGraphs:
    """The graphs, the tokenizer and the end tokens of one web precision.

    Legend: s image size, t visual tokens, n positions, h width of the language model, v vocabulary.

    Args:
        bundle: the bundle.
        build: one of its web builds.
        n_threads: threads of one operator; all cores by default.

    Raises:
        BundleError: a file is missing or damaged, or points at weights elsewhere.
        EngineError: ONNX Runtime can't open a graph.
        DependencyError: onnxruntime isn't installed.
    """

    def __init__(self, bundle: Bundle, build: WebBuild, n_threads: int | None = None) -> None:
        self.spec = bundle.spec
        self._template = get_template(bundle.spec.template)
        threads, self.n_ctx = sizes(bundle.spec, n_threads, None)
        self._paths = (bundle.path(build.preprocess), bundle.path(build.vision))
        self._preprocess = open_session(self._paths[0], threads, (CPU,))
        parts = [bundle.path(part).name for part in build.vision.parts]
        self._vision = open_session(self._paths[1], threads, (CPU,), parts)
        self._decoder = Decoder(bundle.path(build.embed), bundle.path(build.decoder), n_threads=threads)
        tokenizer, settings, generation = (_Text(bundle, file) for file in build.texts)
        self._bos, self._vocabulary, self._bytes = _tokenizer(tokenizer, settings)
        ends = generation.json().get("eos_token_id")
        self.stops = tuple(ends) if isinstance(ends, list) else (ends,)
        if not self.stops or not all(type(end) is int for end in self.stops):
            raise BundleError(f"{generation.path}: names no end token", "export the bundle again")

    def pixel_values(self, rgb: RgbImage) -> Floats:
        """uint8 (height, width, 3) → float32 (3, s, s)."""
        return self._run(0, "pixel_values", {"image": rgb[None]})[0]

    def embeds(self, pixel_values: Floats) -> Floats:
        """(3, s, s) → image embeddings (t, h)."""
        return self._run(1, "image_features", {"pixel_values": np.ascontiguousarray(pixel_values[None], np.float32)})[0]

    def prompt(self, question: str) -> tuple[int, ...]:
        """Ids of a question about one picture, whose place IMAGE_PLACE marks. Raises UsageError, ContextError."""
        ids = (*self._bos, *prompt_ids(question, self._template, self._vocabulary, has_image=True))
        count_positions(ids, self.spec, self.n_ctx)
        return ids

    def rows(self, ids: Sequence[int], embeds: Floats) -> Floats:
        """Prompt ids and image embeddings (t, h) → what the decoder is given, (n, h).

        Raises EngineError where pictures and words have different widths.
        """
        place = ids.index(IMAGE_PLACE)
        around = [self._decoder.embed(part) for part in (ids[:place], ids[place + 1 :]) if part]
        pieces = [embeds, *around] if not place else [around[0], embeds, *around[1:]]
        if len({piece.shape[1] for piece in pieces}) > 1:
            widths = f"image embeddings of width {embeds.shape[1]}, words of {around[0].shape[1]}"
            raise EngineError(f"{self._paths[1]}: {widths}", "export the bundle again")
        return np.concatenate(pieces)

    def logits(self, ids: Sequence[int], embeds: Floats) -> Floats:
        """Logits (v,) after a prompt."""
        last: Floats = self._decoder.logits(self.rows(ids, embeds))[-1]
        return last

    def answer(self, ids: Sequence[int], embeds: Floats, max_tokens: int) -> tuple[Floats, list[int]]:
        """Logits (v,) after a prompt, and the greedy tokens of the answer, the end token excluded."""
        rows = self.rows(ids, embeds)
        most = min(max_tokens, self.n_ctx - len(rows) + 1)  # the last token takes no position
        return self._decoder.answer(rows, max_tokens=most, stops=self.stops)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens of an answer → its text."""
        stream = TextStream()
        for token in ids:
            stream.push(self._bytes(token))
        return stream.finish()

    def _run(self, which: int, name: str, inputs: dict[str, Any]) -> Floats:
        try:
            (found,) = (self._preprocess, self._vision)[which].run([name], inputs)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(
                f"{self._paths[which]}: ONNX Runtime stopped ({one_line(error)})", "export it again"
            ) from error
        values: Floats = found
        return values


class _Text:
    """A JSON file of the layout."""

    def __init__(self, bundle: Bundle, file: BundleFile) -> None:
        self.path: Path = bundle.path(file)

    def read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path}: can't be read ({error})", "copy the whole bundle again") from error

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.read())
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.path}: not valid JSON ({error})", "export the bundle again") from error
        if not isinstance(value, dict):
            raise BundleError(f"{self.path}: no table", "export the bundle again")
        return value


def _tokenizer(file: _Text, settings: _Text) -> tuple[list[int], Vocabulary, Any]:
    """Ids in front of a prompt, sections → ids, and id → bytes, by the rules of the page's tokenizer.ts."""
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_str(file.read())
    except Exception as error:  # the library raises a bare Exception
        raise BundleError(f"{file.path}: not a tokenizer ({one_line(error)})", "export the bundle again") from error
    given = SimpleNamespace(backend_tokenizer=raw, init_kwargs={})
    sections = SectionTokenizer(given)
    template = settings.json().get("chat_template")
    # the export takes the rule out of tokenizer.json and leaves the space to its chat template
    space = " " if isinstance(template, str) and FIRST_SPACE in template else ""

    def encode(section: str) -> list[int]:
        return sections.start(space + section) if section else []

    vocabulary = Vocabulary(encode, None, -1, -1)  # one turn: its prompt holds no end-of-turn mark
    return list(raw.encode("", add_special_tokens=True).ids), vocabulary, token_bytes(given)

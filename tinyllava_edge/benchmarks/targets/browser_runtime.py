"""The page as a runtime, so that what asks the other runtimes can ask it: rounds of a measurement, an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllava_edge.benchmarks.targets.browser_page import BrowserPage
from tinyllava_edge.bundle import WEB, Bundle, WebBuild
from tinyllava_edge.image import read_bytes
from tinyllava_edge.runtimes.base import Answer, OnText, Picture, StageTimings
from tinyllava_edge.runtimes.text import default_context


class WebRuntime:
    """One precision in the page. A picture is sent as its file's bytes and decoded there, by the browser.

    It answers, and gives no stages' outputs: what `verify` compares stays in the page.

    Args:
        page: the page, which stays the caller's.
        bundle: what it serves.
        precision: one of its web precisions.
        provider: `auto`, `wasm` or `webgpu`.
        threads: WebAssembly threads; the page's own choice by default.
        owns_page: `close` closes the page, too.

    Raises:
        EngineError: it can't be opened there, or `webgpu` was asked for and computes wrongly.
    """

    name = "web"
    pictures_at_once = 1

    def __init__(
        self,
        page: BrowserPage,
        bundle: Bundle,
        precision: str,
        *,
        provider: str = "auto",
        threads: int | None = None,
        owns_page: bool = False,
    ) -> None:
        self._page, self._bundle, self._owns_page = page, bundle, owns_page
        self.build, self.spec = WEB + precision, bundle.spec
        self.n_ctx = default_context(bundle.spec)
        self._engine = page.open(precision, provider=provider, threads=threads)
        self.facts = {key: value for key, value in self._engine.facts.items() if key != "spec"}
        self._load_ms = float(self.facts.pop("load_ms"))

    def answer(
        self, image: Picture | None, question: str, *, max_tokens: int = 128, on_text: OnText | None = None
    ) -> Answer:
        """Greedy answer; `on_text` gets it whole at its end. Raises EngineError, or ImageError for no picture file."""
        given = None if image is None else read_bytes(_file(image))[1]
        found = self._page.answer(self._engine, given, question, max_tokens)
        stages = {key: float(ms) for key, ms in found["timings"].items() if key != "ttft_ms"}
        load_ms, self._load_ms = self._load_ms, 0.0
        if on_text is not None and found["text"]:
            on_text(found["text"])
        return Answer(
            text=found["text"],
            token_ids=tuple(found["token_ids"]),
            finish_reason=found["finish_reason"],
            n_prompt_tokens=found["n_prompt_tokens"],
            n_image_tokens=found["n_image_tokens"],
            timings=StageTimings(load_ms=load_ms, **stages),
            token_ms=tuple(found["token_ms"]),
        )

    def answer_many(self, image: Picture, questions: Sequence[str], *, max_tokens: int = 16) -> list[Answer]:
        """Independent answers, one after the other."""
        return [self.answer(image, question, max_tokens=max_tokens) for question in questions]

    def answer_pictures(
        self, items: Iterable[tuple[Picture, Sequence[str]]], *, max_tokens: int = 16
    ) -> Iterator[list[Answer]]:
        """`answer_many` for picture after picture."""
        for image, questions in items:
            yield self.answer_many(image, questions, max_tokens=max_tokens)

    def pixel_values(self, image: str | Path | bytes) -> npt.NDArray[np.float32]:
        """What the page makes of a picture file: float32 (3, s, s)."""
        data = self._page.pixels(self._engine, read_bytes(image)[1])
        side = self.spec.image_size
        return np.frombuffer(data, np.float32).reshape(3, side, side)

    def environment(self) -> dict[str, Any]:
        """The bundle's identity, browser, provider, self-test, threads."""
        build = self._bundle.web_builds()[self.build]
        return {
            "runtime": self.name,
            "bundle": self._bundle.name,
            "bundle_sha256": self._bundle.sha256,
            "build": self.build,
            "files": {entry.path: entry.sha256 for file in build.files for entry in file.entries},
            "verified": self._bundle.is_verified(build),
            "n_threads": self.facts["threads"],
            **self.facts,
            **self._page.environment(),
        }

    def close(self) -> None:
        """Let go of the model; the page stays open unless it is this runtime's own."""
        if self._owns_page:
            self._page.close()
        else:
            self._page.close_engine(self._engine)


def open_web(bundle: Bundle, build: WebBuild, *, threads: int | None = None) -> WebRuntime:
    """A web build in a headless browser of its own. Raises what `BrowserPage` and `WebRuntime` raise."""
    page = BrowserPage(bundle.root)
    try:
        return WebRuntime(page, bundle, build.precision, threads=threads, owns_page=True)
    except BaseException:
        page.close()
        raise


def _file(image: Picture) -> str | Path | bytes:
    """A picture file; an array becomes a PNG, which loses nothing."""
    if not isinstance(image, np.ndarray):
        return image
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()

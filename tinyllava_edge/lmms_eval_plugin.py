"""lmms-eval's model `tinyllava_edge`: one build of a bundle answers lmms-eval's tasks.

    python -m lmms_eval --model tinyllava_edge --model_args bundle=BUNDLE,build=int8+q4_k_m --tasks pope

lmms-eval loads this module by its entry point; nothing of ours imports it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from tinyllava_edge.errors import TinyLlavaEdgeError, UsageError
from tinyllava_edge.prompt import IMAGE_MARKER
from tinyllava_edge.runtimes.base import Picture

MAX_NEW_TOKENS = 1024  # where a task names none, as lmms-eval's llava and tinyllava have it
_READ = {"max_new_tokens", "until", "temperature", "do_sample", "top_p", "top_k", "seed", "use_cache"}
_ONLY_ONE = {"num_beams", "repetition_penalty"}  # other values would move the answers
_LOG = logging.getLogger("tinyllava_edge.lmms_eval")
_warned: set[str] = set()


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives to lmms-eval's registry."""
    return ModelManifest("tinyllava_edge", simple_class_path=f"{__name__}.{TinyLlavaEdge.__name__}")


class TinyLlavaEdge(lmms):
    """A build of a bundle, as `tinyllava-edge run` answers: one request at a time, in lmms-eval's order.

    Questions on one picture follow each other in most tasks, so the engine's caches save the vision graph and the
    prefix for all but the first.
    """

    is_simple = True

    def __init__(
        self,
        bundle: str = "",
        build: str | None = None,
        device: str | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        allow_unverified: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """The arguments are those of --model_args; see `open_bundle`.

        Args:
            bundle: directory of the bundle.
            build: name of the build; the bundle's first by default.
            device: `cpu` (default), `cuda` or `auto`.
            n_ctx: positions that fit.
            n_threads: CPU threads; the cores, shared by the processes of this machine, by default.
            allow_unverified: run a build without a `verified` stamp.
            batch_size: 1, which lmms-eval passes by default.
            max_batch_size: passed by lmms-eval, not looked at.
            unknown: refused.

        Raises:
            UsageError: an argument that is missing, unknown or of the wrong type; else what `open_bundle` raises.
        """
        super().__init__()
        if unknown:
            known = "bundle, build, device, n_ctx, n_threads, allow_unverified"
            raise UsageError(f"unknown model_args: {', '.join(sorted(unknown))} (known: {known})")
        if not bundle:
            raise UsageError("model_args name no bundle (write --model_args bundle=DIRECTORY)")
        if str(batch_size or 1) != "1":
            raise UsageError(f"batch_size={batch_size} (the engine answers one request at a time; leave it at 1)")
        if not isinstance(allow_unverified, bool):
            raise UsageError(f"allow_unverified={allow_unverified} (write allow_unverified=true)")
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads)):
            if value is not None and type(value) is not int:
                raise UsageError(f"{name}={value} (write a whole number)")
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._settings: dict[str, Any] = {
            "path": str(bundle),
            "build": None if build is None else str(build),
            "device": device or "cpu",
            "n_ctx": n_ctx,
            "n_threads": n_threads or _share_of_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            "allow_unverified": allow_unverified,
        }
        self._engine: Any = None
        self._open()

    @property
    def device(self) -> Any:
        """Where lmms-eval puts the tensors that its processes exchange; the engine has a device of its own."""
        from accelerate import PartialState

        return PartialState().device

    @property
    def batch_size(self) -> int:
        """Always 1."""
        return 1

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, with token counts.

        The pictures go in front of the text, as in training: lmms-eval's markers are taken out, and the text is
        stripped, as its `tinyllava` does. The answer ends before the first string of `until`.

        Raises:
            UsageError: a setting that the engine lacks; the rest is what `Engine.generate` raises. A note names task,
                doc_id and the next step: an empty answer in its place would be scored like any other.
        """
        from tqdm import tqdm

        engine = self._open()
        answers = []
        for number, request in enumerate(tqdm(requests, desc="tinyllava-edge", disable=self.rank != 0)):
            context, settings, doc_to_visual, doc_id, task, split = request.args
            try:
                visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if callable(doc_to_visual) else None
                pictures = [as_picture(visual) for visual in visuals or () if visual is not None]
                answer = engine.generate(
                    without_markers(context, pictures), image=pictures, **generation_options(settings, number)
                )
            except TinyLlavaEdgeError as error:
                error.add_note(f"task {task}, doc_id {doc_id}" + (f"; {error.hint}" if error.hint else ""))
                raise
            counts = TokenCounts(input_tokens=answer.n_prompt_tokens, output_tokens=len(answer.token_ids))
            answers.append(GenerationResult(answer.text, counts))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: the runtime generates text."""
        raise NotImplementedError("tinyllava_edge has no log-likelihoods: choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises NotImplementedError: these models were trained on one picture and its questions."""
        raise NotImplementedError("tinyllava_edge has no multi-round tasks: choose one of output_type generate_until")

    def clean(self) -> None:
        """Free the engine's memory once all answers are there; a later request opens it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        super().clean()

    def _open(self) -> Any:
        from tinyllava_edge.runtimes.engine import open_bundle

        if self._engine is None:
            try:
                self._engine = open_bundle(**self._settings)
            except TinyLlavaEdgeError as error:
                if error.hint:
                    error.add_note(f"hint: {error.hint}")
                raise
        return self._engine


def without_markers(context: str, pictures: Sequence[Picture]) -> str:
    """The words of a question: no `<image>`, and stripped where there is a picture or was a marker."""
    if not pictures and IMAGE_MARKER not in context:
        return context
    return context.replace(IMAGE_MARKER, "").strip()


def as_picture(visual: Any) -> Picture:
    """What a task's doc_to_visual gives → what the engine takes.

    A PIL picture becomes upright uint8 (height, width, 3); a path is read as `run` reads it.

    Raises:
        UsageError: a sound or a video.
    """
    from PIL import Image, ImageOps

    if isinstance(visual, str | Path):
        return visual
    if not isinstance(visual, Image.Image):
        raise UsageError(f"a {type(visual).__name__} is no picture", "choose a task about pictures")
    return np.asarray(ImageOps.exif_transpose(visual).convert("RGB"), dtype=np.uint8)


def generation_options(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A task's `generation_kwargs` → options of `Engine.generate`.

    Greedy unless the temperature is above 0 and `do_sample` isn't false; then `seed` makes the draws repeatable where
    the task has no seed. What is not known is left out, with one warning.

    Raises:
        UsageError: beams, a repetition penalty, or `until` that is no text.
    """
    for name in sorted(_ONLY_ONE & set(settings)):
        if settings[name] not in (None, 1):
            raise UsageError(f"{name}={settings[name]}", f"the engine has none: set --gen_kwargs {name}=1")
    for name in sorted(set(settings) - _READ - _ONLY_ONE - _warned):
        _LOG.warning("generation setting %s=%r is not used", name, settings[name])
        _warned.add(name)
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"until={until!r}", "give a string or a list of strings")
    options: dict[str, Any] = {
        "max_tokens": int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
        "stop": tuple(stop for stop in stops if stop),
    }
    temperature = float(settings.get("temperature") or 0)
    if temperature > 0 and settings.get("do_sample") is not False:
        options["temperature"] = temperature
        options["top_p"] = 1.0 if settings.get("top_p") is None else float(settings["top_p"])
        options["top_k"] = int(settings.get("top_k") or 0)
        options["seed"] = int(seed if settings.get("seed") is None else settings["seed"])
    return options


def _share_of_cores(processes: int) -> int | None:
    """Threads of one of several processes on this machine; None, the runtime's default, for one."""
    if processes < 2:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)

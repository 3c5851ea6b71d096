"""Who takes part in runtime_speed.py, each with its best settings, and what is run in processes of its own.

Ours is the engine as a program opens it. llama.cpp's own multimodal road (mtmd) gets what llama-server gives it: fused
attention in encoder and decoder, and batches of 512. The plain loop is what llama-bench's tg measures. Hugging Face's
`generate` runs the checkpoint with its own image processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
MTMD_BATCH = 512  # llama-server's default
TEXT = (
    "what is the colour of the small thing on the left side and how many of the others that one can see in this "
    "picture have the same shape or size as it has"
)
WORDS = TEXT.split()


def question(tokens: int, count: Callable[[str], int], start: int = 0) -> str:
    """Plain words, from the `start`-th on, that come to at least `tokens` tokens."""
    words: list[str] = []
    for word in islice(cycle(WORDS), start % len(WORDS), None):
        words.append(word)
        if count(" ".join(words) + "?") >= tokens:
            return " ".join(words) + "?"
    raise AssertionError("unreachable")


def photo(number: int) -> bytes:
    """A JPEG of 640 x 480; another number, another picture."""
    from tinyllava_edge.export.verify_pictures import photograph

    return photograph(640, 480, number)


def open_ours(bundle: Path, build: str | None, threads: int, *, caches: bool = True) -> Any:
    """The engine, its caches at their defaults or off; warm."""
    from tinyllava_edge.runtimes.caches import NO_CACHES
    from tinyllava_edge.runtimes.engine import open_bundle

    kept = None if caches else NO_CACHES
    engine = open_bundle(bundle, build, n_threads=threads, allow_unverified=True, check_hashes=False, caches=kept)
    engine.warm_up()
    return engine


def open_theirs(bundle: Path, build: str | None, threads: int) -> Any:
    """mtmd's encoder and llama.cpp's decoder with llama-server's settings; warm."""
    from tinyllava_edge.runtimes import mtmd

    best = partial(mtmd.Llama, flash_attention=True, n_batch=MTMD_BATCH)
    with mock.patch.object(mtmd, "Llama", best):  # open_mtmd's own decoder has the settings that verify needs
        runtime = mtmd.open_mtmd(bundle, build, n_threads=threads, flash_attention=True, check_hashes=False)
    runtime.warm_up()
    return runtime


def sample_of(answer: Any, wall_ms: float) -> dict[str, Any]:
    """What is kept of an answer: stages, counts, rates, and the caller's own clock."""
    told = answer.to_dict()
    numbers = {name: told[name] for name in told if name.startswith("n_")}
    timings = answer.timings
    after = wall_ms - timings.queue_ms - timings.ttft_ms - timings.load_ms
    steps = len(answer.token_ids) - 1
    return {
        **timings.to_dict(),
        **numbers,
        "see_ms": timings.preprocess_ms + timings.vision_ms,  # mtmd preprocesses inside its encoder's call
        "wall_ms": wall_ms,
        "tokens_per_s": answer.decode_tokens_per_s,
        "tokens_per_s_by_clock": 1000 * steps / after if steps > 0 and after > 0 else None,
    }


def ask(runtime: Any, picture: Any, text: str, max_tokens: int) -> dict[str, Any]:
    """One question to an engine or a runtime → its sample."""
    start = time.perf_counter()
    if hasattr(runtime, "generate"):
        answer = runtime.generate(text, image=picture, max_tokens=max_tokens)
    else:
        answer = runtime.answer(picture, text, max_tokens=max_tokens)
    return sample_of(answer, 1000 * (time.perf_counter() - start))


class PlainLoop:
    """`llama_decode` of one token after the other: no sampling, no text, no look at the logits.

    Args:
        path: the GGUF, loaded as `Llama` loads it.
        n_ctx: positions of each context.
        threads: CPU threads.
        attentions: name of a context → whether its attention is fused.
    """

    def __init__(self, path: Path, n_ctx: int, threads: int, attentions: dict[str, bool]) -> None:
        from tinyllava_edge.runtimes.llama import native_api, repacks

        api = self._api = native_api()
        self._none = (ctypes.c_void_p * 1)()  # no devices but the CPU
        model = api.llama_model_default_params()
        model.n_gpu_layers, model.devices = 0, ctypes.addressof(self._none)
        model.use_extra_bufts = repacks(api)
        self._model = api.llama_model_load_from_file(os.fsencode(path), model)
        self._contexts, self._depth = {}, 0
        for name, fused in attentions.items():
            context = api.llama_context_default_params()
            context.n_ctx, context.n_batch, context.n_ubatch = -(-n_ctx // 256) * 256, MTMD_BATCH, MTMD_BATCH
            context.n_threads = context.n_threads_batch = threads
            context.flash_attn_type = int(fused)
            context.offload_kqv = context.op_offload = False
            self._contexts[name] = api.llama_init_from_model(self._model, context)
        if not self._model or not all(self._contexts.values()):
            raise RuntimeError(f"{path.name}: llama.cpp can't open it")

    def fill(self, depth: int, states: Mapping[str, Any]) -> None:
        """Put `depth` positions into every context, and decode one token more to warm up.

        Args:
            depth: positions.
            states: name of a context → a saved sequence (`Llama.save`) to take instead; saves computing it again.
        """
        self._depth = depth
        for name, context in self._contexts.items():
            if name in states:
                data = states[name].ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                if self._api.llama_state_seq_set_data(context, data, states[name].size, 0) != states[name].size:
                    raise RuntimeError(f"{name}: takes no saved sequence")
            else:
                for start in range(0, depth, MTMD_BATCH):
                    self._decode(name, list(range(100 + start, 100 + min(depth, start + MTMD_BATCH))))
            held = int(self._api.llama_memory_seq_pos_max(self._api.llama_get_memory(context), 0)) + 1
            if held < depth:
                raise RuntimeError(f"{name}: holds {held} positions of {depth}")
            self.rate(name, 1)

    def rate(self, name: str, tokens: int) -> float:
        """Tokens per second of `tokens` single ones after the depth."""
        context = self._contexts[name]
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(context), 0, self._depth, -1)
        start = time.perf_counter()
        for number in range(tokens):
            self._decode(name, [100 + number])
        return tokens / (time.perf_counter() - start)

    def _decode(self, name: str, ids: list[int]) -> None:
        size = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        array = (ctypes.c_int32 * len(ids))(*(token % size for token in ids))
        code = self._api.llama_decode(self._contexts[name], self._api.llama_batch_get_one(array, len(ids)))
        self._api.llama_synchronize(self._contexts[name])
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    def close(self) -> None:
        """Free the contexts and the model."""
        for context in self._contexts.values():
            self._api.llama_free(context)
        self._api.llama_model_free(self._model)


class _Timed:
    """An object whose one method is timed."""

    def __init__(self, inner: Any, method: str, add: Callable[[float], None]) -> None:
        self._inner, self._call = inner, getattr(inner, method)
        self._add = add
        setattr(self, method, self._measure)

    def _measure(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._call(*arguments)
        finally:
            self._add(1000 * (time.perf_counter() - start))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def inside(engine: Any) -> Iterator[dict[str, float]]:
    """Milliseconds spent inside ONNX Runtime's `run` and inside `llama_decode`, while the block lasts."""
    spent = {"ort_ms": 0.0, "llama_ms": 0.0}

    def add(name: str) -> Callable[[float], None]:
        return lambda ms: spent.__setitem__(name, spent[name] + ms)

    runtime = engine._runtime
    sessions = tuple(_Timed(session, "run", add("ort_ms")) for session in runtime.vision.load())
    api = _Timed(runtime.llama._api, "llama_decode", add("llama_ms"))
    with mock.patch.object(runtime.vision, "_sessions", sessions), mock.patch.object(runtime.llama, "_api", api):
        yield spent


# processes of their own


def child(function: str, arguments: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run a function of this module in a new interpreter and read the JSON object on its last line.

    Raises:
        TimeoutError: it took longer.
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    code = (
        f"import json, sys; sys.path[:0] = sys.argv[1:]; import runtime_peers as p; p.{function}(json.load(sys.stdin))"
    )
    command = [sys.executable, "-c", code, str(HERE), str(HERE.parent)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    given = json.dumps(arguments)
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout_s, env=environment)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no end after {timeout_s:.0f} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def cold(arguments: dict[str, Any]) -> None:
    """Open a build and answer with one token; prints milliseconds and the peak of resident memory in bytes."""
    start = time.perf_counter()
    from tinyllava_edge.runtimes.engine import open_bundle

    imported = time.perf_counter()
    with open_bundle(
        arguments["bundle"],
        arguments["build"],
        n_threads=arguments["threads"],
        allow_unverified=True,
        check_hashes=arguments["check_hashes"],
    ) as engine:
        opened = time.perf_counter()
        engine.generate(arguments["question"], image=bytes.fromhex(arguments["picture"]), max_tokens=1)
        end = time.perf_counter()
    peak = resident_peak()
    times = {"import_ms": imported - start, "open_ms": opened - imported, "answer_ms": end - opened}
    times["open_to_token_ms"] = end - imported
    print(json.dumps({**{name: 1000 * value for name, value in times.items()}, "peak_rss": peak}))


def resident_peak() -> int | None:
    """Peak resident memory of this process since its program began, in bytes; what forked it doesn't count."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def generate(arguments: dict[str, Any]) -> None:
    """Hugging Face's `generate` of one token, picture file to token, several times; prints the milliseconds."""
    import io

    import torch
    import transformers
    from PIL import Image

    from tinyllava_edge.checkpoint import image_processor, load
    from tinyllava_edge.prompt import Turn, get_template
    from tinyllava_edge.runtimes import reference
    from tinyllava_edge.runtimes.base import IMAGE_PLACE
    from tinyllava_edge.runtimes.text import conversation_ids

    torch.set_num_threads(arguments["threads"])
    start = time.perf_counter()
    loaded = load(arguments["checkpoint"])
    model = loaded.model.to(getattr(torch, arguments["dtype"]))
    load_ms = 1000 * (time.perf_counter() - start)
    processor, template = image_processor(loaded.spec), get_template(loaded.spec.template)
    vocabulary = reference._vocabulary(loaded, template.end_of_turn)  # so that the prompt is the same, id by id

    def first_token(picture: bytes, text: str) -> tuple[float, int]:
        start = time.perf_counter()
        ids = conversation_ids([Turn(text)], template, vocabulary, has_image=True)
        slots = [model.config.image_token_id] * loaded.spec.visual_tokens
        expanded = list(chain.from_iterable(slots if id_ == IMAGE_PLACE else [id_] for id_ in ids))
        with Image.open(io.BytesIO(picture)) as opened:
            pixels = processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"].to(model.dtype)
        tokens = torch.tensor([expanded])
        with torch.inference_mode():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=pixels,
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,
            )
        return 1000 * (time.perf_counter() - start), len(expanded)

    side, few = loaded.spec.image_size, torch.ones(1, 8, dtype=torch.long)
    with torch.inference_mode():  # warm both halves; a whole prompt would take as long as what is measured
        model.tower_features(torch.zeros(1, 3, side, side, dtype=model.dtype))
        model.generate(input_ids=few, attention_mask=few, max_new_tokens=1, do_sample=False, pad_token_id=0)
    found = [first_token(bytes.fromhex(picture), arguments["question"]) for picture in arguments["pictures"]]
    result = {"ttft_ms": [ms for ms, _ in found], "n_prompt_tokens": found[0][1], "load_ms": load_ms}
    versions = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
    print(json.dumps({**result, "peak_rss": resident_peak(), **versions}))

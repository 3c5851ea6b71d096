"""The reference: the checkpoint itself in torch, float32, with Hugging Face's image processor and tokenizer.

`answer` and `probe` run one plain prompt. `answer_pictures` scores data sets: the system prompt is decoded once,
pictures are encoded together, and each picture's keys and values are repeated for its questions.

Legend: b pictures, r rows (questions), p image embeddings, h width, n positions, s image size.
"""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import __version__
from ..checkpoint import Checkpoint, image_processor, load
from ..errors import CheckpointError, UsageError
from ..files import sha256_tree
from ..image import pad_to_square
from ..prompt import Turn, get_template
from ..tokenizer_sections import SectionTokenizer, token_bytes
from .base import IMAGE_PLACE, Answer, OnText, Picture, Probe
from .picture import read_picture
from .sampling import GREEDY, Sampler, Sampling
from .stopwatch import Stopwatch
from .text import (
    TextStream,
    Vocabulary,
    check_max_tokens,
    conversation_ids,
    count_positions,
    default_context,
    prompt_ids,
    split_at_image,
    take,
)

MAX_PICTURES = 16  # encoded together
MAX_ROWS = 96  # questions decoded together
CACHE_BYTES = 1 << 30  # most memory for the keys and values of one group
Floats = npt.NDArray[np.float32]


class ReferenceRuntime:
    """A checkpoint, loaded. Not for several threads at once."""

    name = "reference"
    pictures_at_once = MAX_PICTURES
    build = "fp32"

    def __init__(self, checkpoint: Checkpoint, n_ctx: int, load_ms: float) -> None:
        self.spec = checkpoint.spec
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.n_ctx = n_ctx
        self._processor = image_processor(self.spec)
        self._template = get_template(self.spec.template)
        self._vocabulary = _vocabulary(checkpoint, self._template.end_of_turn)
        self._spell = token_bytes(checkpoint.tokenizer)
        self._text_prefix: tuple[list[int], Any] | None = None
        self._load_ms = load_ms
        self._root = checkpoint.root
        self._sha256: str | None = None

    def answer(
        self,
        image: Picture | None,
        question: str,
        *,
        max_tokens: int = 128,
        on_text: OnText | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Answer one question, about a picture or without one; arguments and errors as `EdgeRuntime.answer`."""
        return self.chat(image, [Turn(question)], max_tokens=max_tokens, on_text=on_text, sampling=sampling)

    def chat(
        self,
        image: Picture | None,
        turns: Sequence[Turn],
        *,
        max_tokens: int = 128,
        on_text: OnText | None = None,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Answer a conversation's open last turn; the picture belongs to its first turn. Raises what `answer` does."""
        check_max_tokens(max_tokens)
        with torch.inference_mode():
            watch = Stopwatch()
            with watch.stage("prefill_ms"):
                ids = conversation_ids(turns, self._template, self._vocabulary, has_image=image is not None)
            count_positions(ids, self.spec, self.n_ctx)
            features = None
            if image is not None:
                pixels = self._pixels(image, watch)
                with watch.stage("vision_ms"):
                    features = self.model.tower_features(torch.from_numpy(pixels)[None])
            cache, logits = self._prefill(ids, features, watch)
            return self._generate(ids, cache, logits, max_tokens, on_text, sampling, watch)

    def answer_many(self, image: Picture, questions: Sequence[str], *, max_tokens: int = 16) -> list[Answer]:
        """Independent greedy answers to several questions on one picture; see `answer_pictures`."""
        return next(self.answer_pictures([(image, questions)], max_tokens=max_tokens))

    def answer_pictures(
        self, items: Iterable[tuple[Picture, Sequence[str]]], *, max_tokens: int = 16
    ) -> Iterator[list[Answer]]:
        """Independent greedy answers for many pictures, in order, computed a group of pictures at a time.

        Answers equal single ones unless two tokens' logits differ by less than rounding: a batch adds up in another
        order. Timings are of a whole group and stand on its first answer; the others' are zero.

        Args:
            items: pairs of a picture and its questions.
            max_tokens: most tokens of one answer.

        Raises:
            UsageError, ContextError, ImageError: as `answer`.
        """
        check_max_tokens(max_tokens)
        if self._template.caption_only:  # the question is dropped, so there is nothing to batch
            yield from ([self.answer(image, q, max_tokens=max_tokens) for q in questions] for image, questions in items)
            return
        group: list[tuple[Picture, list[tuple[int, ...]]]] = []
        rows = 0
        for image, questions in items:
            ids = [prompt_ids(q, self._template, self._vocabulary, has_image=True) for q in questions]
            for prompt in ids:
                count_positions(prompt, self.spec, self.n_ctx)
            if group and (len(group) == MAX_PICTURES or rows + len(ids) > self._most_rows(max_tokens)):
                yield from self._answer_group(group, max_tokens)
                group, rows = [], 0
            group.append((image, ids))
            rows += len(ids)
        if group:
            yield from self._answer_group(group, max_tokens)

    def probe(self, image: Picture, question: str, *, max_tokens: int = 16) -> Probe:
        """Every stage's output for one picture and question, greedy. Raises what `answer` raises."""
        check_max_tokens(max_tokens)
        with torch.inference_mode():
            watch = Stopwatch()
            ids = prompt_ids(question, self._template, self._vocabulary, has_image=True)
            count_positions(ids, self.spec, self.n_ctx)
            pixels = self._pixels(image, watch)
            with watch.stage("vision_ms"):
                features = self.model.tower_features(torch.from_numpy(pixels)[None])  # (1, p, v)
                embeds = self.model.model.multi_modal_projector(features)  # (1, p, h)
            cache, logits = self._prefill(ids, features, watch)
            answer = self._generate(ids, cache, logits, max_tokens, None, GREEDY, watch)
            return Probe(pixels, features[0].numpy(), embeds[0].numpy(), ids, logits, answer)

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self._vocabulary.stops

    def prompt(self, question: str) -> tuple[int, ...]:
        """Ids of a prompt about one picture, whose place IMAGE_PLACE marks. Raises UsageError, ContextError."""
        ids = prompt_ids(question, self._template, self._vocabulary, has_image=True)
        count_positions(ids, self.spec, self.n_ctx)
        return ids

    def pixel_values(self, image: Picture) -> npt.NDArray[np.float32]:
        """Picture → what the tower is fed, (3, s, s). Raises ImageError."""
        return self._pixels(image, Stopwatch())

    def rounding_noise(self, probe: Probe) -> float:
        """Relative change of the tower's features when every pixel moves by its last bit: what rounding alone does."""
        with torch.inference_mode():
            features = self.model.tower_features(torch.from_numpy(moved(probe.pixel_values))[None])[0].numpy()
        return relative_change(features, probe.image_features)

    def warm_up(self) -> None:
        """Run every stage once on a grey picture."""
        load_ms, self._load_ms = self._load_ms, 0.0
        side = self.spec.image_size
        self.answer(np.full((side, side, 3), 127, np.uint8), "Hello", max_tokens=2)
        self._load_ms = load_ms

    def environment(self) -> dict[str, Any]:
        """Versions and threads, as JSON values."""
        import tokenizers
        import transformers

        return {
            "runtime": self.name,
            "model": self.spec.name,
            "checkpoint_sha256": self._identity(),
            "build": self.build,
            "n_threads": torch.get_num_threads(),
            "n_ctx": self.n_ctx,
            "providers": ["torch-cpu"],
            "tinyllava_edge": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
            "tokenizers": str(tokenizers.__version__),
        }

    def _identity(self) -> str:
        """Hash of the checkpoint's files, read once: answers of another checkpoint must not pass for this one's."""
        if self._sha256 is None:
            self._sha256 = sha256_tree(self._root)
        return self._sha256

    def close(self) -> None:
        """Nothing native to free; there so that all runtimes close alike."""

    # one prompt

    def _pixels(self, image: Picture, watch: Stopwatch) -> npt.NDArray[np.float32]:
        """Picture → pixel_values (3, s, s) by Hugging Face's processor, padded to a square first where the model is."""
        from PIL import Image

        with watch.stage("decode_image_ms"):
            rgb = read_picture(image, self.spec)
        with watch.stage("preprocess_ms"):
            if self.spec.image_policy == "pad":
                rgb = pad_to_square(rgb, self.spec.pad_color)
            batch = self._processor(Image.fromarray(rgb), return_tensors="np")
            return np.ascontiguousarray(batch["pixel_values"][0], dtype=np.float32)

    def _prefill(
        self, ids: Sequence[int], features: torch.Tensor | None, watch: Stopwatch
    ) -> tuple[Any, npt.NDArray[np.float32]]:
        """The whole prompt in one pass → its cache and the logits (vocab,) of its last position."""
        slots = [self.model.config.image_token_id] * self.spec.visual_tokens
        expanded = [token for id_ in ids for token in (slots if id_ == IMAGE_PLACE else [id_])]
        with watch.stage("prefill_ms"):
            embeds = self.model.embed(torch.tensor([expanded]), features)  # (1, n, h)
            cache, logits = self._decode(embeds, None)
        return cache, logits[0].numpy()

    def _decode(
        self, embeds: torch.Tensor, cache: Any, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> tuple[Any, torch.Tensor]:
        """(r, n, h) after what the cache holds → the longer cache and the last position's logits (r, vocab)."""
        out = self.model.model.language_model(
            inputs_embeds=embeds, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True
        )
        return out.past_key_values, self.model.lm_head(out.last_hidden_state[:, -1])

    def _generate(
        self,
        prompt: Sequence[int],
        cache: Any,
        logits: npt.NDArray[np.float32],
        max_tokens: int,
        on_text: OnText | None,
        sampling: Sampling,
        watch: Stopwatch,
    ) -> Answer:
        sampler, stream, ids = Sampler(sampling), TextStream(on_text), list[int]()
        n_prompt = count_positions(prompt, self.spec, self.n_ctx)
        with watch.stage("first_token_ms"):
            token = sampler.pick(logits)
        limit = min(max_tokens, self.n_ctx - n_prompt + 1)
        while not (finish := take(ids, token, limit, self._vocabulary.stops)):
            stream.push(self._spell(token))
            start = time.perf_counter()
            cache, rows = self._decode(self.model.get_input_embeddings()(torch.tensor([[token]])), cache)
            token = sampler.pick(rows[0].numpy())
            watch.token(1000 * (time.perf_counter() - start))
        if finish == "length":
            stream.push(self._spell(token))
        n_image = self.spec.visual_tokens if IMAGE_PLACE in prompt else 0
        text = stream.finish()
        watch.last_token()
        watch.add("load_ms", self._take_load_ms())
        steps = tuple(watch.token_ms)
        return Answer(text, tuple(ids), finish, n_prompt, n_image, watch.timings(), token_ms=steps)

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._spell, ids)).decode("utf-8", "replace")

    def _take_load_ms(self) -> float:
        load_ms, self._load_ms = self._load_ms, 0.0
        return load_ms

    # many prompts

    def _most_rows(self, max_tokens: int) -> int:
        """Rows whose keys and values fit in CACHE_BYTES."""
        text = self.model.config.text_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        side = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        cell = 2 * 4 * text.num_hidden_layers * heads * side
        return max(1, min(MAX_ROWS, CACHE_BYTES // (cell * (self.spec.visual_tokens + 128 + max_tokens))))

    def _answer_group(
        self, group: Sequence[tuple[Picture, list[tuple[int, ...]]]], max_tokens: int
    ) -> Iterator[list[Answer]]:
        with torch.inference_mode():
            watch = Stopwatch()
            owner = [index for index, (_, prompts) in enumerate(group) for _ in prompts]  # picture of each row
            prompts = [prompt for _, prompts in group for prompt in prompts]
            answers: list[Answer] = []
            if prompts:
                cache = self._picture_caches([image for image, _ in group], split_at_image(prompts[0])[0], watch)
                suffixes = [split_at_image(prompt)[1] or [] for prompt in prompts]
                found = self._decode_rows(cache, owner, suffixes, max_tokens, watch)
                visual = self.spec.visual_tokens
                answers = [
                    Answer(
                        self._text(ids).strip(),
                        tuple(ids),
                        finish,
                        count_positions(prompt, self.spec, self.n_ctx),
                        visual,
                        margins=tuple(margins),
                    )
                    for prompt, (ids, finish, margins) in zip(prompts, found, strict=True)
                ]
                watch.add("load_ms", self._take_load_ms())
                answers[0] = replace(answers[0], timings=watch.timings())
        for index in range(len(group)):
            yield [answer for answer, picture in zip(answers, owner, strict=True) if picture == index]

    def _picture_caches(self, images: Sequence[Picture], prefix: list[int], watch: Stopwatch) -> Any:
        """Keys and values of the text before the picture and of the picture, one row per picture."""
        pixels = np.stack([self._pixels(image, watch) for image in images])  # (b, 3, s, s)
        with watch.stage("vision_ms"):
            features = self.model.tower_features(torch.from_numpy(pixels))  # (b, p, v)
            embeds = self.model.model.multi_modal_projector(features)  # (b, p, h)
        with watch.stage("prefill_ms"):
            cache = None
            if prefix:
                cache = self._prefix_cache(prefix)
                cache.batch_repeat_interleave(len(images))
            cache, _ = self._decode(embeds, cache)
        return cache

    def _prefix_cache(self, prefix: list[int]) -> Any:
        """A copy of the keys and values of the text before every picture, computed once."""
        if self._text_prefix is None or self._text_prefix[0] != prefix:
            cache, _ = self._decode(self.model.get_input_embeddings()(torch.tensor([prefix])), None)
            self._text_prefix = (prefix, cache)
        return copy.deepcopy(self._text_prefix[1])

    def _decode_rows(
        self, cache: Any, owner: list[int], suffixes: list[list[int]], max_tokens: int, watch: Stopwatch
    ) -> list[tuple[list[int], str, list[float]]]:
        """Greedy answers of r rows, with each step's margin.

        Suffixes are padded on the left; the pads are masked and take no position.
        """
        start, longest, r = cache.get_seq_length(), max(map(len, suffixes)), len(suffixes)
        tokens = torch.zeros(r, longest, dtype=torch.long)  # (r, longest)
        mask = torch.zeros(r, start + longest, dtype=torch.long)
        mask[:, :start] = 1
        for row, suffix in enumerate(suffixes):
            if suffix:
                tokens[row, -len(suffix) :] = torch.tensor(suffix)
                mask[row, -len(suffix) :] = 1
        positions = (mask.cumsum(1) - 1)[:, start:].clamp(min=0)  # (r, longest)
        embed = self.model.get_input_embeddings()
        with watch.stage("prefill_ms"):
            cache.batch_select_indices(torch.tensor(owner))
            cache, logits = self._decode(embed(tokens), cache, mask, positions)
        stops = self._vocabulary.stops
        ids: list[list[int]] = [[] for _ in range(r)]
        finish = [""] * r
        margins: list[list[float]] = [[] for _ in range(r)]
        active = list(range(r))
        with watch.stage("decode_ms"):
            while True:
                picked = logits.argmax(dim=1).tolist()
                best = logits.double().topk(2, dim=1).values  # (rows, 2)
                for row, token, gap in zip(active, picked, (best[:, 0] - best[:, 1]).tolist(), strict=True):
                    if not finish[row]:
                        margins[row].append(gap)
                    limit = min(max_tokens, self.n_ctx - start - len(suffixes[row]) + 1)
                    finish[row] = finish[row] or take(ids[row], token, limit, stops)
                going = [index for index, row in enumerate(active) if not finish[row]]
                if not going:
                    return list(zip(ids, finish, margins, strict=True))
                if 2 * len(going) <= len(active):  # dropping rows copies the cache: worth it once half are done
                    kept = torch.tensor(going)
                    cache.batch_select_indices(kept)
                    mask, active = mask[kept], [active[index] for index in going]
                    picked = [picked[index] for index in going]
                mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
                cache, logits = self._decode(embed(torch.tensor(picked)[:, None]), cache, mask, mask.sum(1, True) - 1)


def moved(pixel_values: Floats) -> Floats:
    """Pixels of any shape, each moved by its last bit, up or down: all roundings after them are drawn anew."""
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), pixel_values.shape)
    found: Floats = (pixel_values * (1 + signs * np.finfo(np.float32).eps)).astype(np.float32)
    return found


def relative_change(ours: Floats, theirs: Floats) -> float:
    """‖difference‖ / ‖theirs‖."""
    size = max(float(np.linalg.norm(theirs.astype(np.float64))), 1e-12)
    return float(np.linalg.norm(ours.astype(np.float64) - theirs)) / size


def open_reference(
    checkpoint: str | Path, *, n_threads: int | None = None, n_ctx: int | None = None
) -> ReferenceRuntime:
    """Load a checkpoint in torch.

    Args:
        checkpoint: directory.
        n_threads: torch's CPU threads, for the whole process; left alone by default.
        n_ctx: positions that fit; min(the model's max_length, 2048) by default.

    Raises:
        CheckpointError: the checkpoint is incomplete or inconsistent.
        UsageError: a setting out of range.
    """
    if n_threads is not None:
        if not 1 <= n_threads <= 1024:
            raise UsageError(f"n_threads={n_threads} is outside 1..1024")
        torch.set_num_threads(n_threads)
    start = time.perf_counter()
    loaded = load(checkpoint)
    context = n_ctx if n_ctx is not None else default_context(loaded.spec)
    if not 1 <= context <= 1 << 20:
        raise UsageError(f"n_ctx={context} is outside 1..{1 << 20}")
    return ReferenceRuntime(loaded, context, 1000 * (time.perf_counter() - start))


def _vocabulary(checkpoint: Checkpoint, end_of_turn: str) -> Vocabulary:
    """The tokenizer, section by section: neither BOS nor special tokens may come out of plain text."""
    tokenizer = checkpoint.tokenizer
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plain = SectionTokenizer(tokenizer)
    end = tokenizer.convert_tokens_to_ids(end_of_turn) if end_of_turn else tokenizer.eos_token_id
    if (
        end is None
        or tokenizer.eos_token_id is None
        or (end == tokenizer.unk_token_id and end_of_turn != tokenizer.unk_token)
    ):
        raise CheckpointError(
            f"{checkpoint.root}: the tokenizer has no end-of-turn token {end_of_turn!r}", "use the model's own template"
        )
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = int(tokenizer.bos_token_id) if starts_with_bos else None
    return Vocabulary(plain.start, bos, int(end), int(tokenizer.eos_token_id), plain.rest)

"""Greedy answers of the weights as they are, now and then during training, without a trace in what is trained."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint import Checkpoint
from ..data.llava_json import Row
from ..errors import ImageError
from ..model import TinyLlava
from ..prompt import IMAGE_MARKER, EndOfTurn, Image, Template, Turn, build, get_template, sections
from ..tokenizer_sections import SectionTokenizer, token_bytes
from .lines import Lines
from .pictures import Pixels
from .progress import Watch
from .recipes import StageRecipe
from .source import Source

MAX_TOKENS = 48  # of an answer
LOOKED_AT = 2000  # rows, so that millions need not be read for a few
SHOWN = 60  # characters of a text on stderr


@dataclass(frozen=True)
class Prompt:
    """One question that is asked again and again."""

    question: str
    """the human's words without image markers"""
    expected: str
    """the answer in the data"""
    picture: str
    """name of its first picture; empty without one"""
    ids: tuple[int, ...]
    """prompt ids, image slots included"""
    pixels: Mapping[str, torch.Tensor]
    """`pixel_values` (i, 3, s, s) of its pictures"""


def choose(source: Source, count: int) -> list[tuple[int, Row]]:
    """Rows to ask about, with the number of their set, evenly spread over the first LOOKED_AT good ones.

    Raises:
        DataError: a file can't be read.
    """
    good = ((number, row) for number, row in source.rows() if isinstance(row, Row))
    rows = list(itertools.islice(good, LOOKED_AT))
    count = min(count, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]


def prompts(
    checkpoint: Checkpoint, stage: StageRecipe, rows: Sequence[tuple[int, Row]], source: Source
) -> tuple[Prompt, ...]:
    """First questions of some rows as the runtimes would ask them; those that can't be asked are left out."""
    pixels_of = Pixels(checkpoint.spec, Path())
    template = get_template(checkpoint.spec.template if stage.template == "model" else stage.template)
    limit = min(stage.max_length or checkpoint.spec.max_length, checkpoint.spec.max_length)
    made = []
    for number, row in rows:
        turn = row.turns[0]
        places, ids = _ids(checkpoint, template, turn)
        names = list(row.images[:places])
        if len(names) < places or len(ids) + MAX_TOKENS > limit:
            continue
        try:
            decoded = [pixels_of.decode(source.picture(number, name), name) for name in names]
        except ImageError:
            continue
        pixels = {"pixel_values": torch.stack(decoded)} if decoded else {}
        question = turn.question.replace(IMAGE_MARKER, "").strip()
        made.append(Prompt(question, turn.answer or "", names[0] if names else "", tuple(ids), pixels))
    return tuple(made)


def _ids(checkpoint: Checkpoint, template: Template, turn: Turn) -> tuple[int, list[int]]:
    """The number of pictures in an open turn, and its prompt's ids."""
    tokenizer, bos = checkpoint.tokenizer, checkpoint.tokenizer.bos_token_id
    plain = SectionTokenizer(tokenizer)
    ids = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
    places = 0
    for part in sections(build([Turn(turn.question, None, turn.images)], template)):
        if isinstance(part, Image):
            ids += [int(checkpoint.model.config.image_token_id)] * checkpoint.spec.visual_tokens
            places += 1
        elif not isinstance(part, EndOfTurn):
            ids += plain.encode(part.text, part.starts)[0]
    return places, ids


def answer(model: TinyLlava, tokenizer: Any, template: Template, prompt: Prompt) -> str:
    """The greedy answer as text. The model's mode, its gradients and all random numbers stay as they were."""
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(template.end_of_turn or tokenizer.eos_token)}
    half = any(p.dtype is torch.bfloat16 for p in model.parameters())  # frozen weights of a bf16 stage
    with undisturbed(model), torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        pixels = prompt.pixels.get("pixel_values")
        features = None if pixels is None else model.tower_features(pixels.to(model.device))
        ids = torch.tensor([prompt.ids], device=model.device)
        embeds = model.embed(ids, features)  # (1, n, h)
        found = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(end for end in ends if end is not None),
            pad_token_id=tokenizer.eos_token_id,  # never reached with one row
            use_cache=True,
        )
    spell = token_bytes(tokenizer)
    text = b"".join(spell(token) for token in found[0].tolist() if token not in ends).decode("utf-8", "replace").strip()
    return text.partition("\n")[0].strip() if template.caption_only else text  # a newline ends a caption (Eq. 1)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; every module's own mode and the random state of every device come back."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


class SampleAnswers(TrainerCallback):
    """Asks the prompts every few steps and after the last one; the process that writes does it alone."""

    def __init__(
        self, checkpoint: Checkpoint, stage: StageRecipe, asked: Sequence[Prompt], every: int, path: Path, watch: Watch
    ) -> None:
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.template = get_template(checkpoint.spec.template if stage.template == "model" else stage.template)
        self.asked, self.every, self.path, self.watch = asked, every, path, watch
        self.lines: Lines | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the file; answers after the step that training goes on from are dropped."""
        self.lines = Lines(self.path, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask, if it is time. What goes wrong is said, and nothing is asked again: training goes on."""
        step, ending = state.global_step, state.global_step >= state.max_steps or control.should_training_stop
        if self.watch.reason == "interrupt" or (step % self.every and not ending):
            return
        began = time.monotonic()
        try:
            for number, prompt in enumerate(self.asked):
                self._ask(step, number, prompt)
        except Exception as error:  # a GPU without room for it, a full disk
            self.asked = ()
            self.watch.meter.say(f"no more sample answers: {_plain(str(error), 200)}")
        self.watch.pause(time.monotonic() - began)

    def _ask(self, step: int, number: int, prompt: Prompt) -> None:
        found = answer(self.model, self.tokenizer, self.template, prompt)
        words = {"question": prompt.question, "expected": prompt.expected, "answer": found, "picture": prompt.picture}
        if self.lines is not None:
            self.lines.add({"step": step, "sample": number, **words})
        if self.watch.trackers is not None:
            text = "\n".join(f"{name}: {value}" for name, value in words.items())
            self.watch.trackers.text(step, f"samples/{number}", text)
        asked, expected, found = (_plain(text) for text in (prompt.question, prompt.expected, found))
        self.watch.meter.say(f"  step {step}  {_plain(prompt.picture)}  {asked} → {found} (expected: {expected})")


def _plain(text: str, most: int = SHOWN) -> str:
    """Text for a terminal: one line, no control characters, not too long."""
    clean = "".join(c if c.isprintable() else " " for c in text).strip()
    return clean if len(clean) <= most else clean[: most - 1] + "…"

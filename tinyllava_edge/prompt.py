"""Conversations → pieces of a prompt: text, an image, end-of-turn marks. Strings equal TinyLLaVA Factory's main.

A prompt is a list of pieces rather than one string, so that text typed by a user can never become a special token and
an answer's span is known without tokenising twice; upstream parses special tokens out of what users type, which is the
one deliberate difference. Text between two of image, end-of-turn mark and the ends is one section, tokenised as a
whole, as upstream does; the beginning-of-sequence token is added once, in front of the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError

IMAGE_MARKER = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """One conversation template."""

    name: str
    """key in TEMPLATES"""
    system: str
    """text in front of the first turn; a space follows it"""
    end_of_turn: str
    """special token's text after each answer"""
    caption_only: bool = False
    """stage 1's format: the image, then the caption, then a newline; the human's words are dropped"""


TEMPLATES: dict[str, Template] = {
    "llama": Template("llama", SYSTEM, "</s>"),
    "phi": Template("phi", SYSTEM, "<|endoftext|>"),
    "gemma": Template("gemma", SYSTEM, "<eos>"),
    "qwen2_base": Template("qwen2_base", SYSTEM, "<|endoftext|>"),
    "qwen2_instruct": Template("qwen2_instruct", SYSTEM, "<|im_end|>"),
    "llama3": Template("llama3", SYSTEM, "<|end_of_text|>"),
    "llama3_instruct": Template("llama3_instruct", SYSTEM, "<|eot_id|>"),
    "pretrain": Template("pretrain", "", "", caption_only=True),
}


@dataclass(frozen=True)
class Text:
    """Plain text; special-token strings inside it stay plain text."""

    text: str
    """what is tokenised"""
    is_answer: bool = False
    """whether the loss of Eq. 3 counts these tokens (the set A)"""


@dataclass(frozen=True)
class Image:
    """The place of one picture's embeddings."""


@dataclass(frozen=True)
class EndOfTurn:
    """The end-of-turn token, one id."""

    is_answer: bool = True
    """whether the loss counts it"""


Piece = Text | Image | EndOfTurn


@dataclass(frozen=True)
class Section:
    """Neighbouring texts, which are tokenised together: merges may cross from a question into its answer."""

    texts: tuple[Text, ...]
    """what it is made of"""
    starts: bool
    """whether a chunk starts here, at the beginning or after the image; else an end-of-turn mark stands in front"""

    @property
    def text(self) -> str:
        """What is tokenised."""
        return "".join(piece.text for piece in self.texts)


@dataclass(frozen=True)
class Turn:
    """One question and, unless it is the open last one, its answer."""

    question: str
    """the human's words; `<image>` in it marks the picture"""
    answer: str | None = None
    """the assistant's words; None opens the turn for generation"""
    images: int = 0
    """pictures in front of the question, each followed by a newline; a marker in the question is one more"""


def get_template(name: str) -> Template:
    """Look a template up by its exact name. Raises UsageError that lists the known names."""
    if name not in TEMPLATES:
        raise UsageError(f"unknown template {name!r}", f"known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def build(turns: Sequence[Turn], template: Template) -> list[Piece]:
    """Pieces of a conversation, for training (all turns answered) or inference (the last answer is None).

    As upstream does: `<image>` anywhere in a turn moves to the turn's front, the rest is stripped, and a newline parts
    them unless the rest is empty; a turn without it stays as it is. Inference ends with `ASSISTANT:` and no space after
    it: with one, these models repeat themselves.
    """
    if not turns:
        raise UsageError("a conversation needs at least one turn")
    if any(turn.answer is None for turn in turns[:-1]):
        raise UsageError("only the last turn may lack an answer")
    if template.caption_only:
        return _caption(turns)
    pieces: list[Piece] = [Text(template.system + " ")]
    for turn in turns:
        question, has_image = take_image_marker(turn.question)
        pieces.append(Text("USER: "))
        for _ in range(turn.images + has_image):
            pieces += [Image(), Text("\n")]
        if (turn.images or has_image) and not question:
            pieces.pop()
        pieces.append(Text(question + " ASSISTANT:"))
        if turn.answer is not None:
            pieces.append(Text(" " + turn.answer, is_answer=True))
            pieces.append(EndOfTurn())
    return merge(pieces)


def take_image_marker(question: str) -> tuple[str, bool]:
    """The question and whether an image marker was in it; if so, without the marker and stripped, as upstream does."""
    if IMAGE_MARKER not in question:
        return question, False
    return question.replace(IMAGE_MARKER, "").strip(), True


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring plain texts of the same kind, because they are tokenised together."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Text) and isinstance(last, Text) and piece.is_answer == last.is_answer:
            merged[-1] = Text(last.text + piece.text, last.is_answer)
        else:
            merged.append(piece)
    return merged


def sections(pieces: Sequence[Piece]) -> list[Section | Image | EndOfTurn]:
    """Pieces with neighbouring texts joined to sections."""
    joined: list[Section | Image | EndOfTurn] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if not isinstance(piece, Text):
            joined.append(piece)
        elif isinstance(last, Section):
            joined[-1] = Section((*last.texts, piece), last.starts)
        else:
            joined.append(Section((piece,), not isinstance(last, EndOfTurn)))
    return joined


def render(pieces: Sequence[Piece], template: Template) -> str:
    """The prompt as one string with `<image>` in the picture's place: for people, hashes and logs."""
    parts = {Image: IMAGE_MARKER, EndOfTurn: template.end_of_turn}
    return "".join(piece.text if isinstance(piece, Text) else parts[type(piece)] for piece in pieces)


def _caption(turns: Sequence[Turn]) -> list[Piece]:
    """Stage 1 (Eq. 1): the image, then the caption that the loss counts, then a newline."""
    turn = turns[0]
    if turn.images > 1 or any(later.images for later in turns[1:]):
        raise UsageError("a captioning model takes one picture", "ask about one picture at a time")
    if turn.answer is None:
        return [Image()]
    return [Image(), Text(turn.answer + "\n", is_answer=True)]

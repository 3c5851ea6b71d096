"""The chat template renders prompt.build's text in every host's way, and llama.cpp gives it the runtime's ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llama_cpp
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tinyllava_edge.export.chat_template import chat_template
from tinyllava_edge.export.tokenizer import read_vocabulary
from tinyllava_edge.prompt import IMAGE_MARKER, TEMPLATES, Turn, build, render
from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.headers import check_gguf
from tinyllava_edge.runtimes.text import conversation_ids, gguf_vocabulary
from tinyllava_edge.tokenizer_files import fast_tokenizer

from .. import tiny_tokenizers as tiny
from .vocabularies import vocabulary_gguf

CHATS = [name for name, template in TEMPLATES.items() if not template.caption_only]
MARKED = "<image>\nwhat is it?"
ASKED = {"type": "text", "text": "what is it?"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:"}}
NATIVE = {"type": "media_marker", "text": "<__media__>"}
PARTS = [ASKED, PICTURE]
CONVERSATIONS: list[tuple[list[Turn], list[Any]]] = [
    ([Turn("hello")], ["hello"]),
    ([Turn("hello")], [[{"type": "text", "text": "hello"}]]),
    ([Turn(MARKED)], [MARKED]),
    ([Turn(MARKED)], [PARTS]),
    ([Turn(MARKED)], [PARTS[::-1]]),
    ([Turn("what is it? <image>")], ["what is it? <image>"]),
    ([Turn("what <image> is it?")], ["what <image> is it?"]),
    ([Turn("<image>")], ["<image>"]),
    ([Turn("<image>")], [[PICTURE]]),
    ([Turn(MARKED, "a cat"), Turn("really?")], [PARTS, "a cat", " really? "]),
    ([Turn(MARKED, ""), Turn("really?")], [PARTS, "", "really?"]),
    ([Turn("one", "1"), Turn(MARKED, "2"), Turn("three")], ["one", "1", MARKED, "2", "three"]),
    ([Turn("quotes \" ' {{ braces }} \\ \n tail")], ["quotes \" ' {{ braces }} \\ \n tail"]),
    ([Turn("say </s> <|endoftext|> <eos>")], ["say </s> <|endoftext|> <eos>"]),
]


def rendered(jinja: str, contents: list[Any], bos: str = "", system: str | None = None) -> str:
    messages = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(jinja).render(messages=messages, bos_token=bos, add_generation_prompt=True)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(("turns", "contents"), CONVERSATIONS)
def test_text(name: str, turns: list[Turn], contents: list[Any]) -> None:
    """String and list content, pictures anywhere, several turns; the first token in front where a text has one."""
    template = TEMPLATES[name]
    wanted = render(build(turns, template), template)
    assert rendered(chat_template(template, ""), contents, "<s>") == wanted
    assert rendered(chat_template(template, "<s>"), contents, "<s>") == "<s>" + wanted


@pytest.mark.parametrize(
    "content", [[NATIVE, ASKED], [ASKED, NATIVE], "<__media__>what is it?", "what is it? <__media__>"]
)
def test_markers_of_hosts_and_system_messages(content: Any) -> None:
    """llama.cpp's own marker is moved like ours; a system message replaces the default one."""
    jinja = chat_template(TEMPLATES["llama"], "<s>")
    assert rendered(jinja, [content], "<s>", "Be brief.") == "<s>Be brief. USER: <__media__>\nwhat is it? ASSISTANT:"
    spaced = chat_template(TEMPLATES["llama"], "<s>", first_space=True)
    assert rendered(spaced, [content], "<s>", "Be brief.") == "<s> Be brief. USER: <__media__> \nwhat is it? ASSISTANT:"


DRAWN = "<__media_Qb7xT__>"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (f"{DRAWN}what is it?", f"{DRAWN}\nwhat is it?"),
        (f"what is it?{DRAWN}", f"{DRAWN}\nwhat is it?"),
        (f"{DRAWN}say <image>", f"{DRAWN}\nsay"),
        (DRAWN, DRAWN),
        (f"{DRAWN}{DRAWN}what?", f"{DRAWN}\n{DRAWN}\nwhat?"),
        ([{"type": "media_marker", "text": DRAWN}, ASKED, NATIVE], f"{DRAWN}\n<__media__>\nwhat is it?"),
        ("what is <__media", "what is <__media"),
        ("<__media>what is it?", "<__media>what is it?"),
    ],
)
def test_marker_that_llama_server_draws(content: Any, wanted: str) -> None:
    """It is joined to the words without a newline, and there is one for each picture."""
    text = rendered(chat_template(TEMPLATES["llama"], "<s>"), [content], "<s>", "Be brief.")
    assert text == f"<s>Be brief. USER: {wanted} ASSISTANT:"


def test_several_pictures_as_the_prompt_has_them() -> None:
    template = TEMPLATES["llama"]
    wanted = render(build([Turn("what is it?", images=2)], template), template)
    assert rendered(chat_template(template, ""), [[PICTURE, PICTURE, ASKED]]) == wanted


def test_spaces_where_a_chunk_starts() -> None:
    """In front of everything and behind a picture, not behind an end-of-turn mark."""
    template = TEMPLATES["llama"]
    jinja = chat_template(template, "<s>", first_space=True)
    text = rendered(jinja, [PARTS, "a cat", "really?"], "<s>")
    plain = f" USER: {IMAGE_MARKER} \nwhat is it? ASSISTANT: a cat</s>USER: really? ASSISTANT:"
    assert text == f"<s> {template.system}{plain}"
    assert rendered(jinja, [[PICTURE]]).endswith(f" USER: {IMAGE_MARKER}  ASSISTANT:")


@dataclass(frozen=True)
class Host:
    """A stock host's view of a model: its template and llama.cpp's tokenizer."""

    name: str
    jinja: str
    bos: str
    ids: Callable[[str], tuple[int, ...]]
    wanted: Callable[[list[Turn]], tuple[int, ...]]


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    name, write, _ = tiny.KINDS[request.param]
    template, root = TEMPLATES[name], tmp_path_factory.mktemp(request.param)
    fast = fast_tokenizer(write(root / "release"))
    fast.add_tokens([IMAGE_MARKER], special_tokens=True)
    vocabulary = read_vocabulary(fast, len(fast))
    bos = fast.bos_token if vocabulary.add_bos else ""
    jinja = chat_template(template, bos, first_space=vocabulary.first_space)
    path = vocabulary_gguf(fast, root / "x.gguf", template.end_of_turn, len(fast), vocabulary, jinja)
    native = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def tokens(text: str, special: bool, first: bool = False) -> list[int]:
        return list(native.tokenize(text.encode(), add_bos=first, special=special))

    def host_ids(text: str) -> tuple[int, ...]:
        """llama-server's way with a picture: first token added, each chunk tokenised by itself, special tokens read."""
        ids = list(tokens("", True, first=True))
        for number, chunk in enumerate(text.removeprefix(bos).split(IMAGE_MARKER)):
            ids += [IMAGE_PLACE] * (number > 0) + (tokens(chunk, True) if chunk else [])
        return tuple(ids)

    end = fast.convert_tokens_to_ids(template.end_of_turn)
    first = fast.bos_token_id if vocabulary.add_bos else None
    ours = gguf_vocabulary(lambda text: tokens(text, False), check_gguf(path), first, end, fast.eos_token_id)

    def wanted(turns: list[Turn]) -> tuple[int, ...]:
        has_image = IMAGE_MARKER in turns[0].question
        return conversation_ids(turns, template, ours, has_image=has_image)

    return Host(request.param, native.metadata["tokenizer.chat_template"], bos, host_ids, wanted)


# without an empty question, which the runtime refuses, special tokens as text, and a picture in a later turn
ASKABLE = [
    (turns, contents)
    for turns, contents in CONVERSATIONS
    if turns[0].question not in (IMAGE_MARKER, "one") and "</s>" not in turns[0].question
]


@pytest.mark.parametrize(("turns", "contents"), ASKABLE)
def test_stock_hosts_get_the_runtimes_ids(host: Host, turns: list[Turn], contents: list[Any]) -> None:
    """llama.cpp's tokens of the rendered text, chunk by chunk, equal the runtime's for every kind of tokenizer.

    Special tokens that a user types are the exception: hosts read them.
    """
    assert host.ids(rendered(host.jinja, contents, host.bos)) == host.wanted(turns)

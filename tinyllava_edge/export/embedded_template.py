"""What stock hosts make of a bundle: the GGUF's own chat template, rendered, and llama.cpp's tokens of the text.

Our runtime builds prompts itself and never reads that template, so a fault in it would show only in llama-server, LM
Studio or a phone app. Such hosts read special tokens out of the text, and differ in who adds the first one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..prompt import IMAGE_MARKER
from ..runtimes.base import IMAGE_PLACE
from ..runtimes.headers import check_gguf
from .chat_template import NATIVE_END, NATIVE_MARKER, NATIVE_START
from .native_log import captured
from .render_chat import render

KEY = "tokenizer.chat_template"
_DRAWN = f"{NATIVE_START}_Xy3{NATIVE_END}"  # llama-server's marker is another one at each start


@dataclass(frozen=True)
class Host:
    """How a kind of host puts the beginning-of-sequence token in front."""

    renders_bos: bool
    """whether the template is given the token's text; else an empty one"""
    strips_bos: bool
    """whether a rendered token is taken off again where the tokenizer adds one"""
    adds_bos: bool
    """whether the tokenizer's own rule is applied to the rendered text"""


# Read in llama.cpp's common/chat.cpp and tools/mtmd, and in llama-cpp-python 0.3.36's llama_chat_format.py.
HOSTS: dict[str, Host] = {
    "llama-server": Host(renders_bos=True, strips_bos=True, adds_bos=True),
    "llama-cpp-python": Host(renders_bos=True, strips_bos=False, adds_bos=False),
    "llama-cpp-python, pictures": Host(renders_bos=False, strips_bos=False, adds_bos=True),
}


def _contents(question: str) -> dict[str, Any]:
    """The forms in which hosts hand over a picture and a question."""
    asked = {"type": "text", "text": question}
    return {
        "string": f"{NATIVE_MARKER}\n{question}",
        "string of llama-server": f"{_DRAWN}{question}",
        "image part": [{"type": "image"}, asked],
        "marker part": [asked, {"type": "media_marker", "text": NATIVE_MARKER}],
    }


class HostPrompts:
    """Prompts of a GGUF as hosts would build them.

    Raises:
        BundleError: not a GGUF that can be run.
        EngineError: llama.cpp can't load the vocabulary.
    """

    def __init__(self, path: Path) -> None:
        """Load the vocabulary; the weights stay where they are."""
        import llama_cpp

        template = check_gguf(path).get(KEY)
        self.template = template.decode("utf-8", "replace") if isinstance(template, bytes) else None
        self._path, self._api = path, llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        with captured() as log:
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise EngineError(f"{path}: llama.cpp can't load the vocabulary ({log.reason()})", "export it again")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        self._bos = bos if bos >= 0 else None
        self._add_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    def ids(self, questions: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
        """Prompt ids with IMAGE_PLACE: `host, form of the content` → one tuple per question.

        Raises:
            EngineError: there is no template, or it can't be rendered.
        """
        if self.template is None:
            raise EngineError(f"{self._path}: no chat template, so hosts take one of their own", "export it again")
        bos, eos = self._text(self._bos), self._text(int(self._api.llama_vocab_eos(self._vocab)))
        plan = [(name, host, form) for name, host in HOSTS.items() for form in _contents("")]
        calls = [
            {
                "messages": [{"role": "user", "content": _contents(question)[form]}],
                "bos_token": bos if host.renders_bos else "",
                "eos_token": eos,
                "add_generation_prompt": True,
            }
            for _, host, form in plan
            for question in questions
        ]
        texts = iter(render(self.template, calls))
        return {
            f"{name}, {form}": [self._host_ids(next(texts), host, bos) for _ in questions] for name, host, form in plan
        }

    def is_plain(self, text: str) -> bool:
        """Whether no special token is spelled in a text: hosts would read it as one, our runtime would not."""
        return self._tokenize(text, special=True) == self._tokenize(text, special=False)

    def close(self) -> None:
        """Free the vocabulary."""
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = None

    def _host_ids(self, text: str, host: Host, bos: str) -> tuple[int, ...]:
        adds = host.adds_bos and self._add_bos and self._bos is not None
        if host.strips_bos and adds and bos:
            text = text.removeprefix(bos)
        ids = [self._bos] if adds and self._bos is not None else []
        for marker in (NATIVE_MARKER, _DRAWN):
            text = text.replace(marker, IMAGE_MARKER)
        for number, piece in enumerate(text.split(IMAGE_MARKER)):
            ids += [IMAGE_PLACE] * (number > 0) + self._tokenize(piece, special=True)
        return tuple(ids)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), False, special)
        return list(buffer[: max(count, 0)])

    def _text(self, token: int | None) -> str:
        text = self._api.llama_vocab_get_text(self._vocab, token) if token is not None and token >= 0 else b""
        return (text or b"").decode("utf-8", "replace")

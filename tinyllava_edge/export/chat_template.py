"""The conversation template as Jinja, for the GGUF: what llama.cpp's own programs apply to chat messages.

Renders what prompt.build gives, beginning-of-sequence token in front: hosts that add one themselves take it off again,
or give an empty text for it.
"""

from __future__ import annotations

import json

from ..prompt import IMAGE_MARKER, Template

# llama.cpp's programs mark the picture's place themselves, in a part of type `media_marker` or, joined to the words
# without a newline, in the string. llama-server draws a marker of its own at each start, `<__media_Xy3__>`.
NATIVE_MARKER = "<__media__>"
NATIVE_START, NATIVE_END = "<__media", "__>"

_BODY = """\
{%- if messages and messages[0]['role'] != 'system' -%}{{ SPACE + SYSTEM + ' ' }}{%- endif -%}
{%- for message in messages -%}
{%- set turn = namespace(text='', image='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set turn.text = turn.text + part['text'] -%}
{%- else -%}
{%- set marker = part['text'] if part['type'] == 'media_marker' else IMAGE -%}
{%- set turn.image = turn.image + ('\\n' if turn.image else '') + marker + SPACE -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{{ (SPACE if loop.first else '') + turn.text + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + turn.text + END }}
{%- else -%}
{%- set pieces = turn.text.split(OPEN) -%}
{%- set native = (OPEN + pieces[1].split(CLOSE)[0] + CLOSE) if pieces | length > 1 else IMAGE -%}
{%- for marker in [native, IMAGE] -%}
{%- if marker in turn.text -%}
{%- if not turn.image -%}
{%- for piece in turn.text.split(marker) -%}
{%- if not loop.first and not (marker == IMAGE and turn.image) -%}
{%- set turn.image = turn.image + ('\\n' if turn.image else '') + marker + SPACE -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set turn.text = turn.text.replace(marker, '') -%}
{%- endif -%}
{%- endfor -%}
{%- set turn.text = turn.text.strip() -%}
{{ 'USER: ' + turn.image + ('\\n' if turn.image and turn.text else '') + turn.text + ' ASSISTANT:' }}
{%- endif -%}
{%- endfor -%}
"""


def _set(name: str, text: str) -> str:
    return f"{{%- set {name} = {json.dumps(text)} -%}}"


FIRST_SPACE = _set("SPACE", " ")  # in every template made with `first_space`, in no other


def chat_template(template: Template, bos: str, *, first_space: bool = False) -> str:
    """Jinja source of a template.

    Content may be a string or a list of parts; pictures go to the front of their turn and a newline follows each.

    Args:
        template: not one for captions only.
        bos: the beginning-of-sequence token's text, empty where a text has none.
        first_space: whether the text itself starts with a space, and goes on with one after a picture. A GGUF whose
            tokenizer adds such spaces only there (`vocabulary.Vocabulary.first_space`) needs it: llama.cpp would add
            them after end-of-turn marks too.
    """
    names = {
        "SYSTEM": template.system,
        "END": template.end_of_turn,
        "IMAGE": IMAGE_MARKER,
        "OPEN": NATIVE_START,
        "CLOSE": NATIVE_END,
        "SPACE": " " if first_space else "",
    }
    head = "".join(_set(name, text) for name, text in names.items())
    # the host's own value: one whose tokenizer adds the token renders an empty text, and would else have it twice
    start = "{{ bos_token }}" if bos else ""
    return head + start + _BODY

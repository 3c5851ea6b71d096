"""The conversation template as Jinja, for the GGUF: what llama.cpp's own programs apply to chat messages.

Renders what prompt.build gives, beginning-of-sequence token in front: hosts that add one themselves take it off again,
or give an empty text for it.
"""

from __future__ import annotations

import json

from ..prompt import IMAGE_MARKER, Template

# llama.cpp's programs mark the picture's place themselves, in a part of type `media_marker` or in the string.
NATIVE_MARKER = "<__media__>"

_BODY = """\
{%- if messages and messages[0]['role'] != 'system' -%}{{ SPACE + SYSTEM + ' ' }}{%- endif -%}
{%- for message in messages -%}
{%- set turn = namespace(text='', image='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set turn.text = turn.text + part['text'] -%}
{%- elif part['type'] == 'media_marker' -%}{%- set turn.image = turn.image + part['text'] -%}
{%- else -%}{%- set turn.image = turn.image + IMAGE -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' -%}
{{ (SPACE if loop.first else '') + turn.text + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + turn.text + END }}
{%- else -%}
{%- for marker in [IMAGE, NATIVE] -%}
{%- if marker in turn.text -%}
{%- set turn.text = turn.text.replace(marker, '') -%}
{%- if not turn.image -%}{%- set turn.image = marker -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set turn.text = turn.text.strip() -%}
{%- if turn.image -%}
{%- set turn.image = turn.image + SPACE + ('\\n' if turn.text else '') -%}
{%- endif -%}
{{ 'USER: ' + turn.image + turn.text + ' ASSISTANT:' }}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template, bos: str, *, first_space: bool = False) -> str:
    """Jinja source of a template.

    Content may be a string or a list of parts; pictures go to the front of their turn and a newline follows them.

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
        "NATIVE": NATIVE_MARKER,
        "SPACE": " " if first_space else "",
    }
    head = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in names.items())
    # the host's own value: one whose tokenizer adds the token renders an empty text, and would else have it twice
    start = "{{ bos_token }}" if bos else ""
    return head + start + _BODY

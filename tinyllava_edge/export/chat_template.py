"""The conversation template as Jinja, for the GGUF: what llama.cpp's own programs apply to chat messages.

Renders what prompt.build gives, beginning-of-sequence token in front: hosts that add one themselves take it off again.
"""

from __future__ import annotations

import json

from ..prompt import IMAGE_MARKER, Template

# llama.cpp's programs mark the picture's place themselves, in a part of type `media_marker` or in the string.
_NATIVE_MARKER = "<__media__>"

_BODY = """\
{%- if messages and messages[0]['role'] != 'system' -%}{{ SYSTEM + ' ' }}{%- endif -%}
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
{{ turn.text + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + turn.text + END }}
{%- else -%}
{%- for marker in [IMAGE, NATIVE] -%}
{%- if marker in turn.text -%}
{%- set turn.text = turn.text.replace(marker, '') -%}
{%- if not turn.image -%}{%- set turn.image = marker -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{ 'USER: ' + turn.image + ('\\n' if turn.image else '') + turn.text.strip() + ' ASSISTANT:' }}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template, bos: str) -> str:
    """Jinja source of a template; `bos` is the beginning-of-sequence token's text, empty where a text has none.

    Content may be a string or a list of parts; pictures go to the front of their turn and a newline follows them.
    """
    names = {"SYSTEM": template.system, "END": template.end_of_turn, "IMAGE": IMAGE_MARKER, "NATIVE": _NATIVE_MARKER}
    head = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in names.items())
    start = f"{{{{ {json.dumps(bos)} }}}}" if bos else ""
    return head + start + _BODY

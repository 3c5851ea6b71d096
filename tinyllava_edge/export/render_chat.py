"""Render a chat template in a process of its own: `python -m tinyllava_edge.export.render_chat`.

A template comes from a file that someone else may have written. Jinja's sandbox keeps it from attributes and calls, but
not from eating time and memory, so it runs where both are bounded and where its end is nobody else's.

stdin: JSON {"template": source, "calls": [variables of one rendering, …], "seconds": limit}; stdout: a list of texts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineError

MAX_TEMPLATE = 1 << 16  # bytes; real ones are a few thousand
MAX_OUTPUT = 1 << 20  # bytes of all texts together
SECONDS = 10
MEMORY = 1 << 30  # bytes of address space
_PACKAGES = Path(__file__).parents[2]


def render(template: str, calls: Sequence[Mapping[str, Any]], *, seconds: int = SECONDS) -> list[str]:
    """Texts of a template, one per set of variables, as Hugging Face's and llama.cpp's hosts render it.

    Raises:
        EngineError: it is longer than 64 KiB, isn't Jinja, fails, or takes more than 10 s, 1 GiB or 1 MiB of output.
    """
    if len(template.encode("utf-8", "replace")) > MAX_TEMPLATE:
        raise EngineError(f"a chat template of {len(template):,} characters, limit {MAX_TEMPLATE:,} bytes")
    path = os.environ.get("PYTHONPATH")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=json.dumps({"template": template, "calls": list(calls), "seconds": seconds}).encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(_PACKAGES), path)))},
            timeout=seconds + 10,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"the chat template takes more than {seconds} s") from error
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EngineError(f"the chat template fails ({reason[-1][:200] if reason else 'killed'})")
    texts: list[str] = json.loads(done.stdout)
    return texts


def _bound(seconds: int) -> None:
    """Limits of this process; where the system has none, the parent's timeout remains."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _main() -> None:
    asked = json.load(sys.stdin)
    _bound(asked["seconds"])
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    try:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        source = environment.from_string(asked["template"])
        texts, size = [], 0
        for call in asked["calls"]:
            texts.append(source.render(**call, raise_exception=raise_exception))
            size += len(texts[-1])
            if size > MAX_OUTPUT:
                sys.exit(f"more than {MAX_OUTPUT:,} characters")
    except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except (MemoryError, RecursionError) as error:
        sys.exit(type(error).__name__)
    sys.stdout.write(json.dumps(texts))


if __name__ == "__main__":
    _main()

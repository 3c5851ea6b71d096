"""The forms that `export --mobile` writes, and which optional package each needs. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DependencyError, UsageError

FOLDER = "mobile"  # of a bundle; all files of role `mobile` lie in it
MOBILE_FORMS = {
    "ort": "ONNX Runtime's mobile format, and the operators that a minimal build of it needs",
    "coreml": "static float32 graph for ONNX Runtime's CoreML provider, and what its usability checker says",
    "executorch": "ExecuTorch program of the vision graph, lowered to XNNPACK",
    "litert": "LiteRT (TensorFlow Lite) file of the vision graph",
}
PACKAGES = {"executorch": "executorch", "litert": "litert_torch"}  # form → module; the extra is named like the form


def check_forms(names: Sequence[str]) -> tuple[str, ...]:
    """The asked forms in the table's order, each once.

    Raises:
        UsageError: an unknown name.
        DependencyError: a form's converter isn't installed.
    """
    from importlib.util import find_spec

    unknown = [name for name in names if name not in MOBILE_FORMS]
    if unknown:
        raise UsageError(f"unknown mobile form {unknown[0]!r}", f"known: {', '.join(MOBILE_FORMS)}")
    chosen = tuple(name for name in MOBILE_FORMS if name in names)
    for name in chosen:
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            package = PACKAGES[name].replace("_", "-")
            raise DependencyError(
                f"the mobile form {name} needs the package {package}", f"pip install 'tinyllava-edge[{name}]'"
            )
    return chosen

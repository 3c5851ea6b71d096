"""Picture → image embeddings in ONNX Runtime: the preprocessing graph, then tower + connector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DependencyError, EngineError
from ..image import RgbImage
from ..spec import ModelSpec
from .headers import check_onnx

Floats = npt.NDArray[np.float32]
Signature = tuple[str, tuple[int | None, ...]]  # ONNX type and shape; None is any size
CPU = "CPUExecutionProvider"


class Vision:
    """The two graphs of a build, checked against the model's spec.

    Legend: s image size, t visual tokens, d language-model width, v tower width.

    Args:
        preprocess: path of preprocess.onnx.
        vision: path of vision-*.onnx.
        spec: what the graphs must take and give.
        n_threads: threads of one operator.
        providers: ONNX Runtime execution providers, in order; a provider that doesn't come up is an error.

    Raises:
        BundleError: a file is missing, truncated, or keeps weights in another file.
        EngineError: ONNX Runtime can't open a graph, or its inputs and outputs aren't the spec's.
        DependencyError: onnxruntime isn't installed.
    """

    def __init__(
        self, preprocess: Path, vision: Path, spec: ModelSpec, *, n_threads: int, providers: Sequence[str] = (CPU,)
    ) -> None:
        self._spec = spec
        self._preprocess = _session(preprocess, n_threads, (CPU,))  # uint8 Resize exists on the CPU only
        self._vision = _session(vision, n_threads, providers)
        self._paths = (preprocess, vision)
        s, t, d = spec.image_size, spec.visual_tokens, spec.embedding_dim
        _require(preprocess, self._preprocess.get_inputs(), {"image": ("tensor(uint8)", (1, None, None, 3))})
        _require(preprocess, self._preprocess.get_outputs(), {"pixel_values": ("tensor(float)", (1, 3, s, s))})
        _require(vision, self._vision.get_inputs(), {"pixel_values": ("tensor(float)", (None, 3, s, s))})
        wanted: dict[str, Signature] = {
            "image_embeds": ("tensor(float)", (None, t, d)),
            "image_features": ("tensor(float)", (None, t, None)),
        }
        _require(vision, self._vision.get_outputs(), wanted)

    @property
    def providers(self) -> list[str]:
        """Providers that the vision graph really runs on."""
        return list(self._vision.get_providers())

    def pixel_values(self, rgb: RgbImage) -> Floats:
        """uint8 (height, width, 3) → float32 (3, s, s)."""
        s = self._spec.image_size
        pixels: list[Floats] = self._run(
            self._preprocess, self._paths[0], ["pixel_values"], {"image": rgb[None]}, [(1, 3, s, s)]
        )
        values: Floats = pixels[0][0]
        return values

    def embed(self, pixel_values: Floats) -> Floats:
        """(3, s, s) → image embeddings (t, d)."""
        (embeds,) = self._run_vision(pixel_values, ["image_embeds"])
        return embeds

    def encode(self, pixel_values: Floats) -> tuple[Floats, Floats]:
        """(3, s, s) → image embeddings (t, d) and the selected tower features (t, v) they were made from."""
        embeds, features = self._run_vision(pixel_values, ["image_embeds", "image_features"])
        return embeds, features

    def _run_vision(self, pixel_values: Floats, names: list[str]) -> list[Floats]:
        s, t, d = self._spec.image_size, self._spec.visual_tokens, self._spec.embedding_dim
        pixels = np.ascontiguousarray(pixel_values, dtype=np.float32)
        if pixels.shape != (3, s, s):
            raise EngineError(f"pixel_values of shape {pixels.shape}, (3, {s}, {s}) expected")
        shapes = {"image_embeds": (1, t, d), "image_features": (1, t, None)}
        outputs = self._run(
            self._vision, self._paths[1], names, {"pixel_values": pixels[None]}, [shapes[n] for n in names]
        )
        return [output[0] for output in outputs]

    def _run(
        self,
        session: Any,
        path: Path,
        names: list[str],
        inputs: dict[str, Any],
        shapes: Sequence[tuple[int | None, ...]],
    ) -> list[Floats]:
        try:
            outputs = session.run(names, inputs)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(
                f"{path}: ONNX Runtime stopped ({_one_line(error)})", "verify or export the bundle again"
            ) from error
        for name, output, shape in zip(names, outputs, shapes, strict=True):
            if output.dtype != np.float32 or not _fits(output.shape, shape):
                raise EngineError(
                    f"{path}: {name} came out as {output.dtype} {output.shape}", "export the bundle again"
                )
        return list(outputs)


def onnxruntime_version() -> str:
    """Version of ONNX Runtime. Raises DependencyError if there is none."""
    return str(_onnxruntime().__version__)


def _session(path: Path, n_threads: int, providers: Sequence[str]) -> Any:
    check_onnx(path)
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow llama.cpp's
    options.log_severity_level = 4  # failures arrive as exceptions; the rest is noise on stderr
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise EngineError(
            f"no {missing[0]} in this onnxruntime", f"available: {', '.join(ort.get_available_providers())}"
        )
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(
            f"{path}: ONNX Runtime can't open it ({_one_line(error)})", "copy or export the bundle again"
        ) from error
    lost = [name for name in providers if name not in session.get_providers()]
    if lost:
        raise EngineError(f"{path}: {lost[0]} did not start", "install its drivers and libraries, or run on the CPU")
    return session


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError("onnxruntime is not installed", "pip install 'tinyllava-edge[cpu]'") from error
    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def _require(path: Path, nodes: Sequence[Any], wanted: Mapping[str, Signature]) -> None:
    """Names, types and fixed sizes of a graph's inputs or outputs must be the spec's; other sizes may be symbols."""
    found = {node.name: node for node in nodes}
    if set(found) != set(wanted):
        raise EngineError(f"{path}: has {sorted(found)}, {sorted(wanted)} expected", "export the bundle again")
    for name, (kind, shape) in wanted.items():
        node = found[name]
        if node.type != kind or not _fits(node.shape, shape):
            raise EngineError(
                f"{path}: {name} is {node.type} {node.shape}, {kind} {list(shape)} expected", "export the bundle again"
            )


def _fits(given: Sequence[Any], wanted: Sequence[int | None]) -> bool:
    """Whether sizes agree; symbols and None in either agree with anything."""
    return len(given) == len(wanted) and all(
        not isinstance(a, int) or b is None or a == b for a, b in zip(given, wanted, strict=True)
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

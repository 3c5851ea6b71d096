"""Picture → image embeddings in ONNX Runtime: the preprocessing graph, then tower + connector."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..image import RgbImage
from ..spec import ModelSpec
from .binding import BoundSession
from .cancel import Cancel
from .headers import check_onnx
from .memory_limit import give_back
from .providers import (
    CPU,
    CUDA,
    RECORD_NODES,
    cuda_problem,
    nodes_by_provider,
    onnxruntime_api,
    require_taken,
    with_options,
)

Floats = npt.NDArray[np.float32]
Signature = tuple[str, tuple[int | None, ...]]  # ONNX type and shape; None is any size


class Vision:
    """The two graphs of a build, checked against the model's spec.

    Legend: s image size, t visual tokens, p tower tokens (t, unless the connector resamples), d language-model width,
    v tower width.

    Args:
        preprocess: path of preprocess.onnx.
        vision: path of vision-*.onnx.
        spec: what the graphs must take and give.
        n_threads: threads of one operator.
        providers: ONNX Runtime execution providers, in order; a provider that doesn't come up is an error.
        parts: names of files beside `vision` that it may keep weights in.
        lazy: open the graphs with the first picture, so that text alone never pays for them.

    Raises:
        BundleError: a file is missing, truncated, or keeps weights in another file.
        EngineError: ONNX Runtime can't open a graph, or its inputs and outputs aren't the spec's.
        DependencyError: onnxruntime isn't installed.
    """

    def __init__(
        self,
        preprocess: Path,
        vision: Path,
        spec: ModelSpec,
        *,
        n_threads: int,
        providers: Sequence[str] = (CPU,),
        parts: Collection[str] = (),
        lazy: bool = False,
    ) -> None:
        self._spec = spec
        self._paths = (preprocess, vision)
        self._options = (n_threads, tuple(providers), parts)
        self._lock = threading.Lock()
        self._sessions: tuple[Any, Any] | None = None
        if not lazy:
            self.load()

    def load(self) -> tuple[Any, Any]:
        """Both graphs' sessions, opened unless they are open; raises what the class says."""
        with self._lock:
            if self._sessions is None:
                self._sessions = self._open()
            return self._sessions

    def _open(self) -> tuple[Any, Any]:
        n_threads, providers, parts = self._options
        preprocess, vision = self._paths
        first = open_session(preprocess, n_threads, (CPU,))  # uint8 Resize exists on the CPU only
        second = open_session(vision, n_threads, providers, parts)
        s, t, d = self._spec.image_size, self._spec.visual_tokens, self._spec.embedding_dim
        _require(preprocess, first.get_inputs(), {"image": ("tensor(uint8)", (1, None, None, 3))})
        _require(preprocess, first.get_outputs(), {"pixel_values": ("tensor(float)", (1, 3, s, s))})
        _require(vision, second.get_inputs(), {"pixel_values": ("tensor(float)", (None, 3, s, s))})
        wanted: dict[str, Signature] = {
            "image_embeds": ("tensor(float)", (None, t, d)),
            "image_features": ("tensor(float)", (None, self._spec.feature_tokens, None)),
        }
        _require(vision, second.get_outputs(), wanted)
        return first, BoundSession(second) if CUDA in providers else second

    def close(self) -> None:
        """Let go of the sessions; the next picture would open them again."""
        with self._lock:
            self._sessions = None

    @property
    def settings(self) -> tuple[list[str], int]:
        """Providers that were asked for, and threads of one operator."""
        return list(self._options[1]), self._options[0]

    @property
    def providers(self) -> list[str]:
        """Providers that the vision graph really runs on; none while it isn't open."""
        return [] if self._sessions is None else list(self._sessions[1].get_providers())

    @property
    def nodes(self) -> dict[str, int]:
        """Provider → nodes of the vision graph that it runs; empty on the CPU alone, and while the graph isn't open."""
        return {} if self._sessions is None else nodes_by_provider(self._sessions[1])

    def pixel_values(self, rgb: RgbImage) -> Floats:
        """uint8 (height, width, 3) → float32 (3, s, s)."""
        s = self._spec.image_size
        pixels: list[Floats] = self._run(
            self.load()[0], self._paths[0], ["pixel_values"], {"image": rgb[None]}, [(1, 3, s, s)]
        )
        values: Floats = pixels[0][0]
        return values

    def embed(self, pixel_values: Floats, cancel: Cancel | None = None) -> Floats:
        """(3, s, s) → image embeddings (t, d). Raises CancelledError once `cancel` is thrown."""
        (embeds,) = self._run_vision(pixel_values, ["image_embeds"], cancel)
        return embeds

    def encode(self, pixel_values: Floats) -> tuple[Floats, Floats]:
        """(3, s, s) → image embeddings (t, d) and the selected tower features (p, v) they were made from."""
        embeds, features = self._run_vision(pixel_values, ["image_embeds", "image_features"])
        return embeds, features

    def _run_vision(self, pixel_values: Floats, names: list[str], cancel: Cancel | None = None) -> list[Floats]:
        s, t, d = self._spec.image_size, self._spec.visual_tokens, self._spec.embedding_dim
        pixels = np.ascontiguousarray(pixel_values, dtype=np.float32)
        if pixels.shape != (3, s, s):
            raise EngineError(f"pixel_values of shape {pixels.shape}, (3, {s}, {s}) expected")
        shapes = {"image_embeds": (1, t, d), "image_features": (1, self._spec.feature_tokens, None)}
        wanted = [shapes[n] for n in names]
        inputs = {"pixel_values": pixels[None]}
        if cancel is None:
            outputs = self._run(self.load()[1], self._paths[1], names, inputs, wanted)
        else:
            options = onnxruntime_api().RunOptions()
            with cancel.tells(lambda: setattr(options, "terminate", True)):
                try:
                    outputs = self._run(self.load()[1], self._paths[1], names, inputs, wanted, options)
                except EngineError:
                    cancel.check()
                    raise
        return [output[0] for output in outputs]

    def _run(
        self,
        session: Any,
        path: Path,
        names: list[str],
        inputs: dict[str, Any],
        shapes: Sequence[tuple[int | None, ...]],
        options: Any = None,
    ) -> list[Floats]:
        try:
            outputs = session.run(names, inputs, options)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise EngineError(
                f"{path}: ONNX Runtime stopped ({one_line(error)})", "verify or export the bundle again"
            ) from error
        for name, output, shape in zip(names, outputs, shapes, strict=True):
            if output.dtype != np.float32 or not _fits(output.shape, shape):
                raise EngineError(
                    f"{path}: {name} came out as {output.dtype} {output.shape}", "export the bundle again"
                )
        return list(outputs)


def onnxruntime_version() -> str:
    """Version of ONNX Runtime. Raises DependencyError if there is none."""
    return str(onnxruntime_api().__version__)


def open_session(path: Path, n_threads: int, providers: Sequence[str], parts: Collection[str] = ()) -> Any:
    check_onnx(path, frozenset(parts))
    ort = onnxruntime_api()
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow llama.cpp's
    options.log_severity_level = 4  # failures arrive as exceptions; the rest is noise on stderr
    if CUDA in providers and (problem := cuda_problem()):
        raise EngineError(f"{path}: {problem}", "install what is missing, or run on the CPU (--device auto)")
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise EngineError(
            f"no {missing[0]} in this onnxruntime", f"available: {', '.join(ort.get_available_providers())}"
        )
    if list(providers) != [CPU]:
        options.add_session_config_entry(RECORD_NODES, "1")
    else:
        options.enable_mem_pattern = False  # the planned block of the second run would stand beside the first run's
    try:
        session = ort.InferenceSession(str(path), options, providers=with_options(providers), enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(
            f"{path}: ONNX Runtime can't open it ({one_line(error)})", "copy or export the bundle again"
        ) from error
    require_taken(path, session, providers)
    give_back()  # the parsed file, and weights that were packed since
    return session


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


def one_line(error: Exception) -> str:
    """What a library said, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]

"""llama.cpp's own multimodal road (mtmd): what stock hosts compute from an mmproj and a text GGUF.

MtmdEncoder turns pictures into image embeddings, for the check of an mmproj against its checkpoint. MtmdRuntime
answers with them, to say what a stock host's answers are worth: from Python, no command opens it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, BundleFile, read_bundle
from ..errors import BundleError, EngineError
from ..image import RgbImage, check_array
from ..spec import ModelSpec
from .caches import NO_CACHES
from .cancel import Cancel
from .devices import ON_CPU
from .edge import EdgeRuntime
from .fit import fit_picture
from .headers import check_gguf
from .llama import LOG, LOG_STATE, Llama, last_log, llama_facts, native_api
from .mmproj_header import read_mmproj_header
from .text import default_context
from .vision import Vision

Floats = npt.NDArray[np.float32]


class MtmdEncoder:
    """An mmproj file opened by mtmd. Calls from several threads take turns.

    Args:
        mmproj: the mmproj GGUF.
        text: the text GGUF it belongs to; only its vocabulary is loaded.
        n_threads: CPU threads.
        flash_attention: None leaves it to llama.cpp, as llama-server does.

    Raises:
        BundleError: a file is missing, truncated or not of a Llava model.
        EngineError: the two belong to different models, or mtmd refused.
    """

    def __init__(
        self, mmproj: str | Path, text: str | Path, *, n_threads: int = 1, flash_attention: bool | None = False
    ) -> None:
        self.path = Path(mmproj)
        self.header = read_mmproj_header(self.path)
        facts = check_gguf(Path(text))
        width = facts[f"{facts['general.architecture'].decode()}.embedding_length"]
        if width != self.header.width:
            raise EngineError(
                f"{mmproj}: makes embeddings of width {self.header.width}, {text} takes {width}",
                "the two files belong to different models; export them again",
            )
        self._lock = threading.RLock()
        self._model: Any = None
        self._context: Any = None
        self._llama, self._mtmd = native_api(), _mtmd_api()
        try:
            self._load(Path(text), n_threads, flash_attention)
        except BaseException:
            self.close()
            raise

    def _load(self, text: Path, n_threads: int, flash_attention: bool | None) -> None:
        params = self._llama.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        LOG.clear()
        self._model = self._llama.llama_model_load_from_file(os.fsencode(text), params)
        if not self._model:
            raise EngineError(f"{text}: llama.cpp can't load it ({last_log()})", "copy the file again")
        settings = self._mtmd.mtmd_context_params_default()
        settings.use_gpu = settings.print_timings = False
        settings.n_threads = n_threads
        settings.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        settings.warmup = flash_attention is None  # only then has mtmd something to find out
        self._context = self._mtmd.mtmd_init_from_file(os.fsencode(self.path), self._model, settings)
        if not self._context:
            raise EngineError(
                f"{self.path}: mtmd can't load it ({last_log()})", "copy the file again, or export it again"
            )
        self._marker = self._mtmd.mtmd_default_marker()

    def encode(self, rgb: RgbImage) -> Floats:
        """uint8 RGB (height, width, 3) → image embeddings (header.patches, header.width).

        A picture of image_size x image_size goes in as it is; any other one mtmd resizes and pads by its own rules.

        Raises:
            ImageError: not a usable picture.
            EngineError: closed, or mtmd refused.
        """
        picture = np.ascontiguousarray(check_array(rgb))
        with self._lock:
            if not self._context:
                raise EngineError(f"{self.path}: closed already", "open it again")
            data = picture.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmap = self._mtmd.mtmd_bitmap_init(picture.shape[1], picture.shape[0], data)
            chunks = self._mtmd.mtmd_input_chunks_init()
            try:
                return self._run(bitmap, chunks)
            finally:
                self._mtmd.mtmd_input_chunks_free(chunks)
                self._mtmd.mtmd_bitmap_free(bitmap)

    def _run(self, bitmap: Any, chunks: Any) -> Floats:
        text = self._mtmd.mtmd_input_text()
        text.text, text.text_len = self._marker, len(self._marker)
        text.add_special, text.parse_special = False, True
        array = (self._mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        LOG.clear()
        if self._mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(text), array, 1) != 0:
            raise EngineError(f"{self.path}: mtmd can't prepare the picture ({last_log()})")
        count = self._mtmd.mtmd_input_chunks_size(chunks)
        chunk = self._mtmd.mtmd_input_chunks_get(chunks, 0) if count == 1 else None
        n = self._mtmd.mtmd_input_chunk_get_n_tokens(chunk) if chunk else 0
        if n != self.header.patches:
            raise EngineError(f"{self.path}: mtmd made {count} pieces and {n} embeddings of one picture")
        if self._mtmd.mtmd_encode_chunk(self._context, chunk) != 0:
            raise EngineError(f"{self.path}: mtmd can't encode the picture ({last_log()})")
        found = self._mtmd.mtmd_get_output_embd(self._context)
        embeds: Floats = np.ctypeslib.as_array(found, (n, self.header.width)).astype(np.float32, copy=True)
        if not np.isfinite(embeds).all():
            raise EngineError(f"{self.path}: image embeddings are not finite", "export the mmproj again, or as f32")
        return embeds

    def close(self) -> None:
        """Free what llama.cpp holds; a second call does nothing."""
        with self._lock:
            if self._context:
                self._mtmd.mtmd_free(self._context)
            if self._model:
                self._llama.llama_model_free(self._model)
            self._context = self._model = None

    def __enter__(self) -> MtmdEncoder:
        """The encoder itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()


class _MtmdVision:
    """MtmdEncoder in the place of the ONNX graphs. Pixels are the picture itself, (height, width, 3).

    Embeddings are brought to the model's own size: Gemma's mmproj holds them as llama.cpp's decoder takes them, and
    `Llama` expects them as the checkpoint's connector gives them.
    """

    providers = ("mtmd",)

    def __init__(self, encoder: MtmdEncoder, spec: ModelSpec, host_resize: bool, embedding_scale: float) -> None:
        self.encoder = encoder
        self._spec, self._host_resize, self._scale = spec, host_resize, np.float32(1 / embedding_scale)

    def pixel_values(self, rgb: RgbImage) -> RgbImage:
        return fit_picture(rgb, self._spec) if self._host_resize else rgb

    def load(self) -> None:
        """mtmd is open from the start."""

    def close(self) -> None:
        self.encoder.close()

    def embed(self, picture: RgbImage, cancel: Cancel | None = None) -> Floats:
        return self.encoder.encode(picture) * self._scale

    def encode(self, picture: RgbImage) -> tuple[Floats, Floats]:
        return self.embed(picture), np.zeros((0, self.encoder.header.tower_width), np.float32)


class MtmdRuntime(EdgeRuntime):
    """The text GGUF fed with mtmd's embeddings; all else as in EdgeRuntime.

    A probe's `pixel_values` are the picture that mtmd was given, and it has no `image_features`: mtmd shows none.
    """

    name = "mtmd"

    def environment(self) -> dict[str, Any]:
        """Versions, threads and the files' identity, as JSON values."""
        return {**self._facts, "providers": list(self._vision.providers)}


def open_mtmd(
    bundle: str | Path | Bundle,
    build: str | None = None,
    *,
    n_threads: int = 1,
    n_ctx: int | None = None,
    host_resize: bool = False,
    flash_attention: bool | None = False,
    check_hashes: bool = True,
) -> MtmdRuntime:
    """Open a bundle as a stock host would: its mmproj and one build's text GGUF; the ONNX graphs stay closed.

    Args:
        bundle: a directory, or an opened bundle, that holds an mmproj.
        build: whose text GGUF; the first build by default.
        n_threads: CPU threads.
        n_ctx: positions that fit.
        host_resize: bring pictures to the model's size by its own policy first; else mtmd resizes and pads as it likes.
        flash_attention: of the encoder; None leaves it to llama.cpp.
        check_hashes: compare both files, parts included, with the manifest.

    Raises:
        BundleError: no mmproj in the bundle, or a file that is missing or changed.
        EngineError: llama.cpp refused a file.
    """
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    chosen = opened.build(build)
    mmproj = _mmproj(opened)
    paths = opened.path(mmproj), opened.path(chosen.llm)
    if check_hashes:
        opened.check_files((mmproj, chosen.llm))
    start = time.perf_counter()
    encoder = MtmdEncoder(*paths, n_threads=n_threads, flash_attention=flash_attention)
    spec = replace(opened.spec, visual_tokens=encoder.header.patches)  # what mtmd makes, whatever the model was taught
    try:
        llama = Llama(paths[1], n_ctx=n_ctx or default_context(spec), n_threads=n_threads)
    except BaseException:
        encoder.close()
        raise
    load_ms = 1000 * (time.perf_counter() - start)
    name = f"mmproj_{mmproj.precision}+{chosen.llm.precision}"
    facts = {
        "runtime": MtmdRuntime.name,
        "bundle": opened.name,
        "bundle_sha256": opened.sha256,
        "build": name,
        "files": {entry.path: entry.sha256 for file in (mmproj, chosen.llm) for entry in file.entries},
        "hashes_checked": check_hashes,
        "host_resize": host_resize,
        **llama.settings,
        **llama_facts(),
        **llama.placement.to_dict(),
    }
    vision = cast(Vision, _MtmdVision(encoder, spec, host_resize, llama.embedding_scale))
    files = replace(chosen, name=name)
    return MtmdRuntime(replace(opened, spec=spec), files, vision, llama, ON_CPU, NO_CACHES, facts, load_ms)


def _mmproj(bundle: Bundle) -> BundleFile:
    for file in bundle.files:
        if file.role == "mmproj":
            return file
    raise BundleError(f"{bundle.root}: holds no mmproj", "export the bundle with one")


def _mtmd_api() -> Any:
    """The bindings, with mtmd's log going where llama.cpp's goes."""
    from llama_cpp import mtmd_cpp

    mtmd_cpp.mtmd_log_set(LOG_STATE["callback"], ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(LOG_STATE["callback"], ctypes.c_void_p(0))
    return mtmd_cpp

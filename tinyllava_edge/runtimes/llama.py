"""llama.cpp behind a fence: what reaches `llama_decode` has been checked, because its own checks end the process.

A thin wrapper over llama-cpp-python's low-level API: one GGUF, one context, up to 16 sequences that share a KV buffer.
Positions are the caller's. Image embeddings go in through `llama_batch.embd`, so the decoder never sees an image token.
"""

from __future__ import annotations

import collections
import ctypes
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BundleError, CancelledError, ContextError, EngineError
from .constrain import Vocabulary as GrammarVocabulary
from .headers import check_gguf
from .kv_cache import KV_TYPES, check_kv_types
from .placement import hear, listening, read_placement
from .text import too_long

Floats = npt.NDArray[np.float32]
MAX_SEQUENCES = 16
_KV_PAD = 256  # llama.cpp rounds n_ctx up to a multiple of this
_COMPLAINTS = (2, 3, 5)  # warnings, errors, and continued lines
LOG: collections.deque[str] = collections.deque(maxlen=40)
LOG_STATE: dict[str, Any] = {}  # keeps the ctypes callback alive for the whole process


class Llama:
    """A GGUF with its context. Every method may be called from any thread; calls take turns.

    Args:
        path: the GGUF file.
        n_ctx: positions that fit, shared by all sequences.
        n_threads: CPU threads for prefill and decode.
        n_batch: rows per `llama_decode`; longer inputs are split here.
        flash_attention: llama.cpp's fused attention. A little faster on long prompts, but on a CPU it adds up in
            float16, so a batch and a single question part ways far more often; off by default.
        type_k: type of the cached keys, a key of KV_TYPES; float16 by default, float32 for a float32 file.
        type_v: type of the cached values; a quantised one needs flash attention.
        n_gpu_layers: layers on a GPU, the output layer counted as one; -1 all of them, 0 not even a GPU's buffers.
        check_tensors: let llama.cpp look for NaN and bad blocks in the weights; for files whose hash wasn't checked.

    Raises:
        BundleError: the file is missing, truncated, or not a GGUF of a supported architecture.
        UsageError: a KV-cache type that this model or attention can't have; see kv_cache.check_kv_types.
        EngineError: llama.cpp can't load it, can't allocate the context, or used no GPU when asked to.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int,
        n_threads: int,
        n_batch: int = 256,
        flash_attention: bool = False,
        type_k: str | None = None,
        type_v: str | None = None,
        n_gpu_layers: int = 0,
        check_tensors: bool = False,
    ) -> None:
        self.path = Path(path)
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads), ("n_batch", n_batch)):
            if value < 1:
                raise EngineError(f"{name}={value} must be positive", f"give a larger {name}")
        header = self.header = check_gguf(self.path)
        plain = "f32" if header.get("general.file_type") == 0 else "f16"  # a float32 file is there to be exact
        self.kv_types = (type_k or plain, type_v or plain)
        check_kv_types(header, *self.kv_types, flash_attention)
        # Gemma's graph multiplies every embedding by sqrt(width), Hugging Face those of tokens only
        gemma = header["general.architecture"] == b"gemma"
        self.embedding_scale = float(header["gemma.embedding_length"]) ** -0.5 if gemma else 1.0
        self._lock = threading.RLock()
        self._model: Any = None
        self._context: Any = None
        self._api = native_api()
        try:
            with listening() as lines:
                self._load(n_gpu_layers, check_tensors)
                self._open(n_ctx, n_threads, n_batch, flash_attention, n_gpu_layers != 0)
            self.placement = read_placement(lines)
            if n_gpu_layers and not self.placement.layers_on_gpu:
                raise EngineError(
                    f"{self.path}: llama.cpp put no layer on a GPU, n_gpu_layers={n_gpu_layers} asked for that",
                    "install a llama-cpp-python built for the GPU, or choose the device cpu",
                )
        except BaseException:
            self.close()
            raise

    def _load(self, n_gpu_layers: int, check_tensors: bool) -> None:
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        no_devices = (ctypes.c_void_p * 1)()  # a list that ends at once
        if not n_gpu_layers:  # else a GPU's pinned memory takes the weights, which then aren't repacked for the CPU
            params.devices = ctypes.addressof(no_devices)
        params.load_mode = self._api.LLAMA_LOAD_MODE_MMAP
        params.check_tensors = check_tensors
        params.use_extra_bufts = repacks(self._api)
        LOG.clear()
        self._model = self._api.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise EngineError(
                f"{self.path}: llama.cpp can't load it ({last_log()})", "copy the file again, or export it again"
            )
        self._vocab = self._api.llama_model_get_vocab(self._model)
        if self._api.llama_vocab_type(self._vocab) == 0 or self._api.llama_model_has_encoder(self._model):
            raise BundleError(f"{self.path}: not a decoder with a vocabulary", "export the bundle again")
        self.n_vocab = int(self._api.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(self._api.llama_model_n_embd_inp(self._model))
        self.eos = int(self._api.llama_vocab_eos(self._vocab))
        bos = int(self._api.llama_vocab_bos(self._vocab))
        self.bos = bos if self._api.llama_vocab_get_add_bos(self._vocab) and 0 <= bos < self.n_vocab else None

    def _open(self, n_ctx: int, n_threads: int, n_batch: int, flash_attention: bool, gpu: bool) -> None:
        self.n_ctx = n_ctx
        cells = -(-n_ctx // _KV_PAD) * _KV_PAD
        self.n_batch = min(max(n_batch, MAX_SEQUENCES), cells)  # llama.cpp asserts n_seq_max <= n_batch <= cells
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, self.n_batch, self.n_batch
        params.n_seq_max = params.n_outputs_max = MAX_SEQUENCES  # keeps the logits buffer at 16 rows
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v = (KV_TYPES[name] for name in self.kv_types)
        params.flash_attn_type = int(flash_attention)
        params.offload_kqv = params.op_offload = gpu
        # Called before every operation, so it must be neither Python nor slow: strlen of a buffer that `abort` fills.
        self._stop = ctypes.create_string_buffer(2)
        params.abort_callback = ctypes.cast(_libc().strlen, self._api.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self._stop)
        LOG.clear()
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise EngineError(
                f"{self.path}: llama.cpp can't open a context of n_ctx={self.n_ctx} ({last_log()})",
                "try a smaller n_ctx (-c)",
            )
        self.settings: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "n_batch": self.n_batch,
            "kv_cache": "/".join(dict.fromkeys(self.kv_types)),  # `f16`, or K's type / V's
            "flash_attention": flash_attention,
            "gpu": gpu,
        }
        self._memory = self._api.llama_get_memory(self._context)
        self._tokens = np.zeros(self.n_batch, np.int32)
        self._positions = np.zeros(self.n_batch, np.int32)
        self._sequences = np.zeros(self.n_batch, np.int32)
        self._counts = np.ones(self.n_batch, np.int32)
        self._wanted = np.zeros(self.n_batch, np.int8)
        step = self._sequences.itemsize  # seq_id is an array of pointers: row i points at element i
        self._rows = (self._sequences.ctypes.data + step * np.arange(self.n_batch, dtype=np.uintp)).astype(np.uintp)

    # text ↔ ids

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and special-token strings inside it stay plain text. Raises EngineError."""
        return self._tokenize(text, parse_special=False)

    def special_id(self, text: str) -> int:
        """The one id of a special token's text. Raises EngineError if it isn't a single token of this vocabulary."""
        ids = self._tokenize(text, parse_special=True)
        if len(ids) != 1:
            raise EngineError(f"{self.path}: {text!r} is not one token of the vocabulary", "export the bundle again")
        return ids[0]

    def _tokenize(self, text: str, parse_special: bool) -> list[int]:
        if not text:
            return []
        data = text.encode("utf-8")
        if len(data) > 64 * self.n_ctx:  # far beyond any tokenizer's compression
            raise ContextError(
                f"text of {len(data):,} bytes does not fit n_ctx={self.n_ctx}",
                "shorten the question, or raise n_ctx (-c)",
            )
        with self._lock:
            self._require_open()
            size = len(data) + 8
            buffer = (ctypes.c_int32 * size)()
            n = self._api.llama_tokenize(self._vocab, data, len(data), buffer, size, False, parse_special)
            if n < 0:
                raise EngineError(
                    f"{self.path}: can't tokenise {len(data)} bytes", "the vocabulary is damaged; export it again"
                )
            return list(buffer[:n])

    def piece(self, token: int) -> bytes:
        """Bytes of one token, possibly part of a UTF-8 character; nothing for special tokens."""
        if not 0 <= token < self.n_vocab:
            raise EngineError(f"token {token} is outside 0..{self.n_vocab - 1}")
        with self._lock:
            self._require_open()
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                n = self._api.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
                if n >= 0:
                    return buffer.raw[:n]
                size = -n

    # decoding

    def decode_tokens(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int] | int = 0,
        wanted: Sequence[int] = (),
    ) -> Floats:
        """Run tokens through the decoder.

        Args:
            ids: n token ids.
            positions: n positions, each sequence's next ones in order.
            sequences: the sequence of each row, or one for all.
            wanted: rows whose logits come back, at most 16, in ascending order.

        Returns:
            float32 (len(wanted), n_vocab).

        Raises:
            ContextError: a position or the number of cells is beyond n_ctx.
            EngineError: an id or sequence that doesn't exist, or llama.cpp refused.
        """
        tokens = np.asarray(ids, np.int64).reshape(-1)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.n_vocab):
            raise EngineError(
                f"token ids must lie in 0..{self.n_vocab - 1}", "tokenise with this bundle's own vocabulary"
            )
        return self._decode(tokens.astype(np.int32), None, positions, sequences, wanted)

    def decode_embeddings(
        self, embeddings: Floats, start: int, sequence: int = 0, wanted: Sequence[int] = ()
    ) -> Floats:
        """Run image embeddings (n, n_embd) through the decoder from position `start` on; see decode_tokens."""
        rows = np.ascontiguousarray(embeddings, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.n_embd:
            raise EngineError(
                f"image embeddings of shape {tuple(rows.shape)}, {self.path} needs (n, {self.n_embd})",
                "the vision graph and the GGUF belong to different models",
            )
        if not np.isfinite(rows).all():
            raise EngineError("image embeddings are not finite", "verify the bundle; try another vision precision")
        if self.embedding_scale != 1.0:
            rows = rows * np.float32(self.embedding_scale)
        return self._decode(None, rows, range(start, start + len(rows)), sequence, wanted)

    def _decode(
        self,
        tokens: npt.NDArray[np.int32] | None,
        embeddings: Floats | None,
        positions: Sequence[int],
        sequences: Sequence[int] | int,
        wanted: Sequence[int],
    ) -> Floats:
        n = len(tokens) if tokens is not None else len(embeddings) if embeddings is not None else 0
        place = np.asarray(positions, np.int64)
        owner = np.broadcast_to(np.asarray(sequences, np.int64), (n,))
        want = np.zeros(n, np.int8)
        want[list(wanted)] = 1
        self._check_rows(n, place, owner, want)
        found: list[Floats] = []
        with self._lock:
            self._require_open()
            for start in range(0, n, self.n_batch):
                part = slice(start, min(start + self.n_batch, n))
                self._positions[: part.stop - start] = place[part]
                self._sequences[: part.stop - start] = owner[part]
                self._wanted[: part.stop - start] = want[part]
                if tokens is not None:
                    self._tokens[: part.stop - start] = tokens[part]
                self._run(part.stop - start, None if embeddings is None else embeddings[part])
                found += [self._logits(int(row)) for row in np.flatnonzero(want[part])]
        return np.stack(found) if found else np.zeros((0, self.n_vocab), np.float32)

    def _check_rows(
        self, n: int, place: npt.NDArray[np.int64], owner: npt.NDArray[np.int64], want: npt.NDArray[np.int8]
    ) -> None:
        if n == 0 or place.shape != (n,):
            raise EngineError(f"{n} rows with positions of shape {place.shape}", "pass one position per row")
        if place.min() < 0 or place.max() >= self.n_ctx:
            raise too_long(int(place.max()) + 1, self.n_ctx)
        if owner.min() < 0 or owner.max() >= MAX_SEQUENCES:
            raise EngineError(f"sequence ids must lie in 0..{MAX_SEQUENCES - 1}")
        if int(want.sum()) > MAX_SEQUENCES:
            raise EngineError(f"logits of {int(want.sum())} rows asked for, at most {MAX_SEQUENCES} fit")

    def _run(self, n: int, embeddings: Floats | None) -> None:
        def pointer(array: npt.NDArray[Any], kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        batch = self._api.llama_batch()
        batch.n_tokens = n
        if embeddings is None:
            batch.token = pointer(self._tokens, ctypes.c_int32)
        else:
            batch.embd = pointer(embeddings, ctypes.c_float)
        batch.pos = pointer(self._positions, ctypes.c_int32)
        batch.n_seq_id = pointer(self._counts, ctypes.c_int32)
        batch.seq_id = pointer(self._rows, ctypes.POINTER(ctypes.c_int32))
        batch.logits = pointer(self._wanted, ctypes.c_int8)
        LOG.clear()
        code = self._api.llama_decode(self._context, batch)
        if code == 2:
            raise CancelledError("the request was cancelled")
        if code == 1:
            raise ContextError(
                f"the sequences together do not fit n_ctx={self.n_ctx}",
                "ask fewer questions at once, or raise n_ctx (-c)",
            )
        if code != 0:
            raise EngineError(f"{self.path}: llama.cpp refused a batch of {n} rows with code {code} ({last_log()})")

    def _logits(self, row: int) -> Floats:
        pointer = self._api.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise EngineError(f"{self.path}: llama.cpp holds no logits for row {row} ({last_log()})")
        logits: Floats = np.ctypeslib.as_array(pointer, (self.n_vocab,)).astype(np.float32, copy=True)
        if not np.isfinite(logits).all():
            self._api.llama_memory_clear(self._memory, True)  # values that are no numbers would stay in unused cells
            raise EngineError(
                f"{self.path}: logits are not finite", "the weights are damaged; copy or export the bundle again"
            )
        return logits

    def vocabulary(self, stops: Collection[int]) -> GrammarVocabulary:
        """The vocabulary in the form that grammars are held to; `stops` are the ids that end an answer."""
        with self._lock:
            self._require_open()
            return GrammarVocabulary(self._vocab, stops)

    def last_logits(self) -> Floats:
        """(vocab,) logits of the last row that was asked for."""
        with self._lock:
            self._require_open()
            return self._logits(-1)

    def abort(self) -> None:
        """Make the running call stop with CancelledError, and every later one until `resume`; callable at any time."""
        self._stop[0] = b"x"

    def resume(self) -> None:
        """Forget `abort`."""
        self._stop[0] = b"\0"

    # memory

    def save(self, sequence: int) -> npt.NDArray[np.uint8]:
        """A sequence's cells as bytes, which `restore` takes back; worth it where computing them again costs more."""
        with self._lock:
            self._require_sequence(sequence)
            state = np.empty(int(self._api.llama_state_seq_get_size(self._context, sequence)), np.uint8)
            pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            if self._api.llama_state_seq_get_data(self._context, pointer, state.size, sequence) != state.size:
                raise EngineError(f"{self.path}: llama.cpp can't save a sequence ({last_log()})")
            return state

    def saved_bytes(self, sequence: int) -> int:
        """Size of what `save` would give."""
        with self._lock:
            self._require_sequence(sequence)
            return int(self._api.llama_state_seq_get_size(self._context, sequence))

    def restore(self, sequence: int, state: npt.NDArray[np.uint8]) -> None:
        """Fill a sequence with what `save` gave in this very process, in place of what it held."""
        with self._lock:
            self.remove(sequence)
            pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            if self._api.llama_state_seq_set_data(self._context, pointer, state.size, sequence) != state.size:
                self.remove(sequence)
                raise EngineError(f"{self.path}: llama.cpp can't restore a sequence ({last_log()})")

    def copy(self, source: int, target: int) -> None:
        """Let sequence `target` share all cells of sequence `source`; costs no memory."""
        with self._lock:
            self._require_sequence(source)
            self._require_sequence(target)
            self._api.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, sequence: int, start: int = 0) -> None:
        """Forget positions start.. of one sequence. Raises EngineError if the memory can't forget a part."""
        with self._lock:
            self._require_sequence(sequence)
            if not self._api.llama_memory_seq_rm(self._memory, sequence, start, -1):
                raise EngineError(f"{self.path}: this architecture can't forget a part of its context", "clear it all")

    def clear(self) -> None:
        """Forget every sequence."""
        with self._lock:
            self._require_open()
            self._api.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        with self._lock:
            if self._context:
                self._api.llama_free(self._context)
            if self._model:
                self._api.llama_model_free(self._model)
            self._context = self._model = None

    def _require_open(self) -> None:
        if not self._context:
            raise EngineError(f"{self.path}: closed already", "open the runtime again")

    def _require_sequence(self, sequence: int) -> None:
        self._require_open()
        if not 0 <= sequence < MAX_SEQUENCES:
            raise EngineError(f"sequence {sequence} is outside 0..{MAX_SEQUENCES - 1}")


def _libc() -> Any:
    return ctypes.CDLL("msvcrt" if os.name == "nt" else None)


def llama_facts() -> dict[str, Any]:
    """llama-cpp-python's version, llama.cpp's own words on its CPU features, and whether weights are repacked."""
    api = native_api()
    return {
        "llama_cpp_python": str(api.__version__),
        "llama_cpp_system_info": api.llama_print_system_info().decode("utf-8", "replace").strip(),
        "llama_cpp_repack": repacks(api),
    }


def repacks(api: Any) -> bool:
    """Whether weights are repacked for the CPU: always, but where llama.cpp would choose AMX.

    Its AMX kernels end the process on quantised weights (ggml-org/llama.cpp#20824; seen with 0.3.36).
    """
    return b"AMX_INT8 = 1" not in api.llama_print_system_info()


def native_api() -> Any:
    """llama-cpp-python with its back end ready and its log kept in memory instead of on stderr."""
    import llama_cpp

    if "callback" not in LOG_STATE:
        LOG_STATE["callback"] = llama_cpp.llama_log_callback(_remember)
        llama_cpp.llama_log_set(LOG_STATE["callback"], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp


def _remember(level: int, text: bytes, user_data: Any) -> None:
    line = text.decode("utf-8", "replace")
    hear(line)
    if level in _COMPLAINTS:
        LOG.append(line)


def last_log() -> str:
    """The last complaints of llama.cpp on one line."""
    lines = [line.strip() for line in "".join(LOG).splitlines() if line.strip(" .\n")]
    return "; ".join(lines[-2:]) or "no message"

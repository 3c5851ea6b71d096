"""What a GGUF will take in memory once llama.cpp has it: from its header alone, weights are not touched.

The rules are llama.cpp's (read in 0.3.36 of its bindings, and held against its own figures in the tests): the KV cache
is cleared when it is made, so all of it is resident; the compute buffer holds what one batch has alive at once; weights
of some types are copied into another order, by what the processor can do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .gguf_front import TensorEntry, damage, opened, read_front
from .headers import check_gguf, gguf_shards
from .kv_cache import head_widths

CELLS = 256  # n_ctx is rounded up to a multiple of this
OUTPUTS = 16  # rows of logits that the context keeps
# ggml's numbers of its types, and the rows that a matrix must be a multiple of to be repacked
_X86 = {"AVX2": {2: 8, 12: 8, 20: 8, 39: 8}, "AVX512": {10: 8}}  # q4_0, q4_K, iq4_nl, mxfp4; q2_K
_ARM = {2: 4, 12: 8, 13: 8, 14: 8, 20: 4, 39: 4, 8: 4}  # q4_0, q4_K, q5_K, q6_K, iq4_nl, mxfp4, q8_0
_KV_BYTES = {  # of 32 values; a block of q8_0 has a float16 scale, and so on
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}
_TOKEN, _MERGE = 300, 180  # bytes of one in llama.cpp's tables and in our own list of the header
_FEATURE = re.compile(r"([A-Z0-9_]+) = (\d+)")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufSizes:
    """What one language model's memory is made of."""

    mapped: int
    """bytes of its files, all of which are mapped and read once"""
    repacked: int
    """bytes of the weights that are copied into another order"""
    vocabulary: int
    """bytes of its tokens and merges in memory"""
    layers: int
    """blocks"""
    width: int
    """channels of the residual stream"""
    heads: int
    """query heads"""
    key_heads: int
    """heads of keys and values"""
    head_widths: tuple[int, int]
    """channels of one key head and one value head"""
    inner: int
    """channels of the feed-forward part"""
    gated: bool
    """whether that part multiplies two projections"""
    vocab: int
    """tokens"""
    plain: str
    """the type of its KV cache unless another one is asked for"""

    def kv_cache(self, n_ctx: int, type_k: str | None = None, type_v: str | None = None) -> int:
        """Bytes of the KV cache; types are keys of kv_cache.KV_TYPES. Raises UsageError for another one."""
        cells = -(-n_ctx // CELLS) * CELLS
        kinds = (type_k or self.plain, type_v or self.plain)
        for kind in kinds:
            if kind not in _KV_BYTES:
                raise UsageError(f"unknown KV-cache type {kind[:40]!r}", f"known: {', '.join(_KV_BYTES)}")
        row = sum(_KV_BYTES[kind] * width for kind, width in zip(kinds, self.head_widths, strict=True))
        return self.layers * self.key_heads * cells * row // 32

    def compute(self, n_ctx: int, n_batch: int, flash_attention: bool) -> int:
        """Bytes of the compute buffer, the logits, and the CPU's working space.

        A graph's peak is in attention, where the scores of all heads stand as float32 beside five values of the
        stream's width and a batch's keys and values; with flash attention there are no scores and it is in the
        feed-forward part. The working space holds a batch of that part's inputs as float16.
        """
        cells = -(-n_ctx // CELLS) * CELLS
        batch = min(n_batch, cells)
        queries = max(self.width, self.heads * self.head_widths[0])
        keys = self.key_heads * sum(self.head_widths)
        mask = cells * (2 if flash_attention else 4)
        scores = 0 if flash_attention else 4 * cells * self.heads
        attention = scores + 4 * (5 * queries + keys)
        feed_forward = 4 * (3 * self.inner + 4 * self.width if self.gated else self.inner + 5 * self.width)
        return batch * (mask + max(attention, feed_forward) + 2 * self.inner) + OUTPUTS * self.vocab * 4


def gguf_sizes(path: Path, system_info: bytes = b"") -> GgufSizes:
    """Read a GGUF's sizes.

    Args:
        path: the file, or the first of its shards.
        system_info: llama.cpp's words on this processor; nothing is repacked without them.

    Raises:
        BundleError: what headers.check_gguf raises.
    """
    pairs = check_gguf(path)
    mapped = 0
    tensors: dict[str, tuple[TensorEntry, int]] = {}  # name → entry, bytes
    for file in gguf_shards(path, pairs):
        with opened(file) as data, damage(file, "a GGUF"):
            front = read_front(data)
            mapped += len(data)
            sizes = _bytes(front.tensors, len(data) - front.start)
            tensors.update({name: (entry, sizes[name]) for name, entry in front.tensors.items()})
    architecture = pairs["general.architecture"].decode()
    heads = pairs[f"{architecture}.attention.head_count"]
    inner = pairs.get(f"{architecture}.feed_forward_length")
    gated = any(".ffn_gate." in name for name in tensors)
    tokens, merges = len(pairs["tokenizer.ggml.tokens"]), pairs.get("tokenizer.ggml.merges")
    return GgufSizes(
        mapped=mapped,
        repacked=repacked_bytes(tensors, system_info),
        vocabulary=_TOKEN * tokens + _MERGE * (len(merges) if isinstance(merges, list) else 0),
        layers=pairs[f"{architecture}.block_count"],
        width=pairs[f"{architecture}.embedding_length"],
        heads=heads,
        key_heads=pairs.get(f"{architecture}.attention.head_count_kv", heads),
        head_widths=head_widths(pairs),
        inner=inner if isinstance(inner, int) else 0,
        gated=gated,
        vocab=tokens,
        plain="f32" if pairs.get("general.file_type") == 0 else "f16",
    )


def repacked_types(system_info: bytes) -> Mapping[int, int]:
    """ggml type → rows that a matrix must be a multiple of to be repacked on this processor (ggml-cpu/repack.cpp)."""
    features = {name for name, value in _FEATURE.findall(system_info.decode("utf-8", "replace")) if value != "0"}
    found: dict[int, int] = {}
    if "REPACK" not in features:  # built without
        return found
    for feature, kinds in _X86.items():
        found.update(kinds if feature in features else {})
    if "NEON" in features and features & {"DOTPROD", "MATMUL_INT8"}:
        found.update(_ARM)
    return found


def repacked_bytes(tensors: Mapping[str, tuple[TensorEntry, int]], system_info: bytes) -> int:
    """Bytes of the weights that a processor copies into another order, of name → entry and bytes."""
    kinds = repacked_types(system_info)
    looked_up = EMBEDDING if HEAD in tensors else ""  # rows are read from it; without a head it is multiplied too
    weights = [tensor for name, tensor in tensors.items() if name != looked_up]
    return sum(size for entry, size in weights if _repacked(entry, kinds))


def _repacked(entry: TensorEntry, kinds: Mapping[int, int]) -> bool:
    return len(entry.sizes) == 2 and entry.kind in kinds and entry.sizes[1] % kinds[entry.kind] == 0


def _bytes(tensors: Mapping[str, TensorEntry], end: int) -> dict[str, int]:
    """Name → bytes up to the next tensor: with its padding, and without a table of all of ggml's types."""
    starts = sorted({entry.offset for entry in tensors.values()} | {end})
    sizes = {start: following - start for start, following in itertools.pairwise(starts)}
    return {name: sizes.get(entry.offset, 0) for name, entry in tensors.items()}

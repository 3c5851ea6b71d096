"""The fence around llama.cpp: splitting, sequences, and refusals of what its asserts would end the process for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tinyllava_edge.errors import ContextError, EngineError
from tinyllava_edge.runtimes.llama import MAX_SEQUENCES, Llama

from .conftest import Pair

IDS = list(range(5, 105))


@pytest.fixture(scope="module")
def llama(siglip: Pair) -> Iterator[Llama]:
    decoder = Llama(siglip.bundle / "llm-f32.gguf", n_ctx=256, n_threads=1)
    yield decoder
    decoder.close()


@pytest.fixture(autouse=True)
def clean(llama: Llama) -> None:
    llama.clear()


def test_long_inputs_are_split(siglip: Pair, llama: Llama) -> None:
    """100 rows in batches of 16 equal one batch within float32 rounding, for ids and for embeddings."""
    small = Llama(siglip.bundle / "llm-f32.gguf", n_ctx=256, n_threads=1, n_batch=16)
    embeddings = np.random.default_rng(0).standard_normal((100, llama.n_embd)).astype(np.float32)
    for wanted in ([99], [0, 15, 16, 40, 99]):
        outputs = []
        for decoder in (llama, small):
            decoder.clear()
            from_ids = decoder.decode_tokens(IDS, range(100), wanted=wanted)
            from_embeddings = decoder.decode_embeddings(embeddings, 100, wanted=wanted)
            assert from_ids.shape == from_embeddings.shape == (len(wanted), llama.n_vocab)
            outputs.append(np.concatenate([from_ids, from_embeddings]))
        np.testing.assert_allclose(*outputs, atol=1e-4)
    small.close()


def test_sequences_share_a_prefix(llama: Llama) -> None:
    """A copied prefix continues as its own; a removed sequence leaves the others alone."""
    llama.decode_tokens(IDS[:50], range(50))
    alone = [llama.decode_tokens([token], [50], wanted=[0])[0] for token in (7,)]
    llama.remove(0, 50)
    for sequence in range(1, MAX_SEQUENCES):
        llama.copy(0, sequence)
    rows = llama.decode_tokens([7] * 15, [50] * 15, range(1, 16), wanted=range(15))
    np.testing.assert_allclose(rows, np.broadcast_to(alone[0], rows.shape), atol=1e-4)
    llama.remove(3)
    again = llama.decode_tokens([9], [51], 5, wanted=[0])
    llama.remove(0)
    assert again.shape == (1, llama.n_vocab) and np.isfinite(again).all()


def test_sequences_do_not_see_each_other(llama: Llama) -> None:
    llama.decode_tokens(IDS[:10], range(10), 1)
    llama.decode_tokens(IDS[50:60], range(10), 2)
    beside = llama.decode_tokens([7], [10], 1, wanted=[0])
    llama.clear()
    llama.decode_tokens(IDS[:10], range(10), 1)
    np.testing.assert_allclose(beside, llama.decode_tokens([7], [10], 1, wanted=[0]), atol=1e-4)


def nan(llama: Llama) -> np.ndarray:
    rows = np.zeros((3, llama.n_embd), np.float32)
    rows[1, 5] = np.nan
    return rows


REFUSED: dict[str, tuple[Callable[[Llama], object], str]] = {
    "unknown id": (lambda m: m.decode_tokens([m.n_vocab], [0]), "token ids must lie in"),
    "negative id": (lambda m: m.decode_tokens([-1], [0]), "token ids must lie in"),
    "huge id": (lambda m: m.decode_tokens([1 << 40], [0]), "token ids must lie in"),
    "no rows": (lambda m: m.decode_tokens([], []), "0 rows"),
    "fewer positions": (lambda m: m.decode_tokens([1, 2], [0]), r"2 rows with positions of shape \(1,\)"),
    "negative position": (lambda m: m.decode_tokens([1], [-1]), "does not fit n_ctx=256"),
    "position beyond": (lambda m: m.decode_tokens([1], [256]), "prompt of 257 positions does not fit n_ctx=256"),
    "gap": (lambda m: (m.decode_tokens([1], [0]), m.decode_tokens([1], [5])), "refused a batch of 1 rows"),
    "twice": (lambda m: (m.decode_tokens([1], [0]), m.decode_tokens([1], [0])), "refused a batch of 1 rows"),
    "sequence 16": (lambda m: m.decode_tokens([1], [0], 16), "sequence ids must lie in"),
    "sequence -1": (lambda m: m.decode_tokens([1], [0], -1), "sequence ids must lie in"),
    "copy to 16": (lambda m: m.copy(0, 16), "sequence 16 is outside"),
    "remove 300": (lambda m: m.remove(300), "sequence 300 is outside"),
    "17 logits": (lambda m: m.decode_tokens([1] * 17, range(17), wanted=range(17)), "at most 16"),
    "width": (lambda m: m.decode_embeddings(np.zeros((3, 255), np.float32), 0), r"needs \(n, 256\)"),
    "one axis": (lambda m: m.decode_embeddings(np.zeros(256, np.float32), 0), r"needs \(n, 256\)"),
    "not finite": (lambda m: m.decode_embeddings(nan(m), 0), "not finite"),
    "no embeddings": (lambda m: m.decode_embeddings(np.zeros((0, 256), np.float32), 0), "0 rows"),
    "too many": (lambda m: m.decode_embeddings(np.zeros((257, 256), np.float32), 0), "does not fit n_ctx=256"),
    "piece": (lambda m: m.piece(m.n_vocab), "is outside"),
    "special": (lambda m: m.special_id("two words"), "is not one token"),
    "long text": (lambda m: m.tokenize("a" * 100_000), "does not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(llama: Llama, name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(EngineError, match=message) as caught:
        call(llama)
    assert "\n" not in caught.value.message
    llama.clear()
    assert np.isfinite(llama.decode_tokens(IDS, range(100), wanted=[99])).all()  # still in order


def test_cells_run_out(llama: Llama) -> None:
    """256 cells hold two sequences of 100, not three: an error, and the context still works."""
    llama.decode_tokens(IDS, range(100), 1)
    llama.decode_tokens(IDS, range(100), 2)
    with pytest.raises(ContextError, match="together do not fit"):
        llama.decode_tokens(IDS, range(100), 3)
    llama.clear()
    llama.decode_tokens(IDS, range(100), 3)


def test_text(llama: Llama) -> None:
    text = "what color </s> is <s> it? 😀 naïve\0\n"
    ids = llama.tokenize(text)
    assert b"".join(llama.piece(token) for token in ids) == text.encode() and llama.eos not in ids
    assert llama.special_id("</s>") == llama.eos == 2 and llama.bos == 1
    assert llama.piece(llama.eos) == b"" and llama.tokenize("") == []


def test_a_tiny_context(siglip: Pair) -> None:
    """Fewer positions than sequences: llama.cpp asserts n_seq_max <= n_batch."""
    tiny = Llama(siglip.bundle / "llm-f16.gguf", n_ctx=3, n_threads=1, n_batch=1)
    assert tiny.decode_tokens([1, 5, 6], range(3), wanted=[2]).shape == (1, tiny.n_vocab)
    with pytest.raises(ContextError):
        tiny.decode_tokens([7], [3])
    tiny.close()
    with pytest.raises(EngineError, match="closed already"):
        tiny.decode_tokens([7], [0])


def test_quantised_weights_run(tiny_bundle: Path) -> None:
    """Prefill of quantised weights, which ends the process where llama.cpp picks its AMX kernels."""
    quantised = Llama(tiny_bundle / "llm-q4_k_m.gguf", n_ctx=256, n_threads=1)
    assert np.isfinite(quantised.decode_tokens(IDS, range(100), wanted=[99])).all()
    quantised.close()

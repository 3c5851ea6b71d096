"""Packs that stand end to end see nothing of each other: losses, gradients and logits stay what they are alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tinyllava_edge.errors import UsageError
from tinyllava_edge.model import TinyLlava, build_model
from tinyllava_edge.spec import VISION_BACKBONES, model_spec
from tinyllava_edge.train.collate import EMPTY, IGNORED, Pack, arrange, collate, group, without_answers
from tinyllava_edge.train.encode import Encoded
from tinyllava_edge.train.objective import Objective

VOCABULARY, IMAGE, SLOTS, WIDTH = 64, 63, 4, 192
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def make_model(family: str) -> TinyLlava:
    """Every parameter random, norms and biases too."""
    torch.manual_seed(3)
    spec = dataclasses.replace(model_spec("TinyLLaVA-base-NanoSig-Nano"), llm_family=family)
    tower = {**VISION_BACKBONES["NanoSig"].config, "num_hidden_layers": 1}
    model = build_model(spec, tower, {**TEXT, "model_type": family, **FAMILIES[family]}, IMAGE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".vision_tower." in name:
                continue
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
            if family == "gemma" and "embed_tokens" in name:  # Gemma multiplies them by the root of their width
                scale /= parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter.ndim == 1 and "norm" in name))
    model.model.language_model.set_attn_implementation("sdpa")
    return model.eval()


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> TinyLlava:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> TinyLlava:
    return make_model("llama")


def row(rng: np.random.Generator, text: int, images: int = 1, prefix: np.ndarray | None = None) -> Encoded:
    """`images` pictures with a word between them, then text whose second half is the answer."""
    if prefix is None:
        prefix = np.array([1])
        for _ in range(images):
            prefix = np.concatenate([prefix, rng.integers(2, IMAGE, 1), [IMAGE] * SLOTS])
    ids = np.concatenate([prefix, rng.integers(2, IMAGE, text)]).astype(np.int32)
    marks = np.arange(len(ids)) >= len(ids) - text // 2
    return Encoded(ids, marks, len(prefix) if images == 1 else 0, images)


def make_packs(seed: int = 0) -> list[Pack]:
    """Shared prefixes, several pictures, text alone, of several lengths, and a gap."""
    rng = np.random.default_rng(seed)
    prefix = row(rng, 0).ids
    shared = Pack(tuple(row(rng, n, prefix=prefix) for n in (4, 7, 2)), (0,))
    pictures = [Pack((row(rng, 6, images=n),), tuple(range(10 * n, 11 * n))) for n in (1, 2, 3)]
    texts = [Pack((row(rng, n, images=0),)) for n in (5, 9, 2)]
    return [shared, texts[0], pictures[1], EMPTY, pictures[0], texts[1], pictures[2], texts[2]]


PICTURES = torch.randn(64, SLOTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits_of(model: TinyLlava, packs: list[Pack], batch: dict[str, Any], length: int) -> torch.Tensor:
    """(b, n, vocabulary), in the model's own precision."""
    numbers = [k for part in arrange(packs, length) for item in part for k in item.images]
    features = PICTURES[numbers].to(model.lm_head.weight.dtype) if numbers else None
    hidden = model.model.language_model(
        inputs_embeds=model.embed(batch["input_ids"], features),
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)


def loss_and_gradients(model: TinyLlava, packs: list[Pack], length: int) -> tuple[float, dict[str, torch.Tensor]]:
    batch = collate(packs, 0, pack_length=length)
    logits = logits_of(model, packs, batch, length)
    picked = logits.gather(1, batch["sources"].unsqueeze(-1).expand(-1, -1, VOCABULARY))
    loss = cross_entropy(picked.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def in_double(module: torch.nn.Module) -> None:
    """Gemma's norm sums the gradient of its weight in float32, whatever it is given; the same formula in float64."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps) * (1.0 + module.weight)

    module.forward = forward  # type: ignore[method-assign]


def test_loss_and_every_gradient_are_equal_packed_and_alone(model: TinyLlava) -> None:
    """float64 to 1e-10 of the largest gradient of a tensor, float32 to 1e-5."""
    packs = make_packs()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model.to(dtype)
        for module in model.modules():
            if type(module).__name__ == "GemmaRMSNorm":
                in_double(module) if dtype is torch.float64 else module.__dict__.pop("forward")
        alone = [loss_and_gradients(model, [item], 0) for item in packs]
        expected = sum(loss for loss, _ in alone)
        for length in (30, 1000):
            loss, gradients = loss_and_gradients(model, packs, length)
            assert loss == pytest.approx(expected, rel=tolerance)
            trained = {n for n, _ in model.named_parameters() if ".vision_tower." not in n}
            assert set(gradients) == trained
            for name, gradient in gradients.items():
                total = sum(found[name] for _, found in alone if name in found)
                assert (gradient - total).abs().max() <= tolerance * max(1.0, float(total.abs().max())), name
    model.float()


def test_another_packs_tokens_change_no_logits(model: TinyLlava) -> None:
    packs = make_packs()
    sequences = arrange(packs, 1000)
    assert len(sequences) == 1
    batch = collate(packs, 0, pack_length=1000)
    before = logits_of(model, packs, batch, 1000)
    place = 0
    for item in sequences[0]:
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        own = slice(place, place + item.length)
        words = changed["input_ids"][:, own]
        words[words != IMAGE] = (words[words != IMAGE] + 7) % IMAGE
        after = logits_of(model, packs, changed, 1000)
        others = torch.ones(before.shape[1], dtype=torch.bool)
        others[own] = False
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, own], after[:, own])
        place += item.length


def test_a_turns_tokens_change_no_other_turn(llama: TinyLlava) -> None:
    packs = make_packs()[:1]
    batch = collate(packs, 0, pack_length=100)
    before = logits_of(llama, packs, batch, 100)
    shared = packs[0].rows[0].shared
    second = slice(shared + 4, shared + 11)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, second] += 1
    after = logits_of(llama, packs, changed, 100)
    others = torch.ones(before.shape[1], dtype=torch.bool)
    others[second] = False
    assert torch.equal(before[:, others], after[:, others]) and not torch.equal(before, after)


def test_the_objective_gives_the_same_loss_and_hits(llama: TinyLlava) -> None:
    packs = [item for item in make_packs() if item.rows]
    objective = Objective(llama).eval()
    found = []
    for length in (0, 64):
        numbers = [k for part in arrange(packs, length) for item in part for k in item.images]
        with torch.no_grad():
            out = objective(**collate(packs, 0, pack_length=length), image_features=PICTURES[numbers].float())
        found.append((float(out["loss"]), int(out["hits"].sum())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][1] == found[1][1]


def varlen_packs() -> list[Pack]:
    return [item for item in make_packs() if len(item.rows) == 1]


def test_varlen_names_the_boundaries_that_the_mask_holds(model: TinyLlava) -> None:
    """FlashAttention can't run here: the mask is made from its arguments, and the answers equal those of the packs."""
    packs = varlen_packs()
    batch = collate(packs, 0, varlen=True)
    ends = batch["cu_seq_lens_q"]
    assert "attention_mask" not in batch and len(batch["input_ids"]) == 1
    assert ends.dtype is torch.int32 and torch.equal(ends, batch["cu_seq_lens_k"])
    assert ends.diff().tolist() == [item.length for item in packs] and int(ends[-1]) == batch["input_ids"].shape[1]
    assert type(batch["max_length_q"]) is int and batch["max_length_k"] == max(item.length for item in packs)
    numbers = torch.bucketize(torch.arange(int(ends[-1])), ends[1:], right=True)
    mask = (numbers[:, None] == numbers[None]) & torch.ones(len(numbers), len(numbers), dtype=torch.bool).tril()
    logits = logits_of(model, packs, {**batch, "attention_mask": mask[None, None]}, 0)
    # transformers derives the same boundaries from positions that restart
    derived = logits_of(model, packs, {**batch, "attention_mask": None}, 0)
    torch.testing.assert_close(derived, logits, atol=1e-5, rtol=1e-5)
    for k, item in enumerate(packs):
        alone = logits_of(model, [item], collate([item], 0), 0)
        torch.testing.assert_close(logits[:, ends[k] : ends[k + 1]], alone, atol=1e-4, rtol=1e-5)
    plain = collate(packs, 0)
    assert sorted(batch["labels"].flatten().tolist()) == sorted(plain["labels"][plain["labels"] >= 0].tolist())
    picked = batch["input_ids"][0, batch["sources"][0] + 1]
    assert torch.equal(picked, batch["labels"][0])  # a label is the token that follows its source


def test_varlen_refuses_packs_that_share_a_prefix() -> None:
    with pytest.raises(UsageError, match="share a prefix"):
        collate(make_packs(), 0, varlen=True)


def test_only_gaps_are_one_position_without_an_answer(llama: TinyLlava) -> None:
    batch = collate([EMPTY, EMPTY], 5)
    assert batch["input_ids"].tolist() == [[5]] and batch["labels"].tolist() == [[IGNORED]]
    loss = Objective(llama).eval()(**batch, num_items_in_batch=3)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(p.grad is not None and p.grad.any() for p in llama.model.language_model.parameters())
    llama.zero_grad()


def test_packs_without_answers_add_nothing(llama: TinyLlava) -> None:
    packs = [item for item in make_packs() if item.rows]
    filled = [packs[0], without_answers(packs[2]), packs[1]]
    alone, _ = loss_and_gradients(llama, packs[:2], 0)
    for length in (0, 1000):
        batch = collate(filled, 0, pack_length=length)
        assert int((batch["labels"] != IGNORED).sum()) == sum(int(r.is_answer.sum()) for p in packs[:2] for r in p.rows)
        assert loss_and_gradients(llama, filled, length)[0] == pytest.approx(alone, rel=1e-5)
    assert without_answers(packs[2]).images == packs[2].images


def test_a_sequence_of_two_packs_written_out_by_hand() -> None:
    two = Pack((Encoded(np.array([1, 9, 5], np.int32), np.array([0, 0, 1], bool), 2),) * 2, (0,))
    one = Pack((Encoded(np.array([1, 8], np.int32), np.array([0, 1], bool), 0),))
    batch = collate([one, two], 0, pack_length=6)
    assert batch["input_ids"].tolist() == [[1, 9, 5, 5, 1, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 0, 1]]
    assert batch["labels"].tolist() == [[5, 5, 8]] and batch["sources"].tolist() == [[1, 1, 4]]
    assert batch["attention_mask"].int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 1, 0, 1, 0, 0],
                [0, 0, 0, 0, 1, 0],
                [0, 0, 0, 0, 1, 1],
            ]
        ]
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 50))
def test_arranging_keeps_every_pack_and_the_limit(lengths: list[int], limit: int) -> None:
    packs = [
        Pack((Encoded(np.full(n, k, np.int32), np.ones(n, bool), 0),), (k,) * (k % 3)) for k, n in enumerate(lengths)
    ]
    sequences = arrange([*packs, EMPTY], limit)
    assert sorted(id(item) for part in sequences for item in part) == sorted(map(id, packs))
    for part in sequences:
        assert sum(item.length for item in part) <= limit or len(part) == 1
    filled = sorted(sum(item.length for item in part) for part in sequences)
    assert len(filled) < 2 or filled[0] + filled[1] > limit or filled[1] > limit  # no two would fit in one
    batch = collate(packs, 0, pack_length=limit)
    assert int((batch["labels"] != IGNORED).sum()) == sum(lengths) - len(lengths)


@given(st.lists(st.integers(-1, 5), max_size=40), st.integers(1, 6))
def test_grouping_keeps_every_row_in_packs_of_even_size(pictures: list[int], most: int) -> None:
    rows, ends = group(np.array(pictures, np.int64), most)
    assert sorted(rows.tolist()) == list(range(len(pictures)))
    parts = [part.tolist() for part in np.split(rows, ends[:-1]) if len(part)]
    assert len(parts) == len(ends) and [part[0] for part in parts] == sorted(min(part) for part in parts)
    for part in parts:
        of = {pictures[k] for k in part}
        assert len(of) == 1 and len(part) <= most and (len(part) == 1 or of != {-1})
    for picture in set(pictures) - {-1}:
        sizes = [len(part) for part in parts if pictures[part[0]] == picture]
        assert max(sizes) - min(sizes) <= 1 and len(sizes) == -(-sum(sizes) // most)

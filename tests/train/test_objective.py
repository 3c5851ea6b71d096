"""The loss equals Hugging Face Llava's own on plain rows, and a pack's loss equals the sum of its rows'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.checkpoint import Checkpoint
from tinyllava_edge.errors import UsageError
from tinyllava_edge.train.collate import IGNORED
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.objective import Objective
from tinyllava_edge.train.parts import freeze
from tinyllava_edge.train.recipes import StageRecipe, override

from .conftest import Files

CAPTIONS = StageRecipe("pretrain", "pretrain", "frozen", 1e-3, 4, precision="fp32")
ANSWERS = StageRecipe("finetune", "model", "full", 1e-3, 4, max_turns=4, precision="fp32")


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def start_clip(tiny_checkpoint_clip: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint_clip)


def summed(start: Checkpoint, data: StageData) -> float:
    with torch.no_grad():
        batch = data.batch(list(data.packs))
        return float(Objective(start.model).eval()(**batch, num_items_in_batch=1)["loss"])


@pytest.mark.parametrize("tower", ["start", "start_clip"])
@pytest.mark.parametrize("stage", [CAPTIONS, ANSWERS], ids=["captions", "answers"])
def test_packing_does_not_change_the_loss(
    tower: str, stage: StageRecipe, files: Files, request: pytest.FixtureRequest
) -> None:
    start = request.getfixturevalue(tower)
    data = [files.captions, files.qa] if stage is CAPTIONS else [files.qa]
    packed = prepare(start, override(stage, {"max_turns": 4}), data, files.images)
    alone = prepare(start, override(stage, {"max_turns": 1}), data, files.images)
    assert len(packed.packs) < len(alone.packs) == sum(len(p.rows) for p in packed.packs)
    expected = summed(start, alone)
    assert summed(start, packed) == pytest.approx(expected, rel=1e-6, abs=1e-4)  # 60 to 1,100 nats in float32
    # turns that see each other, or positions that do not restart, are far outside this tolerance
    batch = packed.batch(list(packed.packs))
    n = batch["input_ids"].shape[1]
    leaky = {**batch, "attention_mask": torch.ones(n, n, dtype=torch.bool).tril().expand(len(packed.packs), 1, n, n)}
    moved = {**batch, "position_ids": torch.arange(n).expand(len(packed.packs), n)}
    for wrong in (leaky, moved):
        with torch.no_grad():
            loss = float(Objective(start.model).eval()(**wrong, num_items_in_batch=1)["loss"])
        assert abs(loss - expected) > 1e-2


def test_hugging_face_llava_honours_the_mask_and_gives_the_same_loss(start: Checkpoint, files: Files) -> None:
    packed = prepare(start, override(ANSWERS, {"max_turns": 4}), files.qa, files.images, cache_bytes=0)
    batch = packed.batch(list(packed.packs))
    with torch.no_grad():
        logits = start.model(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
        ).logits  # (b, n, vocabulary)
    picked = logits.gather(1, batch["sources"].unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    expected = cross_entropy(picked.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
    assert summed(start, packed) == pytest.approx(float(expected), rel=1e-5)


def test_plain_rows_give_llavas_own_loss(start: Checkpoint, files: Files) -> None:
    data = prepare(start, override(ANSWERS, {"max_turns": 1}), files.mixed, files.images, cache_bytes=0)
    batch = data.batch(list(data.packs))
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for k, item in enumerate(data.packs):
        row = item.rows[0]
        labels[k, : len(row.ids)] = torch.where(torch.tensor(row.is_answer), torch.tensor(row.ids), IGNORED)
    with torch.no_grad():
        theirs = start.model(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"],
            attention_mask=batch["attention_mask"],
            labels=labels,
        ).loss
        ours = Objective(start.model).eval()(**batch)
    assert float(ours["loss"]) == pytest.approx(float(theirs), rel=1e-5)
    assert not ours["hits"][batch["labels"] == IGNORED].any()


def test_the_head_runs_in_chunks_with_the_same_gradients(
    start: Checkpoint, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepare(start, ANSWERS, files.qa, files.images)
    freeze(start.model, ANSWERS)
    sizes: list[int] = []
    hook = start.model.lm_head.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    found = []
    for chunk in (1024, 7):
        monkeypatch.setattr("tinyllava_edge.train.objective.CHUNK", chunk)
        out = Objective(start.model).train()(**data.batch(list(data.packs)))
        out["loss"].backward()
        found.append(
            (out["loss"].detach(), out["hits"], [p.grad.clone() for p in start.model.parameters() if p.requires_grad])
        )
        start.model.zero_grad()
    hook.remove()
    assert sizes[0] > 30 and sum(sizes[1:]) == 2 * sizes[0] and max(sizes[1:]) == 7  # forwards, and again backwards
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    assert torch.equal(found[0][1], found[1][1])
    for whole, chunked in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


def test_cached_features_equal_pixels(start: Checkpoint, files: Files) -> None:
    cached = prepare(start, ANSWERS, files.qa, files.images)
    live = prepare(start, ANSWERS, files.qa, files.images, cache_bytes=0)
    assert "image_features" in cached.batch(cached.packs[:2]) and "pixel_values" in live.batch(live.packs[:2])
    assert summed(start, cached) == pytest.approx(summed(start, live), rel=1e-5)
    assert cached.sha256 == live.sha256


def test_what_each_stage_trains(start: Checkpoint) -> None:
    def trained(**changes: object) -> set[str]:
        freeze(start.model, override(ANSWERS, changes))
        return {name for name, p in start.model.named_parameters() if p.requires_grad}

    connector = trained(llm="frozen")
    assert len(connector) == 4 and all(".multi_modal_projector." in name for name in connector)
    both = trained(llm="full")
    assert "lm_head.weight" in both and not any(".vision_tower." in name for name in both)
    assert both == {name for name, _ in start.model.named_parameters() if ".vision_tower." not in name}
    top = trained(llm="from-1", connector="frozen")
    assert {"lm_head.weight", "model.language_model.norm.weight"} < top and len(top) == 2 + 9
    assert all(".layers.1." in name or name.endswith(("lm_head.weight", ".norm.weight")) for name in top)
    whole = trained(tower="full", llm="frozen", connector="frozen")
    assert "model.vision_tower.embeddings.patch_embedding.weight" in whole
    assert not any(".layers.2." in name or ".head." in name or "post_layernorm" in name for name in whole)
    for part, mode in (("llm", "from-2"), ("connector", "from-0"), ("tower", "from-2")):
        with pytest.raises(UsageError, match=f"{part} = '{mode}'.* no such layer"):
            trained(**{part: mode})
    tower = trained(llm="full", tower="from-1") - both
    # layers 0, 1, 2: the first is kept, and the last never reaches the features of hidden_states[-2]
    assert tower and all(".layers.1." in name for name in tower)


def test_the_tower_stays_in_eval_mode_unless_it_is_trained(start: Checkpoint) -> None:
    freeze(start.model, ANSWERS)
    objective = Objective(start.model).train()
    assert not start.model.model.vision_tower.training and start.model.model.language_model.training
    freeze(start.model, override(ANSWERS, {"tower": "from-0"}))
    assert objective.train().model.model.vision_tower.training


def test_gradients_reach_the_tuned_tower_layers_only(start: Checkpoint, files: Files) -> None:
    stage = override(ANSWERS, {"tower": "from-1"})
    data = prepare(start, stage, files.qa, files.images)
    freeze(start.model, stage)
    Objective(start.model).train()(**data.batch(data.packs[:2]))["loss"].backward()
    for name, parameter in start.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    start.model.zero_grad()

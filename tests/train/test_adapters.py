"""Adapters are trained, saved as PEFT's own, merged, trained further, and taken up again after a kill, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import CheckpointError, StorageError, TinyLlavaEdgeError, UsageError
from tinyllava_edge.train import adapters
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.objective import Objective
from tinyllava_edge.train.parts import adapted, adapter_size, freeze, part_of
from tinyllava_edge.train.recipes import StageRecipe, override
from tinyllava_edge.train.trainer import TrainResult, adapter_directory, train, work_directory

from .conftest import Files

LORA = StageRecipe(
    "finetune", "model", "lora", 2e-3, 2, max_turns=4, precision="fp32", save_steps=3, lora_rank=8, lora_alpha=16.0,
    epochs=2.0,
)  # fmt: skip


def run(start: Path, stage: StageRecipe, files: Files, out: Path, **options: object) -> TrainResult:
    return train(start, stage, files.qa, files.images, out, progress=False, **options)  # type: ignore[arg-type]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    out = tmp_path_factory.mktemp("lora") / "run"
    return run(tiny_checkpoint, LORA, files, out), out


@pytest.mark.parametrize(("mode", "dropout"), [("lora", 0.0), ("qlora", 0.05)])
@pytest.mark.parametrize("part", ["tower", "connector", "llm"])
def test_each_part_takes_adapters_and_only_they_get_gradients(
    mode: str, dropout: float, part: str, tiny_checkpoint: Path, files: Files
) -> None:
    changes = {"tower": "frozen", "connector": "frozen", "llm": "frozen", part: mode, "lora_dropout": dropout}
    stage = override(LORA, changes)
    start = checkpoints.load(tiny_checkpoint)
    data = prepare(start, stage, files.qa, files.images, cache_bytes=0)
    expected = adapter_size(start.model, stage, part)
    before = float(Objective(start.model).eval()(**data.batch(data.packs[:2]))["loss"].detach())
    names = set(adapted(start.model, stage))
    adapters.put_in(start.model, stage)
    freeze(start.model, stage)
    objective = Objective(start.model).train()
    loss = objective(**data.batch(data.packs[:2]))["loss"]
    loss.backward()
    own = {name: p for name, p in start.model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in own.values()) == expected > 0
    assert {name.partition(".lora_")[0] for name in own} == names and {part_of(name) for name in names} == {part}
    for name, parameter in start.model.named_parameters():
        assert (parameter.grad is not None) == (name in own), name
    # B is zero at first: LoRA changes nothing yet, and 4 bits a weight change a random model a little
    after = float(Objective(start.model).eval()(**data.batch(data.packs[:2]))["loss"].detach())
    if mode == "lora":
        assert after == pytest.approx(before, rel=1e-6)
    else:
        assert after != before and after == pytest.approx(before, rel=0.2)
        assert all(start.model.get_submodule(name).base_layer.weight.dtype == torch.uint8 for name in names)


def test_adapters_and_the_connector_are_trained_and_nothing_else(
    trained: tuple[TrainResult, Path], tiny_checkpoint: Path
) -> None:
    result, out = trained
    assert result.losses[0] > 5 and result.final_loss < result.losses[0]
    before, after = tensors(tiny_checkpoint), tensors(out)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {
        name for name in before if "language_model.model.layers" in name and ".weight" in name and "norm" not in name
    }
    assert changed == linear | {name for name in before if "multi_modal_projector" in name} and len(linear) == 14
    saved = json.loads((adapter_directory(out) / adapters.ORIGIN).read_text())
    assert saved["source"] == str(tiny_checkpoint) and not work_directory(out).exists()


def test_peft_loads_the_adapter_and_gives_the_merged_models_logits(
    trained: tuple[TrainResult, Path], tiny_checkpoint: Path, files: Files
) -> None:
    from peft import PeftModel

    out = trained[1]
    base, merged = checkpoints.load(tiny_checkpoint), checkpoints.load(out)
    theirs = PeftModel.from_pretrained(base.model, adapter_directory(out))
    ids = torch.tensor([[1, *[int(base.model.config.image_token_id)] * 64, 40, 41, 42]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.eval()(input_ids=ids, pixel_values=pixels).logits
        found = merged.model(input_ids=ids, pixel_values=pixels).logits
        plain = checkpoints.load(tiny_checkpoint).model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert (plain - expected).abs().max() > 0.05


def test_merging_by_hand_gives_the_same_checkpoint(
    trained: tuple[TrainResult, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapters.merge_checkpoint(tiny_checkpoint, adapter_directory(trained[1]), tmp_path / "merged")
    by_hand, by_train = tensors(tmp_path / "merged"), tensors(trained[1])
    assert all(torch.equal(by_hand[name], by_train[name]) for name in by_train)
    with pytest.raises(StorageError, match="exists"):
        adapters.merge_checkpoint(tiny_checkpoint, adapter_directory(trained[1]), tmp_path / "merged")
    with pytest.raises(CheckpointError, match="was not trained on"):
        adapters.merge_checkpoint(trained[1], adapter_directory(trained[1]), tmp_path / "twice")


def test_an_adapter_is_trained_further(
    trained: tuple[TrainResult, Path], tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    first, out = trained
    kept = adapter_directory(out)
    second = run(tiny_checkpoint, override(LORA, {"lora_dropout": 0.0}), files, tmp_path / "on", adapter=kept)
    assert second.losses[0] < first.losses[0] / 2 and second.final_loss < first.final_loss
    for k, changes in enumerate(({"lora_rank": 4, "lora_alpha": 8.0}, {"connector": "frozen"}, {"lora_alpha": 8.0})):
        with pytest.raises(CheckpointError, match="doesn't fit|scaled by 2") as error:
            run(tiny_checkpoint, override(LORA, changes), files, tmp_path / f"other-{k}", adapter=kept)
        assert "recipe that made it" in error.value.hint


def test_an_adapter_of_another_checkpoint_is_refused(
    trained: tuple[TrainResult, Path], files: Files, tmp_path: Path
) -> None:
    """It is merged into the checkpoint beside it already, where it would count twice."""
    with pytest.raises(CheckpointError, match="was not trained on"):
        run(trained[1], LORA, files, tmp_path / "twice", adapter=adapter_directory(trained[1]))


def test_a_part_without_linear_layers_takes_no_adapters(tiny_checkpoint: Path) -> None:
    model = checkpoints.load(tiny_checkpoint).model
    model.model.multi_modal_projector = torch.nn.Identity()
    with pytest.raises(UsageError, match="connector = 'lora', and it has no linear layer"):
        adapters.put_in(model, override(LORA, {"connector": "lora"}))
    with pytest.raises(UsageError, match="lora_rank = 9999"):
        adapters.put_in(model, override(LORA, {"lora_rank": 9999}))


def test_a_run_with_dropout_goes_on_bit_for_bit(
    trained: tuple[TrainResult, Path],
    tiny_checkpoint: Path,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, real = [0], StageData.batch

    def batch(self: StageData, packs: list[object]) -> object:
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, packs)  # type: ignore[arg-type]

    monkeypatch.setattr(StageData, "batch", batch)
    with pytest.raises(TinyLlavaEdgeError, match="interrupted at step"):
        run(tiny_checkpoint, LORA, files, tmp_path / "run")
    result = run(tiny_checkpoint, LORA, files, tmp_path / "run")
    assert result.resumed_from > 0 and result.losses == trained[0].losses
    mine, whole = tensors(tmp_path / "run"), tensors(trained[1])
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_qlora_is_merged_into_the_whole_weights(tiny_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    """What is added is the adapter alone: of rank 8, and not the rounding to 4 bits, which has full rank."""
    result = run(tiny_checkpoint, override(LORA, {"llm": "qlora", "epochs": 1.0}), files, tmp_path / "run")
    assert result.final_loss < result.losses[0]
    before, after = tensors(tiny_checkpoint), tensors(tmp_path / "run")
    name = next(name for name in before if name.endswith("layers.1.mlp.up_proj.weight"))
    sizes = torch.linalg.svdvals((after[name] - before[name]).double())
    assert sizes[0] > 1e-4 and sizes[8] < 1e-3 * sizes[0]


def test_an_answer_in_between_leaves_4_bit_gradients_alone(tiny_checkpoint: Path, files: Files) -> None:
    """bitsandbytes repacks 4-bit weights for inference where a CPU has bf16 instructions, and then loses gradients."""
    stage = override(LORA, {"llm": "qlora", "lora_dropout": 0.0})
    start = checkpoints.load(tiny_checkpoint)
    data = prepare(start, stage, files.qa, files.images)
    adapters.put_in(start.model, stage)
    freeze(start.model, stage)
    weight = start.model.model.multi_modal_projector.linear_1.weight
    found = []
    for _ in range(2):
        Objective(start.model).train()(**data.batch(data.packs[:2]))["loss"].backward()
        found.append(weight.grad.clone())
        start.model.zero_grad()
        with torch.inference_mode():
            Objective(start.model).eval()(**data.batch(data.packs[:2]))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


def test_qlora_without_its_package(
    tiny_checkpoint: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="needs bitsandbytes") as error:
        run(tiny_checkpoint, override(LORA, {"llm": "qlora"}), files, tmp_path / "run")
    assert "tinyllava-edge[qlora]" in error.value.hint


def test_whole_layers_beside_adapters_are_saved_as_peft_wants_them(
    tiny_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    from peft import PeftModel

    stage = override(LORA, {"tower": "from-1", "llm": "lora", "epochs": 1.0})
    run(tiny_checkpoint, stage, files, tmp_path / "run")
    folder = adapter_directory(tmp_path / "run")
    config = json.loads((folder / adapters.CONFIG).read_text())
    assert config["modules_to_save"] == ["model.multi_modal_projector", "model.vision_tower.encoder.layers.1"]
    theirs = PeftModel.from_pretrained(checkpoints.load(tiny_checkpoint).model, folder).eval()
    merged = checkpoints.load(tmp_path / "run").model
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = merged.tower_features(pixels), theirs.base_model.model.tower_features(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_damaged_adapter_is_named(trained: tuple[TrainResult, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    def spoiled(name: str, data: bytes) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(adapter_directory(trained[1]), folder)
        (folder / name).write_bytes(data)
        return folder

    config = json.loads((adapter_directory(trained[1]) / adapters.CONFIG).read_text())
    whole = (adapter_directory(trained[1]) / adapters.WEIGHTS).read_bytes()
    values = load_file(adapter_directory(trained[1]) / adapters.WEIGHTS)
    nan = save({name: value * torch.nan for name, value in values.items()})
    cases = [
        spoiled(adapters.WEIGHTS, whole[:-100]),
        spoiled(adapters.WEIGHTS, b""),
        spoiled(adapters.CONFIG, b"["),
        spoiled(adapters.CONFIG, b"[" * 100_000),
        spoiled(adapters.CONFIG, b"[]"),
        spoiled(adapters.CONFIG, json.dumps({**config, "r": 0}).encode()),
        spoiled(adapters.CONFIG, json.dumps({**config, "use_dora": True}).encode()),
        spoiled(adapters.CONFIG, json.dumps({**config, "r": 7}).encode()),
        spoiled(adapters.CONFIG, json.dumps({**config, "lora_alpha": 10**400}).encode()),
        spoiled(adapters.WEIGHTS, nan),
        spoiled(adapters.ORIGIN, b"[]"),
    ]
    for folder in cases:
        with pytest.raises(CheckpointError, match=folder.name) as error:
            adapters.merge_checkpoint(tiny_checkpoint, folder, tmp_path / "out")
        assert error.value.hint and not (tmp_path / "out").exists()

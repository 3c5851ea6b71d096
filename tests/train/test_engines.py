"""Engines train the same model: equal curves and weights on one process and on two, whatever divides the states.

Two real processes that torchrun starts, gloo between them, on the CPU. One launch runs every case, one after another.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tinyllava_edge
from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import DependencyError, UsageError
from tinyllava_edge.train import engine as trainer_engine
from tinyllava_edge.train import engines
from tinyllava_edge.train.recipes import StageRecipe, override
from tinyllava_edge.train.trainer import TrainResult, train

from .conftest import Files, message

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("engines_child.py")
# 13 packs in batches of 4: the last of an epoch holds one, which one of two processes must do without
LLM = StageRecipe("llm", "model", "full", 1e-3, 4, micro_batch=1, precision="fp32", epochs=2.0)
TOWER = override(
    LLM, {"name": "tower", "tower": "from-1", "micro_batch": 2, "epochs": 1.0, "gradient_checkpointing": True}
)
CONNECTOR = override(LLM, {"name": "connector", "llm": "frozen", "micro_batch": 2, "epochs": 1.0})
LORA = override(
    LLM,
    {"name": "lora", "llm": "lora", "lora_rank": 8, "lora_dropout": 0.0, "micro_batch": 2, "epochs": 1.0}
    | {"pack_length": 400},
)
QLORA = override(LORA, {"name": "qlora", "llm": "qlora"})
STAGES = {"llm": LLM, "tower": TOWER, "connector": CONNECTOR, "lora": LORA, "qlora": QLORA}
# AdamW divides by the root of tiny second moments, so that rounding shows in weights more than in losses.
LOSS, WEIGHT = 1e-4, 2e-4
OTHERS = ("zero2", "zero3", "fsdp")
WHOLE_RUNS = [
    *[(name, "llm", False) for name in engines.ENGINES],
    ("ddp", "tower", False),
    *[(name, "tower", True) for name in OTHERS],
    ("zero3", "connector", False),
    ("fsdp", "connector", False),
    *[(name, "lora", False) for name in engines.ENGINES],
    ("ddp", "qlora", False),
    ("zero2", "qlora", False),
]
CHAIN = ("ddp", "zero2", "zero3", "fsdp")  # each goes on from the state that the one before it left


@dataclass(frozen=True)
class Ran:
    """What two processes did."""

    results: dict[str, dict[str, Any]]
    folder: Path
    alone: dict[str, TrainResult]
    other_rank: dict[str, dict[str, Any]]


def launch(child: Path, arguments: list[str], processes: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tinyllava_edge.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(child), *arguments], env=environment, capture_output=True, text=True, timeout=600, **options
    )


@pytest.fixture(scope="module")
def both(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with a picture and rows of text alone: some batches of one process hold no picture."""
    rows = json.loads(files.qa.read_text())[:7]
    for word in ("one", "two", "three", "four", "five", "six"):
        rows.append({"id": word, "conversations": [message("human", f"say {word}"), message("gpt", word)]})
    path = tmp_path_factory.mktemp("both") / "both.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def ran(tiny_checkpoint: Path, files: Files, both: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    common = {"start": str(tiny_checkpoint), "data": str(both), "images": str(files.images)}
    plain = {name: {k: v for k, v in stage.__dict__.items() if v is not None} for name, stage in STAGES.items()}
    cases: dict[str, dict[str, Any]] = {
        f"{name}-{stage}": {
            **common,
            "engine": name,
            "offload": offload,
            "stage": plain[stage],
            "cache": 0 if (name, stage) == ("fsdp", "connector") else 1 << 30,
            "out": str(folder / f"{name}-{stage}"),
        }
        for name, stage, offload in WHOLE_RUNS
    }
    for k, name in enumerate(CHAIN):
        stop = {"stop": [k % 2, 4]} if k + 1 < len(CHAIN) else {}  # one process gets a signal in its fourth batch
        cases[f"chain-{k}"] = {**common, **stop, "engine": name, "stage": plain["llm"], "out": str(folder / "chain")}
    for name in ("zero3", "fsdp"):
        refused = {"engine": name, "stage": plain["qlora"], "out": str(folder / f"{name}-refused")}
        cases[f"{name}-refused"] = {**common, **refused}
    loaded = checkpoints.load(tiny_checkpoint)
    with torch.no_grad():
        loaded.model.lm_head.weight[5, 5] = float("inf")
    checkpoints.save(loaded.model, loaded.tokenizer, loaded.spec, folder / "broken")
    for name in ("ddp", "zero2"):
        broken = {"start": str(folder / "broken"), "out": str(folder / f"{name}-broken")}
        cases[f"{name}-broken"] = {**common, **broken, "engine": name, "stage": plain["connector"]}
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    done = launch(CHILD, [str(folder / "cases.json"), str(folder / "results.json")])
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == ""
    found = [
        dict(zip(cases, json.loads((folder / f"results.{rank}.json").read_text()), strict=True)) for rank in (0, 1)
    ]
    alone = {
        name: train(tiny_checkpoint, stage, both, files.images, folder / f"alone-{name}", progress=False)
        for name, stage in STAGES.items()
    }
    return Ran(found[0], folder, alone, found[1])


def same_weights(first: Path, second: Path) -> None:
    one, two = (load_file(path / "model.safetensors") for path in (first, second))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=WEIGHT, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_divided_weights_have_no_4_bits(ran: Ran) -> None:
    for name in ("zero3", "fsdp"):
        said = ran.results[f"{name}-refused"]
        assert said["exit"] == 2 and f"qlora with engine {name}" in said["error"] and "zero2" in said["hint"]


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stage, _ in WHOLE_RUNS])
def test_two_processes_train_what_one_trains(ran: Ran, name: str, stage: str) -> None:
    """float32: losses within 1e-4 (relative) at every step, weights within 2e-4 at the end."""
    result = ran.results[f"{name}-{stage}"]
    assert "error" not in result, result
    assert len(result["losses"]) == len(ran.alone[stage].losses) == (8 if stage == "llm" else 4)
    assert result["losses"] == pytest.approx(ran.alone[stage].losses, rel=LOSS)
    same_weights(ran.folder / f"alone-{stage}", ran.folder / f"{name}-{stage}")


def test_each_engine_goes_on_from_another_ones_state(ran: Ran) -> None:
    """DDP → ZeRO-2 → ZeRO-3 → FSDP2, each stopped by a signal to one of its processes, ends as one process does."""
    reached = []
    for k in range(len(CHAIN) - 1):
        first, second = ran.results[f"chain-{k}"], ran.other_rank[f"chain-{k}"]
        steps = [re.search(r"interrupted at step (\d+) of 8", stopped["error"]) for stopped in (first, second)]
        assert steps[0] and steps[1] and steps[0][1] == steps[1][1]  # both processes stopped at the same step
        assert first["exit"] == 1 and "same command again" in first["hint"]
        got, other = (first, second) if k % 2 == 0 else (second, first)
        assert "by SIGTERM" in got["error"] and "by another process" in other["error"]
        reached.append(int(steps[0][1]))
    assert 0 < reached[0] < reached[1] < reached[2] < 8
    last = ran.results[f"chain-{len(CHAIN) - 1}"]
    assert last["resumed_from"] == reached[2] and last["losses"] == pytest.approx(ran.alone["llm"].losses, rel=LOSS)
    same_weights(ran.folder / "alone-llm", ran.folder / "chain")


@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_a_loss_that_is_not_finite_stops_every_process(ran: Ran, name: str) -> None:
    for results in (ran.results, ran.other_rank):
        stopped = results[f"{name}-broken"]
        assert re.search(r"the loss at step 1 is (nan|inf)", stopped["error"]) and stopped["exit"] == 1
    assert not (ran.folder / f"{name}-broken").exists()


def test_each_setting_has_a_file_that_says_the_same() -> None:
    folder = ROOT / "train" / "deepspeed"
    assert {path.stem for path in folder.glob("*.json")} == set(engines.DEEPSPEED)
    for name, value in engines.DEEPSPEED.items():
        assert json.loads((folder / f"{name}.json").read_text()) == value


def test_engines_are_chosen_by_exact_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    assert engines.choose() == engines.Engine("ddp")
    assert engines.choose("zero2", offload=True).deepspeed == engines.DEEPSPEED["zero2_offload"]
    own = ROOT / "train" / "deepspeed" / "zero3.json"
    assert engines.choose("zero3", config=own).deepspeed == engines.DEEPSPEED["zero3"]
    with pytest.raises(UsageError, match="unknown engine 'zero'") as unknown:
        engines.choose("zero")
    assert "ddp, zero2, zero3, fsdp" in unknown.value.hint
    with pytest.raises(UsageError, match=r"stage is 3, the engine is zero2"):
        engines.choose("zero2", config=own)
    for name, options in (
        ("ddp", {"offload": True}),
        ("fsdp", {"config": own}),
        ("zero3", {"config": own, "offload": True}),
    ):
        with pytest.raises(UsageError):
            engines.choose(name, **options)  # type: ignore[arg-type]
    bad = tmp_path / "bad.json"
    for text, said in (
        ("{", "can't be read as JSON"),
        ("[]", "stage is None"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {}}', "optimizer is the recipe's"),
        ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', "fp16 is not supported"),
    ):
        bad.write_text(text)
        with pytest.raises(UsageError, match=said):
            engines.choose("zero2", config=bad)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="needs DeepSpeed") as missing:
        engines.choose("zero2")
    assert "tinyllava-edge[deepspeed]" in missing.value.hint


def test_a_launch_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="fsdp divides over several processes") as alone:
        trainer_engine.arguments(LLM, tmp_path, "cpu", 0, engines.Engine("fsdp"))
    assert "torchrun" in alone.value.hint
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="batch_size 4 is no multiple of micro_batch 1 x 3 devices"):
        trainer_engine.arguments(LLM, tmp_path, "cpu", 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="ACCELERATE_USE_FSDP"):
        trainer_engine.arguments(LLM, tmp_path, "cpu", 0)


def test_importing_the_package_does_not_import_deepspeed() -> None:
    code = "import sys, tinyllava_edge.cli, tinyllava_edge.train.engines; print('deepspeed' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(tinyllava_edge.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

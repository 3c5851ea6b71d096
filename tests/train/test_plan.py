"""A dry run says what training would do: the paper's sizes, Trainer's steps, counted operations, measured rows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from tinyllava_edge import checkpoint as checkpoints
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.model import TinyLlava, build_model
from tinyllava_edge.spec import LLM_BACKBONES, VARIANTS, VISION_BACKBONES, ModelSpec, model_spec
from tinyllava_edge.towers import MOF_TYPE
from tinyllava_edge.train import memory_plan
from tinyllava_edge.train.adapters import put_in
from tinyllava_edge.train.collate import Encoded, Pack
from tinyllava_edge.train.dataset import StageData, prepare
from tinyllava_edge.train.memory_plan import ENGINES, Counts, Stack, estimate
from tinyllava_edge.train.new_model import new_model
from tinyllava_edge.train.objective import Objective
from tinyllava_edge.train.parts import freeze
from tinyllava_edge.train.plan import Machine, Plan, count_steps, make_plan
from tinyllava_edge.train.plan_data import Lengths
from tinyllava_edge.train.plan_shape import model_shape, sequence_flop, tower_flop
from tinyllava_edge.train.plan_source import checkpoint_model, data_lengths, plan_tokenizer
from tinyllava_edge.train.plan_text import parse_memory, plan_lines
from tinyllava_edge.train.recipes import PRESETS, load, override

from .conftest import Files

SHARE = "TinyLLaVA-share-Sig-Phi"
# Exact counts published with the backbones' weights; SigLIP's and CLIP's are those of the vision models alone.
PUBLISHED = {"TL": 1_100_048_384, "SLM": 1_644_417_024, "Phi": 2_779_683_840, "C": 303_507_456, "Sig": 428_225_600}
# The released TinyLLaVA-3.1B is 12.74 GB of float32, without the tower's last layer and pooling head.
RELEASED_3_1B = 12.74e9 / 4


def variant_model(name: str) -> tuple[TinyLlava, ModelSpec]:
    made = new_model(name)
    return made.without_weights(), made.spec


def plan(name: str = SHARE, recipe: str = "share", machine: Machine | None = None, **options: object) -> Plan:
    model, spec = variant_model(name)
    values = {"text_tokens": 200, **options}
    return make_plan(model, spec, load(recipe), machine or Machine(), **values)  # type: ignore[arg-type]


def test_parameters_are_those_of_the_published_backbones_and_of_the_papers_tables() -> None:
    """2 % on what was published exactly; the paper cuts its sizes to one decimal and adds them up in Table A1."""
    for name, variant in VARIANTS.items():
        if variant.recipe != "base":
            continue
        parts = {part.name: part.parameters for part in plan(name, "base").stages[0].parts}
        tower, llm = VISION_BACKBONES[variant.vision], LLM_BACKBONES[variant.llm]
        assert parts["tower"] == pytest.approx(PUBLISHED[variant.vision], rel=0.02)
        assert parts["llm"] == pytest.approx(PUBLISHED[variant.llm], rel=0.02)
        width, h = int(tower.config["hidden_size"]), int(llm.config["hidden_size"])
        assert parts["connector"] == width * h + h + h * h + h
        assert math.floor(parts["tower"] / 1e8) / 10 == tower.size_paper  # Table 1
        assert math.floor(parts["llm"] / 1e8) / 10 == llm.size_paper
        assert variant.size_paper == pytest.approx(tower.size_paper + llm.size_paper)  # Table A1
        assert sum(parts.values()) == pytest.approx(variant.size_paper * 1e9, rel=0.05)


def test_share_trains_14_of_27_tower_layers_in_its_second_stage() -> None:
    first, second, third = plan().stages
    width, inner = 1152, 4304
    layer = 4 * (width**2 + width) + 2 * width * inner + width + inner + 4 * width
    trained = {part.name: part.trainable for part in second.parts}
    everything = {part.name: part.parameters for part in second.parts}
    assert trained == {"tower": 14 * layer, "connector": everything["connector"], "llm": everything["llm"]}
    dead = layer + 2 * width + (everything["tower"] - 27 * layer - 2 * width - 14**2 * 3 * width - width * 730)
    assert sum(everything.values()) - dead == pytest.approx(RELEASED_3_1B, rel=0.02)
    assert [sum(part.trainable > 0 for part in stage.parts) for stage in (first, second, third)] == [1, 3, 2]
    assert [part.learning_rate for part in first.parts] == [None, 1e-3, None]
    assert (first.rows, second.rows, third.rows) == (558_000, 1_246_000, 665_000)
    assert (first.steps, second.steps, third.steps) == (2180, 4868, 5196)
    assert second.tokens == 1_246_000 * (729 + 200)


def test_full_and_factorys_share_train_what_they_say() -> None:
    factory = plan(recipe="share-factory").stages
    assert all(stage.parts[0].trainable == 0 for stage in factory)
    full = plan(recipe="full").stages[1].parts
    layer = plan().stages[1].parts[0].trainable // 14
    assert full[0].trainable == 26 * layer and full[1].trainable and full[2].trainable


def test_states_are_divided_as_in_the_zero_paper() -> None:
    """Figure 1: 7.5 billion parameters on 64 devices take 16.6 GB (gradients and optimiser) or 1.9 GB (all states)."""
    size = 7_500_000_000
    counts = Counts(size, size, size, 0, 0, 0, 0)
    for engine, expected in (("zero2", 16.6e9), ("zero3", 1.9e9), ("fsdp", 1.9e9)):
        assert sum(memory_plan._states(counts, "bf16", ENGINES[engine], 64)) == pytest.approx(expected, rel=0.015)
    assert sum(memory_plan._states(counts, "bf16", ENGINES["ddp"], 1)) == 16 * size
    assert sum(memory_plan._states(counts, "bf16", ENGINES["ddp"], 2)) == 20 * size  # DDP's buckets
    frozen = Counts(size, 0, 0, size, 0, 0, 0)
    assert sum(memory_plan._states(frozen, "bf16", ENGINES["ddp"], 1)) == 4 * size  # ours keeps float32


def test_engines_and_devices_lower_the_peak() -> None:
    peaks = {
        name: [plan(machine=Machine(devices=n, engine=name)).stages[2].memory.peak for n in (2, 8)] for name in ENGINES
    }
    assert peaks["ddp"][0] == peaks["ddp"][1] > peaks["fsdp"][0] > peaks["fsdp"][1]
    assert peaks["zero2"][1] > peaks["zero3"][1] and peaks["zero2"][0] > peaks["zero2"][1]
    model, spec = variant_model(SHARE)
    freeze(model, PRESETS["share"].stages[2])
    shape = model_shape(model, spec, PRESETS["share"].stages[2])
    load_ = memory_plan.Load(8, 929, 200, 1)
    with_, without = (estimate(shape, load_, "bf16", ENGINES["ddp"], 1, given) for given in (True, False))
    assert without.activations > 5 * with_.activations and without.peak > with_.peak


@pytest.mark.parametrize("packs", [1, 7, 64, 100, 257])
@pytest.mark.parametrize(("micro", "accumulate", "devices"), [(2, 4, 1), (3, 2, 4), (8, 1, 3)])
def test_steps_are_what_accelerate_deals_out(packs: int, micro: int, accumulate: int, devices: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    batches = BatchSampler(SequentialSampler(range(packs)), micro, drop_last=False)
    length = len(BatchSamplerShard(batches, num_processes=devices, process_index=0))
    per_epoch = max(1, length // accumulate + (length % accumulate > 0))  # as Trainer counts
    assert count_steps(packs, 2.0, micro, accumulate, devices) == 2 * per_epoch


@pytest.mark.parametrize("changes", [{"llm": "frozen"}, {}, {"tower": "from-1"}, {"gradient_checkpointing": True}])
def test_operations_are_those_that_torch_counts(changes: dict[str, object], tiny_checkpoint: Path) -> None:
    """Forwards and backwards of one batch; within 5 %: recomputing a layer stops before its last product."""
    start = checkpoints.load(tiny_checkpoint)
    stage = override(PRESETS["base-nano"].stages[1], {"max_turns": 1, **changes})
    model, n, answers, image = start.model, 200, 40, int(start.model.config.image_token_id)
    freeze(model, stage)
    shape = model_shape(model, start.spec, stage)
    found = Lengths(1, 1, 1, 1.0, n, n, answers, answers, 0, "known")
    mine = 3 * (sequence_flop(model, shape, found, stage) + tower_flop(model, shape, stage))
    put_in(model, stage)
    freeze(model, stage)
    model.model.language_model.set_attn_implementation("sdpa")
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = np.full(n, 5, np.int32)
    ids[: start.spec.visual_tokens] = image
    item = Pack((Encoded(ids, np.arange(n) >= n - answers, 0),), "x")
    data = StageData([item], lambda names: {"pixel_values": torch.randn(len(names), 3, 64, 64)}, 0)
    objective = Objective(model).train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused one is not counted
        objective(**data.batch([item] * 3))["loss"].backward()
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(("stage", "name"), [(0, "captions"), (1, "qa")])
def test_data_is_measured_as_training_packs_it(stage: int, name: str, tiny_checkpoint: Path, files: Files) -> None:
    start = checkpoints.load(tiny_checkpoint)
    recipe = PRESETS["base-nano"]
    data = getattr(files, name)
    packs = prepare(start, recipe.stages[stage], data, files.images).packs
    model, spec = checkpoint_model(tiny_checkpoint)
    assert spec == start.spec and next(model.parameters()).device.type == "meta"
    lengths = data_lengths(data, files.images, spec, plan_tokenizer(tiny_checkpoint, None, ""))
    names = [recipe.stages[stage].name]
    made = make_plan(model, spec, recipe, Machine(), stages=names, text_tokens=1, lengths=lengths).stages[0]
    assert made.rows == sum(len(item.rows) for item in packs) and made.packs == len(packs)
    assert made.positions == pytest.approx(sum(item.length for item in packs) / len(packs))
    assert made.longest == max(item.length for item in packs) and made.lengths == "measured with a tokenizer"
    assert made.host_features == 8 * 64 * 192 * 4  # eight small pictures: the trainer caches their features
    scaled = make_plan(model, spec, recipe, Machine(), stages=names, text_tokens=1, lengths=lengths, rows=1000)
    assert scaled.stages[0].rows == 1000 and scaled.stages[0].positions == made.positions


def test_without_a_tokenizer_characters_are_counted_and_it_says_so(files: Files) -> None:
    assert plan_tokenizer(None, None, SHARE) is None
    model, spec = variant_model(SHARE)
    lengths = data_lengths(files.mixed, files.images, spec, None)
    made = make_plan(model, spec, PRESETS["share"], Machine(), text_tokens=1, lengths=lengths, stages=["finetune"])
    assert "4 characters a token" in made.stages[0].lengths and "assumption" in made.stages[0].lengths
    assert 729 * 5 / 6 < made.stages[0].positions < 729 + 60  # one row of six has no picture
    captions = make_plan(model, spec, PRESETS["share"], Machine(), text_tokens=1, lengths=lengths, stages=["pretrain"])
    assert any("1 rows will be refused" in text for text in captions.stages[0].warnings)


def test_a_mixture_is_planned_as_both_its_towers() -> None:
    """Layers, parameters and operations of two towers; a language model without a formula is refused by name."""
    clip = {**VISION_BACKBONES["NanoC"].config, "num_hidden_layers": 3}
    base = model_spec("TinyLLaVA-base-NanoC-Nano")
    with torch.device("meta"):
        alone = build_model(base, clip, LLM_BACKBONES["Nano"].config, 1023)
        spec = dataclasses.replace(base, vision_family="mof", select_strategy="full", visual_tokens=128)
        both = {"model_type": MOF_TYPE, "first": clip, "second": clip}
        mixed = build_model(spec, both, LLM_BACKBONES["Nano"].config, 1023)
    stage = PRESETS["base"].stage("finetune")
    one, two = (model_shape(model, each, stage) for model, each in ((alone, base), (mixed, spec)))
    assert (two.tower.layers, two.tower.hidden) == (2 * one.tower.layers, one.tower.hidden)
    assert tower_flop(mixed, two, stage) == pytest.approx(2 * tower_flop(alone, one, stage), rel=0.02)  # class token
    other = AutoConfig.for_model("gpt2")
    with pytest.raises(UsageError, match="no memory formula for gpt2 layers"):
        Stack.of(other)


def test_warnings_name_what_will_not_work() -> None:
    made = plan(machine=Machine(devices=3, memory=24e9))
    for stage in made.stages:
        assert any("no multiple of micro_batch" in text and "3 devices" in text for text in stage.warnings)
        assert any("does not fit" in text or "not a batch of the longest" in text for text in stage.warnings)
    longer = plan("TinyLLaVA-base-Sig-Phi", machine=Machine(devices=8, memory=80e9))
    assert any("max_length 3072 is more than the model's own 2048" in text for text in longer.stages[1].warnings)
    assert not any("the model's own" in text for text in made.stages[1].warnings)  # share models are made for 3072
    roomy = plan(recipe="base", machine=Machine(devices=8, memory=80e9, engine="zero3"))
    assert all(not stage.warnings for stage in roomy.stages)
    with pytest.raises(UsageError) as error:
        plan(machine=Machine(engine="zero1"))
    assert "zero3" in error.value.hint
    with pytest.raises(UsageError, match="--mfu 1.5"):
        plan(machine=Machine(mfu=1.5))
    with pytest.raises(UsageError, match="no stage 'x'"):
        plan(stages=["x"])


def test_time_is_never_made_up() -> None:
    none = plan()
    assert all(stage.seconds is None for stage in none.stages)
    assert "give --peak-tflops" in "\n".join(plan_lines(none))
    known = plan(machine=Machine(devices=8, peak_tflops=312.0, mfu=0.5))
    for stage in known.stages:
        assert stage.flop and stage.seconds == pytest.approx(stage.flop / (8 * 312e12 * 0.5))
    assert "50% of 312 TFLOPS" in "\n".join(plan_lines(known))
    unknown = plan("TinyLLaVA-base-NanoSig-Nano", "base-nano", Machine(peak_tflops=1.0))
    assert unknown.stages[0].rows is unknown.stages[0].steps is unknown.stages[0].seconds is None
    assert "rows unknown" in "\n".join(plan_lines(unknown))


def test_sizes_are_read_as_people_write_them() -> None:
    assert (parse_memory("24GB"), parse_memory("22.5 GiB"), parse_memory("512mib")) == (24e9, 22.5 * 2**30, 2**29)
    for wrong in ("24", "0GB", "-1GB", "24 apples", "1e9GB", ""):
        with pytest.raises(UsageError, match="not a size"):
            parse_memory(wrong)


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(cwd)}
    return subprocess.run(
        [sys.executable, "-m", "tinyllava_edge.cli", "train", *arguments],
        capture_output=True, text=True, timeout=120, env=environment, cwd=cwd,
    )  # fmt: skip


def test_the_command_needs_nothing_and_writes_nothing(tmp_path: Path) -> None:
    """The variant's own recipe is taken; stdout is the plan alone."""
    done = call("--variant", SHARE, "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["recipe"] == "share" and [stage["name"] for stage in value["stages"]][1] == "share-pretrain"
    parts = {part["name"]: part["parameters"] for part in value["stages"][0]["parts"]}
    assert parts["tower"] + parts["connector"] + parts["llm"] == 3_217_417_280
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_a_table_and_one_stage(tmp_path: Path) -> None:
    done = call(
        "--variant", "TinyLLaVA-base-C-TL", "--dry-run", "--stage", "finetune", "--devices", "8",
        "--engine", "zero2", "--device-memory", "40GB", "--peak-tflops", "312", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("stage 1 of 1: finetune", "frozen", "peak", "8 micro x 2 accumulated x 8 devices", "about"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variant", SHARE), "training needs --out, --data"),
        (("--dry-run", "--variant", SHARE, "--device-memory", "lots"), "--device-memory 'lots'"),
        (("--dry-run", "--variant", SHARE, "--images", "."), "--images without --data"),
        (("--dry-run", "--variant", SHARE, "--set", "epoch=3"), "unknown key 'epoch'"),
        (("--dry-run", "--variant", "typo"), "typo"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_data_that_is_not_there(tmp_path: Path) -> None:
    model, spec = variant_model(SHARE)
    lengths = data_lengths(tmp_path / "none.json", tmp_path, spec, None)
    with pytest.raises(DataError, match="none.json"):
        make_plan(model, spec, PRESETS["share"], Machine(), text_tokens=1, lengths=lengths)


def test_a_plan_is_plain_json() -> None:
    value = json.loads(json.dumps(plan().to_dict()))
    assert dataclasses.asdict(Machine()) == value["machine"]

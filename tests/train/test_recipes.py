"""The presets hold the paper's numbers, the TOML files say the same, and nothing mistyped is taken in silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.train.recipes import PRESETS, StageRecipe, load, override, recipe_from

FOLDER = Path(__file__).parents[2] / "train" / "recipes"


def test_base_is_the_papers() -> None:
    first, second = PRESETS["base"].stages
    assert (first.llm, first.learning_rate, first.batch_size, first.epochs) == ("frozen", 1e-3, 256, 1)
    assert (second.llm, second.learning_rate, second.batch_size, second.epochs) == ("full", 2e-5, 128, 1)
    assert (first.template, second.template) == ("pretrain", "model")
    assert first.tower == second.tower == "frozen" and first.connector == second.connector == "full"


def test_share_trains_the_tower_from_layer_12_in_its_second_stage() -> None:
    first, second, third = PRESETS["share"].stages
    base = PRESETS["base"].stages
    assert first == base[0] and third == dataclasses.replace(base[1], max_length=3072)
    assert (second.tower, second.learning_rate, second.batch_size) == ("from-12", 2e-5, 256)


def test_factorys_share_freezes_the_tower_and_cuts_at_3072() -> None:
    """Numbers of its scripts: per device x accumulated x 4 devices, learning rate, maximal length."""
    stages = PRESETS["share-factory"].stages
    numbers = [(s.micro_batch, s.batch_size // s.micro_batch // 4, s.learning_rate, s.max_length) for s in stages]
    assert numbers == [(32, 2, 1e-3, 3072), (8, 8, 2e-5, 3072), (8, 4, 2e-5, 3072)]
    assert all(stage.tower == "frozen" and stage.epochs == 1 for stage in stages)
    assert [stage.llm for stage in stages] == ["frozen", "full", "full"]
    assert [stage.template for stage in stages] == ["pretrain", "pretrain", "model"]
    assert all(stage.max_length == 2048 for stage in PRESETS["base"].stages)


def test_full_is_base_with_the_tower_trained_in_stage_2() -> None:
    first, second = PRESETS["full"].stages
    assert first == PRESETS["base"].stages[0]
    assert second == dataclasses.replace(PRESETS["base"].stages[1], tower="from-0")


def test_rows_are_those_of_the_papers_data_sets() -> None:
    assert PRESETS["base"].rows == PRESETS["full"].rows == (558_000, 665_000)
    assert PRESETS["share"].rows == PRESETS["share-factory"].rows == (558_000, 1_246_000, 665_000)


def test_each_preset_has_a_file_that_says_the_same() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert load(FOLDER / f"{name}.toml") == preset
        assert load(name) is preset


def test_every_field_is_explained() -> None:
    source = (Path(__file__).parents[2] / "tinyllava_edge" / "train" / "recipes.py").read_text()
    for field in dataclasses.fields(StageRecipe):
        line = next(line for line in source.split("\n") if line.startswith(f"    {field.name}: "))
        assert source.split(line, 1)[1].lstrip().startswith('"""'), field.name


STAGE = '[[stages]]\nname = "a"\ntemplate = "model"\nllm = "frozen"\nlearning_rate = 1e-3\nbatch_size = 4\n'
WRONG = {
    "unknown key": ('name = "x"\n' + STAGE + "learning_rat = 1\n", "unknown key 'learning_rat'", "learning_rate"),
    "unknown top key": ('nam = "x"\n' + STAGE, "unknown key 'nam'", "stages"),
    "missing": ('name = "x"\n' + STAGE.replace("batch_size = 4\n", ""), "batch_size is missing", "learning_rate"),
    "type": ('name = "x"\n' + STAGE.replace("= 4", '= "4"'), "batch_size = '4'", ""),
    "bool as int": ('name = "x"\n' + STAGE.replace("= 4", "= true"), "batch_size = True", ""),
    "choice": ('name = "x"\n' + STAGE.replace('"frozen"', '"all"'), "llm = 'all'", "from-K"),
    "layer": ('name = "x"\n' + STAGE + 'tower = "from-x"\n', "tower = 'from-x'", "from-12"),
    "nothing": ('name = "x"\n' + STAGE + 'connector = "frozen"\n', "every part is frozen", "train one"),
    "rank": ('name = "x"\n' + STAGE + "lora_rank = 0\n", "lora_rank = 0", "at least 1"),
    "alpha": ('name = "x"\n' + STAGE + "lora_alpha = nan\n", "lora_alpha = nan", "alpha"),
    "not a number": ('name = "x"\n' + STAGE.replace("1e-3", "nan"), "learning_rate = nan", ""),
    "zero batch": ('name = "x"\n' + STAGE.replace("= 4", "= 0"), "batch_size = 0", "at least 1"),
    "uneven": ('name = "x"\n' + STAGE + "micro_batch = 3\n", "no multiple of micro_batch = 3", ""),
    "no stage": ('name = "x"\n', "stages", "[[stages]]"),
    "no name": (STAGE, "`name`", ""),
    "rows": ('name = "x"\nrows = [1, 2]\n' + STAGE, "`rows` must be a list of 1", "leave it out"),
    "rows as text": ('name = "x"\nrows = ["1"]\n' + STAGE, "`rows` must be a list of 1", ""),
    "not TOML": ("[[", "can't be read as TOML", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(case: str, tmp_path: Path) -> None:
    text, message, hint = WRONG[case]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert str(path) in error.value.message and message in error.value.message and hint in error.value.hint


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        load("bas")
    assert "base-nano" in error.value.hint
    with pytest.raises(UsageError, match="can't be read"):
        load(tmp_path / "none.toml")


def test_overrides_are_checked_and_change_nothing_else() -> None:
    stage = PRESETS["base"].stages[0]
    assert override(stage, {"epochs": 2}) == dataclasses.replace(stage, epochs=2.0)
    with pytest.raises(UsageError, match="unknown key 'epoch'"):
        override(stage, {"epoch": 2})
    with pytest.raises(UsageError, match="precision = 'fp16'"):
        override(stage, {"precision": "fp16"})
    assert recipe_from(dataclasses.asdict(PRESETS["share"]), "json") == PRESETS["share"]
    assert recipe_from(dataclasses.asdict(PRESETS["share-nano"]), "json") == PRESETS["share-nano"]
    with pytest.raises(UsageError, match="no stage 'x'"):
        PRESETS["base"].stage("x")

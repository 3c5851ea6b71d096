"""A grid file becomes the product it says; what is mistyped is refused with the file, the key and what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllava_edge.ablate.backbones import cell_spec
from tinyllava_edge.ablate.data import DataFiles, count_packs, prepare_data
from tinyllava_edge.ablate.grid import Data, Scale
from tinyllava_edge.ablate.grid_toml import read_grid
from tinyllava_edge.ablate.plan import Train, make_plan, scaled, waiting
from tinyllava_edge.errors import DataError, UsageError
from tinyllava_edge.train import recipes

REPOSITORY = Path(__file__).parents[2]
GRID = """
[grid]
towers = ["siglip", "clip"]
llms = ["nano"]
connectors = ["linear", "few"]
recipes = ["base-nano", "share-nano"]
data = ["mine"]
[connectors.few]
kind = "resampler"
num_queries = 16
num_layers = 1
[data.mine]
pretrain = "captions.json"
finetune = ["qa.json"]
images = "images"
[scale]
epochs = { pretrain = 1, finetune = 3.0 }
steps = { share-pretrain = 5 }
seeds = [0, 7]
[scale.every]
precision = "fp32"
[scale.stages.finetune]
batch_size = 4
[eval]
tasks = ["qa.json"]
images = "images"
[compare]
baseline = "siglip.nano.few.base-nano.mine"
"""


def row(k: int, picture: str | None, turns: int = 1) -> dict[str, object]:
    talk = [{"from": "human", "value": "<image>\nwhat?" if picture else "what?"}, {"from": "gpt", "value": "red"}]
    return {"id": k, "conversations": talk * turns, **({"image": picture} if picture else {})}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    captions = [row(k, f"{k}.png") for k in range(10)]
    qa = [row(k, f"{k // 3}.png") for k in range(21)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "qa.json").write_text(json.dumps(qa))
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path


def test_the_product_in_order_with_its_names(folder: Path) -> None:
    grid = read_grid(folder / "grid.toml")
    names = [cell.name for cell in grid.cells()]
    assert len(names) == 8 and names[0] == "siglip.nano.linear.base-nano.mine"
    assert names[1] == "siglip.nano.linear.share-nano.mine" and names[-1] == "clip.nano.few.share-nano.mine"
    assert grid.baseline == "siglip.nano.few.base-nano.mine" and grid.scale.seeds == (0, 7)
    assert grid.connectors[1].options == {"num_queries": 16, "num_layers": 1}
    assert grid.eval.tasks == (str(folder / "qa.json"),) and grid.data[0].finetune == (folder / "qa.json",)
    assert str(folder) not in json.dumps(grid.facts())


def test_connectors_with_fewer_tokens(folder: Path) -> None:
    """Their count is part of the name, and of the cell's spec; a Q-Former's own options are read."""
    text = GRID.replace('"linear"', '"avgpool-16"').replace('kind = "resampler"', 'kind = "qformer-5"')
    text = text.replace("num_queries = 16", "hidden_size = 64\nnum_heads = 2").replace(".linear.", ".avgpool-16.")
    (folder / "grid.toml").write_text(text)
    grid = read_grid(folder / "grid.toml")
    assert grid.connectors[1].options == {"hidden_size": 64, "num_heads": 2, "num_layers": 1}
    found = {cell.connector.kind: cell_spec(cell) for cell in grid.cells()}
    assert {kind: spec.visual_tokens for kind, spec in found.items()} == {"avgpool-16": 16, "qformer-5": 5}
    assert found["avgpool-16"].connector == "avgpool-16"


def test_the_shipped_grid_is_two_by_two_by_two() -> None:
    grid = read_grid(REPOSITORY / "train" / "ablate" / "nano.toml")
    assert len(grid.cells()) == 8
    assert {cell.recipe.name for cell in grid.cells()} == {"base-nano", "share-nano"}
    assert len(grid.towers) == len(grid.connectors) == len(grid.recipes) == 2


WRONG = {
    "not TOML": ("[grid]", "[grid", "can't be read as TOML"),
    "no grid": (GRID.split("[connectors", 1)[0], "\n", "[grid] is missing"),
    "no eval": ('[eval]\ntasks = ["qa.json"]\nimages = "images"\n', "", "[eval] is missing"),
    "unknown table": ("[grid]", "[grids]\n[grid]", "unknown key 'grids'"),
    "unknown key": ("[grid]", "[grid]\nvision = 1", "unknown key 'vision'"),
    "unknown tower": ('"clip"', '"dino"', "'dino', which is not shipped"),
    "unknown connector": ('"linear"', '"mlp9"', "unknown kind 'mlp9'"),
    "unknown recipe": ('"base-nano"', '"bas"', "unknown recipe 'bas'"),
    "unknown data": ('data = ["mine"]', 'data = ["mine", "yours"]', "'yours', which is not built in"),
    "twice": ('["siglip", "clip"]', '["clip", "clip"]', "names 'clip' twice"),
    "empty": ('["siglip", "clip"]', "[]", "at least one name"),
    "number": ('["siglip", "clip"]', "[1]", "at least one name"),
    "path in a name": ('"linear"', '"../x"', "'../x': names are letters"),
    "missing file": ('"captions.json"', '"none.json"', "no such file"),
    "missing folder": ('images = "images"\n[scale]', 'images = "none"\n[scale]', "no directory"),
    "option": ("num_queries = 16", "num_queries = 0", "must be a whole number of at least 1"),
    "option of another": ('kind = "resampler"', 'kind = "linear"', "is no option of linear"),
    "pictures": ("[scale]", "[scale]\npictures = 0", "at least 1"),
    "bool": ("[scale]", "[scale]\npictures = true", "at least 1"),
    "epochs": ("pretrain = 1,", "pretrain = nan,", "above 0"),
    "steps": ("share-pretrain = 5", "share-pretrain = 5.5", "above 0"),
    "seeds": ("[0, 7]", "[0, 0]", "different whole numbers"),
    "seed": ("[0, 7]", "[-1]", "at least 0"),
    "baseline": ("few.base-nano.mine", "few.base.mine", "is no cell"),
    "unused table": ('["linear", "few"]', '["linear"]', "[connectors.few] is not named in [grid]"),
    "type of like": ("[connectors.few]", '[towers.clip]\nlike = []\npath = "x"\n[connectors.few]', "= [] is unknown"),
    "type of kind": ('kind = "resampler"', "kind = []", "unknown kind []"),
    "stage": ("[scale.stages.finetune]", "[scale.stages.nosuch]", "'nosuch', which no recipe has"),
    "renamed stages": ('precision = "fp32"', 'name = "../../x"', "renames a stage"),
    "renamed stage": ("batch_size = 4", 'name = "x"', "renames a stage"),
    "epochs of a stage": ("{ pretrain = 1", "{ pretain = 1", "'pretain', which no recipe has"),
    "steps of a stage": ("{ share-pretrain", "{ share = 1, share-pretrain", "'share', which no recipe has"),
    "limit": ("[eval]", "[eval]\nlimit = 0", "at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_grid_is_refused(case: str, folder: Path) -> None:
    before, after, message = WRONG[case]
    path = folder / "grid.toml"
    assert before in GRID
    path.write_text(GRID.replace(before, after))
    with pytest.raises(UsageError) as error:
        read_grid(path)
    assert message in error.value.message and error.value.hint
    if "recipe" not in case:  # recipes.load names the recipe
        assert str(path) in error.value.message


def test_a_stage_whose_name_is_no_directory_is_refused(folder: Path) -> None:
    stage = 'name = "{}"\ntemplate = "{}"\nllm = "frozen"\nlearning_rate = 1e-3\nbatch_size = 2\n'
    stages = ("pretrain", "pretrain"), ("../../x", "model"), ("finetune", "model")
    text = "".join("[[stages]]\n" + stage.format(*names) for names in stages)
    (folder / "mine.toml").write_text(f'name = "mine"\n{text}')
    grid = GRID.replace('"base-nano", ', '"mine", ').replace("few.base-nano", "few.mine")
    (folder / "grid.toml").write_text(grid + '[recipes.mine]\nfile = "mine.toml"\n')
    with pytest.raises(UsageError, match=r"'\.\./\.\./x': names are letters"):
        read_grid(folder / "grid.toml")


def test_a_missing_or_binary_grid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("none.toml", "b.toml"):
        with pytest.raises(UsageError, match="can't be read as TOML"):
            read_grid(tmp_path / name)


def test_packs_are_counted_as_the_trainer_packs_them(folder: Path) -> None:
    rows = [row(k, f"{k // 3}.png") for k in range(7)] + [row(8, None), row(9, "0.png", turns=2)]
    (folder / "mixed.json").write_text("\n".join(json.dumps(item) for item in rows))  # JSON lines
    assert count_packs([folder / "mixed.json"], 2) == (7, 3, 10)  # 2 + 2 + 1 packs, 2 rows alone
    assert count_packs([folder / "mixed.json"], 1) == (9, 3, 10)
    for text in ("[", "[1]", "{}\n[]"):
        (folder / "bad.json").write_text(text)
        with pytest.raises(DataError, match="bad.json"):
            count_packs([folder / "bad.json"], 1)


def test_data_is_cut_to_the_first_pictures(folder: Path) -> None:
    data = Data("mine", (folder / "captions.json",), (folder / "qa.json",), folder / "images")
    files = prepare_data(data, folder / "out", 3)
    assert [len(json.loads(path.read_text())) for path in (*files.pretrain, *files.finetune)] == [3, 9]
    assert prepare_data(data, folder / "out2", None).finetune == (folder / "qa.json",)
    assert not (folder / "out2").exists()
    (folder / "text.json").write_text(json.dumps([row(1, None)]))
    with pytest.raises(DataError, match="no row with a picture"):
        prepare_data(Data("t", (folder / "text.json",), (), folder / "images"), folder / "out", 3)


@pytest.mark.parametrize(("packs", "steps"), [(100, 7), (1, 1), (64, 3), (7, 13), (1000, 1)])
def test_wanted_steps_are_what_trainer_will_take(packs: int, steps: int) -> None:
    import math

    stage, found = scaled(recipes.load("base-nano").stages[0], Scale(steps={"": steps}), 3, packs)
    per_epoch = max(1, math.ceil(packs / stage.batch_size))
    assert found == steps == math.ceil(stage.epochs * per_epoch) and stage.seed == 45


def test_stages_that_cells_share_are_planned_once(folder: Path) -> None:
    """8 cells x 2 seeds: share's first stage is base's, so 8 models, 8 first, 8 second, 16 last stages, 16 scores."""
    grid = read_grid(folder / "grid.toml")
    data = {item.name: prepare_data(item, folder / "out", None) for item in grid.data}
    plan = make_plan(grid, data, 21, folder / "out")
    kinds = [type(unit.work).__name__ for unit in plan.units.values()]
    assert (len(plan.runs), kinds.count("Init"), kinds.count("Train"), kinds.count("Evaluate")) == (16, 8, 32, 16)
    assert len({unit.out for unit in plan.units.values()}) == len(plan.units) == len(waiting(plan))
    for unit in waiting(plan):
        assert not unit.after or list(plan.units).index(unit.after) < list(plan.units).index(unit.key)
    steps = {u.work.stage.name: u.work.steps for u in plan.units.values() if isinstance(u.work, Train)}
    assert steps == {"pretrain": 1, "share-pretrain": 5, "finetune": 6}  # 7 packs by 4: 2 a pass, 3 passes
    assert all(u.work.stage.precision == "fp32" for u in plan.units.values() if isinstance(u.work, Train))


def test_a_changed_file_changes_the_keys_behind_it_only(folder: Path) -> None:
    grid = read_grid(folder / "grid.toml")

    def keys() -> set[str]:
        files = DataFiles("mine", grid.data[0].pretrain, grid.data[0].finetune, folder / "images")
        return set(make_plan(grid, {"mine": files}, 21, folder / "out").units)

    before = keys()
    (folder / "qa.json").write_text(json.dumps([row(k, f"{k // 3}.png") for k in range(18)]))
    kept = before & keys()
    assert len(kept) == 8 + 8 + 8  # new models, first stages, share's second ones; last stages and scores are new

"""GRID.toml → Grid. Relative paths start from the file's directory; every error names the file and the key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..spec import LLM_BACKBONES, VISION_BACKBONES
from ..toml_files import read_toml
from ..train import recipes
from .grid import Backbone, Connector, Data, EvalPlan, Grid, Scale

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED_TOWERS = {"siglip": "NanoSig", "clip": "NanoC"}  # name → key of VISION_BACKBONES
SHIPPED_LLMS = {"nano": "Nano"}
BUILT_IN_DATA = ("easy-vqa", "easy-vqa+scenes")
TABLES = ("grid", "towers", "llms", "connectors", "recipes", "data", "scale", "eval", "compare")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,63}")  # names become directories
_EXAMPLE = "compare with train/ablate/nano.toml"


class _Reader:
    """The parsed file, with checks that name the place."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.resolve().parent
        self.value = read_toml(path, _EXAMPLE)

    def fail(self, where: str, message: str, hint: str = _EXAMPLE) -> UsageError:
        return UsageError(f"{self.path}: {where} {message}", hint)

    def table(self, name: str, known: Sequence[str] | None) -> dict[str, Any]:
        """A table of the file, empty when absent, with known keys only."""
        found = self.value.get(name, {})
        if not isinstance(found, dict):
            raise self.fail(f"[{name}]", "is not a table")
        return self.keys(found, f"[{name}]", known)

    def keys(self, found: dict[str, Any], where: str, known: Sequence[str] | None) -> dict[str, Any]:
        unknown = [key for key in found if known is not None and key not in known]
        if unknown:
            raise self.fail(where, f"has the unknown key {unknown[0]!r}", f"known: {', '.join(known or ())}")
        return found

    def names(self, table: str, key: str) -> list[str]:
        """A list of texts without repetition, at least one."""
        found = self.value[table].get(key)
        if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
            raise self.fail(f"[{table}] {key}", "must be a list with at least one name")
        if len(set(found)) != len(found):
            raise self.fail(f"[{table}] {key}", f"names {max(found, key=found.count)!r} twice")
        return found

    def entry(self, table: str, name: str, known: Sequence[str]) -> dict[str, Any] | None:
        """[table.name], or None."""
        found = self.table(table, None).get(name)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self.fail(f"[{table}.{name}]", "is not a table")
        return self.keys(found, f"[{table}.{name}]", known)

    def named(self, table: str, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise self.fail(f"[grid] {table}", f"has {name[:80]!r}: names are letters, digits, `_`, `+` and `-`")
        return name

    def place(self, text: Any, where: str) -> Path:
        if not isinstance(text, str) or not text or "\0" in text:
            raise self.fail(where, "must be a path")
        return self.folder / Path(text).expanduser()

    def whole(self, found: Any, where: str, lowest: int) -> int:
        if type(found) is not int or not lowest <= found < 2**31:
            raise self.fail(where, f"= {found!r}: must be a whole number of at least {lowest}")
        return found


def read_grid(path: Path) -> Grid:
    """Read and check a grid.

    Raises:
        UsageError: an unreadable file, an unknown key or name, or a value out of range.
    """
    read = _Reader(path)
    read.keys(read.value, "the file", TABLES)
    read.table("grid", ("towers", "llms", "connectors", "recipes", "data"))
    if "grid" not in read.value:
        raise read.fail("[grid]", "is missing")
    if "eval" not in read.value:
        raise read.fail("[eval]", "is missing", 'write tasks = ["easy_vqa"] in it')
    grid = Grid(
        towers=_each(read, "towers", lambda name: _backbone(read, "towers", name, SHIPPED_TOWERS, VISION_BACKBONES)),
        llms=_each(read, "llms", lambda name: _backbone(read, "llms", name, SHIPPED_LLMS, LLM_BACKBONES)),
        connectors=_each(read, "connectors", lambda name: _connector(read, name)),
        recipes=_each(read, "recipes", lambda name: _recipe(read, name)),
        data=_each(read, "data", lambda name: _data(read, name)),
        scale=_scale(read),
        eval=_eval(read),
        baseline="",
    )
    _unused(read)
    _known_stages(read, grid)
    return dataclasses.replace(grid, baseline=_baseline(read, grid))


def _each(read: _Reader, key: str, make: Callable[[str], Any]) -> tuple[Any, ...]:
    return tuple(make(read.named(key, name)) for name in read.names("grid", key))


def _backbone(read: _Reader, table: str, name: str, shipped: Mapping[str, str], known: Mapping[str, Any]) -> Backbone:
    entry = read.entry(table, name, ("like", "path"))
    if entry is None:
        if name not in shipped:
            raise read.fail(
                f"[grid] {table}", f"names {name!r}, which is not shipped",
                f"shipped: {', '.join(shipped)}; others get a table [{table}.{name}] with like and path",
            )  # fmt: skip
        return Backbone(name, shipped[name], PACKAGE / known[shipped[name]].hub_id)
    like = entry.get("like")
    if not isinstance(like, str) or like not in known:
        raise read.fail(f"[{table}.{name}] like", f"= {like!r} is unknown", f"known: {', '.join(known)}")
    path = read.place(entry.get("path"), f"[{table}.{name}] path")
    if not (path / "config.json").is_file():
        raise read.fail(f"[{table}.{name}]", f"path {path}: no config.json here", "name a Hugging Face directory")
    return Backbone(name, like, path)


def _connector(read: _Reader, name: str) -> Connector:
    from ..connectors import connector_options

    keys = ("kind", "num_queries", "num_layers", "hidden_size", "num_heads")
    entry = dict(read.entry("connectors", name, keys) or {"kind": name})
    kind = entry.pop("kind", None)
    try:
        options = connector_options(kind)
    except CheckpointError as error:
        raise read.fail("[grid] connectors", f"has the unknown kind {kind!r}", error.hint) from error
    for key, value in entry.items():
        if key not in options:
            raise read.fail(f"[connectors.{name}]", f"{key} is no option of {kind}")
        read.whole(value, f"[connectors.{name}] {key}", 1)
    return Connector(name, kind, entry)


def _recipe(read: _Reader, name: str) -> recipes.Recipe:
    entry = read.entry("recipes", name, ("file",))
    if entry is None:
        return recipes.load(name)
    found = recipes.load(read.place(entry.get("file"), f"[recipes.{name}] file"))
    return dataclasses.replace(found, name=name)


def _data(read: _Reader, name: str) -> Data:
    entry = read.entry("data", name, ("pretrain", "finetune", "images"))
    if entry is None:
        if name not in BUILT_IN_DATA:
            raise read.fail(
                "[grid] data", f"names {name!r}, which is not built in",
                f"built in: {', '.join(BUILT_IN_DATA)}; others get a table [data.{name}]",
            )  # fmt: skip
        return Data(name)
    found: dict[str, tuple[Path, ...]] = {}
    for key in ("pretrain", "finetune"):
        given = entry.get(key)
        listed = [given] if isinstance(given, str) else given
        if not isinstance(listed, list) or not listed:
            raise read.fail(f"[data.{name}] {key}", "must be a file or a list of files")
        found[key] = tuple(read.place(text, f"[data.{name}] {key}") for text in listed)
        for file in found[key]:
            if not file.is_file():
                raise read.fail(f"[data.{name}] {key}", f"names {file}: no such file", "check the path")
    images = read.place(entry.get("images"), f"[data.{name}] images")
    if not images.is_dir():
        raise read.fail(f"[data.{name}] images", f"names {images}: no directory", "check the path")
    return Data(name, found["pretrain"], found["finetune"], images)


def _scale(read: _Reader) -> Scale:
    table = read.table("scale", [field.name for field in dataclasses.fields(Scale)])
    pictures = table.get("pictures")
    if pictures is not None:
        read.whole(pictures, "[scale] pictures", 1)
    seeds = table.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len({str(seed) for seed in seeds}) != len(seeds):
        raise read.fail("[scale] seeds", "must be a list of different whole numbers")
    stages = table.get("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(value, dict) for value in stages.values()):
        raise read.fail("[scale.stages]", "must hold tables, one per stage")
    every = table.get("every", {})
    if not isinstance(every, dict):
        raise read.fail("[scale.every]", "is not a table")
    return Scale(
        pictures=pictures,
        every=every,
        epochs=_by_stage(read, table.get("epochs", {}), "epochs", (int, float)),
        steps=_by_stage(read, table.get("steps", {}), "steps", (int,)),
        stages=stages,
        seeds=tuple(read.whole(seed, "[scale] seeds", 0) for seed in seeds),
    )


def _by_stage(read: _Reader, found: Any, key: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    listed = found if isinstance(found, dict) else {"": found}
    for value in listed.values():
        if type(value) not in kinds or not 0 < value < 2**31:
            raise read.fail(f"[scale] {key}", f"= {value!r}: must be a number above 0, or a table of them by stage")
    return listed


def _eval(read: _Reader) -> EvalPlan:
    table = read.table("eval", [field.name for field in dataclasses.fields(EvalPlan)])
    limit = table.get("limit")
    if limit is not None:
        read.whole(limit, "[eval] limit", 1)
    tasks = [str(read.folder / name) if name.endswith(".json") else name for name in read.names("eval", "tasks")]
    places = {key: read.place(table[key], f"[eval] {key}") if key in table else None for key in ("data", "images")}
    return EvalPlan(tuple(tasks), limit, places["data"], places["images"])


def _baseline(read: _Reader, grid: Grid) -> str:
    names = [cell.name for cell in grid.cells()]
    wanted = read.table("compare", ("baseline",)).get("baseline", names[0])
    if wanted not in names:
        raise read.fail("[compare] baseline", f"= {wanted!r} is no cell", f"cells: {', '.join(names)}")
    return str(wanted)


def _known_stages(read: _Reader, grid: Grid) -> None:
    """A scale for a stage that no recipe of the grid has would change nothing; stage names become directories."""
    for name in (stage.name for recipe in grid.recipes for stage in recipe.stages):
        read.named("recipes", name)
    if any("name" in changes for changes in (grid.scale.every, *grid.scale.stages.values())):
        raise read.fail("[scale]", "renames a stage", "name it in a recipe file")
    known = list(dict.fromkeys(stage.name for recipe in grid.recipes for stage in recipe.stages))
    for key in ("epochs", "steps", "stages"):
        for name in getattr(grid.scale, key):
            if name and name not in known:
                raise read.fail(
                    f"[scale] {key}", f"has the stage {name[:80]!r}, which no recipe has", f"known: {', '.join(known)}"
                )


def _unused(read: _Reader) -> None:
    """A table that no entry of [grid] names is most likely a mistyped name."""
    for table in ("towers", "llms", "connectors", "recipes", "data"):
        for name in read.table(table, None):
            if name not in read.value["grid"][table]:
                raise read.fail(f"[{table}.{name}]", "is not named in [grid]", f"add it to {table}, or remove it")

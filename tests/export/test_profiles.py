"""The profiles say where their numbers come from, the TOML files say the same, and nothing mistyped is taken."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.export.profiles import PAGE_CONTEXT, PRESETS, DeviceProfile, load, profile_from
from tinyllava_edge.runtimes.gguf_sizes import repacked_types

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "export"


def test_each_preset_has_a_file_that_says_the_same() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert load(FOLDER / f"{name}.toml") == preset
        assert load(name) is preset and preset.name == name
        written = tomllib.loads((FOLDER / f"{name}.toml").read_text())
        assert profile_from(written, name) == preset


def test_every_number_and_choice_has_a_source() -> None:
    """And a file that is named as a source is there."""
    for preset in PRESETS.values():
        sourced = {"memory_bytes", "budget_bytes", "n_threads", "n_ctx", "max_visual_tokens", "llm", "vision"}
        sourced |= {"cpu_features"} | ({"mmproj"} if preset.mmproj else set()) | ({"web"} if preset.web else set())
        sourced |= {"mobile"} if preset.mobile else set()
        sourced |= set(preset.sources) & {"trims"} | (set() if preset.trims else {"trims"})
        assert sourced == set(preset.sources), preset.name
        for text in preset.sources.values():
            for path in re.findall(r"\b(?:docs|benchmarks|runtimes)/[\w./]+", text):
                assert (ROOT / path.rstrip(".:")).is_file(), (preset.name, path)


def test_the_browsers_context_is_the_pages() -> None:
    source = (ROOT / "runtimes" / "web" / "src" / "engine" / "answer.ts").read_text()
    kept = re.search(r"^const MOST_POSITIONS = (\d+);", source, re.MULTILINE)
    assert kept is not None and "Math.min(spec.max_length, MOST_POSITIONS)" in source
    assert PRESETS["browser"].n_ctx == PAGE_CONTEXT == int(kept[1])


def test_every_field_is_explained() -> None:
    source = (ROOT / "tinyllava_edge" / "export" / "profiles.py").read_text()
    for field in dataclasses.fields(DeviceProfile):
        line = next(line for line in source.split("\n") if line.startswith(f"    {field.name}: "))
        assert source.split(line, 1)[1].lstrip().startswith('"""'), field.name


def test_no_preset_asks_for_what_its_device_cannot_run() -> None:
    for preset in PRESETS.values():
        if preset.device != "cpu":  # CUDA has no kernels for dynamic int8, and WebGPU computes it wrong
            assert "int8" not in preset.vision, preset.name
    phone = PRESETS["phone-arm64"]
    assert phone.llm[0] == "q4_0" and phone.imatrix
    q4_0 = 2  # ggml's number of the type
    assert q4_0 in repacked_types(phone.system_info) and q4_0 in repacked_types(PRESETS["laptop-cpu"].system_info)
    assert repacked_types(b"") == {}


GOOD = """\
name = "mine"
description = "A board of mine."
device = "cpu"
memory_bytes = 1_000_000_000
budget_bytes = 700_000_000
n_threads = 2
n_ctx = 512
max_visual_tokens = 64
llm = ["q4_k_m"]
vision = ["int8"]
"""
WRONG = {
    "unknown key": (GOOD + "theads = 2\n", "unknown key 'theads'", "n_threads"),
    "missing": (GOOD.replace("n_ctx = 512\n", ""), "n_ctx is missing", "budget_bytes"),
    "type": (GOOD.replace("n_ctx = 512", 'n_ctx = "512"'), "n_ctx = '512': not int", "export/"),
    "bool as int": (GOOD.replace("n_threads = 2", "n_threads = true"), "n_threads = True: not int", ""),
    "float": (GOOD.replace("700_000_000", "7e8"), "budget_bytes = 700000000.0: not int", ""),
    "no list": (GOOD.replace('["int8"]', '"int8"'), "vision = 'int8': not a list of texts", ""),
    "list of numbers": (GOOD.replace('["int8"]', "[8]"), "vision = a list: not a list of texts", ""),
    "int as bool": (GOOD + "imatrix = 1\n", "imatrix = 1: not bool", ""),
    "unknown llm": (GOOD.replace("q4_k_m", "q9"), "llm: unknown 'q9'", "q4_k_m"),
    "unknown vision": (GOOD.replace("int8", "int9"), "vision: unknown 'int9'", "w8"),
    "unknown mmproj": (GOOD + 'mmproj = ["q2"]\n', "mmproj: unknown 'q2'", "q8_0"),
    "unknown web": (GOOD + 'web = ["q2"]\n', "web: unknown 'q2'", "q4f16"),
    "unknown mobile": (GOOD + 'mobile = ["ncnn"]\n', "mobile: unknown 'ncnn'", "litert"),
    "twice": (GOOD.replace('["q4_k_m"]', '["q4_0", "q4_0"]'), "llm: one is named twice", ""),
    "empty": (GOOD.replace('["q4_k_m"]', "[]"), "is empty", "at least one"),
    "device": (GOOD.replace('"cpu"', '"npu"'), "device = 'npu'", "cuda"),
    "page": (GOOD.replace('"cpu"', '"web"') + 'web = ["q4"]\n', "n_ctx = 512", "keeps 2048"),
    "budget over memory": (GOOD.replace("700_", "2_700_"), "budget_bytes = 2700000000", "..1,000,000,000"),
    "no memory": (GOOD.replace("1_000_000_000", "0"), "memory_bytes = 0", ""),
    "huge": (GOOD.replace("512", "1" + 30 * "0"), "n_ctx = a very large number", "1,048,576"),
    "negative": (GOOD.replace("n_threads = 2", "n_threads = -1"), "n_threads = -1", ""),
    "feature": (GOOD + 'cpu_features = ["neon"]\n', "cpu_features: 'neon'", "NEON"),
    "name": (GOOD.replace('"mine"', '"../mine"'), "name = '../mine'", "letters"),
    "description": (GOOD.replace("of mine", "of\\nmine"), "description = ", "one line"),
    "source": (GOOD + '[sources]\ntheads = "x"\n', "sources: unknown key 'theads'", "field"),
    "sources": (GOOD + "[sources]\nn_ctx = 3\n", "sources = a dict: not a table of texts", ""),
    "long key": (GOOD + "a" * 20_000 + " = 2\n", "unknown key 'aaa", "n_threads"),
    "long features": (
        GOOD + f"cpu_features = {[f'A{n}' for n in range(33)]}\n",
        "cpu_features: 33 words",
        "32 at most",
    ),
    "feature twice": (GOOD + 'cpu_features = ["NEON", "NEON"]\n', "cpu_features: one is named twice", "each once"),
    "odd source": (GOOD + '[sources]\nn_ctx = "a\\u001b[2J"\n', "sources: n_ctx = 'a\\x1b[2J'", "one line"),
    "long source": (GOOD + f'[sources]\nn_ctx = "{201 * "a"}"\n', "sources: n_ctx = 'aaa", "200 characters"),
    "too large": (GOOD + (1 << 20) * "#", "larger than 1,048,576 bytes", "export/"),
    "not TOML": ("name = ", "can't be read as TOML", "export/"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(case: str, tmp_path: Path) -> None:
    text, message, hint = WRONG[case]
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert str(path) in error.value.message and message in error.value.message and hint in error.value.hint
    assert error.value.message.isprintable() and len(error.value.message) < len(str(path)) + 250


def test_a_directory_is_no_profile(tmp_path: Path) -> None:
    """Pipes and endless files: tests/test_toml_files.py."""
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match="no regular file"):
        load(tmp_path / "folder.toml")
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["\x1b[2J.toml", "a" * 100_000 + ".toml", "a" * 100_000, "a\0.toml"])
def test_odd_names_are_not_repeated(name: str) -> None:
    with pytest.raises(UsageError) as error:
        load(name)
    assert error.value.message.isprintable() and len(error.value.message) < 300


def test_a_right_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(GOOD)
    mine = load(tmp_path / "mine.toml")
    assert (mine.llm, mine.n_ctx, mine.budget_bytes, mine.imatrix) == (("q4_k_m",), 512, 700_000_000, False)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown profile 'phone'") as error:
        load("phone")
    assert "phone-arm64" in error.value.hint and ".toml" in error.value.hint
    with pytest.raises(UsageError, match="can't be read"):
        load(tmp_path / "none.toml")

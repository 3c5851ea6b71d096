"""The edge runtime on ARM64, in Debian's root under qemu: its stages and its answers agree with this machine's.

Made by `make arm64` (docs/arm64.md); skipped where that was not run.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tinyllava_edge.errors import EngineError, UsageError
from tinyllava_edge.runtimes.edge import open_edge

from .conftest import BUILT, ROOT

pytestmark = pytest.mark.timeout(3600)

PROBE = ROOT / "tests" / "arm64" / "probe.py"
# ONNX Runtime's 8-bit kernels there: SVE's ummla (all that qemu has but SME), udot, and plain Armv8.0
CORES = ("max", "cortex-a76", "cortex-a53")
REPACKED = ("fp32+q8_0", "fp32+q4_k_m", "fp32+q4_0")  # by libraries that have dotprod and i8mm
FAST = BUILT / "llama-armv8.2-a+dotprod+i8mm"

# Build → largest difference of image embeddings and of first logits, as a share of the largest value. Float32 differs
# by the order of sums alone; so do whole numbers, and float16 weights that a core without float16 arithmetic multiplies
# in float32. 4 and 8 bits beside floats round to other neighbours wherever sums differ by a last bit: that is as wide
# as what the type costs, so `check_type` looks besides.
STAGES = {
    "fp32+f32": (1e-5, 1e-5),
    "fp16+f32": (5e-4, 5e-4),
    "int8+f32": (1e-5, 1e-5),
    "w8+f32": (4e-2, 4e-2),
    "w4+f32": (4e-2, 4e-2),
    "fp32+f16": (1e-5, 4e-3),
    "fp32+q8_0": (1e-5, 4e-2),
    "fp32+q4_k_m": (1e-5, 6e-2),
    "fp32+q4_0": (1e-5, 4e-2),
}
HALF = ("max", "cortex-a76")  # have float16 arithmetic, in which ONNX Runtime then adds, too
ADDED_IN_HALF = (2e-2, 2e-2)
SATURATED = (4e-2, 4e-2)
LIKENESS = 0.5  # cosine of two machines' rounding: 0.66 to 1.00 was measured for one type, 0.43 at most for two


def limits(build: str, core: str) -> tuple[float, float]:
    """What may differ between a core and this machine."""
    if build == "fp16+f32" and core in HALF:
        return ADDED_IN_HALF
    cpuinfo = Path("/proc/cpuinfo")
    if build == "int8+f32" and not (cpuinfo.is_file() and "vnni" in cpuinfo.read_text()):
        return SATURATED  # x86 without VNNI adds 8-bit products in 16 bits, where they may saturate
    return STAGES[build]


def rounding(side: Mapping[str, Any], build: str) -> npt.NDArray[np.float64]:
    """What a build's type does to the stage that it concerns: the difference from fp32+f32 on the same machine."""
    stage = "logits" if build.startswith("fp32") else "embeds"
    found: npt.NDArray[np.float64] = side[f"{build}/{stage}"].astype(np.float64) - side[f"fp32+f32/{stage}"]
    return found.ravel()


def check_type(here: Mapping[str, Any], there: Mapping[str, Any], build: str, core: str) -> None:
    """The same weights were rounded in the same way, or it is another file that ran: see LIKENESS."""
    ours, theirs = rounding(here, build), rounding(there, build)
    lengths = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
    assert lengths[1] > lengths[0] / 2, f"{build} on {core}: {lengths[1]:.1e} from float32, here {lengths[0]:.1e}"
    if build != "fp16+f32" or core not in HALF:  # adding in float16 moves values more than rounded weights do
        cosine = float(ours @ theirs) / (lengths[0] * lengths[1])
        assert cosine > LIKENESS, f"{build} on {core}: its rounding is like this machine's by {cosine:.2f} only"


def distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.abs(one.astype(np.float64) - other).max() / np.abs(one).max())


def probe(agreement: Any, bundle: Path, picture: Path, out: Path, builds: list[str], **where: Any) -> Any:
    """Stages there, as probe.py names them."""
    script = Path("/repository") / PROBE.relative_to(ROOT)
    arguments = [script, "/bundle", f"/data/{picture.name}", "/out/there.npz", *builds]
    agreement.there(arguments, bundle=bundle, data=picture.parent, out=out, **where)
    return np.load(out / "there.npz")


def test_info_there(agreement: Any) -> None:
    said = json.loads(agreement.there(["-m", "tinyllava_edge", "info", "--json"]))
    assert "aarch64" in said["platform"] and said["problems"] == []
    assert "NEON = 1" in said["engines"]["llama_cpp_system_info"]
    assert "CPUExecutionProvider" in said["engines"]["onnxruntime_providers"]
    versions = {**said["installed"]["device"], "easy-vqa": said["installed"]["train"]["easy-vqa"]}
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().replace("_", "-").lower()))
    assert {name: versions[name] for name in ("numpy", "pillow", "onnxruntime", "llama-cpp-python", "easy-vqa")} == {
        name: pins[name] for name in ("numpy", "pillow", "onnxruntime", "llama-cpp-python", "easy-vqa")
    }


def test_nothing_of_this_machine_can_be_written_there(agreement: Any, tmp_path: Path) -> None:
    """Repository, bundle and the kernel's settings are read-only; what else is written is gone afterwards."""
    (tmp_path / "file").write_text("kept")
    code = """
import os
places = ["/repository/x", "/bundle/file", "/opt/site/llama_cpp/lib/x", "/proc/sys/kernel/core_pattern"]
for place in places:
    try:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT))
        print("written")
    except OSError as error:
        print(error.strerror)
open("/tmp/x", "w").write("lost")
print(os.path.exists("/sys/class"))
"""
    said = agreement.there(["-c", code], bundle=tmp_path).splitlines()
    assert said[:3] == ["Read-only file system"] * 3 and said[4:] == ["False"]
    assert said[3] in ("Read-only file system", "Permission denied")  # as root, as another user
    assert (tmp_path / "file").read_text() == "kept" and not (BUILT / "root" / "tmp" / "x").exists()


@pytest.fixture(scope="session")
def stages_here(agreement: Any, all_types: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("here") / "here.npz"
    agreement.here([PROBE, all_types, picture, out, *STAGES])
    return np.load(out)


@pytest.mark.parametrize("core", CORES)
def test_stages_agree(
    agreement: Any, all_types: Path, picture: Path, stages_here: Any, core: str, tmp_path: Path
) -> None:
    there = probe(agreement, all_types, picture, tmp_path, list(STAGES), cpu=core)
    assert str(there["machine"]) == "aarch64" != str(stages_here["machine"])
    found = {}
    for build in STAGES:
        assert not there[f"{build}/repacked"], "the baseline has no kernels for that"
        assert np.array_equal(there[f"{build}/pixels"], stages_here[f"{build}/pixels"]), build
        pairs = [(stages_here[f"{build}/{stage}"], there[f"{build}/{stage}"]) for stage in ("embeds", "logits")]
        found[build] = tuple(distance(*pair) for pair in pairs)
    print({build: tuple(f"{value:.1e}" for value in values) for build, values in found.items()})
    for build, values in found.items():
        assert all(value <= most for value, most in zip(values, limits(build, core), strict=True)), (build, values)
        if build != "fp32+f32":
            check_type(stages_here, there, build, core)
    assert np.array_equal(there["fp32+f32/tokens"], stages_here["fp32+f32/tokens"])


@pytest.mark.parametrize("core", CORES)
def test_another_file_in_its_place_is_seen(stages_here: Any, core: str) -> None:
    """Float32 or another type in a build's place, however wide the limits are; an exact copy is not reported."""
    for builds in ([b for b in STAGES if b.endswith("+f32")], [b for b in STAGES if b.startswith("fp32+")]):
        for build in builds:
            for other in builds:
                if build == "fp32+f32" or (other != "fp32+f32" and build == "fp16+f32" and core in HALF):
                    continue
                there = dict(stages_here)
                for stage in ("embeds", "logits"):
                    there[f"{build}/{stage}"] = stages_here[f"{other}/{stage}"]
                if other == build:
                    check_type(stages_here, there, build, core)
                else:
                    with pytest.raises(AssertionError, match=re.escape(build)):
                        check_type(stages_here, there, build, core)


@pytest.mark.parametrize("core", ["max", "cortex-a53"])
def test_trained_answers_agree(agreement: Any, demo_bundle: Path, core: str) -> None:
    builds = agreement.BUILDS.split(",")
    found = agreement.compare(demo_bundle, builds, [core], 200)
    for build in builds:
        shares = found["cores"][core][build]
        assert found["questions"] == 200 and len(found["answers"][build]) == 200
        assert shares["right_here"] > 0.9, "an untrained model agrees with anything"
        assert shares["equal"] >= agreement.LEAST, shares["differ"]


def test_the_comparison_can_fail(agreement: Any, all_types: Path, tmp_path: Path) -> None:
    """Other files there than here: the shares say so."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, build in ((first, "fp32+f32"), (second, "w4+q4_0")):
        folder.mkdir()
        agreement.here(agreement.eval_command(all_types, [build], 12, folder / "answers.jsonl"))
    ours, theirs = (agreement.answers(folder, "", True)[0] for folder in (first, second))
    found = agreement.agreement(ours, theirs)
    assert found["equal"] < agreement.LEAST and found["differ"]
    assert agreement.agreement(ours, ours)["equal"] == 1


def test_cores_and_builds_named_twice_count_once(agreement: Any, all_types: Path) -> None:
    found = agreement.compare(all_types, ["fp32+f32"] * 2, ["max", "max"], 3)
    assert list(found["cores"]) == list(found["there"]) == ["max"] and list(found["cores"]["max"]) == ["fp32+f32"]
    assert [list(row) for row in found["answers"]["fp32+f32"]] == [
        ["id", "image", "question", "expected", "here", "max"]
    ] * 3
    assert "NEON = 1" in found["there"]["max"]["llama_cpp_system_info"]


def test_a_core_is_tried_before_anything_is_asked(agreement: Any, all_types: Path) -> None:
    """The last of them, too; so many questions would need more time than there is."""
    with pytest.raises(UsageError, match="qemu knows no such core"):
        agreement.compare(all_types, ["fp32+f32"], ["max", "../zz"], 100_000)


def test_a_folder_to_copy_to_a_device(agreement: Any, all_types: Path, picture: Path, tmp_path: Path) -> None:
    """The folder of docs/arm64.md is all that Python needs, beside Debian's own."""
    site = tmp_path / "site"
    shutil.copytree(BUILT / "root" / "opt" / "site", site)
    assert not (site / "easy_vqa").exists(), "questions are no part of what a device needs"
    for library in (BUILT / "llama").glob("*.so*"):
        shutil.copy2(library, site / "llama_cpp" / "lib", follow_symlinks=False)
    shutil.copytree(ROOT / "tinyllava_edge", site / "tinyllava_edge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(picture, tmp_path)
    command = ["run", "/bundle", "--build", "fp32+f32", "--allow-unverified", "-n", "6", "-t", "1", "--json"]
    words = ["tinyllava-edge", *command, "--image", f"/data/{picture.name}", "what color is the shape?"]
    code = f"""
import runpy, sys
sys.path.insert(0, "/data/site")
sys.argv = {words!r}
runpy.run_module("tinyllava_edge", run_name="__main__")
"""
    said = json.loads(agreement.there(["-E", "-c", code], bundle=all_types, data=tmp_path, cpu="cortex-a53"))
    with open_edge(all_types, "fp32+f32", n_threads=1, allow_unverified=True) as edge:
        assert said["answer"] == edge.answer(picture, words[-1], max_tokens=6).text


# kernels that need more than every core has


@pytest.fixture(scope="session")
def fast() -> Path:
    if not (FAST / "libllama.so").is_file():
        pytest.skip(f"no {FAST.name} (runtimes/native/build.sh --arch armv8.2-a+dotprod+i8mm)")
    return FAST


def test_repacked_weights_agree(
    agreement: Any, all_types: Path, picture: Path, stages_here: Any, fast: Path, tmp_path: Path
) -> None:
    """Phones' llama.cpp lays q4_0 out anew for the 8-bit matrix instructions; the answers are the same model's."""
    said = json.loads(agreement.there(["-m", "tinyllava_edge", "info", "--json"], llama=fast))
    info = said["engines"]["llama_cpp_system_info"]
    assert "DOTPROD = 1" in info and "MATMUL_INT8 = 1" in info and "REPACK = 1" in info
    builds = ["fp32+f32", "fp32+q8_0", "fp32+q4_k_m", "fp32+q4_0"]
    there = probe(agreement, all_types, picture, tmp_path, builds, llama=fast)
    for build in builds:
        assert bool(there[f"{build}/repacked"]) == (build in REPACKED), build
        value = distance(stages_here[f"{build}/logits"], there[f"{build}/logits"])
        print(f"{build}: {value:.1e}")
        assert value <= STAGES[build][1], build
        if build != "fp32+f32":
            check_type(stages_here, there, build, "max")


def test_a_core_without_them_needs_the_baseline(
    agreement: Any, all_types: Path, picture: Path, fast: Path, tmp_path: Path
) -> None:
    """A library for newer cores ends at an unknown instruction on an old one, which the baseline above does not."""
    with pytest.raises(EngineError, match=r"code 132|code -4|Illegal instruction"):
        probe(agreement, all_types, picture, tmp_path, ["fp32+q4_0"], llama=fast, cpu="cortex-a53")


# the scripts refuse what can't be meant


@pytest.mark.parametrize(
    ("script", "arguments", "code", "words"),
    [
        ("arm64-run.sh", [], 2, "nothing to run"),
        ("arm64-run.sh", ["--cpu"], 2, "needs a value"),
        ("arm64-run.sh", ["--cpu", "pentium", "--", "-V"], 2, "no such core"),
        ("arm64-run.sh", ["--cpu", ",", "--", "-V"], 2, "no such core"),
        ("arm64-run.sh", ["--cpu", "max,", "--", "-V"], 2, "no such core"),
        ("arm64-run.sh", ["--cpu", "../zz", "--", "-V"], 2, "no such core"),
        ("arm64-run.sh", ["--cpu", "max,foo=bar", "--", "-V"], 2, "'max-arm-cpu.foo' not found"),
        ("arm64-run.sh", ["--bundle", "/nonexistent", "--", "-V"], 1, "/nonexistent: no such directory"),
        ("arm64-run.sh", ["--llama", "/etc", "--", "-V"], 1, "/etc holds no libllama.so"),
        ("arm64-root.sh", ["--fast"], 2, "unknown argument"),
        ("arm64-root.sh", ["--force", "--sources", "/etc"], 1, "/etc: no sources of llama-cpp-python"),
    ],
)
def test_scripts_refuse(agreement: Any, script: str, arguments: list[str], code: int, words: str) -> None:
    command = [str(ROOT / "runtimes" / "native" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code and words in done.stderr and "hint: " in done.stderr, done.stderr
    assert done.stdout == "" and (BUILT / "root" / "made.txt").is_file()

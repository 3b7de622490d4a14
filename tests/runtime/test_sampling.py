"""Each filter alone against its definition, and the properties that hold between them."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, EngineError
from turbosparse.runtime.sampling import Sampler, SamplingConfig

logit_arrays = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=32).map(lambda x: round(x, 1))
)


def draws(logits: NDArray[np.float32], n: int = 300, **options: Any) -> set[int]:
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=1, **options))
    return {sampler.sample(logits) for _ in range(n)}


def probabilities(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())


@given(logit_arrays)
def test_top_k_one_is_greedy(logits: NDArray[np.float32]) -> None:
    greedy = Sampler(SamplingConfig()).sample(logits)
    assert greedy == np.argmax(logits)
    assert draws(logits, 5, top_k=1) == {greedy}


@given(logit_arrays, st.integers(0, 2**32), st.floats(0.1, 3))
def test_a_seed_repeats_itself(logits: NDArray[np.float32], seed: int, temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, top_p=0.9, seed=seed)
    first, second = Sampler(config), Sampler(config)
    assert [first.sample(logits) for _ in range(8)] == [second.sample(logits) for _ in range(8)]


@given(logit_arrays, st.integers(0, 2**32))
def test_filters_that_keep_all_change_nothing(logits: NDArray[np.float32], seed: int) -> None:
    plain = SamplingConfig(temperature=1.0, seed=seed)
    same = SamplingConfig(
        temperature=1.0, seed=seed, top_k=len(logits), top_p=1.0, min_p=0.0, repetition_penalty=1.0
    )
    assert [Sampler(plain).sample(logits) for _ in range(4)] == [
        Sampler(same).sample(logits) for _ in range(4)
    ]


@given(logit_arrays, st.integers(1, 40))
def test_top_k_keeps_the_k_likeliest(logits: NDArray[np.float32], k: int) -> None:
    allowed = set(np.argsort(-logits, kind="stable")[:k].tolist())
    assert draws(logits, 20, top_k=k) <= allowed


@given(logit_arrays, st.floats(0.05, 0.999))
def test_top_p_keeps_the_fewest_that_reach_the_mass(logits: NDArray[np.float32], top_p: float) -> None:
    order = np.argsort(-logits, kind="stable")
    mass = np.cumsum(probabilities(logits)[order])
    allowed = set(order[: int(np.sum(mass < top_p - 1e-9)) + 1].tolist())
    assert draws(logits, 20, top_p=top_p) <= allowed


@given(logit_arrays, st.floats(0.01, 1))
def test_min_p_is_relative_to_the_likeliest(logits: NDArray[np.float32], min_p: float) -> None:
    p = probabilities(logits)
    assert draws(logits, 20, min_p=min_p) <= set(np.flatnonzero(p >= min_p * p.max() * (1 - 1e-6)).tolist())


@given(logit_arrays)
def test_the_logits_stay_as_they_are(logits: NDArray[np.float32]) -> None:
    before = logits.copy()
    config = SamplingConfig(temperature=1.0, repetition_penalty=2.0, logit_bias={0: -5.0}, top_p=0.5, seed=0)
    Sampler(config).sample(logits, [0] * 3)
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_probabilities() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    sampler = Sampler(SamplingConfig(temperature=0.7), np.random.default_rng(3))
    counts = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(
        counts, probabilities(logits, 0.7), atol=0.012
    )  # 3.5 standard errors of p = 0.5


def test_top_p_beyond_the_first_guess() -> None:
    logits = np.zeros(5000, np.float32)  # uniform: 90 % of the mass is 4500 tokens, above the first 1024
    drawn = draws(logits, 4000, top_p=0.9)
    assert max(drawn) < 4500
    assert max(drawn) > 4000


def test_repetition_penalty_reads_its_window_and_both_signs() -> None:
    logits = np.array([2.0, 1.5, -1.0, -1.5], np.float32)
    config = SamplingConfig(repetition_penalty=2.0, repetition_window=2)
    assert Sampler(config).sample(logits, [0]) == 1
    assert Sampler(config).sample(logits, [0, 3, 3]) == 0  # out of the window
    assert Sampler(config).sample(logits[2:], [0]) == 1  # a negative logit sinks
    without = SamplingConfig(repetition_penalty=2.0, repetition_window=0)
    assert Sampler(without).sample(logits, [0]) == 0


def test_logit_bias_lifts_and_bans() -> None:
    logits = np.array([1.0, 0.0, 0.5], np.float32)
    assert Sampler(SamplingConfig(logit_bias={1: 2.0})).sample(logits) == 1
    assert Sampler(SamplingConfig(logit_bias={0: -math.inf})).sample(logits) == 2
    with pytest.raises(ConfigError, match=r"\[sampling.logit_bias\] expected ids below 3, got 3"):
        Sampler(SamplingConfig(logit_bias={3: 1.0})).sample(logits)
    with pytest.raises(EngineError, match="finite logit"):
        Sampler(SamplingConfig(logit_bias=dict.fromkeys(range(3), -math.inf))).sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_window", -1),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", "text"),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\[sampling.{name}\] expected .*, got"):
        SamplingConfig(**{name: value})


def test_stop_becomes_a_tuple() -> None:
    assert SamplingConfig(stop=["a", "b"]).stop == ("a", "b")

"""Re-use and unions against obvious slow twins."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, TextError
from turbosparse.sparsity import reuse as reuse_module
from turbosparse.sparsity.hotness import hotness
from turbosparse.sparsity.reuse import UNION_SIZES, WINDOWS, NeuronReuse, chance_reuse, reuse

Bits = NDArray[np.bool_]


def make_active(seed: int, tokens: int, neurons: int, density: float) -> Bits:
    return np.asarray(np.random.default_rng(seed).random((tokens, neurons)) < density)


active_neurons = st.builds(
    make_active, st.integers(0, 2**31), st.integers(16, 200), st.integers(1, 40), st.floats(0.05, 1)
)


def slow_reuse(active: Bits, window: int) -> float:
    reused = used = 0
    for t in range(window - 1, len(active)):
        before = active[t - window + 1 : t].any(axis=0)
        reused += int((active[t] & before).sum())
        used += int(active[t].sum())
    return reused / used if used else np.nan


def slow_union(active: Bits, size: int) -> tuple[int, int]:
    unions = [active[t - size + 1 : t + 1].any(axis=0).sum() for t in range(size - 1, len(active))]
    return int(sum(unions)), len(unions)


def test_by_hand() -> None:
    active = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], np.bool_)
    # second token: 1 of 2 was active before; third: 1 of 2; fourth has none. With two before: 2 of 2.
    np.testing.assert_allclose(reuse(active, [2, 3]), [2 / 4, 2 / 2])


@given(active_neurons)
def test_equals_the_slow_twin(active: Bits) -> None:
    np.testing.assert_allclose(reuse(active), [slow_reuse(active, w) for w in WINDOWS], atol=1e-12)


@given(active_neurons, st.lists(st.integers(1, 60), max_size=5))
def test_streaming_equals_one_batch(active: Bits, cuts: list[int]) -> None:
    whole, parts = NeuronReuse(active.shape[1]), NeuronReuse(active.shape[1])
    whole.add(active)
    begin = 0
    for cut in [*cuts, len(active)]:
        parts.add(active[begin : begin + cut])
        begin += cut
    for name in ("active", "reused", "united", "positions"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    unions = [slow_union(active, size) for size in UNION_SIZES]
    np.testing.assert_array_equal(whole.united[0], [united for united, _ in unions])
    np.testing.assert_array_equal(whole.positions[0], [count for _, count in unions])


def test_nothing_is_used_across_texts() -> None:
    counts = NeuronReuse(4)
    token = np.ones((1, 4), np.bool_)
    counts.add(token)
    counts.start()
    counts.add(token)
    assert counts.active.sum() == 0
    assert counts.positions[0].tolist() == [2, 0, 0, 0, 0, 0, 0, 0]


@given(active_neurons)
def test_the_order_of_neurons_does_not_matter(active: Bits) -> None:
    order = np.random.default_rng(0).permutation(active.shape[1])
    np.testing.assert_array_equal(reuse(active[:, order]), reuse(active))


def test_chance_is_met_by_independent_tokens() -> None:
    active = np.random.default_rng(1).random((20_000, 30)) < np.linspace(0.02, 0.9, 30)
    np.testing.assert_allclose(chance_reuse(hotness(active)), reuse(active), atol=0.01)


def test_a_text_shorter_than_the_window() -> None:
    with pytest.raises(TextError, match=r"\[reuse\] expected at least 16 tokens, a window, got 3"):
        reuse(np.ones((3, 2), np.bool_))


@pytest.mark.parametrize(("windows", "got"), [([17], "17"), ([2, 1], "2, 1"), ([], "none")])
def test_windows_out_of_range(windows: list[int], got: str) -> None:
    message = rf"\[reuse\] expected at least one window, of 2 to 16 tokens, got {got}$"
    with pytest.raises(ConfigError, match=message):
        reuse(np.ones((20, 2), np.bool_), windows)


def test_examples() -> None:
    assert doctest.testmod(reuse_module).failed == 0

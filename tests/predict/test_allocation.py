"""Thresholds of several layers chosen together, on curves whose best choice can be told by hand."""

import numpy as np
import pytest

from turbosparse.predict.allocation import (
    ALL_NEURONS,
    EXACT,
    Menu,
    Tradeoff,
    allocate,
    only,
    within_bytes,
    within_loss,
)


def curve(*points: tuple[float, float]) -> Tradeoff:
    """Points of (bytes, lost), thresholds 0, 1, 2 ..."""
    read_bytes, lost = np.array(points).T
    return Tradeoff(thresholds=np.arange(len(points), dtype=float), read_bytes=read_bytes, lost=lost)


# Per byte saved, the first layer loses 0.001, then 0.01; the second 0.002, then 0.004.
EASY = Menu(exact_bytes=100, curves={"small": curve((90, 0.01), (80, 0.02), (70, 0.12))})
HARD = Menu(exact_bytes=100, curves={"small": curve((90, 0.02), (80, 0.06))})
BOTH = {"easy": EASY, "hard": HARD}


def test_without_a_price_nothing_is_lost() -> None:
    found = allocate(BOTH, 0.0)
    assert {name: choice.kind for name, choice in found.choices.items()} == {"easy": EXACT, "hard": EXACT}
    assert (found.read_bytes, found.lost) == (200, 0)
    assert found.choices["easy"].threshold == ALL_NEURONS


@pytest.mark.parametrize(
    ("limit", "read", "lost"),
    [(180, 180, 0.02), (170, 170, 0.04), (169, 160, 0.08), (160, 160, 0.08), (150, 150, 0.18)],
)
def test_bytes_are_saved_where_they_cost_least(limit: float, read: float, lost: float) -> None:
    found = within_bytes(BOTH, limit)
    assert found.read_bytes == read
    assert found.lost == pytest.approx(lost)


def test_a_loss_is_kept_to_with_the_fewest_bytes() -> None:
    assert within_loss(BOTH, 0.041).read_bytes == 170
    assert within_loss(BOTH, 0.0).read_bytes == 200
    assert within_loss(BOTH, 9.0).read_bytes == 150


def test_a_limit_that_cannot_be_met_gives_the_fewest_bytes() -> None:
    assert within_bytes(BOTH, 10).read_bytes == 150


def test_a_layer_that_matters_more_is_spared() -> None:
    weighted = {"easy": Menu(exact_bytes=100, curves=EASY.curves, weight=10.0), "hard": HARD}
    choices = within_bytes(weighted, 180).choices
    assert (choices["easy"].kind, choices["hard"].read_bytes) == (EXACT, 80)


def test_an_expert_counts_by_its_share_of_the_tokens() -> None:
    menus = {"often": Menu(exact_bytes=100, curves=HARD.curves, share=0.75), "rarely": HARD}
    assert allocate(menus, 0.0).read_bytes == 175
    found = allocate(menus, 0.003)
    assert found.read_bytes == pytest.approx(0.75 * 90 + 90)
    assert found.lost == pytest.approx(0.75 * 0.02 + 0.02)


def test_the_larger_predictor_is_taken_where_it_pays() -> None:
    menu = Menu(exact_bytes=100, curves={"small": curve((60, 0.1)), "large": curve((65, 0.01))})
    assert within_loss({"x": menu}, 0.05).choices["x"].kind == "large"
    assert within_bytes({"x": menu}, 62).choices["x"].kind == "small"
    assert within_loss(only({"x": menu}, ["small"]), 0.05).choices["x"].kind == EXACT
    assert only({"x": menu}, ())["x"].curves == {}

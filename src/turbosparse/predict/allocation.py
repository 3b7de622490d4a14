"""Choose the thresholds of all layers together: the fewest bytes for what is lost.

Every layer has a menu of predictors, each with a curve of bytes against loss over its thresholds. With a
price per byte, each layer by itself takes the point where loss + price * bytes is least: there, one byte more
would save as much loss in every layer. Raising the price walks through the efficient choices.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ALL_NEURONS",
    "EXACT",
    "Allocation",
    "Choice",
    "Menu",
    "Tradeoff",
    "allocate",
    "only",
    "within_bytes",
    "within_loss",
]

ALL_NEURONS = float(np.finfo(np.float32).min)
"""A threshold that every score meets, so that the predictor need not be asked; finite, as JSON wants it."""
EXACT = "exact"
"""The kind of a layer that runs without a predictor."""
_PRICES = (1e-18, 1e6)  # loss per byte: from "all bytes are worth it" to "none is"
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One predictor at one threshold, or none."""

    kind: str
    """`EXACT` for none."""
    threshold: float
    read_bytes: float
    lost: float


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """What a predictor costs and loses at each of K thresholds."""

    thresholds: NDArray[np.float64]
    """[K]"""
    read_bytes: NDArray[np.float64]
    """[K], per token that reaches the layer."""
    lost: NDArray[np.float64]
    """[K], share of the energy of the neurons' outputs, mean over tokens."""

    def choice(self, kind: str, at: int) -> Choice:
        """Name one of the points.

        Parameters
        ----------
        kind : str
            What this curve is called on the menu.
        at : int
            Index of the threshold.

        Returns
        -------
        Choice
            The predictor at that threshold.
        """
        return Choice(
            kind=kind,
            threshold=float(self.thresholds[at]),
            read_bytes=float(self.read_bytes[at]),
            lost=float(self.lost[at]),
        )


@dataclass(frozen=True, kw_only=True)
class Menu:
    """What a layer can choose from."""

    exact_bytes: float
    """Per token that reaches the layer, without a predictor."""
    curves: Mapping[str, Tradeoff]
    """By kind of predictor; may be empty."""
    share: float = 1.0
    """Of all tokens, those that reach the layer; below 1 for an expert."""
    weight: float = 1.0
    """How much what is lost here counts, against other layers."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A choice for every layer."""

    price: float
    choices: Mapping[str, Choice]
    read_bytes: float
    """Per token, all layers."""
    lost: float
    """Weighted sum over the layers."""


def allocate(menus: Mapping[str, Menu], price: float) -> Allocation:
    """Choose at a price.

    Parameters
    ----------
    menus : mapping of str to Menu
        By layer.
    price : float
        Weighted loss that a byte per token is worth.

    Returns
    -------
    Allocation
        The best choice of each layer; of equals the first.
    """
    choices = {name: _best(menu, price) for name, menu in menus.items()}
    return Allocation(
        price=price,
        choices=choices,
        read_bytes=sum(menus[name].share * choice.read_bytes for name, choice in choices.items()),
        lost=sum(menus[name].share * menus[name].weight * choice.lost for name, choice in choices.items()),
    )


def within_bytes(menus: Mapping[str, Menu], limit: float) -> Allocation:
    """Lose the least within a number of bytes.

    Parameters
    ----------
    menus : mapping of str to Menu
        By layer.
    limit : float
        Bytes per token, all layers.

    Returns
    -------
    Allocation
        At the lowest price that keeps to the limit; at the highest of all if none does.
    """
    return _search(menus, lambda found: found.read_bytes <= limit, rising=True)


def within_loss(menus: Mapping[str, Menu], limit: float) -> Allocation:
    """Read the fewest bytes for a loss.

    Parameters
    ----------
    menus : mapping of str to Menu
        By layer.
    limit : float
        Weighted loss, all layers.

    Returns
    -------
    Allocation
        At the highest price that keeps to the limit; at the lowest of all if none does.
    """
    return _search(menus, lambda found: found.lost <= limit, rising=False)


def only(menus: Mapping[str, Menu], kinds: Collection[str]) -> dict[str, Menu]:
    """Leave some kinds on the menus.

    Parameters
    ----------
    menus : mapping of str to Menu
        By layer.
    kinds : collection of str
        Kinds to leave.

    Returns
    -------
    dict of str to Menu
        The same layers.
    """
    return {
        name: replace(menu, curves={kind: curve for kind, curve in menu.curves.items() if kind in kinds})
        for name, menu in menus.items()
    }


def _best(menu: Menu, price: float) -> Choice:
    exact = Choice(kind=EXACT, threshold=ALL_NEURONS, read_bytes=menu.exact_bytes, lost=0.0)
    found = [(price * menu.exact_bytes, exact)]
    for kind, curve in menu.curves.items():
        cost = menu.weight * curve.lost + price * curve.read_bytes
        at = int(cost.argmin())
        found.append((float(cost[at]), curve.choice(kind, at)))
    return min(found, key=lambda pair: pair[0])[1]


def _search(menus: Mapping[str, Menu], meets: Callable[[Allocation], bool], *, rising: bool) -> Allocation:
    """Bisect the price: a rising one meets the condition from some point on, else up to some point."""
    fails, holds = (math.log(price) for price in (_PRICES if rising else reversed(_PRICES)))
    best = allocate(menus, math.exp(holds))
    for _ in range(_HALVINGS):
        middle = (fails + holds) / 2
        found = allocate(menus, math.exp(middle))
        if meets(found):
            holds, best = middle, found
        else:
            fails = middle
    return best

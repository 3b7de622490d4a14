"""What rules cost, against counting by hand."""

import numpy as np
import pytest

from turbosparse.measure.counted_rule import CountedRule
from turbosparse.sparsity.selection import NonZero, PositiveGate, TopK

GATE = np.array([[0.0, 2.0, -1.0, 3.0], [1.0, 0.0, 0.0, -2.0]], np.float32)
UP = np.array([[5.0, 0.0, 4.0, 1.0], [2.0, 1.0, 1.0, 1.0]], np.float32)


@pytest.mark.parametrize(
    ("rule", "gate_first", "computed", "needs_up"),
    [
        (NonZero(), False, 4, 5),
        (PositiveGate(), True, 2, 3),  # the one with a positive gate and no up has no output
        (TopK(share=0.25), False, 3, 5),  # equal ones are kept together
    ],
)
def test_rows_are_counted(
    rule: NonZero | PositiveGate | TopK, gate_first: bool, computed: int, needs_up: int
) -> None:
    counted = CountedRule(rule, gate_first=gate_first)
    for row in range(2):
        one = slice(row, row + 1)
        kept = counted.kept(0, GATE[one], GATE[one] * UP[one])
        counted.end_window()
        assert (kept == rule.kept(0, GATE[one], GATE[one] * UP[one])).all()
    shares = counted.shares(gated=True)
    assert shares["computed"]["value"] == computed / 8
    assert shares["sparsity"]["value"] == 1 - computed / 8
    assert shares["ffn_bytes"]["value"] == pytest.approx((8 + needs_up + computed) / 24)
    assert counted.shares(gated=False)["ffn_bytes"]["value"] == pytest.approx((8 + computed) / 16)


def test_errors_come_from_the_spread_over_windows() -> None:
    counted = CountedRule(NonZero(), gate_first=False)
    for zeros in (0, 1, 2):
        values = np.ones((1, 4), np.float32)
        values[0, :zeros] = 0
        counted.kept(0, values, values)
        counted.end_window()
    found = counted.shares(gated=True)["computed"]
    assert found["value"] == pytest.approx(0.75)
    assert found["standard_error"] == pytest.approx(0.25 / np.sqrt(3))
    alone = CountedRule(NonZero(), gate_first=False)
    alone.kept(0, GATE, GATE)
    assert np.isnan(alone.shares(gated=True)["computed"]["standard_error"])

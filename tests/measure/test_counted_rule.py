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
        assert (kept == rule.kept(0, GATE[one], GATE[one] * UP[one])).all()
    shares = counted.shares(gated=True)
    assert shares["computed"] == computed / 8
    assert shares["ffn_bytes"] == pytest.approx((8 + needs_up + computed) / 24)
    assert counted.shares(gated=False)["ffn_bytes"] == pytest.approx((8 + computed) / 16)

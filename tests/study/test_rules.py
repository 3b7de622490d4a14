"""What rules cost, against counting by hand."""

from pathlib import Path

import numpy as np
import pytest

from tests.measure.twins import TEXT, make_twins
from turbosparse.sparsity.quality import cut_windows
from turbosparse.sparsity.selection import NonZero, PositiveGate, TopK
from turbosparse.study.rules import CountedRule, gate_thresholds

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


def test_gate_thresholds_keep_the_share_asked_for(tmp_path: Path) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    windows = cut_windows(twin.text_ids(TEXT)[:256], 64, None)
    thresholds = gate_thresholds(twin, windows, (0.5, 0.1))
    counted = {share: CountedRule(rule, gate_first=True) for share, rule in thresholds.items()}
    for rule in counted.values():
        for window in windows:
            list(twin.predictions(window, rule))
    for share, rule in counted.items():
        # what one layer leaves out changes the next, and quantiles are those of bins 6 % wide
        assert rule.shares(gated=True)["computed"] == pytest.approx(share, abs=0.04)

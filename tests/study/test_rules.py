"""Thresholds on the gate keep what they are asked to."""

from pathlib import Path

import pytest

from tests.measure.twins import TEXT, make_twins
from turbosparse.measure.counted_rule import CountedRule
from turbosparse.sparsity.quality import cut_windows
from turbosparse.study.rules import gate_thresholds


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
        assert rule.shares(gated=True)["computed"]["value"] == pytest.approx(share, abs=0.04)

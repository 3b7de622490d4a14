"""The model that the repository ships: it is sparse by training, every mode works, and no mode loses much."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

from turbosparse.runtime.default_model import SHIPPED_MODEL
from turbosparse.runtime.engine import Model, load
from turbosparse.runtime.perplexity import compare_modes
from turbosparse.runtime.texts import HELD_OUT, read_text

if TYPE_CHECKING:
    from turbosparse._native import Mode

TOKENS = 512


@pytest.fixture(scope="module")
def model() -> Model:
    return load(SHIPPED_MODEL, threads=2)


def test_what_the_file_says(model: Model) -> None:
    assert model.info.modes == ["dense", "exact", "threshold", "predicted"]
    assert model.info.activation == "drelu"
    assert not model.has_chat_template  # it was not trained on chats


def test_exact_is_dense(model: Model) -> None:
    ids = model.text_ids(read_text(HELD_OUT))[:64]
    dense, exact = model.logits(ids, mode="dense"), model.logits(ids, mode="exact")
    assert np.abs(dense - exact).max() <= 1e-3 * np.abs(dense).max()


@pytest.mark.parametrize(("mode", "active", "rise"), [("threshold", 0.2, 1.06), ("predicted", 0.2, 1.1)])
def test_what_a_mode_computes_and_loses(model: Model, mode: "Mode", active: float, rise: float) -> None:
    ids = model.text_ids(read_text(HELD_OUT))[:TOKENS]
    found = compare_modes(
        model.engine, ids, mode=mode, context=256, bos_id=model.window_bos_id, advance=lambda count: None
    )
    assert found.result.active_ratio <= active
    assert found.perplexity_ratio <= rise

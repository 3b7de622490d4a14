"""Perplexity against its definition, and modes against each other."""

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.real_models import SMOLLM2, real_model
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.errors import ConfigError, TextError
from turbosparse.runtime.engine import Model, load
from turbosparse.runtime.perplexity import compare_modes, perplexity

TEXT = "the cat and the hat and the rat in the land of the other men and then some. " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    make_tiny_model(path, TinyModel(activation="drelu", down_t=True, threshold=0.4, gate_threshold=0.1))
    return load(path, threads=1)


def by_definition(model: Model, ids: list[int], context: int, bos_id: int | None) -> tuple[float, int]:
    losses = []
    for start in range(0, len(ids) - context + 1, context):
        window = list(ids[start : start + context])
        if bos_id is not None:
            window[0] = bos_id
        logits = model.logits(window, mode="dense").astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-log_probs[t, window[t + 1]] for t in range(context // 2, context - 1)]
    return float(np.exp(np.mean(losses))), len(losses)


@pytest.mark.parametrize("context", [8, 33, 200])  # 200: the scored half comes in more than one piece
@pytest.mark.parametrize("bos_id", [None, 264])
def test_perplexity_by_its_definition(model: Model, context: int, bos_id: int | None) -> None:
    ids = model.text_ids(TEXT)
    result = perplexity(model.engine, ids, context=context, bos_id=bos_id)
    value, tokens = by_definition(model, ids, context, bos_id)
    assert result.perplexity == pytest.approx(value, rel=1e-4)
    assert result.tokens == tokens
    assert result.standard_error > 0
    assert (result.mode, result.context, result.active_ratio) == ("dense", context, 1.0)


def test_progress_reaches_whole_windows(model: Model) -> None:
    ids = model.text_ids(TEXT)
    steps: list[float] = []
    perplexity(model.engine, ids, context=50, advance=steps.append)
    assert steps == [50] * (len(ids) // 50)


def test_exact_is_dense_and_threshold_is_not(model: Model) -> None:
    assert model.default_mode == "exact"
    dense = model.perplexity(TEXT, mode="dense", context=64)
    exact = model.perplexity(TEXT, context=64)
    assert exact.perplexity == pytest.approx(dense.perplexity, rel=1e-6)
    assert exact.mode == "exact"
    assert exact.active_ratio < dense.active_ratio
    threshold = model.perplexity(TEXT, mode="threshold", context=64)
    assert threshold.active_ratio < exact.active_ratio


def test_a_mode_does_not_differ_from_itself(model: Model) -> None:
    same = compare_modes(model.engine, model.text_ids(TEXT), mode="dense", context=64)
    assert (same.mean_kl, same.max_kl, same.same_top_1, same.perplexity_ratio) == (0.0, 0.0, 1.0, 1.0)


def test_divergence_by_its_definition(model: Model) -> None:
    ids = model.text_ids(TEXT)
    context = 64
    found = compare_modes(model.engine, ids, mode="threshold", context=context)
    divergences, same = [], []
    for start in range(0, len(ids) - context + 1, context):
        log_probs = []
        for mode in ("dense", "threshold"):
            logits = model.logits(ids[start : start + context], mode=mode).astype(np.float64)
            rows = logits[context // 2 : context - 1]
            log_probs.append(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))
        p, q = log_probs
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    expected = np.concatenate(divergences)
    assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-3)
    assert found.max_kl == pytest.approx(expected.max(), rel=1e-3)
    assert found.kl_99_percentile == pytest.approx(np.percentile(expected, 99), rel=1e-3)
    assert found.same_top_1 == pytest.approx(np.concatenate(same).mean())
    assert found.result == model.perplexity(TEXT, mode="threshold", context=context)
    assert found.baseline == model.perplexity(TEXT, mode="dense", context=context)


def test_a_short_text_is_one_window(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    text = TEXT[:60]
    with caplog.at_level(logging.WARNING):
        result = model.perplexity(text)
    assert "fewer than a window of 512" in caplog.text
    assert result.context == len(model.text_ids(text))


def test_what_cannot_be_measured(model: Model) -> None:
    with pytest.raises(TextError, match="nothing but white space"):
        model.perplexity(" \n ")
    with pytest.raises(TextError, match=r"\[text\] expected at least 8 tokens to measure perplexity, got 3"):
        model.perplexity("abc")
    with pytest.raises(ConfigError, match=r"\[context\] expected at least 8 tokens, got 7"):
        model.perplexity(TEXT, context=7)
    with pytest.raises(ConfigError, match="context"):
        model.perplexity(TEXT * 9, context=1000)  # trained for 256


@pytest.mark.slow
def test_perplexity_of_smollm2_agrees_with_llama_cpp() -> None:
    """21.588 is llama.cpp's (llama-cpp-python 0.3.36) on the same file, text and windows; ours is 21.63."""
    model = load(real_model(SMOLLM2))
    texts = Path(__file__).parents[2] / "src/turbosparse/runtime/texts"
    text = (texts / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    assert model.perplexity(text, mode="dense", context=256).perplexity == pytest.approx(21.588, rel=0.01)

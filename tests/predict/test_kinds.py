"""Every kind of predictor on one tiny layer: fitted ones learn, copies improve with bits."""

import dataclasses

import pytest
import torch

from turbosparse.errors import ConfigError
from turbosparse.models.activations import Activation
from turbosparse.predict.allocation import EXACT, only, within_loss
from turbosparse.predict.capture import CapturedInputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.fit import activity_bound
from turbosparse.predict.layer_fit import LayerFit, family_of
from turbosparse.predict.layers import FFNLayer, RowBytes
from turbosparse.predict.predictors import SignBitPredictor, WeightCopyPredictor

QUICK = PredictorConfig(
    ranks=(4, 16), steps=100, batch_tokens=64, learning_rate=1e-2, weight_type="F32", predictor_type="F32"
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(50, 32, generator=torch.Generator().manual_seed(2))


def test_every_kind_is_on_the_menu_and_the_oracle_is_best(layer: FFNLayer, captured: CapturedInputs) -> None:
    fit = LayerFit(layer, captured, dataclasses.replace(QUICK, inputs=("ffn_norm", "residual")))
    fitted = {"low_rank_4", "low_rank_16", "low_rank_4_residual", "low_rank_16_residual"}
    assert set(fit.fitted) == fitted
    assert set(fit.menu.curves) == {*fitted, "sign_bits", "low_bit_1", "low_bit_2", "oracle"}
    chosen = {kind: within_loss(only({"x": fit.menu}, [kind]), 0.02).choices["x"] for kind in fit.menu.curves}
    cheapest = min(chosen.values(), key=lambda choice: choice.read_bytes)
    assert cheapest.kind == "oracle"
    assert chosen["low_rank_16"].read_bytes < fit.menu.exact_bytes
    scores = {kind: fit.score(choice) for kind, choice in chosen.items()}
    assert scores["low_rank_16"].norm_kept > 0.85
    assert scores["low_rank_16"].candidate_ratio < scores["sign_bits"].candidate_ratio
    for kind, choice in chosen.items():
        assert scores[kind].bytes_ratio == pytest.approx(choice.read_bytes / layer.dense_bytes, rel=1e-3)
    exact = fit.score(within_loss(only({"x": fit.menu}, []), 1.0).choices["x"])
    assert (exact.recall, exact.cett) == (1, 0)
    assert exact.bytes_ratio == pytest.approx(fit.menu.exact_bytes / layer.dense_bytes)


def test_fitting_is_deterministic(layer: FFNLayer, captured: CapturedInputs) -> None:
    config = dataclasses.replace(QUICK, steps=10, rivals=())
    one, two = (LayerFit(layer, captured, config) for _ in range(2))
    assert torch.equal(one.fitted["low_rank_4"].a.weight, two.fitted["low_rank_4"].a.weight)


def test_a_layer_that_no_token_reached_runs_exactly(layer: FFNLayer, captured: CapturedInputs) -> None:
    path = captured.files["ffn_norm"].with_suffix(".empty")
    path.touch()
    nothing = CapturedInputs(files={"ffn_norm": path}, hidden_size=32, tokens_seen=10)
    fit = LayerFit(layer, nothing, QUICK)
    assert (fit.fitted, dict(fit.menu.curves), fit.menu.share) == ({}, {}, 0)
    choice = within_loss({"x": fit.menu}, 1.0).choices["x"]
    assert choice.kind == EXACT
    assert fit.place(choice) is None


@pytest.mark.parametrize("ends", [(1500,) * 5, (0, 0, 0, 0, 1500), (300, 600, 900, 1495, 1500)])
def test_an_expert_that_met_nothing_before_or_after_the_split_runs_exactly(
    ends: tuple[int, ...], layer: FFNLayer, captured: CapturedInputs
) -> None:
    fit = LayerFit(layer, dataclasses.replace(captured, batch_ends=ends), QUICK)
    assert (fit.fitted, dict(fit.menu.curves), fit.tokens) == ({}, {}, 1500)
    score = fit.score(within_loss({"x": fit.menu}, 1.0).choices["x"])
    assert (score.cett, score.recall) == ((0, 0) if ends[3] == 1500 else (0, 1))


def test_an_expert_that_meets_no_held_out_token_any_more_runs_exactly(
    layer: FFNLayer, captured: CapturedInputs
) -> None:
    ends = (300, 600, 900, 1200, 1500)
    fit = LayerFit(layer, dataclasses.replace(captured, batch_ends=ends), QUICK)
    assert "low_rank_4" in fit.menu.curves
    fit.read(dataclasses.replace(captured, batch_ends=(1500,) * 5))
    assert dict(fit.menu.curves) == {}


def test_the_oracle_knows_the_norm_of_each_output(layer: FFNLayer, x: torch.Tensor) -> None:
    activations = layer.neurons(x).activations
    scores = WeightCopyPredictor(layer, None)(x)
    assert torch.equal(scores > 0, activations > 0)
    torch.testing.assert_close(scores.clamp(min=0), activations * layer.down.norm(dim=0))


def test_copies_get_closer_with_bits(layer: FFNLayer, x: torch.Tensor) -> None:
    exact = WeightCopyPredictor(layer, None)(x)
    errors = [float((WeightCopyPredictor(layer, bits)(x) - exact).norm()) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.2 * float(exact.norm())
    # 32 x 48 weights of gate and of up: 2 bits and a sixteenth of a half float per weight
    assert WeightCopyPredictor(layer, 2).read_bytes("F32") == 2 * 32 * 48 * (2 + 0.5) / 8


def test_sign_bits_by_hand() -> None:
    gate, up = torch.tensor([[1.0, -2.0, 3.0, 4.0]]), torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    x = torch.tensor([[0.5, -0.5, 0.0, 2.0]])  # zero counts as negative
    for name, expected in (("drelu", -0.5), ("relu", 0.5)):
        layer = FFNLayer(
            gate=gate, up=up, down=gate.T, activation=Activation(name=name), row_bytes=RowBytes(4.0, 4.0, 4.0)
        )
        assert SignBitPredictor(layer)(x).tolist() == [[expected]]


def test_active_by_cett_drops_the_quiet_neurons(layer: FFNLayer, x: torch.Tensor) -> None:
    norms = layer.neurons(x).activations * layer.down.norm(dim=0)
    assert ((norms >= activity_bound(layer, x, QUICK)) == (norms > 0)).all()
    bound = activity_bound(layer, x, dataclasses.replace(QUICK, labels="cett", label_cett=0.2))
    assert 0 < (norms >= bound).sum() < (norms > 0).sum()


def test_thresholds_of_a_file_leave_less_to_predict(layer: FFNLayer, x: torch.Tensor) -> None:
    plain = layer.neurons(x)
    ones = torch.ones(48)
    cut = dataclasses.replace(layer, thresholds=(0.5 * ones, ones)).neurons(x)
    expected = plain.activations * (plain.activations >= 1) * cut.passed
    torch.testing.assert_close(cut.activations, expected)
    assert cut.passed.sum() < plain.passed.sum()


@pytest.mark.parametrize(
    ("kind", "family"), [("low_rank_64", "low_rank"), ("low_rank_64_residual", "low_rank_residual")]
)
def test_families(kind: str, family: str) -> None:
    assert family_of(kind) == family


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": ()},
        {"ranks": (0,)},
        {"ranks": (8,)},
        {"labels": "x"},
        {"inputs": ("next",)},
        {"rivals": ("x",)},
        {"weight_type": "Q5_0"},
        {"label_cett": 0.0},
        {"steps": 0},
        {"ppl_budget": -0.1},
        {"learning_rate": 0.0},
    ],
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"\[predictor\.{next(iter(wrong))}\] expected"):
        PredictorConfig(**wrong)  # type: ignore[arg-type]

"""Predictors of a tiny model: they learn, keep their promise, and do nothing when they name every neuron."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.tiny_hf import make_hf_model, make_texts, make_tokenizer, tiny_ids
from turbosparse.cli.main import main
from turbosparse.data.config import DataConfig, SourceConfig
from turbosparse.errors import ConfigError, DataError
from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import GatedFFN, gated_ffns
from turbosparse.models.registry import swap_activation
from turbosparse.predict.capture import capture_inputs, open_inputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import predictors_on
from turbosparse.predict.fit import active_neurons, fit_layer
from turbosparse.predict.run import fit_predictors
from turbosparse.predict.score import ALL_NEURONS

DRELU = Activation(name="drelu")
QUICK = PredictorConfig(ranks=(4, 16), steps=100, batch_tokens=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    swap_activation(make_hf_model(), DRELU).save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    make_texts(directory)
    return directory


def first_ffn() -> GatedFFN:
    ffn = next(iter(gated_ffns(swap_activation(make_hf_model(), DRELU)).values()))
    assert isinstance(ffn, GatedFFN)
    return ffn


def inputs(rows: int = 1500) -> NDArray[np.float16]:
    """Hidden states of low dimension, as real ones nearly are."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 6, generator=generator) @ torch.randn(6, 32, generator=generator)
    result: NDArray[np.float16] = states.to(torch.float16).numpy()
    return result


def test_captured_inputs_are_what_the_ffns_see(tmp_path: Path) -> None:
    model = swap_activation(make_hf_model(), DRELU)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in gated_ffns(model)}
    for name, ffn in gated_ffns(model).items():
        ffn.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
    paths = capture_inputs(model, [{"input_ids": tiny_ids(2)}, {"input_ids": tiny_ids(3)}], tmp_path)
    for name, path in paths.items():
        expected = torch.cat([x.flatten(0, 1) for x in seen[name]]).to(torch.float16).numpy()
        np.testing.assert_array_equal(open_inputs(path, 32), expected)


def test_a_fitted_layer_keeps_the_target_and_beats_sign_bits() -> None:
    fitted = fit_layer(first_ffn(), inputs(), QUICK)
    assert set(fitted.scores) == {"low_rank_4", "low_rank_16", "sign_bits", "oracle"}
    assert all(score.cett <= QUICK.target_cett for score in fitted.scores.values())
    chosen = fitted.scores[fitted.chosen]
    assert chosen.bytes_ratio == min(fitted.scores[f"low_rank_{rank}"].bytes_ratio for rank in QUICK.ranks)
    assert fitted.scores["oracle"].candidate_ratio <= chosen.candidate_ratio
    assert fitted.scores["low_rank_16"].candidate_ratio < fitted.scores["sign_bits"].candidate_ratio
    assert chosen.norm_kept > 0.9


def test_fitting_is_deterministic() -> None:
    one, two = (fit_layer(first_ffn(), inputs(300), dataclasses.replace(QUICK, steps=10)) for _ in range(2))
    assert torch.equal(one.predictor.a.weight, two.predictor.a.weight)
    assert one.scores == two.scores


def test_active_by_cett_drops_the_quiet_neurons() -> None:
    activations = torch.tensor([[1.0, 0.01, 2.0, -1.0]])
    config = PredictorConfig(labels="cett", label_cett=0.05)
    assert active_neurons(activations, torch.eye(4), config).tolist() == [[True, False, True, True]]
    assert active_neurons(activations, torch.eye(4), PredictorConfig()).all()


def test_naming_every_neuron_changes_nothing() -> None:
    model = swap_activation(make_hf_model(), DRELU)
    names = list(gated_ffns(model))
    fitted = fit_layer(first_ffn(), inputs(300), dataclasses.replace(QUICK, steps=2))
    everything = dataclasses.replace(fitted, threshold=ALL_NEURONS)
    with torch.no_grad():
        before = model(tiny_ids()).logits
        with predictors_on(model, dict.fromkeys(names, everything)):
            assert torch.equal(model(tiny_ids()).logits, before)
        with predictors_on(model, dict.fromkeys(names, dataclasses.replace(fitted, threshold=1e30))):
            assert not torch.allclose(model(tiny_ids()).logits, before)
        assert torch.equal(model(tiny_ids()).logits, before)


def test_the_verb_leaves_predictors_and_a_report(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(base / "model"), f"--text={base / 'stories.txt'}", f"--output={tmp_path}", "--json"]
    arguments += ["--tokens=1500", "--ranks=4,8", "--steps=60", "--sequence-length=32", "--cett=0.2"]
    assert main(["fit-predictor", *arguments]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record == {name: value for name, value in report.items() if name != "layers"}
    assert record["kl_divergence"] >= 0
    assert 0 <= record["same_top1"] <= 1
    tensors = load_file(tmp_path / "predictors.safetensors")
    for name, layer in report["layers"].items():
        rank = int(layer["chosen"].removeprefix("low_rank_"))
        assert tensors[f"{name}.pred_a.weight"].shape == (rank, 32)
        assert tensors[f"{name}.pred_b.weight"].shape == (48, rank)
        assert float(tensors[f"{name}.pred_threshold"]) == pytest.approx(layer["threshold"])
        assert layer["scores"]["oracle"]["recall"] <= 1
    assert not (tmp_path / ".captured").exists()


def test_wrong_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    data = DataConfig(sources=(SourceConfig(path=str(path)),), sequence_length=32)
    with pytest.raises(DataError, match="expected held-out text of at least one sequence"):
        fit_predictors(base / "model", tmp_path, data=data, tokens=64, config=QUICK)
    for wrong in ({"ranks": ()}, {"ranks": (0,)}, {"labels": "x"}, {"target_cett": 0.0}, {"steps": 0}):
        with pytest.raises(ConfigError, match=r"\[predictor\.\w+\] expected"):
            PredictorConfig(**wrong)
    arguments = [str(base / "model"), "--text=x", f"--output={tmp_path}", "--ranks=a"]
    assert main(["fit-predictor", *arguments]) == 2
    assert "[--ranks] expected numbers" in capsys.readouterr().err


def test_a_model_of_experts_alone_is_refused(tmp_path: Path) -> None:
    model = swap_activation(make_hf_model("mixtral"), DRELU)
    with pytest.raises(ConfigError, match="expected a model with dense gated FFNs"):
        capture_inputs(model, [], tmp_path)

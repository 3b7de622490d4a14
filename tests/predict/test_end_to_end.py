"""Whole tiny models: what is captured, what a model computes with predictors on, and the verb."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.tiny_hf import make_hf_model, tiny_ids
from turbosparse.cli.main import main
from turbosparse.data.config import DataConfig, SourceConfig
from turbosparse.data.mixture import PackedSequence
from turbosparse.errors import ConfigError, DataError
from turbosparse.models.activations import Activation
from turbosparse.models.gated_ffn import GatedExperts, gated_ffns
from turbosparse.models.registry import activation_of, load_model, swap_activation
from turbosparse.predict.allocation import ALL_NEURONS
from turbosparse.predict.capture import capture_inputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import PlacedPredictor, evaluate, predictors_on
from turbosparse.predict.finetune import finetune
from turbosparse.predict.layer_fit import LayerFit
from turbosparse.predict.layers import FFNLayer, layers_of
from turbosparse.predict.predictors import LowRankPredictor, WeightCopyPredictor
from turbosparse.predict.score import exact_bytes
from turbosparse.predict.source import HuggingFaceSource

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
KINDS = ("ffn_norm", "residual", "previous")


def make(model_type: str) -> Any:
    return swap_activation(make_hf_model(model_type), Activation(name="drelu"))


def oracles(layers: Mapping[str, FFNLayer], threshold: float) -> dict[str, PlacedPredictor]:
    return {
        name: PlacedPredictor(predictor=WeightCopyPredictor(layer, None), threshold=threshold)
        for name, layer in layers.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "olmo2"])
def test_captured_inputs_of_dense_ffns(model_type: str, tmp_path: Path) -> None:
    model = make(model_type)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, ffn in gated_ffns(model).items():
        ffn.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    captured = capture_inputs(
        model, [{"input_ids": tiny_ids(2)}, {"input_ids": tiny_ids(3)}], tmp_path, KINDS
    )
    first, second = captured
    for name, inputs in captured.items():
        expected = torch.cat([x.flatten(0, 1) for x in seen[name]]).half().numpy()
        np.testing.assert_array_equal(inputs.open("ffn_norm"), expected)
        assert inputs.tokens_seen == len(expected)
    np.testing.assert_array_equal(captured[second].open("previous"), captured[first].open("ffn_norm"))
    np.testing.assert_array_equal(captured[first].open("previous"), captured[first].open("ffn_norm"))
    residual = torch.from_numpy(captured[first].open("residual").astype(np.float32))
    if model_type == "olmo2":  # no norm before the FFN
        np.testing.assert_array_equal(captured[first].open("residual"), captured[first].open("ffn_norm"))
    else:
        norm = "pre_feedforward_layernorm" if model_type == "gemma2" else "post_attention_layernorm"
        normed = getattr(model.model.layers[0], norm)(residual)
        torch.testing.assert_close(
            normed, torch.cat([x.flatten(0, 1) for x in seen[first]]), rtol=0.01, atol=0.01
        )


@torch.no_grad()
@pytest.mark.parametrize("model_type", MOE)
def test_an_expert_sees_the_tokens_that_are_routed_to_it(model_type: str, tmp_path: Path) -> None:
    model = make(model_type)
    layers = layers_of(model, "F32")
    name, ffn = next((name, ffn) for name, ffn in gated_ffns(model).items() if isinstance(ffn, GatedExperts))
    calls: list[tuple[torch.Tensor, ...]] = []
    ffn.register_forward_pre_hook(lambda _, args: calls.append(args))
    captured = capture_inputs(model, [{"input_ids": tiny_ids()}], tmp_path, KINDS)
    assert set(captured) == set(layers)
    x, index, weights = calls[0]
    total = torch.zeros_like(x)
    for expert in range(ffn.num_experts):
        inputs = captured[f"{name}.{expert}"]
        token, slot = torch.where(index == expert)
        np.testing.assert_array_equal(inputs.open("ffn_norm"), x[token].half().numpy())
        assert inputs.open("residual").shape == inputs.open("ffn_norm").shape
        layer = layers[f"{name}.{expert}"]
        total[token] += layer.neurons(x[token]).activations @ layer.down.T * weights[token, slot, None]
    torch.testing.assert_close(ffn(x, index, weights), total)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_predictors_are_scored_on_the_last_sequences(model_type: str, tmp_path: Path) -> None:
    model, rows = make(model_type), tiny_ids(12)
    for number in range(6, 12):  # the later ones have other tokens: some experts meet more of them
        rows[number] = number
    batches = [{"input_ids": row[None]} for row in rows]
    captured = capture_inputs(model, batches, tmp_path / "all")
    held_out = capture_inputs(model, batches[9:], tmp_path / "held out")  # int(12 * 0.8) = 9 come before
    config = PredictorConfig(ranks=(4,), predictor_type="F32", steps=1)
    for name, layer in layers_of(model, "F32").items():
        with torch.enable_grad():
            fit = LayerFit(layer, captured[name], config)
        x = torch.from_numpy(held_out[name].open("ffn_norm").astype(np.float32))
        assert fit.menu.exact_bytes == exact_bytes(layer.neurons(x), layer)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "phi3", *MOE])
def test_the_oracle_changes_nothing_and_no_candidates_silence_the_ffns(model_type: str) -> None:
    model = make(model_type)
    layers = layers_of(model, "F32")
    before = model(tiny_ids()).logits
    for threshold in (ALL_NEURONS, 1e-30):
        with predictors_on(model, oracles(layers, threshold)):
            torch.testing.assert_close(model(tiny_ids()).logits, before)
    with predictors_on(model, oracles(layers, 1e30)):
        silent = model(tiny_ids()).logits
    assert not torch.allclose(silent, before)
    for parameters in (layer.down for layer in layers.values()):
        parameters.zero_()
    torch.testing.assert_close(model(tiny_ids()).logits, silent)


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_reads_what_was_captured(kind: str, tmp_path: Path) -> None:
    model = make("mixtral")
    captured = capture_inputs(model, [{"input_ids": tiny_ids()}], tmp_path, KINDS)
    read: dict[str, torch.Tensor] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            read[self.name] = x
            return torch.zeros(len(x), 48)

        def read_bytes(self, weight_type: str) -> float:
            return 0.0

    placed = {name: PlacedPredictor(predictor=Recorder(name), threshold=0.0, input=kind) for name in captured}
    with torch.no_grad(), predictors_on(model, placed):
        model(tiny_ids())
    for name, inputs in captured.items():
        np.testing.assert_array_equal(read[name].half().numpy(), inputs.open(kind))


def test_evaluation_by_hand() -> None:
    model = make("llama")
    ids = tiny_ids(1)[0].tolist()
    row = PackedSequence(input_ids=ids, position_ids=list(range(len(ids))), labels=ids)
    silent = oracles(layers_of(model, "F32"), 1e30)
    plain, changed = evaluate(model, [{}, silent], [row, row])
    assert (plain.kl_divergence, plain.same_top1) == (0, 1)
    with torch.no_grad():
        p = model(tiny_ids(1)).logits[0, :-1].softmax(-1)
        with predictors_on(model, silent):
            q = model(tiny_ids(1)).logits[0, :-1].softmax(-1)
    labels = tiny_ids(1)[0, 1:, None]
    assert plain.perplexity == pytest.approx(float(p.gather(1, labels).log().mean().neg().exp()), rel=1e-4)
    assert changed.perplexity == pytest.approx(float(q.gather(1, labels).log().mean().neg().exp()), rel=1e-4)
    assert changed.kl_divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert changed.same_top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_verb(model_type: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(base / model_type), f"--text={base / 'stories.txt'}", f"--output={tmp_path}", "--json"]
    arguments += [f"--held-out={base / 'book.txt'}", "--tokens=1500", "--ranks=4,8", "--steps=60"]
    arguments += ["--sequence-length=32", "--predictor-type=F32", "--weight-type=F32", "--ppl-budget=20%"]
    assert main(["fit-predictor", *arguments, "--inputs=ffn_norm,previous"]) == 0
    output = capsys.readouterr().out.splitlines()
    record = json.loads(output[-1])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert record == {name: value for name, value in report.items() if name != "layers"}
    assert "cheaper: " + report["cheaper"] in output[-2]
    assert set(report["rivals"]) == {"low_rank_previous", "sign_bits", "low_bit_1", "low_bit_2", "oracle"}
    exact, *others = report["curve"]
    assert exact["bytes_ratio"] == pytest.approx(report["exact_bytes_ratio"])
    assert exact["evaluation"]["kl_divergence"] == 0
    limit = exact["evaluation"]["perplexity"] * 1.2
    kept = [point["bytes_ratio"] for point in report["curve"] if point["evaluation"]["perplexity"] <= limit]
    assert report["chosen"]["bytes_ratio"] == min(kept)
    assert all(point["bytes_ratio"] < exact["bytes_ratio"] for point in others)
    with safe_open(tmp_path / "predictors.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "turbosparse-predictors",
            "version": "1",
            "kind": "low_rank",
            "input": "ffn_norm",
        }
        assert len(list(file.keys())) == 3 * len(report["layers"]) + 1
        assert file.get_tensor("model.sample").shape == (16, 32)
        for name, layer in report["layers"].items():
            rank = 4 if layer["kind"] == "exact" else int(layer["kind"].removeprefix("low_rank_"))
            assert file.get_tensor(f"{name}.pred_a.weight").shape == (rank, 32)
            assert file.get_tensor(f"{name}.pred_b.weight").shape == (48, rank)
            assert float(file.get_tensor(f"{name}.pred_threshold")) == pytest.approx(layer["threshold"])
    assert len(report["layers"]) == (2 if model_type == "llama" else 8)
    assert not (tmp_path / ".captured").exists()


@pytest.mark.parametrize("what", ["predictors", "model"])
def test_fine_tuning_moves_the_model_towards_the_one_without_predictors(what: str) -> None:
    model = make("mixtral")
    layers = layers_of(model, "F32")
    ids = tiny_ids(1)[0].tolist()
    row = PackedSequence(input_ids=ids, position_ids=list(range(len(ids))), labels=ids)
    torch.manual_seed(0)
    placed = {
        name: PlacedPredictor(predictor=LowRankPredictor(32, 48, 8).requires_grad_(False), threshold=0.0)
        for name in layers
    }
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (before,) = evaluate(model, [placed], [row])
    config = PredictorConfig(finetune_steps=30, finetune=what, finetune_learning_rate=1e-2)
    expected = copy.deepcopy(model)
    finetune(model, placed, layers, [row], 0.0, config)
    with torch.no_grad(), predictors_on(model, placed):
        got = model(tiny_ids(1)).logits.log_softmax(-1)
        p = expected(tiny_ids(1)).logits.softmax(-1)
    assert float((p * (p.log() - got)).sum(-1).mean()) < 0.7 * before.kl_divergence
    same = all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert same == (what == "predictors")
    with predictors_on(model, placed) as trained:
        model(tiny_ids(1))
    assert trained == {}


def test_fine_tuning_at_a_price_names_fewer_candidates() -> None:
    model = make("llama")
    layers = layers_of(model, "F32")
    ids = tiny_ids(1)[0].tolist()
    row = PackedSequence(input_ids=ids, position_ids=list(range(len(ids))), labels=ids)
    shares = []
    for price in (0.0, 1.0):
        torch.manual_seed(0)
        placed = {
            name: PlacedPredictor(predictor=LowRankPredictor(32, 48, 8), threshold=0.0) for name in layers
        }
        finetune(model, placed, layers, [row], price, PredictorConfig(finetune_steps=10))
        x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            shares.append([float((each.predictor(x) >= 0).float().mean()) for each in placed.values()])
    assert all(costly < free for free, costly in zip(*shares, strict=True))


def test_the_verb_saves_a_fine_tuned_model(base: Path, tmp_path: Path) -> None:
    arguments = [str(base / "llama"), f"--text={base / 'stories.txt'}", f"--output={tmp_path}"]
    arguments += [f"--held-out={base / 'book.txt'}", "--tokens=1500", "--ranks=8", "--steps=60"]
    arguments += ["--sequence-length=32", "--predictor-type=F32", "--weight-type=F32", "--ppl-budget=50%"]
    assert main(["fit-predictor", *arguments, "--finetune-steps=3", "--finetune=model"]) == 0
    before, after = (load_model(path) for path in (base / "llama", tmp_path / "model"))
    assert activation_of(after) == activation_of(before)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])


def make_source(base: Path, text: Path, held_out: Path | None = None, tokens: int = 480) -> HuggingFaceSource:
    data = DataConfig(
        sources=(SourceConfig(path=str(text), on_end="stop"),),
        held_out=() if held_out is None else (SourceConfig(path=str(held_out)),),
        sequence_length=32,
    )
    return HuggingFaceSource(base / "llama", data, tokens=tokens, weight_type="F32")


def test_fine_tuning_sees_no_held_out_sequence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("turbosparse.predict.source.finetune", lambda *args: seen.append(args[3]))
    source = make_source(base, base / "stories.txt", base / "book.txt")
    source.finetune({}, 0.0, tmp_path, PredictorConfig())
    source.finetune({}, 0.0, tmp_path, PredictorConfig(held_out_share=0.5))
    assert len(source.rows) == 15
    assert seen == [source.rows[:12], source.rows[:7]]
    source = make_source(base, base / "stories.txt", base / "book.txt", tokens=32)
    with pytest.raises(DataError, match=r"\[fit-predictor\] expected sequences to fine-tune on .* got 1 in"):
        source.finetune({}, 0.0, tmp_path, PredictorConfig())


def test_halves_of_few_held_out_sequences_share_none(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[PackedSequence]] = []
    monkeypatch.setattr(
        "turbosparse.predict.source.evaluate", lambda model, configurations, rows: parts.append(rows)
    )
    book = tmp_path / "book.txt"
    for windows in (2, 3, 5):
        book.write_text("".join(f"{number:03}." for number in range(8 * windows)), encoding="utf-8")
        source = make_source(base, base / "stories.txt", book)
        source.evaluate([], "choose")
        source.evaluate([], "report")
        choose, report = ([tuple(row.input_ids) for row in part] for part in parts[-2:])
        assert len({*choose, *report}) == len(choose) + len(report) == windows
        assert choose
        assert report
    book.write_text("".join(f"{number:03}." for number in range(8)), encoding="utf-8")
    with pytest.raises(DataError, match="expected held-out text of at least two sequences, got 1"):
        make_source(base, base / "stories.txt", book)


def test_wrong_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short", encoding="utf-8")
    data = DataConfig(sources=(SourceConfig(path=str(path)),), sequence_length=32)
    with pytest.raises(DataError, match="expected held-out text of at least two sequences, got 0"):
        HuggingFaceSource(base / "llama", data, tokens=64, weight_type="F32")
    arguments = [str(base / "llama"), "--text=x", f"--output={tmp_path}"]
    for option, message in (
        ("--ranks=a", "[--ranks] expected numbers"),
        ("--ppl-budget=x", "[--ppl-budget] exp"),
        ("--tokens=0", "[--tokens] expected at least 1, got 0"),
    ):
        assert main(["fit-predictor", *arguments, option]) == 2
        assert message in capsys.readouterr().err


def test_an_ffn_with_biases_is_refused() -> None:
    model = swap_activation(make_hf_model("llama", mlp_bias=True), Activation(name="drelu"))
    with pytest.raises(ConfigError, match="expected an FFN without biases"):
        layers_of(model, "F32")

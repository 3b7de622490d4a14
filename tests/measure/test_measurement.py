"""Whole measurements: engine = torch = formulas on one array; mixtures; what cannot be measured."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from tests.measure.twins import TEXT, byte_tokenizer, make_twins
from tests.tiny_hf import make_hf_model, make_tokenizer
from turbosparse.errors import CalibrationError, ConfigError, TextError
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.figures import draw
from turbosparse.measure.hugging_face import HuggingFaceModel, check_device, open_hugging_face
from turbosparse.measure.measurement import measure
from turbosparse.measure.quality_points import budget_targets
from turbosparse.measure.report import plain
from turbosparse.runtime.measured_file import MeasuredFile
from turbosparse.sparsity.hotness import batch_union, carrying_share
from turbosparse.sparsity.quality import cut_windows
from turbosparse.sparsity.reuse import reuse
from turbosparse.sparsity.selection import GateThresholds, PositiveGate, Selection, TopK

CONFIG = MeasureConfig(
    tokens=512, context=64, quality_tokens=128, sample_tokens=128, ppl_budgets=(0.2,), pair_neurons=16
)


class Kept:
    """A watcher that keeps everything."""

    def __init__(self, units: int) -> None:
        self.rows: list[list[NDArray[np.float32]]] = [[] for _ in range(units)]

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        self.rows[unit].append(gate * up)

    def on_routing(self, layer: int, chosen: NDArray[np.integer]) -> None:
        pass


def numbers(record: Any, place: str = "") -> dict[str, float]:
    """Every number of a record by where it stands."""
    if isinstance(record, dict):
        return {k: v for name, item in record.items() for k, v in numbers(item, f"{place}.{name}").items()}
    if isinstance(record, list):
        return {k: v for at, item in enumerate(record) for k, v in numbers(item, f"{place}.{at}").items()}
    return {place: float(record)} if isinstance(record, int | float) else {}


class _BlasThreads(Kept):
    """A watcher that notes how many threads NumPy's matrix products would have."""

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        self.found = blas_threads()


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_numpy_leaves_the_cpus_to_torch_while_it_watches(tmp_path: Path) -> None:
    twin, watcher, before = make_twins(tmp_path / "tiny.gguf", "silu"), _BlasThreads(2), blas_threads()
    twin.capture(np.arange(16, dtype=np.int32), watcher)
    assert watcher.found == [1] * len(before)
    assert blas_threads() == before


@pytest.mark.parametrize("activation", ["silu", "drelu"])
def test_engine_and_torch_agree(tmp_path: Path, activation: str) -> None:
    twin = make_twins(tmp_path / "tiny.gguf", activation)
    file = MeasuredFile(tmp_path / "tiny.gguf", scratch=tmp_path, threads=1)
    ours, theirs = measure(file, TEXT, CONFIG), measure(twin, TEXT, CONFIG)
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]
    for part in ("overall", "units"):
        expected = numbers(theirs[part])
        got = numbers(ours[part])
        assert expected.keys() == got.keys()
        # one neuron of 160 on the other side of a threshold moves a mean over 64 tokens by 1e-4
        off = {
            name: (value, expected[name])
            for name, value in got.items()
            if not math.isclose(value, expected[name], rel_tol=0.01, abs_tol=0.003)
            and not (math.isnan(value) and math.isnan(expected[name]))
        }
        assert off == {}
    for got_point, point in zip(ours["quality"], theirs["quality"], strict=True):
        assert got_point["label"] == point["label"]
        assert got_point["dense_perplexity"] == pytest.approx(point["dense_perplexity"], rel=1e-3)
        assert got_point["perplexity"] == pytest.approx(point["perplexity"], rel=1e-3)
        assert got_point["mean_kl"] == pytest.approx(point["mean_kl"], rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    "rule", [TopK(share=0.25), PositiveGate(), GateThresholds(label="gate", thresholds={1: 0.1})]
)
def test_every_rule_sees_what_earlier_layers_lost(tmp_path: Path, rule: Selection) -> None:
    """In the engine as in torch: both choose by the activations of the thinned model."""
    twin = make_twins(tmp_path / "tiny.gguf", "silu")
    file = MeasuredFile(tmp_path / "tiny.gguf", scratch=tmp_path, threads=1)
    [window] = cut_windows(twin.text_ids(TEXT)[:64], 64, None)
    pieces = [list(source.predictions(window, rule)) for source in (file, twin)]
    ours, theirs = (np.concatenate([logits for logits, _ in part]) for part in pieces)
    dense = np.concatenate([logits for logits, _ in twin.predictions(window, None)])
    file.close()
    error, change = np.linalg.norm(ours - theirs), np.linalg.norm(theirs - dense)
    assert error < 1e-4 * np.linalg.norm(theirs) < 0.1 * change


def test_streaming_equals_the_formulas_on_whole_arrays(tmp_path: Path) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    config = dataclasses.replace(CONFIG, quality_tokens=0)
    record = measure(twin, TEXT, config)
    windows = cut_windows(twin.text_ids(TEXT)[: config.tokens], config.context, None)
    for unit, found in enumerate(record["units"]):
        per_window = []
        for window in windows:
            watcher = Kept(len(twin.units))
            twin.capture(window, watcher)
            per_window.append(np.concatenate(watcher.rows[unit]))
        activations = np.concatenate(per_window)
        norms = np.abs(activations) * np.linalg.norm(twin.down_t(unit), axis=1)
        at = record["cett_targets"].index(0.1)
        eps = found["thresholds"][at]["eps"]
        active = norms >= np.float32(eps)
        counts = active.sum(axis=0)
        assert found["tokens"] == len(activations) == 512
        assert found["cett_sparsity"]["value"][at] == pytest.approx(1 - active.mean(), abs=1e-4)
        assert found["active_share"]["value"] == pytest.approx(active.mean(), abs=1e-4)
        assert found["carrying_80_percent"]["value"] == pytest.approx(carrying_share(counts), abs=0.01)
        union = batch_union(counts, len(active), record["union_sizes"])
        np.testing.assert_allclose(found["union_batch"]["value"], union, atol=1e-3)
        by_window = [reuse(active[begin : begin + 64]) for begin in range(0, len(active), 64)]
        np.testing.assert_allclose(found["reuse"]["value"], np.mean(by_window, axis=0), atol=0.01)


def test_thresholds_meet_their_targets(tmp_path: Path) -> None:
    record = measure(make_twins(tmp_path / "tiny.gguf"), TEXT, CONFIG)
    for unit in record["units"]:
        sparsities = unit["cett_sparsity"]["value"]
        assert sparsities == sorted(sparsities)
        for found in unit["thresholds"]:
            assert 0.97 * found["target"] < found["cett"] <= found["target"]
            assert found["checked_cett"] == pytest.approx(found["target"], rel=0.3)
    divergences = [point["mean_kl"] for point in record["quality"] if point["kind"] == "cett"]
    assert divergences == sorted(divergences)
    zeros = record["quality"][-1]
    assert (zeros["kind"], zeros["mean_kl"], zeros["same_top_1"]) == ("zeros", 0, 1)


def test_top_k_is_as_sparse_as_it_leaves_neurons_out(tmp_path: Path) -> None:
    """Most neurons of dReLU are zero, so the largest half holds zeros too."""
    config = dataclasses.replace(CONFIG, top_k=(0.5,), ppl_budgets=(), cett_targets=(0.1,))
    record = measure(make_twins(tmp_path / "tiny.gguf", "drelu"), TEXT, config)
    points = {point["label"]: point for point in record["quality"]}
    zeros = record["overall"]["exact_zeros"]["value"]
    assert zeros > 0.6
    assert points["top 50 %"]["sparsity"]["value"] == pytest.approx(zeros, abs=0.02)


class Quadratic:
    """Stands for a search and its runs: perplexity rises by the square of the CETT target."""

    def selection(self, target: float) -> float:
        return target

    def run(self, target: float) -> SimpleNamespace:
        return SimpleNamespace(perplexity_rise=0.001 + target**2, perplexity_rise_se=0.003)


def test_budgets_are_met_or_said_not_to_be() -> None:
    notes: list[str] = []
    stub: Any = Quadratic()
    found = budget_targets(stub, stub, (0.01, 0.0005, 0.05), notes)
    assert found[0.01] == pytest.approx(0.095, rel=0.1)
    assert found[0.05] == pytest.approx(0.221, rel=0.1)
    assert sorted(found) == [0.01, 0.05]
    assert notes[0].startswith(
        "CETT-PPL-0.05%: [perplexity budget] expected a rise of at most 0.05%, got 0.10%"
    )
    assert notes[1] == "CETT-PPL-1%: the rise is known within 0.3 % only; give more quality tokens"
    assert len(notes) == 2


class Unreachable(Quadratic):
    """A search in which a layer never reaches large targets."""

    def selection(self, target: float) -> float:
        if target > 0.15:
            raise CalibrationError("[layer 3] expected an error above it")
        return target


def test_a_target_that_no_threshold_reaches_does_not_cost_the_budget() -> None:
    notes: list[str] = []
    stub: Any = Unreachable()
    found = budget_targets(stub, stub, (0.01, 0.05, 0.1), notes)
    assert found[0.01] == pytest.approx(0.095, rel=0.1)
    for budget in (0.05, 0.1):
        assert 0.14 < found[budget] <= 0.15
    assert not [note for note in notes if "layer 3" in note]


@pytest.mark.parametrize(
    ("folder", "name"), [("models/tiny", "tiny"), ("runs/mine/distillation/model", "mine/distillation")]
)
def test_what_sparsify_leaves_has_the_name_of_its_run(tmp_path: Path, folder: str, name: str) -> None:
    make_hf_model().save_pretrained(tmp_path / folder)
    make_tokenizer().save_pretrained(tmp_path / folder)
    assert open_hugging_face(tmp_path / folder).description["name"] == name


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_mixtures_are_measured_per_expert(model_type: str) -> None:
    model = HuggingFaceModel(make_hf_model(model_type), byte_tokenizer(), name=model_type)
    record = measure(model, TEXT, CONFIG)
    experts = [unit for unit in record["units"] if unit["expert"] is not None]
    assert len(experts) == 2 * 4
    assert {unit["name"] for unit in experts} >= {"layer 0 expert 0", "layer 1 expert 3"}
    assert sum(unit["tokens"] for unit in experts) == 2 * 512 * 2  # layers, tokens, experts per token
    assert [layer["layer"] for layer in record["routing"]] == [0, 1]
    for layer in record["routing"]:
        assert sum(layer["load"]) == pytest.approx(2)
        assert 0 < layer["entropy"] <= 1
        assert layer["largest_load"] == pytest.approx(max(layer["load"]) * 4 / 2)
        assert 0 < layer["entropy_se"] < 0.2
        assert 0 < layer["largest_load_se"] < 0.5
        assert 0 < layer["reuse"]["value"][0] <= 1
    shared = [unit for unit in record["units"] if "shared" in unit["name"]]
    assert len(shared) == (2 if model_type == "qwen2_moe" else 0)


def test_the_gap_of_a_mixture_is_weighted_as_all_means_are() -> None:
    model = HuggingFaceModel(make_hf_model("qwen2_moe"), byte_tokenizer(), name="mixture")
    record = measure(model, TEXT, dataclasses.replace(CONFIG, quality_tokens=0))
    judged = [unit for unit in record["units"] if unit["coactivation"]["neurons"]]
    weights = [unit["tokens"] * unit["neurons"] for unit in judged]
    assert len(set(weights)) > 1
    for name in ("gap", "partner", "average"):
        mean = np.average([unit["coactivation"][name] for unit in judged], weights=weights)
        assert record["overall"]["coactivation"][name] == pytest.approx(mean)
    errors = np.nan_to_num([unit["coactivation"]["standard_error"] for unit in judged])
    expected = math.sqrt(sum((w * error) ** 2 for w, error in zip(weights, errors, strict=True))) / sum(
        weights
    )
    assert record["overall"]["coactivation"]["standard_error"] == pytest.approx(expected)


def test_experts_that_the_sample_does_not_reach_have_no_numbers() -> None:
    model = HuggingFaceModel(make_hf_model("mixtral", num_local_experts=32), byte_tokenizer(), name="mixture")
    config = dataclasses.replace(CONFIG, sample_tokens=16, quality_tokens=0)
    record = measure(model, TEXT, config)
    missed = [unit for unit in record["units"] if unit["tokens"] and not unit["sample_tokens"]]
    reached = [unit for unit in record["units"] if unit["sample_tokens"]]
    assert missed
    for unit in missed:
        assert not math.isnan(unit["exact_zeros"]["value"])
        for name in ("cett_sparsity", "active_share", "never_active_share", "union_batch"):
            assert np.isnan(unit[name]["value"]).all()
        assert np.isnan(unit["hotness"]).all()
        assert f"{unit['name']}: no token of the sample reached it" in "".join(record["notes"])
    assert "no neuron is active" not in "".join(record["notes"])
    found = [(unit["tokens"], unit["active_share"]["value"]) for unit in reached]
    mean = sum(tokens * share for tokens, share in found) / sum(tokens for tokens, _ in found)
    assert record["overall"]["active_share"]["value"] == pytest.approx(mean)


def test_running_with_all_neurons_is_the_model_itself() -> None:
    model = make_hf_model("mixtral")
    ids = np.arange(32, dtype=np.int32)
    with torch.no_grad():
        expected = model(torch.arange(32)[None]).logits[0, 16:31].numpy()
    source = HuggingFaceModel(model, byte_tokenizer(), name="mixtral")
    [(logits, targets)] = source.predictions(ids, None)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert targets.tolist() == list(range(17, 32))


@pytest.mark.parametrize("projection", ["up_proj", "down_proj"])
def test_a_silent_layer_is_told_and_left_out(tmp_path: Path, projection: str) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    with torch.no_grad():
        getattr(twin.model.model.layers[1].mlp, projection).weight.zero_()
    record = measure(twin, TEXT, CONFIG)
    assert "layer 1: no neuron is active on the sample, so CETT is undefined there" in record["notes"]
    silent = record["units"][1]
    assert silent["exact_zeros"]["value"] == (projection == "up_proj")
    assert silent["cett_sparsity"]["value"] == [1] * len(record["cett_targets"])
    assert silent["thresholds"] == []
    assert math.isnan(silent["reuse"]["value"][0])
    np.testing.assert_allclose(record["overall"]["reuse"]["value"], record["units"][0]["reuse"]["value"])


def test_a_report_of_layers_without_values_can_be_drawn(tmp_path: Path) -> None:
    """A layer whose up is zero everywhere, and experts that no token was sent to."""
    twin = make_twins(tmp_path / "tiny.gguf")
    with torch.no_grad():
        twin.model.model.layers[1].mlp.up_proj.weight.zero_()
    mixture = HuggingFaceModel(
        make_hf_model("mixtral", num_local_experts=32), byte_tokenizer(), name="mixture"
    )
    config = dataclasses.replace(CONFIG, tokens=32, context=32, sample_tokens=16, quality_tokens=0)
    for source in (twin, mixture):
        record = plain(measure(source, TEXT, config))
        tokens = {unit["name"]: unit["tokens"] for unit in record["units"]}
        assert all(tokens[shown["name"]] for shown in record["histograms"])
        assert {plot.name for plot in draw([record])} >= {"gate", "up", "combined", "hotness"}
    assert 0 in tokens.values()


def test_nan_is_an_error_that_names_the_layer(tmp_path: Path) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    with torch.no_grad():
        twin.model.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    with pytest.raises(CalibrationError, match=r"layer 1.*NaN or Inf"):
        measure(twin, TEXT, CONFIG)


@pytest.mark.parametrize("budgets", [(), (0.2,)])
def test_predictions_that_are_not_finite_are_an_error(tmp_path: Path, budgets: tuple[float, ...]) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    with torch.no_grad():
        twin.model.model.norm.weight[3] = math.nan
    message = r"\[window 0\] \[quality\] expected finite losses, got nan of the dense model at scored token 0"
    with pytest.raises(CalibrationError, match=message):
        measure(twin, TEXT, dataclasses.replace(CONFIG, ppl_budgets=budgets))


@pytest.mark.parametrize(("text", "message"), [("  \n", "white space"), ("short", "at least 64 tokens")])
def test_too_little_text(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        measure(make_twins(tmp_path / "tiny.gguf"), text, CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 8}, "[context] expected at least 16"),
        ({"tokens": 32}, "[tokens] expected at least one window"),
        ({"cett_targets": (0.1, 1.5)}, "[cett] expected targets above 0 and below 1"),
        ({"active": 0.15}, "[active] expected one of the CETT targets"),
        ({"top_k": (0.0,)}, "[top-k] expected shares"),
        ({"ppl_budgets": (0.0,)}, "[ppl budgets] expected above 0"),
        ({"sample_tokens": 2}, "[sample tokens] expected at least 16"),
        ({"pair_neurons": 1}, "[pair neurons] expected at least 2"),
        ({"quality_tokens": -1}, "[quality tokens] expected 0 or more"),
        ({"seed": -1}, "[seed] expected 0 or more"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("device", ["foo", "meta", ""])
def test_devices_that_torch_cannot_use(device: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"\[device\] expected one that torch can use here, got '{device}': "
    ):
        check_device(device)
    check_device("cpu")


def test_a_torch_without_cuda_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this one has it")
    with pytest.raises(ConfigError, match=r"\[device\] expected .* got 'cuda': "):
        open_hugging_face(tmp_path, device="cuda")


def test_a_small_budget_shrinks_the_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twin = make_twins(tmp_path / "tiny.gguf")
    record = measure(twin, TEXT, dataclasses.replace(CONFIG, memory_bytes=1 << 16, quality_tokens=0))
    assert record["units"][0]["sample_tokens"] < 30
    assert "the memory budget has room for 25 of 160 sample tokens" in caplog.text

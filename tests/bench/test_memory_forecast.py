"""What a budget would hold is what the engine takes, hits are what the engine has, and the process keeps to
its budget.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bundled_model import make_bundled
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native
from turbosparse.bench.memory_forecast import demand_of, forecast, plan_memory
from turbosparse.bench.shapes import Shape, SyntheticModel
from turbosparse.bench.synthetic_cache import synthetic_file
from turbosparse.cli.main import main
from turbosparse.errors import ConfigError
from turbosparse.runtime.model_file import ModelFile

SMALL = Shape(
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1024,
    num_experts=8,
    num_experts_per_tok=2,
)
MODEL = SyntheticModel(name="small", shape=SMALL, rank=128, hot_share=0.6, bundled=True)
CONTEXT = 256
CHILD = """
import json, sys
import numpy as np
from turbosparse import _native
from turbosparse.runtime.memory import forget_peak, peak_resident_bytes
path, budget, io = sys.argv[1], int(sys.argv[2]), sys.argv[3]
forget_peak()
before = peak_resident_bytes()
model = _native.Model(path, threads=1, memory_budget=budget, context=256, io=io)
session = model.session(256)
session.forward(np.arange(100, 164, dtype=np.int32), mode="predicted")
for token in range(180):
    session.forward(np.array([token * 5 % 900], np.int32), mode="predicted")
print(json.dumps([peak_resident_bytes() - before, model.info.memory is not None]))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return synthetic_file(MODEL, plain=False)


@pytest.mark.parametrize(("share", "io"), [(0.5, "pread"), (0.8, "pread"), (0.8, "mmap"), (1.1, "pread")])
def test_the_process_keeps_to_its_budget(path: Path, share: float, io: str) -> None:
    file = ModelFile(path)
    everything = plan_memory(file, budget=1 << 40, context=CONTEXT, threads=1).everything
    assert everything > 100 << 20
    budget = int(share * everything)
    command = [sys.executable, "-c", CHILD, str(path), str(budget), io]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, on_disk = json.loads(done.stdout)
    assert on_disk == (share < 1)
    assert 0.8 * min(budget, everything) < grown <= 1.02 * budget


def test_the_plan_is_what_the_engine_takes(path: Path) -> None:
    file = ModelFile(path)
    for share in (0.5, 0.7, 0.9):
        whole = plan_memory(file, budget=1 << 40, context=CONTEXT, threads=1)
        budget = int(share * whole.everything)
        plan = plan_memory(file, budget=budget, context=CONTEXT, threads=1)
        model = _native.Model(str(path), threads=1, memory_budget=budget, context=CONTEXT)
        session = model.session(CONTEXT)
        memory = model.info.memory
        assert session.position == 0 and memory is not None
        assert memory["pinned_neurons"] == plan.pinned
        assert memory["pinned_neurons"] + memory["cached_neurons"] == pytest.approx(plan.kept, abs=4)
        used = sum(plan.parts.values()) + plan.kept * plan.neuron_bytes / plan.neurons
        assert 0.97 * budget < used <= budget
    assert whole.kept == whole.neurons and not whole.on_disk


def test_the_smallest_budget_works_and_less_does_not(path: Path) -> None:
    plan = plan_memory(ModelFile(path), budget=1, context=CONTEXT, threads=1)
    assert not plan.fits and plan.kept == 0
    assert _native.Model(str(path), threads=1, memory_budget=plan.least, context=CONTEXT).info.memory
    with pytest.raises(ConfigError, match="at least"):
        _native.Model(str(path), threads=1, memory_budget=plan.least - 1, context=CONTEXT)


def test_demand_is_the_hotness_in_the_file(path: Path) -> None:
    demand = demand_of(ModelFile(path))
    per_token = 2 * 2 * 3584 * 0.1  # layers, experts of a token, 90 % zeros
    assert demand.neurons_per_token == pytest.approx(per_token, rel=0.01)
    assert demand.clusters.size == 2 * 8 * 3584 / 2  # two neurons of 1024 columns in Q4_0 fill a block
    assert "hotness" in demand.assumption


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_hits_of_the_engine(path: Path, share: float) -> None:
    file = ModelFile(path)
    everything = plan_memory(file, budget=1, context=CONTEXT, threads=1).everything
    plan = plan_memory(file, budget=int(share * everything), context=CONTEXT, threads=1)
    expected = forecast(file, plan, threads=1, io="pread").hit_ratio
    model = _native.Model(str(path), threads=1, memory_budget=plan.budget, context=CONTEXT, io="pread")
    session = model.session(CONTEXT)
    hits = []
    for begin in (0, 100):  # from the first token on, and later
        session.reset_counters()
        for token in range(begin, begin + 100):
            session.forward(np.array([token * 7 % 900], np.int32), mode="predicted")
        counters = session.counters
        hits.append(sum(counters["cached"]) / (sum(counters["cached"]) + sum(counters["missed"])))
    assert 0.3 < expected < 0.97
    assert hits == pytest.approx([expected, expected], abs=0.05)


def test_a_forecast_counts_what_is_missed(path: Path) -> None:
    file = ModelFile(path)
    whole = plan_memory(file, budget=1 << 40, context=CONTEXT, threads=1)
    small = plan_memory(file, budget=whole.everything * 3 // 4, context=CONTEXT, threads=1)
    found, without = forecast(file, small, threads=1, io="pread"), forecast(file, whole, threads=1)
    assert without.hit_ratio == 1 and without.disk_s == 0 and without.speeds.io == ""
    assert 0.4 < found.hit_ratio < 1 and found.speeds.io == "pread"
    missed = (1 - found.hit_ratio) * demand_of(file).clusters.sum()
    assert found.disk_bytes_per_token == pytest.approx(4096 * missed)
    assert 0.5 * missed / 2 < found.speeds.reads_per_burst <= missed / 2
    assert found.tok_per_s < found.tok_per_s_hidden


def test_inspect_shows_budgets(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = plan_memory(ModelFile(path), budget=1, context=CONTEXT).everything
    arguments = ["inspect", str(path), "--context", str(CONTEXT), "-t", "1", "--memory-budget"]
    assert main([*arguments, str(everything // 2)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "KV cache of 256 tokens",
        "predictors",
        "of the activations",
        "PREDICTION",
        "hits",
        "assumed",
    ):
        assert part in shown
    assert main([*arguments, "1MB"]) == 0
    shown = capsys.readouterr().out
    assert "too small: at least" in shown and "PREDICTION" not in shown
    assert main([*arguments, "1GiB", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["memory"]
    assert record["forecast"]["hit_ratio"] == 1 and record["kept"] == record["neurons"]
    assert main([*arguments, "1GiB", "-t", "9999"]) == 2
    assert "[threads] expected" in capsys.readouterr().err
    assert main([*arguments, "1GiB", "--context", "9999999"]) == 2
    assert "[context] expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "gate_apart", "assumption", "share"),
    [
        ({"predictor": "low_rank"}, False, "no hotness in the file: .* 10% .*assumed", 0.1),
        ({}, False, "mode exact with gate in the bundles", 1.0),
        ({}, True, "no hotness in the file", 0.1),
        ({"activation": "silu"}, False, "mode dense reads all neurons", 1.0),
    ],
)
def test_what_is_assumed_without_hotness(
    tmp_path: Path, options: dict[str, str], gate_apart: bool, assumption: str, share: float
) -> None:
    make_tiny_model(tmp_path / "m.gguf", TinyModel(**({"activation": "drelu", "down_t": True} | options)))  # type: ignore[arg-type]
    demand = demand_of(
        ModelFile(make_bundled(tmp_path / "m.gguf", tmp_path / "b.gguf", gate_apart=gate_apart))
    )
    assert re.search(assumption, demand.assumption)
    assert demand.neurons_per_token == pytest.approx(share * 2 * 160)

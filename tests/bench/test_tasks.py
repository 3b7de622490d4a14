"""lm-evaluation-harness on a model file: its likelihoods, answers and scores are the engine's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from tests.measure.twins import make_twins
from tests.tiny_hf import make_tokenizer
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.bench.harness_model import EngineHarnessModel
from turbosparse.bench.harness_torch import harness_around
from turbosparse.bench.tasks import OPEN_LLM_TASKS, TaskSettings, evaluate
from turbosparse.cli.main import main
from turbosparse.errors import ConfigError
from turbosparse.runtime.engine import Model, load

QUESTIONS: list[dict[str, Any]] = [
    {"context": "the land and", "choices": ["the sea", "a tree in the garden", "an end"], "gold": 0},
    {"context": "in the", "choices": ["beginning", "end"], "gold": 1},
    {"context": "the land and the", "choices": ["other", "thin ink"], "gold": 0},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    make_tiny_model(target, TinyModel(down_t=True, threshold=0.05, gate_threshold=0.02))
    return target


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path, threads=2)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_task(tmp_path, monkeypatch)


def write_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task "tiny", on data beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    (folder / "tiny.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def direct(model: Model, context: list[int], continuation: list[int], mode: Any) -> tuple[float, bool]:
    logits = model.logits(context + continuation, mode=mode).astype(np.float64)
    logits = logits[len(context) - 1 : -1]
    peak = logits.max(axis=-1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    chosen = log_p[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((logits.argmax(axis=-1) == continuation).all())


@pytest.mark.parametrize("mode", ["dense", "threshold"])
def test_likelihoods_are_the_engines(model: Model, mode: Any) -> None:
    pairs = [(question["context"], " " + choice) for question in QUESTIONS for choice in question["choices"]]
    harness = EngineHarnessModel(model, mode=mode)
    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (likelihood, is_greedy) in zip(pairs, found, strict=True):
        ids = model.tokenizer.encode(context)
        whole = model.tokenizer.encode(context + continuation)
        expected = direct(model, ids, whole[len(ids) :], mode)
        assert likelihood == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]


def test_likelihoods_are_those_of_the_harness_in_torch(tmp_path: Path) -> None:
    """The same F32 weights in its own Hugging Face backend."""
    twin = make_twins(tmp_path / "twin.gguf")
    theirs = harness_around(twin.model, make_tokenizer(), batch_size=3)
    ours = EngineHarnessModel(load(tmp_path / "twin.gguf", threads=2), mode="dense")
    random = np.random.default_rng(1)
    requests = []
    for length in (1, 5, 40, 17, 3):
        ids = random.integers(twin.model.config.vocab_size, size=length + 4).tolist()
        requests.append((("", ""), ids[:length], ids[length:]))
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    got = ours._loglikelihood_tokens(requests)
    for (likelihood, greedy), (value, is_greedy) in zip(got, expected, strict=True):
        assert likelihood == pytest.approx(value, abs=1e-3)
        assert greedy == is_greedy


def test_the_likeliest_continuation_is_greedy(model: Model) -> None:
    context = model.tokenizer.encode("the land")
    best = int(model.logits(context, mode="dense")[-1].argmax())
    harness = EngineHarnessModel(model, mode="dense")
    assert harness._score([*context, best], 1)[1]
    assert not harness._score([*context, (best + 1) % 256], 1)[1]


def test_long_requests_lose_their_beginning(path: Path) -> None:
    model = load(path, context=16)
    harness = EngineHarnessModel(model, mode="dense")
    ids = model.tokenizer.encode("the land and the sea " * 5)
    ((likelihood, _),) = harness._loglikelihood_tokens([(None, ids[:-3], ids[-3:])])
    expected = direct(load(path), ids[-17:-3], ids[-3:], "dense")
    assert likelihood == pytest.approx(expected[0], abs=1e-4)


def test_rolling_windows_score_every_token_once(path: Path) -> None:
    model = load(path, context=16)
    text = "the land and the sea in the end " * 3
    harness = EngineHarnessModel(model, mode="dense")
    (total,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    ids = [harness.prefix_token_id, *model.tokenizer.encode(text, add_special=False)]
    expected = 0.0
    for begin in range(0, len(ids) - 1, 16):
        end = min(begin + 16, len(ids) - 1)
        lead = max(end - 16, 0)  # the last window is filled up with what came before
        scored = ids[begin + 1 : end + 1]
        expected += direct(load(path), ids[lead : begin + 1], scored, "dense")[0]
    assert total == pytest.approx(expected, abs=1e-3)


def test_generation_stops_where_told(model: Model) -> None:
    harness = EngineHarnessModel(model, mode="dense")
    plain = "".join(model.generate("the land", max_tokens=12, mode="dense"))
    settings = {"until": [], "max_gen_toks": 12}
    assert harness.generate_until([request("generate_until", "the land", settings)]) == [plain]
    stop = plain[3]
    (cut,) = harness.generate_until([request("generate_until", "the land", settings | {"until": [stop]})])
    assert cut == plain[: plain.index(stop)]


def test_scores_of_a_task(model: Model, tasks: Path) -> None:
    settings = TaskSettings(tasks=["tiny"], include_path=tasks)
    done: list[float] = []
    harness = EngineHarnessModel(model, mode="dense", advance=done.append)
    (score,) = evaluate(harness, settings)
    assert (score.task, score.metric, score.questions) == ("tiny", "acc", 3)
    assert sum(done) == sum(len(question["choices"]) for question in QUESTIONS)
    right = 0
    for question in QUESTIONS:
        ids = model.tokenizer.encode(question["context"])
        likelihoods = []
        for choice in question["choices"]:
            whole = model.tokenizer.encode(f"{question['context']} {choice}")
            likelihoods.append(direct(model, ids, whole[len(ids) :], "dense")[0])
        right += int(np.argmax(likelihoods) == question["gold"])
    assert score.value == pytest.approx(right / 3)


def test_the_verb_prints_modes_side_by_side(
    path: Path,
    tasks: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where git knows of no repository
    modes = ["--mode", "dense", "--mode", "threshold"]
    assert main(["eval", str(path), "--tasks", "tiny", "--include", str(tasks), *modes, "--json"]) == 0
    printed = capfd.readouterr()
    assert "git" not in printed.err
    lines = printed.out.splitlines()
    assert lines[0].split() == ["task", "metric", "shots", "questions", "dense", "threshold"]
    record = json.loads(lines[-1])
    assert set(record) == {"dense", "threshold"}
    assert record["dense"][0]["metric"] == "acc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one task"),
        (["--tasks", "no_such_task"], "expected tasks that lm-evaluation-harness knows, got no_such_task"),
        (["--tasks", "tiny", "--limit", "0"], "[limit] expected 1 or more"),
        (["--tasks", "tiny", "--shots", "-1"], "[shots] expected 0 or more"),
        (["--preset", "open-llm", "--tasks", "tiny"], "[preset] expected neither"),
        (["--tasks", "tiny", "--include", "nowhere"], "[include] expected a folder"),
    ],
)
def test_bad_input_is_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["eval", str(path), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


@pytest.mark.parametrize(
    ("options", "got"), [([], "tiny"), (["--tasks", "tiny,other"], "one of tiny, other")]
)
def test_more_examples_than_a_task_has_are_refused(
    path: Path, tasks: Path, capsys: pytest.CaptureFixture[str], options: list[str], got: str
) -> None:
    other = (tasks / "tiny.yaml").read_text(encoding="utf-8").replace("task: tiny", "task: other")
    (tasks / "other.yaml").write_text(other, encoding="utf-8")
    arguments = ["--tasks", "tiny", "--include", str(tasks), "--shots", "25", *options]
    assert main(["eval", str(path), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    expected = "[shots] expected a task with 25 examples to show before a question, got fewer in"
    assert error.endswith(f"{expected} {got}")


def test_modes_are_checked_before_anything_is_asked(
    path: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbosparse.cli.eval._ask_file", lambda *args: pytest.fail("asked"))
    modes = ["--mode", "dense", "--mode", "predicted"]
    assert main(["eval", str(path), "--tasks", "tiny", "--include", str(tasks), *modes]) == 2
    assert "can run (dense, " in capsys.readouterr().err


def test_a_mode_of_a_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--tasks", "tiny", "--mode", "exact"]) == 2
    assert "[mode] expected none for a Hugging Face model" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--tasks", "tiny", "--context", "16"]) == 2
    assert "[context] expected none for a Hugging Face model, got 16" in capsys.readouterr().err


def test_the_preset_has_the_papers_shots() -> None:
    assert OPEN_LLM_TASKS == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
    with pytest.raises(ConfigError, match="at least one task"):
        TaskSettings(tasks=[])

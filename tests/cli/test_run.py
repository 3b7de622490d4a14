"""`turbosparse run` as a user types it."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main

PROMPT = "the cat and the hat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    make_tiny_model(path, TinyModel(activation="drelu", down_t=True))
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["run", *arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def test_text_on_stdout_and_timings_on_stderr(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", model, "--raw", "-p", PROMPT, "-n", "6", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    record = run_json(capsys, model, "--raw", "-p", PROMPT, "-n", "6", "--threads", "2")
    assert captured.out == f"{record['text']}\n"
    for words in ("mode exact (also dense)", "load ", "prompt 11 tokens at", "answer 6 tokens at", "active"):
        assert words in captured.err, words


def test_pinned_threads_change_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = os.sched_getaffinity(0)
    free, pinned = (
        run_json(capsys, model, "--raw", "-p", PROMPT, "-n", "6", *pin) for pin in ([], ["--pin"])
    )
    assert pinned["ids"] == free["ids"]
    assert os.sched_getaffinity(0) == allowed


def test_the_json_record(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_json(capsys, model, "--raw", "-p", PROMPT, "-n", "5", "--mode", "dense")
    assert record["mode"] == "dense"
    assert record["active_ratio"] == 1.0
    assert record["tokens"] == 5
    assert isinstance(record["ids"], list)
    assert {
        "text",
        "load_s",
        "prompt_tokens",
        "prompt_tok_per_s",
        "decode_tok_per_s",
        "finish_reason",
    } <= record.keys()


def test_a_prompt_from_a_file_and_from_stdin(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
    by_option = run_json(capsys, model, "--raw", "-p", PROMPT, "-n", "5")
    by_file = run_json(capsys, model, "--raw", "-f", str(tmp_path / "prompt.txt"), "-n", "5")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    by_stdin = run_json(capsys, model, "--raw", "-n", "5")
    assert by_option["ids"] == by_file["ids"] == by_stdin["ids"]


def test_chat_is_the_default_where_the_file_has_a_template(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    default, chat, raw, system = (
        run_json(capsys, model, "-p", "the", "-n", "1", *more)["prompt_tokens"]
        for more in ([], ["--chat"], ["--raw"], ["--system", "and"])
    )
    assert default == chat
    assert isinstance(raw, int)
    assert isinstance(default, int)
    assert isinstance(system, int)
    assert raw < default < system


def test_sampling_options_arrive(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--raw", "-p", PROMPT, "-n", "12", "--temp", "1.2", "--top-k", "50", "--top-p", "0.9"]
    options += ["--min-p", "0.01", "--repeat-penalty", "1.1", "--repeat-window", "8"]
    first, again, other = (
        run_json(capsys, model, *options, "--seed", seed)["ids"] for seed in ("1", "1", "2")
    )
    assert first == again != other
    text = str(run_json(capsys, model, *options, "--seed", "1")["text"])
    stopped = run_json(capsys, model, *options, "--seed", "1", "--stop", text[2:4].replace("\n", "\\n"))
    assert stopped["text"] == text[: text.index(text[2:4])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", " "], "[prompt] expected text, got none"),
        (["-p", "a" * 400], "[prompt] expected at most 256 tokens (the context), got"),
        (["-p", "a", "--threads", "0"], "[threads] expected 1 to "),
        (["-p", "a", "--threads", "99999"], "[threads]"),
        (["-p", "a", "--threads", "two"], "argument -t/--threads: expected a number, got 'two'"),
        (["-p", "a", "--context", "9999"], "[context] expected 1 to 256 tokens"),
        (["-p", "a", "--temp", "-1"], "[sampling.temperature] expected 0 or more, got -1.0"),
        (["-p", "a", "--top-p", "0"], "[sampling.top_p]"),
        (["-p", "a", "-n", "0"], "[max_tokens] expected 1 or more, got 0"),
        (["-p", "a", "--raw", "--system", "b"], "[--system] expected a chat, got --raw beside it"),
        (["-p", "a", "--memory-budget", "99999999999999999999GiB"], "[memory budget] expected at most"),
        (["-p", "a", "--mode", "magic"], "invalid choice: 'magic'"),
        (["-p", "a", "--isa", "mmx"], "mmx"),
        (["-p", "a", "--io", "pread"], "[--io] expected --memory-budget beside it, got pread alone"),
        (["-f", "/nowhere/prompt.txt"], "[/nowhere/prompt.txt] No such file or directory"),
        (["-p", "a", "-f", "b"], "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    model: str, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["run", model, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("turbosparse: error: ")
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_what_helps_where_a_prompt_is_too_long(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    too_long = ["run", model, "--raw", "-p", "a" * 100, "-n", "1"]
    assert main([*too_long, "--context", "64"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("got 100; --truncate drops the oldest; --context N makes room, up to 256")
    assert main([*too_long, "--context", "256"]) == 0
    assert main([*too_long, "--context", "64", "--truncate"]) == 0
    capsys.readouterr()
    assert main(["run", model, "--raw", "-p", "a" * 400]) == 2
    assert capsys.readouterr().err.endswith("got 400; --truncate drops the oldest\n")


@pytest.mark.parametrize("arguments", [["run", "-p", "a"], ["chat"], ["perplexity", "--text"]])
def test_a_mode_that_the_file_lacks_is_refused_before_it_is_loaded(
    arguments: list[str], model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    monkeypatch.setattr("turbosparse.runtime.engine.load", lambda *args, **settings: pytest.fail("loaded"))
    verb, *rest = arguments
    rest += [__file__] if verb == "perplexity" else []
    expected = f"[mode] expected a mode that {model} can run (dense, exact), got threshold"
    expected += "; turbosparse calibrate writes a file that can"
    for option in ["--mode", *(["--against-mode"] if verb == "perplexity" else [])]:
        assert main([verb, model, *rest, option, "threshold"]) == 2
        assert capsys.readouterr() == ("", f"turbosparse: error: {expected}\n")


def test_a_kv_cache_is_spelled_in_either_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "wide.gguf", TinyModel(hidden_size=128))
    for name in ("q8_0", "Q8_0"):
        assert main(["run", str(tmp_path / "wide.gguf"), "-p", "a", "-n", "1", "--kv-cache", name]) == 0
        assert "KV cache q8_0" in capsys.readouterr().err


def test_files_that_are_not_models_or_not_text(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(model).read_bytes()[:1000])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    for arguments in (
        [str(tmp_path / "missing.gguf"), "-p", "a"],
        [str(tmp_path), "-p", "a"],
        [str(broken), "-p", "a"],
        [model, "-f", str(latin)],
        [model, "-f", str(tmp_path)],
    ):
        assert main(["run", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("turbosparse: error: [")
        assert error.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert main(["run", model]) == 2
    assert "expected UTF-8" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_written(endless_model: Path) -> None:
    command = [sys.executable, "-m", "turbosparse", "run", str(endless_model), "--raw", "-p", PROMPT]
    command += ["-n", "8000", "--context", "8192", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"stopped" in err.splitlines()[-1]
    assert b"Traceback" not in err

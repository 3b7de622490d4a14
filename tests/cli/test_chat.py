"""`turbosparse chat` with lines from a pipe, and on a terminal of its own."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    make_tiny_model(path, TinyModel(activation="drelu", down_t=True, context_length=512))
    return str(path)


class Talk:
    """Runs the verb with these lines on its standard input."""

    def __init__(
        self, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.model, self.capsys, self.monkeypatch = model, capsys, monkeypatch

    def __call__(self, *lines: str, options: tuple[str, ...] = (), n: int = 6) -> tuple[str, str]:
        stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()))
        self.monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["chat", self.model, "--temp", "0", "-n", str(n), *options]) == 0
        captured = self.capsys.readouterr()
        return captured.out, captured.err


@pytest.fixture
def talk(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    return Talk(model, capsys, monkeypatch)


def test_each_line_is_a_turn_and_the_cache_is_reused(talk: Talk) -> None:
    out, err = talk("the cat", "", "and the hat")
    assert out.endswith("\n")
    turns = [line for line in err.splitlines() if line.startswith("prompt ")]
    assert len(turns) == 2
    assert "cached" not in turns[0]
    assert " cached) at " in turns[1]


def test_reset_forgets(talk: Talk) -> None:
    out, _ = talk("the cat", "/reset", "the cat")
    once, _ = talk("the cat")
    assert out == once * 2


def test_a_system_message_changes_the_answer_and_survives_a_reset(talk: Talk, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    by_option, _ = talk("the cat", options=("--system", "and and and"))
    by_command, _ = talk("/system and and and", "the cat", "/reset", f"/save {saved}")
    assert by_option == by_command
    assert json.loads(saved.read_text()) == [{"role": "system", "content": "and and and"}]
    again, err = talk(f"/save {saved}", "/save", "/save /nowhere/talk.json")
    assert again == ""
    assert "File exists" in err
    assert "expected a file name" in err
    assert "No such file" in err


def test_save_writes_the_messages(talk: Talk, tmp_path: Path) -> None:
    out, err = talk("the cat", f"/save {tmp_path / 'talk.json'}")
    assert "2 messages in" in err
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert messages[0] == {"role": "user", "content": "the cat"}
    assert messages[1]["role"] == "assistant"
    assert messages[1]["content"] == out.removesuffix("\n")


def test_modes_help_and_what_is_unknown(talk: Talk) -> None:
    _, err = talk("the", "/mode dense", "the", "/mode threshold", "/nonsense", "/help")
    assert "| exact, " in err
    assert "| dense, 100.0 % of neurons active" in err
    assert "this file can run dense, exact; now dense" in err
    assert "unknown command /nonsense" in err
    assert "/save FILE" in err


def test_quit_leaves_at_once(talk: Talk) -> None:
    out, _ = talk("/quit", "the cat")
    assert out == ""


def test_a_full_context_forgets_the_oldest(talk: Talk) -> None:
    lines = ["the cat and the hat " * 2] * 12
    _, err = talk(*lines, options=("--context", "256"))
    assert "the context is full: forgot the oldest 2 messages" in err
    assert err.count("answer ") == 12


def test_a_message_that_can_never_fit_is_taken_back(talk: Talk) -> None:
    out, err = talk("a" * 600, "the cat")
    assert "error: [message] expected at most" in err
    assert out == talk("the cat")[0]


def test_a_model_without_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "t5.gguf", TinyModel(extra_metadata={"tokenizer.ggml.add_eos_token": 0}))
    data = (tmp_path / "t5.gguf").read_bytes()
    renamed = data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatx")
    renamed = renamed.replace(b"<|im_start|>", b"<|im_begin|>")
    (tmp_path / "base.gguf").write_bytes(renamed)
    assert main(["chat", str(tmp_path / "base.gguf")]) == 2
    assert "this model was not made for chat" in capsys.readouterr().err


def test_bad_settings(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", model, "-n", "0"]) == 2
    assert "[max_tokens] expected 1 or more" in capsys.readouterr().err


LINE_EDITOR_READY = b"\x1b[?2004h"  # bracketed paste is on


class Terminal:
    """Our end of a pseudo-terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.unread = b""

    def write(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def read_until(self, expected: bytes, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while expected not in self.unread:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {expected!r}, got {self.unread!r}"
            self.unread += os.read(self.descriptor, 4096)
        self.unread = self.unread.partition(expected)[2]

    def read_to_end(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while os.read(self.descriptor, 4096):
                pass


def test_ctrl_c_stops_an_answer_and_not_the_program(endless_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "turbosparse", "chat", str(endless_model)]
    command += ["-n", "8000", "--context", "8192", "--temp", "0", "--threads", "1"]
    parent, child = pty.openpty()
    environment = os.environ | {
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    process = subprocess.Popen(
        command, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
    )
    os.close(child)
    terminal = Terminal(parent)
    try:
        terminal.read_until(LINE_EDITOR_READY)
        terminal.write(b"the cat\r")
        terminal.read_until(b"\xe2\x90")  # the answer runs; its control characters are depicted, not obeyed
        process.send_signal(signal.SIGINT)
        terminal.read_until(b"[stopped]")
        terminal.read_until(LINE_EDITOR_READY)
        terminal.write(b"/help\r")
        terminal.read_until(b"Ctrl-C stops an answer.")
        terminal.read_until(LINE_EDITOR_READY)
        terminal.write(b"\x04")
        terminal.read_to_end()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    assert "+the cat" in (tmp_path / "turbosparse/chat_history").read_text(encoding="utf-8")

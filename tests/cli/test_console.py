"""What the verbs share: JSON on the last line, sizes for people, progress only where somebody watches."""

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from turbosparse.cli.console import bytes_text, console, count_text, plain_text, print_json, progress

WORK = """
import time
from turbosparse.cli import console
console.SHOW_AFTER_S = {delay}
with console.progress(4, "measuring") as advance:
    for _ in range(4):
        time.sleep(0.1)
        advance(1)
"""


def on_a_terminal(delay: float) -> str:
    """What a terminal shows while work of 0.4 s is done and bars appear after `delay` seconds."""
    ours, theirs = pty.openpty()
    code = WORK.format(delay=delay)
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return shown.decode()


def test_a_bar_is_shown_for_long_work_and_only_for_that() -> None:
    assert "measuring" in on_a_terminal(0.05)
    assert on_a_terminal(30) == ""


def test_no_bar_without_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbosparse.cli.console.SHOW_AFTER_S", 0.0)
    with progress(2, "measuring") as advance:
        advance(1)
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_json_is_one_line_without_what_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "a": np.float32(0.5),
            "b": np.arange(3),
            "c": float("nan"),
            "d": [float("inf"), 1, "\N{SNOWMAN}"],
            "e": {"f": None, "g": True},
            "h": (np.float64("nan"),),
        }
    )
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": None,
        "d": [None, 1, "\N{SNOWMAN}"],
        "e": {"f": None, "g": True},
        "h": [None],
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_400_000, "98.4 MB"),
        (2.5e9, "2.5 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(35_136, "35,136"), (134_515_008, "134.5 M"), (7_240_000_000, "7.24 B")]
)
def test_counts(count: int, text: str) -> None:
    assert count_text(count) == text


def test_text_of_a_file_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(plain_text("[red]x[/red]\x1b[31m\u202e\a"))
    assert capsys.readouterr().out == "[red]x[/red]\ufffd[31m\ufffd\ufffd\n"

"""Ctrl-C in the middle of a calibration: status 130, not a word, no file besides those that were there."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model

MODEL = TinyModel(hidden_size=128, intermediate_size=512, num_hidden_layers=3)
GIVE_UP_S = 60.0


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.3, 0.8])
def test_interrupted_calibration(tmp_path: Path, delay_s: float) -> None:
    make_tiny_model(tmp_path / "m.gguf", MODEL)
    command = [sys.executable, "-m", "turbosparse", "calibrate", str(tmp_path / "m.gguf"), "-t", "1"]
    command += ["--tokens", "8192", "--ppl-budget", "5%", "-o", str(tmp_path / "out.gguf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        stop = time.monotonic() + GIVE_UP_S
        # From here on there is something to clean up.
        while files(tmp_path) == {"m.gguf"} and process.poll() is None and time.monotonic() < stop:
            time.sleep(0.01)
        time.sleep(delay_s)
        assert process.poll() is None, "the calibration was over before it could be interrupted"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=GIVE_UP_S)
    assert (process.returncode, output, errors) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]

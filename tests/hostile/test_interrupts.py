"""Ctrl-C in the middle of a calibration: status 130, not a word, no file besides those that were there.

And while the engine is between two calls of Python code: the exception of the signal, nothing else.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse import _native

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


def test_interrupted_between_choices(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m.gguf", TinyModel(down_t=True, intermediate_size=4096, num_hidden_layers=16))
    session = _native.Model(str(tmp_path / "m.gguf"), threads=1).session(64)

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def choose(layer: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.bool_]:
        if layer == 0:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.001)  # of computing time: soon, in native code mostly
        return gate > 0

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        for _ in range(10):
            with pytest.raises(KeyboardInterrupt):
                session.forward(np.arange(64, dtype=np.int32), mode="predicted", choose=choose)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

"""Where torch is not installed, the tests of the training column are not collected; Ctrl-C always works."""

import importlib.util
import signal

_TRAINING = [
    "models",
    "data",
    "sparsify",
    "predict",
    "export",
    "tiny_hf.py",
    "cli/test_sparsify.py",
    "cli/test_export.py",
]

collect_ignore = _TRAINING if importlib.util.find_spec("torch") is None else []

# A shell starts background jobs with the signal ignored, and so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""Where torch is not installed, the tests of the training column are not collected."""

import importlib.util

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

"""turbosparse: make a model's feed-forward layers sparse, measure the cost, run the result faster.

>>> import turbosparse
>>> model = turbosparse.load("model.gguf")  # doctest: +SKIP
>>> for piece in model.generate("Why is the sky blue?", chat=True):  # doctest: +SKIP
...     print(piece, end="", flush=True)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbosparse.runtime.engine import Model, load
    from turbosparse.runtime.sampling import SamplingConfig

__version__ = "0.1.0"
__all__ = ["Model", "SamplingConfig", "__version__", "load"]

_ROOMS = {
    "Model": "turbosparse.runtime.engine",
    "SamplingConfig": "turbosparse.runtime.sampling",
    "load": "turbosparse.runtime.engine",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import turbosparse` itself loads nothing."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)

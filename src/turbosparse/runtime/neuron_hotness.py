"""How often each neuron of a model file is needed: what decides which neurons stay in memory."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.runtime.captures import Captures, default_memory_bytes
from turbosparse.runtime.model_file import ModelFile
from turbosparse.sparsity.thresholds import kept_neurons
from turbosparse.tokenizer import Tokenizer

__all__ = ["neuron_hotness"]

_WINDOW = 256  # tokens


def neuron_hotness(
    file: ModelFile,
    text: str,
    *,
    tokens: int,
    threads: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> list[NDArray[np.float32]]:
    """Run a text through a model and count.

    Parameters
    ----------
    file : ModelFile
        A model that can skip neurons.
    text : str
        What it is to run on.
    tokens : int
        At most so many tokens of it.
    threads : int
        Threads of the engine; 0 means physical cores, at most 8.
    progress : callable, optional
        Called with shares of the work.

    Returns
    -------
    list of float32 array, shape (F,)
        Per layer, the share of tokens for which the neuron reaches its thresholds, or where the file has none
        is not zero.
    """
    ids = np.asarray(Tokenizer.from_metadata(file.metadata).encode(text)[:tokens], np.int32)
    model = _native.Model(file.path, threads=threads)
    window = min(_WINDOW, model.info.context_length)
    windows = np.split(ids, range(window, len(ids), window))
    hotness: list[NDArray[np.float32]] = []
    captures = Captures(model, windows, memory_bytes=default_memory_bytes())
    for ((ffn, _, gate, up),) in captures.layers(progress):
        needed = gate * up != 0
        if (thresholds := ffn.thresholds(file)) is not None:
            needed &= kept_neurons(gate, up, *thresholds)[1]
        hotness.append(np.asarray(np.mean(needed, axis=0), np.float32))
    return hotness

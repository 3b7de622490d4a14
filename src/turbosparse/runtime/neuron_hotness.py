"""How often each neuron of a model file is needed: what decides which neurons stay in memory."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.runtime.captures import Captures, default_memory_bytes
from turbosparse.runtime.ffns import FFNTokens
from turbosparse.runtime.model_file import ModelFile
from turbosparse.sparsity.thresholds import kept_neurons
from turbosparse.tokenizer import Tokenizer

__all__ = ["Hotness", "neuron_hotness"]

Hotness = dict[tuple[int, str], NDArray[np.float32]]
"""By layer and the suffix of its tensors' names: share of tokens that need each neuron, [F] or [E, F]."""

_WINDOW = 256  # tokens


def neuron_hotness(
    file: ModelFile,
    text: str,
    *,
    tokens: int,
    gate_apart: bool = False,
    threads: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Hotness:
    """Run a text through a model and count.

    Parameters
    ----------
    file : ModelFile
        A model that can skip neurons.
    text : str
        What it is to run on.
    tokens : int
        At most so many tokens of it.
    gate_apart : bool
        Count neurons that pass the threshold on the gate alone: where gate stays in memory, they are what is
        read.
    threads : int
        Threads of the engine; 0 means physical cores, at most 8.
    progress : callable, optional
        Called with shares of the work.

    Returns
    -------
    dict
        Per FFN or tensor of experts, float32 of shape (F,) or (E, F): the share of all tokens for which the
        neuron reaches its thresholds, or where the file has none is not zero. A token does not need neurons
        of experts that it is not sent to, so those of popular experts are hotter.
    """
    ids = np.asarray(Tokenizer.from_metadata(file.metadata).encode(text)[:tokens], np.int32)
    model = _native.Model(file.path, threads=threads)
    window = min(_WINDOW, model.info.context_length)
    captures = Captures(
        model, np.split(ids, range(window, len(ids), window)), memory_bytes=default_memory_bytes()
    )
    hotness: dict[tuple[int, str], list[NDArray[np.float32]]] = defaultdict(list)
    for layer in captures.layers(progress):
        for captured in layer:
            needed = _needed(file, captured, gate_apart=gate_apart)
            share = needed.sum(axis=0) / captures.tokens
            hotness[captured.ffn.layer, captured.ffn.suffix].append(share.astype(np.float32))
    return {key: np.stack(rows) if key[1] == "_exps" else rows[0] for key, rows in hotness.items()}


def _needed(file: ModelFile, captured: FFNTokens, *, gate_apart: bool) -> NDArray[np.bool_]:
    """Which neurons each token needs, [n, F]."""
    ffn, _, gate, up = captured
    needed: NDArray[np.bool_] = (gate if gate_apart else gate * up) != 0
    if (thresholds := ffn.thresholds(file)) is not None:
        passed, kept = kept_neurons(gate, up, *thresholds)
        needed &= passed if gate_apart else kept
    return needed

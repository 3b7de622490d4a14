"""How much each layer's error matters for the model's predictions, measured with one layer sparse at a time.

Layers differ: of SmolLM2-135M, the same relative error of an FFN's output costs eight to ten times as much KL
divergence in the first and in the last layer as in any other. So one CETT for all layers is not the cheapest
way to a perplexity.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from turbosparse.runtime.captures import Captures
from turbosparse.sparsity.quality import log_softmax
from turbosparse.sparsity.thresholds import LayerThresholds, kept_neurons

if TYPE_CHECKING:
    from turbosparse._native import Model

__all__ = ["layer_divergences", "relative_targets"]

_TOKENS = 256  # of the first window; the second half is scored
_WIDEST = 4.0  # targets stay within this factor of their mean, whatever a short text says


def layer_divergences(
    model: "Model",
    window: NDArray[np.int32],
    captures: Captures,
    thresholds: Sequence[LayerThresholds],
    progress: Callable[[float], None] = lambda amount: None,
) -> NDArray[np.float64]:
    """Measure what each layer's thresholds alone do to the predictions.

    Parameters
    ----------
    model : _native.Model
        With neuron-major down projections, and thresholds that drop nothing.
    window : int32, shape (T,)
        Tokens, the first of which `captures` holds first too; at most 256 are used.
    captures : Captures
        Dense activations of those tokens.
    thresholds : sequence of LayerThresholds
        What is tried, one per FFN.
    progress : callable
        Called with shares of the work, 1 in all.

    Returns
    -------
    float64, shape (layers,)
        Mean KL(dense || sparse) over the second half of the tokens, nats.

    Notes
    -----
    One pass over the tokens per layer. Which neurons are kept is decided on the dense activations, which are
    what a layer sees when only later ones or none are sparse.
    """
    window = window[:_TOKENS]
    session = model.session(len(window))
    scored = slice(len(window) // 2, None)

    dense = log_softmax(session.forward(window, logits="all")[scored])
    layers = model.info.num_hidden_layers
    neurons = np.ones((layers, len(window), model.info.layer_neurons), np.bool_)
    found = np.zeros(layers)
    tried = iter(thresholds)
    for layer, ffns in enumerate(captures.layers()):
        for (ffn, tokens, gate, up), own in zip(ffns, tried, strict=False):
            n = np.searchsorted(tokens, len(window))
            kept = kept_neurons(gate[:n], up[:n], own.gate_threshold, own.threshold)[1]
            neurons[layer, tokens[:n], ffn.first_neuron : ffn.first_neuron + ffn.neurons] = kept
        session.truncate(0)
        logits = session.forward(window, mode="predicted", logits="all", candidates=neurons)
        difference = dense - log_softmax(logits[scored])
        found[layer] = np.sum(np.exp(dense) * difference, axis=-1, dtype=np.float64).mean()
        neurons[layer] = True
        progress(1 / layers)
    return found


def relative_targets(divergences: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share a divergence among layers so that the fewest bytes are read.

    Parameters
    ----------
    divergences : float64, shape (layers,)
        KL divergence of each layer alone, nats.
    errors : float64, shape (layers,)
        CETT of each layer at which it was measured, above 0.

    Returns
    -------
    float64, shape (layers,)
        CETT target of each layer relative to the others, with a geometric mean of 1; from 1/4 to 4.

    Notes
    -----
    Divergences add up and grow with the square of the error, KL = sum of s_l c_l^2, and bytes fall with its
    logarithm, about alike in all layers. Least bytes at a given KL is then where every layer adds the same to
    it: c_l = constant / sqrt(s_l).

    Examples
    --------
    >>> import numpy as np
    >>> relative_targets(np.array([0.04, 0.01, 0.01, 0.01]), np.full(4, 0.2)).round(3)
    array([0.595, 1.189, 1.189, 1.189])
    """
    smallest = max(float(divergences.max()), 1e-12) * 1e-3
    targets = errors / np.sqrt(np.maximum(divergences, smallest))
    targets = np.clip(targets / np.exp(np.mean(np.log(targets))), 1 / _WIDEST, _WIDEST)
    return np.asarray(targets / np.exp(np.mean(np.log(targets))), np.float64)

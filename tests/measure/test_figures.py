"""What figures draw."""

import math

from turbosparse.measure.figures import _layer_means


def test_experts_of_a_layer_count_by_their_tokens_and_neurons() -> None:
    values = [(0, 30, 10, 0.2), (0, 10, 10, 0.6), (0, 5, 10, None), (0, 0, 10, 0.9), (1, 0, 10, None)]
    units = [
        {"layer": layer, "tokens": tokens, "neurons": neurons, "exact_zeros": {"value": value}}
        for layer, tokens, neurons, value in values
    ]
    layers, means = _layer_means({"units": units}, "exact_zeros", "value")
    assert layers == [0, 1]
    assert math.isclose(means[0], 0.3)
    assert math.isnan(means[1])

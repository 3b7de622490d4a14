"""Sparsity of arrays: what `turbosparse measure` computes, on activations of your own.

Run it as it is, or cell by cell in a notebook.
"""

import numpy as np

from turbosparse.sparsity.cett import activation_ratio, find_cett_threshold, neuron_output_norms
from turbosparse.sparsity.coactivation import coactivation_gap
from turbosparse.sparsity.hotness import batch_union, carrying_share, hotness
from turbosparse.sparsity.reuse import reuse

# %% Inputs of a down projection [T, F] and its weights [F, D]; here 40 topics that a token has or has not.
rng = np.random.default_rng(0)
topics = np.repeat(rng.random((128, 40)) < 0.2, 4, axis=0)  # [T, 40], each lasts four tokens
activations = (topics @ rng.standard_normal((40, 512)) * rng.standard_normal((512, 512))).astype(np.float32)
down_t = rng.standard_normal((512, 64)).astype(np.float32)

# %% The threshold whose error is 10 % of the output, and what it keeps.
found = find_cett_threshold(activations, down_t, 0.1)
active = neuron_output_norms(activations, down_t) >= np.float32(found.eps)
print(f"eps {found.eps:.3f}: CETT {found.cett:.3f}, {activation_ratio(active):.1%} of neurons active")

# %% Which neurons, how often, and again when.
counts = active.sum(axis=0)
print(f"the hottest neuron is active on {hotness(active).max():.1%} of tokens")
print(f"{carrying_share(counts):.1%} of neurons carry 80 % of activations")
print("re-use in windows of 2, 4, 8:", np.round(reuse(active, [2, 4, 8]), 3))
print("union of 1, 2, 4 unrelated tokens:", np.round(batch_union(counts, len(active), [1, 2, 4]), 3))
gap = coactivation_gap(active)
print(f"co-activation gap {gap.gap:.3f} ± {gap.standard_error:.3f}")

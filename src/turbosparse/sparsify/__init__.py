"""From a dense model to a sparse one: swap, losses, schedules, the training run."""

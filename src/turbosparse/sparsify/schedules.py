"""How learning rate, L1 weight and activation change over a stage; pure functions."""

import math

__all__ = ["learning_rate_factor", "ramp"]


def learning_rate_factor(
    step: int, *, steps: int, warmup_steps: int, decay_steps: int, schedule: str, final: float
) -> float:
    """Return the learning rate of a step as a share of the peak.

    Parameters
    ----------
    step : int
        Steps done, from 0.
    steps : int
        Steps of the whole stage.
    warmup_steps : int
        Steps of linear warm-up.
    decay_steps : int
        Steps of the linear decay at the end of ``wsd``.
    schedule : str
        ``wsd``, ``cosine`` or ``constant``.
    final : float
        Share of the peak that is left at the end, 0 to 1.

    Returns
    -------
    float
        Between 0 and 1.

    Notes
    -----
    The stable phase of ``wsd`` does not depend on `steps`, so a run can be extended, and a decayed copy be
    taken from any of its checkpoints (MiniCPM, arXiv 2404.06395).

    Examples
    --------
    >>> settings = dict(steps=100, warmup_steps=10, decay_steps=20, schedule="wsd", final=0.0)
    >>> [learning_rate_factor(step, **settings) for step in (0, 9, 50, 90, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd" and decay_steps and step > steps - decay_steps:
        return final + (1 - final) * max(steps - step, 0) / decay_steps
    return 1.0


def ramp(done: int, length: int, shape: str = "linear") -> float:
    """Return how far a ramp has risen, from 0 to 1.

    Parameters
    ----------
    done : int
        Tokens or steps done.
    length : int
        Where the ramp reaches 1; 0 is at once.
    shape : str, default "linear"
        ``linear``, or ``sine`` for the half wave of ProSparse (arXiv 2402.13516), flat at both ends.

    Returns
    -------
    float
        Between 0 and 1.
    """
    if done >= length:
        return 1.0
    x = done / length
    return 0.5 * (1 - math.cos(math.pi * x)) if shape == "sine" else x

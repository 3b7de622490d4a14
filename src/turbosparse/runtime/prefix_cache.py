"""A session that remembers its tokens: a prompt that begins as the last one did costs only what is new."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, ContextLengthError

if TYPE_CHECKING:
    from turbosparse._native import Mode, Model, ModelInfo

__all__ = ["PrefixCache", "active_per_layer", "active_ratio", "token_array"]


def token_array(ids: Sequence[int]) -> NDArray[np.int32]:
    """Turn token ids into what the engine takes, without wrapping or rounding any.

    Parameters
    ----------
    ids : sequence of int
        Of any integer type.

    Returns
    -------
    ndarray of int32, shape (T,)
        The same ids.

    Raises
    ------
    ConfigError
        If they are not whole numbers of 32 bits.
    """
    found = np.asarray(ids)
    limits = np.iinfo(np.int32)
    if found.size == 0:
        return np.zeros(0, np.int32)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ConfigError(f"[ids] expected a list of whole numbers, got {found.dtype} of shape {found.shape}")
    if found.min() < limits.min or found.max() > limits.max:
        raise ConfigError(f"[ids] expected numbers of 32 bits, got {found.min()} to {found.max()}")
    return found.astype(np.int32)


def active_per_layer(counters: Mapping[str, Any], info: "ModelInfo") -> list[float]:
    """Compute the share of each layer's FFN neurons that a session used.

    Parameters
    ----------
    counters : mapping
        `Session.counters`, after at least one token.
    info : turbosparse._native.ModelInfo
        The model's shape.

    Returns
    -------
    list of float
        Between 0 and 1, mean over tokens.
    """
    neurons = counters["tokens"] * info.token_neurons
    return [active / neurons for active in counters["active"]]


def active_ratio(counters: Mapping[str, Any], info: "ModelInfo") -> float | None:
    """Compute the share of FFN neurons that a session used.

    Parameters
    ----------
    counters : mapping
        `Session.counters`.
    info : turbosparse._native.ModelInfo
        The model's shape.

    Returns
    -------
    float or None
        Between 0 and 1, mean over layers and tokens; None before the first token.
    """
    neurons = counters["tokens"] * info.num_hidden_layers * info.token_neurons
    return sum(counters["active"]) / neurons if neurons else None


class PrefixCache:
    """One KV cache and the tokens in it.

    Parameters
    ----------
    model : turbosparse._native.Model
        Whose session this is.
    context : int
        Tokens that fit.

    Raises
    ------
    ConfigError
        If the model was not trained for so many positions.
    """

    def __init__(self, model: "Model", context: int) -> None:
        self._info = model.info
        self._session = model.session(context)
        self._session.skipping = True
        self.owner: object = None  # who fed it last: a second answer takes it away from the first
        # The first session.position of these are in the cache. Written before each call into the engine, so
        # that an interrupt at any moment leaves them right.
        self._ids: list[int] = []
        self._mode: Mode = "dense"

    @property
    def context(self) -> int:
        """Tell how many tokens fit.

        Returns
        -------
        int
            Positions of the KV cache.
        """
        return self._session.context

    @property
    def is_full(self) -> bool:
        """Tell whether no further token fits.

        Returns
        -------
        bool
            True at the end of the context.
        """
        return self._session.position >= self._session.context

    def start(
        self,
        ids: Sequence[int],
        *,
        mode: "Mode",
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[NDArray[np.float32], int]:
        """Make these tokens the content of the cache and reuse the beginning they share with the last ones.

        Keys and values depend on the mode, so that another mode starts from nothing.

        Parameters
        ----------
        ids : sequence of int
            The whole prompt, at least one token.
        mode : {"dense", "exact", "threshold", "predicted"}
            How the feed-forward layers are computed.
        should_stop : callable, optional
            Asked between chunks of a long prompt.

        Returns
        -------
        logits : ndarray of float32, shape (V,)
            For the token after the prompt.
        reused : int
            Tokens that were not computed again.

        Raises
        ------
        ContextLengthError
            If the prompt does not fit.
        ConfigError
            If there is no token, or one that is not a whole number of the vocabulary.
        """
        if len(ids) > self.context:
            raise ContextLengthError(f"[prompt] expected at most {self.context} tokens, got {len(ids)}")
        known = self._ids[: self._session.position] if mode == self._mode else []
        shared = next((i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), None)
        if shared is None:
            shared = min(len(known), len(ids))
        shared = min(shared, len(ids) - 1)  # the last one's logits are needed
        self._session.truncate(shared)
        self._ids, self._mode = list(ids), mode
        fresh = token_array(ids[shared:])
        logits = self._session.forward(fresh, mode=mode, logits="last", should_stop=should_stop)
        return _row(logits), shared

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token.

        Parameters
        ----------
        token : int
            The token that was chosen last.

        Returns
        -------
        ndarray of float32, shape (V,)
            Logits for the next.
        """
        del self._ids[self._session.position :]
        self._ids.append(token)
        logits = self._session.forward(np.array([token], dtype=np.int32), mode=self._mode, logits="last")
        return _row(logits)

    def reset_usage(self) -> None:
        """Begin to count anew."""
        self._session.reset_counters()

    def usage(self) -> tuple[float | None, float | None]:
        """Tell what the tokens since the last reset needed.

        Returns
        -------
        active_ratio : float or None
            Share of FFN neurons used.
        bytes_per_token : float or None
            Weights and KV cache read per token that came alone; None without such a token.
        """
        counters = self._session.counters
        steps = counters["decode_tokens"]
        return active_ratio(counters, self._info), counters["bytes_read"] / steps if steps else None


def _row(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """[1, V] to [V]."""
    return logits.reshape(-1)

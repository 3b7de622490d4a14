"""Sessions whose first tokens are computed once, for all modes and rounds that begin behind them.

Filling a cache of 4,000 tokens takes longer than everything that is timed there. What stands in it does not
change how long a token takes, apart from which neurons it needs; all modes see the same keys and values.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from turbosparse import _native

if TYPE_CHECKING:
    from turbosparse._native import Mode
    from turbosparse.bench.rounds import Case

__all__ = ["FilledSessions"]


class FilledSessions:
    """A session for every depth of the tests.

    Parameters
    ----------
    model : _native.Model
        Weights and threads.
    mode : {"dense", "exact", "threshold", "predicted"}
        How the tokens before a test are computed.
    cases : sequence of Case
        The tests, so that they fit.
    """

    def __init__(self, model: _native.Model, mode: "Mode", cases: "Sequence[Case]") -> None:
        self._mode: Mode = mode
        contexts: dict[int, int] = {}
        for case in cases:
            depth = len(case.warm)
            contexts[depth] = max(contexts.get(depth, 0), depth + len(case.timed))
        self._sessions = {depth: model.session(context) for depth, context in contexts.items()}

    def after(self, warm: list[int]) -> _native.Session:
        """Give the session that holds these tokens and no more.

        Parameters
        ----------
        warm : list of int
            Token ids, of one of the tests.

        Returns
        -------
        _native.Session
            Filled when first asked for, rewound from then on.
        """
        session = self._sessions[len(warm)]
        if session.position < len(warm):
            session.forward(np.array(warm, np.int32), mode=self._mode, logits="none")
        session.truncate(len(warm))
        return session

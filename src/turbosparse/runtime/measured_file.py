"""A model file as a source of measurements: activations from the engine, quality with thresholds in a draft.

What `turbosparse.measure` asks of a source, without knowing it: the serving column does not import that room.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ModelFileError
from turbosparse.runtime.ffns import FFN, down_t, ffns_of, tokens_of_ffns
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.perplexity import second_half
from turbosparse.runtime.sparse_file import SparseDraft
from turbosparse.sparsity.selection import NormThresholds, Selection
from turbosparse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from turbosparse._native import Choose, Mode

__all__ = ["MeasuredFile", "ThinnedFile", "require_measurable"]

_CHUNK_BYTES = 256 << 20  # of captured arrays at once
_NO_THRESHOLDS = NormThresholds(label="all", eps={}, down_norms={})


def require_measurable(file: ModelFile) -> None:
    """Refuse a file that can be run but not measured.

    Parameters
    ----------
    file : ModelFile
        The file.

    Raises
    ------
    ModelFileError
        When its FFNs lie in bundles, have no gate, or an activation that is not known.
    """
    file.require_no_bundles()
    if not file.gated:
        raise ModelFileError(
            f"[{file.path}] expected FFNs with a gate, got plain ones, which are measured in torch only: "
            "give the Hugging Face directory"
        )
    if file.activation is None:
        raise ModelFileError(
            f"[{file.path}] expected a known activation, got architecture {file.architecture}"
        )


class _FFNWatcher(Protocol):
    """What looks at captured arrays."""

    def on_ffn(self, unit: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
        """Look at f(gate) and g(up) of an FFN, each [T, F]."""

    def on_routing(self, layer: int, chosen: NDArray[np.int32]) -> None:
        """Look at the experts of tokens, [T, k]."""


@dataclass(frozen=True, kw_only=True)
class _Thresholds:
    """Thresholds of one FFN, each [F]."""

    gate_threshold: NDArray[np.float32]
    threshold: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ThinnedFile:
    """How the engine leaves out what a selection does."""

    path: Path
    """A file of the same weights, with the thresholds that are asked for."""
    mode: "Mode"
    choose: "Choose | None" = None
    """For `Session.forward`: what takes the place of predictors."""


class MeasuredFile:
    """A GGUF file that can be watched and thinned out.

    Parameters
    ----------
    path : str or path
        The file.
    scratch : Path
        Directory for a draft with thresholds, about the size of the file; removed by `close`.
    threads : int
        Threads of the engine; 0 means physical cores, at most 8.

    Raises
    ------
    ModelFileError
        When the file is broken, or `require_measurable` refuses it.
    """

    def __init__(self, path: str | PathLike[str], *, scratch: Path, threads: int = 0) -> None:
        self._file = ModelFile(path)
        require_measurable(self._file)
        self._engine = _native.Model(str(path), threads=threads)
        self._info = self._engine.info
        self._threads = threads
        self._tokenizer = Tokenizer.from_metadata(self._file.metadata)
        self._scratch = scratch
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._draft: SparseDraft | None = None
        self._drafted: tuple[Selection | None, _native.Model] | None = None
        self._session: tuple[_native.Model, _native.Session] | None = None
        self.units = ffns_of(self._info)

    @property
    def description(self) -> dict[str, Any]:
        """Say what model this is.

        Returns
        -------
        dict
            Name, kind, activation, sizes, weight types.
        """
        info, path = self._info, Path(self._file.path)
        return {
            "name": path.name,
            "title": str(self._file.metadata.get("general.name", path.stem)),
            "kind": "model file, engine",
            "architecture": info.architecture,
            "activation": info.activation,
            "gated": True,
            "hidden_size": info.hidden_size,
            "intermediate_size": max(info.intermediate_size, info.shared_intermediate_size),
            "num_hidden_layers": info.num_hidden_layers,
            "num_experts": info.num_experts,
            "experts_per_token": info.num_experts_per_tok,
            "weights": "/".join(dict.fromkeys(info.ffn_types)),
            "bytes": path.stat().st_size,
        }

    @property
    def context_length(self) -> int:
        """Give the positions the model was trained for.

        Returns
        -------
        int
            Tokens.
        """
        return self._info.context_length

    @property
    def bos_id(self) -> int | None:
        """Give the token that windows begin with.

        Returns
        -------
        int or None
            Where the file asks for one.
        """
        return self._tokenizer.bos_id if self._tokenizer.add_bos else None

    def text_ids(self, text: str) -> list[int]:
        """Turn a text into tokens.

        Parameters
        ----------
        text : str
            Control tokens are not read in it.

        Returns
        -------
        list of int
            Token ids.
        """
        return self._tokenizer.encode(text)

    def experts(self, layer: int) -> int:
        """Count the experts of a layer.

        Parameters
        ----------
        layer : int
            Index.

        Returns
        -------
        int
            0 where it has none.
        """
        del layer  # all have as many
        return self._info.num_experts

    def down_t(self, unit: int) -> NDArray[np.float32]:
        """Give a unit's down projection, one row per neuron.

        Parameters
        ----------
        unit : int
            Index.

        Returns
        -------
        float32, shape (F, D)
            Dequantised from the file.
        """
        return down_t(self._file, self.units[unit])

    def capture(self, window: NDArray[np.int32], watcher: _FFNWatcher) -> None:
        """Run a window densely and show its FFNs.

        Parameters
        ----------
        window : int32, shape (T,)
            Token ids.
        watcher : turbosparse.measure.source.Watcher
            Sees every layer in pieces of the window.
        """
        session = self._session_of(self._engine, len(window))
        layers = list(range(self._info.num_hidden_layers))
        per_token = len(layers) * 8 * (self._info.layer_neurons + self._info.hidden_size)
        chunk = max(16, _CHUNK_BYTES // per_token)
        for begin in range(0, len(window), chunk):
            arrays = session.capture(window[begin : begin + chunk], layers)
            unit = 0
            for layer, ffns in groupby(self.units, key=lambda ffn: ffn.layer):
                gate, up, _, _, chosen = arrays.pop(0)
                if chosen.shape[1]:
                    watcher.on_routing(layer, chosen)
                for piece in tokens_of_ffns(list(ffns), gate, up, chosen):
                    if len(piece.tokens):
                        watcher.on_ffn(unit, piece.gate, piece.up)
                    unit += 1

    def supports(self, selection: Selection) -> bool:
        """Say whether the engine can leave out what a selection does.

        Parameters
        ----------
        selection : Selection
            Neurons to compute.

        Returns
        -------
        bool
            True: what are not thresholds is told the engine as candidates.
        """
        del selection
        return True

    def predictions(
        self, window: NDArray[np.int32], selection: Selection | None
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """Predict the second half of a window.

        Parameters
        ----------
        window : int32, shape (T,)
            Token ids.
        selection : Selection or None
            Neurons to compute; all if None. All run on the draft, so on the same weights.

        Yields
        ------
        tuple
            Logits, float32 of shape (T, V), and the tokens that follow, int32 of shape (T,).

        Notes
        -----
        Thresholds on norms are the engine's own. Any other selection is asked layer by layer, and sees what
        was left out of the layers before.
        """
        model, thinned = self._thinned(selection)
        session = self._session_of(model, len(window))
        yield from second_half(session, window, thinned.mode, choose=thinned.choose)

    def thinned(self, selection: Selection | None) -> ThinnedFile:
        """Say how others can leave out what a selection does.

        Parameters
        ----------
        selection : Selection or None
            Neurons to compute; all if None.

        Returns
        -------
        ThinnedFile
            To be loaded before the next call: the file's thresholds change with each.
        """
        return self._thinned(selection)[1]

    def _thinned(self, selection: Selection | None) -> tuple[_native.Model, ThinnedFile]:
        if selection is None or isinstance(selection, NormThresholds):
            model = self._drafted_model(selection)
            return model, ThinnedFile(
                path=self._draft_path(), mode="dense" if selection is None else "threshold"
            )

        def choose(layer: int, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.bool_]:
            kept = np.zeros(gate.shape, np.bool_)
            for unit, ffn in enumerate(self.units):
                if ffn.layer != layer:
                    continue
                own = slice(ffn.first_neuron, ffn.first_neuron + ffn.neurons)
                # the engine leaves zeros where a token has other experts
                routed = (gate[:, own] != 0).any(axis=1) | (up[:, own] != 0).any(axis=1)
                tokens = np.flatnonzero(routed | (ffn.expert is None))
                if len(tokens):
                    f_gate, g_up = gate[tokens, own], up[tokens, own]
                    kept[tokens, own] = selection.kept(unit, f_gate, f_gate * g_up)
            return kept

        model = self._drafted_model(_NO_THRESHOLDS)
        return model, ThinnedFile(path=self._draft_path(), mode="predicted", choose=choose)

    def close(self) -> None:
        """Remove the draft."""
        self._drafted = self._session = self._draft = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _session_of(self, model: _native.Model, context: int) -> _native.Session:
        """A session of this model with an empty cache; the last one is kept."""
        if self._session is None or self._session[0] is not model or self._session[1].context < context:
            self._session = model, model.session(context)
        self._session[1].truncate(0)
        return self._session[1]

    def _draft_path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "draft.gguf"

    def _drafted_model(self, selection: Selection | None) -> _native.Model:
        if self._draft is None:
            self._folder = tempfile.TemporaryDirectory(prefix=".turbosparse-", dir=self._scratch)
            self._draft = SparseDraft(self._file, self._draft_path(), None, lambda share: None)
        if self._drafted is None or (selection is not None and selection is not self._drafted[0]):
            self._drafted = None  # frees the model before the next one is loaded
            if selection is not None:
                assert isinstance(selection, NormThresholds)
                self._draft.set_thresholds(_thresholds(selection, self.units))
            self._drafted = selection, self._draft.load(self._threads)
        return self._drafted[1]


def _thresholds(selection: NormThresholds, ffns: Sequence[FFN]) -> list[_Thresholds]:
    """tau_i = eps / ||W_down[:, i]|| on the activation alone, as the definition of CETT has it."""
    thresholds = []
    for unit, ffn in enumerate(ffns):
        if unit not in selection.eps:
            none = np.zeros(ffn.neurons, np.float32)
            thresholds.append(_Thresholds(gate_threshold=none, threshold=none))
            continue
        norms = np.maximum(selection.down_norms[unit], 1e-30).astype(np.float64)
        tau = np.minimum(selection.eps[unit] / norms, 3e38).astype(np.float32)
        thresholds.append(_Thresholds(gate_threshold=np.zeros_like(tau), threshold=tau))
    return thresholds

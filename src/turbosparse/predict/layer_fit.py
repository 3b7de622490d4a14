"""The predictors that one FFN or expert can choose from, and what each costs and loses."""

import torch
from torch import Tensor

from turbosparse.predict.allocation import ALL_NEURONS, EXACT, Choice, Menu, Tradeoff
from turbosparse.predict.capture import CapturedInputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import PlacedPredictor
from turbosparse.predict.fit import activity_bound, fit_low_rank, rows_of
from turbosparse.predict.layers import FFNLayer, Neurons
from turbosparse.predict.predictors import RIVALS, LowRankPredictor
from turbosparse.predict.score import PredictorScore, exact_bytes, score_candidates, trade_off

__all__ = ["LayerFit", "family_of"]

_SCORED_TOKENS = 2048
_FEWEST_TOKENS = 64  # an expert that met fewer is left without a predictor,
_FEWEST_OF_A_PART = 8  # as is one that met fewer in what it is fitted or scored on


def family_of(kind: str) -> str:
    """Return a kind of predictor without its rank.

    Parameters
    ----------
    kind : str
        Such as ``low_rank_64_residual``.

    Returns
    -------
    str
        Such as ``low_rank_residual``.

    Examples
    --------
    >>> family_of("low_rank_64_residual"), family_of("low_bit_2")
    ('low_rank_residual', 'low_bit_2')
    """
    parts = kind.split("_")
    return "_".join(parts[:2] + parts[3:]) if kind.startswith("low_rank_") else kind


class LayerFit:
    """Fits and scores the predictors of one FFN or expert.

    Fitted predictors are kept; copies of weights and held-out activations are made anew where needed.

    Parameters
    ----------
    layer : FFNLayer
        Its weights.
    captured : CapturedInputs
        What it and its predictors read; the last sequences are held out. The files are read until the end.
    config : PredictorConfig
        What to fit.
    """

    def __init__(self, layer: FFNLayer, captured: CapturedInputs, config: PredictorConfig) -> None:
        self.layer = layer
        self._config = config
        self._bound = 0.0
        self._sources: dict[str, str] = {}
        self.fitted: dict[str, LowRankPredictor] = {}
        """By kind; empty where too few tokens reached the layer."""
        inputs = {kind: captured.open(kind) for kind in ("ffn_norm", *config.inputs)}
        tokens = len(inputs["ffn_norm"])
        first = self._first_held_out(captured, tokens)
        if tokens >= _FEWEST_TOKENS and min(first, tokens - first) >= _FEWEST_OF_A_PART:
            training = {kind: rows[:first] for kind, rows in inputs.items()}
            sample = rows_of(inputs["ffn_norm"], slice(first, first + _SCORED_TOKENS))
            self._bound = activity_bound(layer, sample, config)
            for (source, rank), predictor in fit_low_rank(layer, training, self._bound, config).items():
                kind = f"low_rank_{rank}" + ("" if source == config.inputs[0] else f"_{source}")
                self.fitted[kind], self._sources[kind] = predictor, source
        self.read(captured)

    def read(self, captured: CapturedInputs) -> None:
        """Work out what every predictor costs and loses, as the layer and the predictors now are.

        Parameters
        ----------
        captured : CapturedInputs
            Of the model as it now is.
        """
        self._inputs = {kind: captured.open(kind) for kind in ("ffn_norm", *self._config.inputs)}
        self.tokens = len(self._inputs["ffn_norm"])
        first = self._first_held_out(captured, self.tokens)
        self._scored = slice(first, first + _SCORED_TOKENS)
        neurons = self._neurons()
        # Which tokens an expert meets can change with the model.
        is_scored = bool(self.fitted) and self.tokens - first >= _FEWEST_OF_A_PART
        kinds = (*self.fitted, *self._config.rivals) if is_scored else ()
        self.menu = Menu(
            exact_bytes=exact_bytes(neurons, self.layer),
            curves={kind: self._trade_off(kind, neurons) for kind in kinds},
            share=self.tokens / max(captured.tokens_seen, 1),
        )

    def _first_held_out(self, captured: CapturedInputs, tokens: int) -> int:
        """Find the row with which the held-out sequences begin, and with one sequence, its last tokens."""
        sequences = self._config.first_held_out(len(captured.batch_ends))
        return captured.batch_ends[sequences - 1] if sequences else self._config.first_held_out(tokens)

    def _held_out(self, source: str) -> Tensor:
        return rows_of(self._inputs[source], self._scored)

    def _neurons(self) -> Neurons:
        return self.layer.neurons(self._held_out("ffn_norm"))

    def _placed(self, kind: str, threshold: float) -> PlacedPredictor:
        predictor = self.fitted[kind] if kind in self.fitted else RIVALS[kind](self.layer)
        source = self._sources.get(kind, "ffn_norm")
        return PlacedPredictor(predictor=predictor, threshold=threshold, input=source)

    @torch.no_grad()
    def _trade_off(self, kind: str, neurons: Neurons) -> Tradeoff:
        placed = self._placed(kind, ALL_NEURONS)
        read_bytes = placed.predictor.read_bytes(self._config.predictor_type)
        return trade_off(placed.predictor(self._held_out(placed.input)), neurons, self.layer, read_bytes)

    def place(self, choice: Choice) -> PlacedPredictor | None:
        """Make a choice ready to run.

        Parameters
        ----------
        choice : Choice
            From this layer's menu.

        Returns
        -------
        PlacedPredictor or None
            None where the choice is to have no predictor.
        """
        return None if choice.kind == EXACT else self._placed(choice.kind, choice.threshold)

    @torch.no_grad()
    def score(self, choice: Choice) -> PredictorScore:
        """Score a choice on held-out tokens.

        Parameters
        ----------
        choice : Choice
            From this layer's menu.

        Returns
        -------
        PredictorScore
            Without a predictor: all neurons are candidates, and rows of up and down are still skipped.
            Zeros where no held-out token reached the layer.
        """
        neurons = self._neurons()
        placed = self.place(choice)
        candidates, read_bytes = torch.ones_like(neurons.passed), 0.0
        if placed is not None:
            candidates = placed.predictor(self._held_out(placed.input)) >= placed.threshold
            read_bytes = placed.predictor.read_bytes(self._config.predictor_type)
        return score_candidates(
            candidates, neurons, self.layer, bound=self._bound, predictor_bytes=read_bytes
        )

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
_FEWEST_TOKENS = 64  # an expert that met fewer is left without a predictor


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
        What it and its predictors read; the last part is held out. The files are read until the end.
    config : PredictorConfig
        What to fit.
    """

    def __init__(self, layer: FFNLayer, captured: CapturedInputs, config: PredictorConfig) -> None:
        self.layer = layer
        self._config = config
        self._inputs = {kind: captured.open(kind) for kind in ("ffn_norm", *config.inputs)}
        self.tokens = len(self._inputs["ffn_norm"])
        training = int(self.tokens * (1 - config.held_out_share))
        self._scored = slice(training, training + _SCORED_TOKENS)
        self.fitted: dict[str, LowRankPredictor] = {}
        """By kind; empty where too few tokens reached the layer."""
        self._sources: dict[str, str] = {}
        self._bound = 0.0
        if self.tokens >= _FEWEST_TOKENS:
            self._bound = activity_bound(layer, self._held_out("ffn_norm"), config)
            inputs = {kind: rows[:training] for kind, rows in self._inputs.items()}
            for (source, rank), predictor in fit_low_rank(layer, inputs, self._bound, config).items():
                kind = f"low_rank_{rank}" + ("" if source == config.inputs[0] else f"_{source}")
                self.fitted[kind], self._sources[kind] = predictor, source
        neurons = self._neurons()
        kinds = (*self.fitted, *config.rivals) if self.fitted else ()
        self.menu = Menu(
            exact_bytes=exact_bytes(neurons, layer),
            curves={kind: self._trade_off(kind, neurons) for kind in kinds},
            share=self.tokens / max(captured.tokens_seen, 1),
        )

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

"""Where the activations of a model come from, and its perplexity with predictors on: torch, or the engine."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch

from turbosparse.data.config import DataConfig
from turbosparse.data.encoding import make_encoder
from turbosparse.data.held_out import split_of
from turbosparse.data.mixture import Mixture, PackedSequence, held_out_sequences
from turbosparse.errors import DataError
from turbosparse.measure.held_out_loss import batch_of
from turbosparse.models.gated_ffn import gated_ffns, replace_ffns
from turbosparse.models.registry import activation_of, load_model, load_tokenizer
from turbosparse.predict.capture import CapturedFFNs, CapturedInputs, capture_inputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import Evaluation, PlacedPredictor, evaluate
from turbosparse.predict.finetune import finetune
from turbosparse.predict.layers import layers_of

__all__ = ["HuggingFaceSource", "PredictorSource", "TextPart"]

_LOG = logging.getLogger(__name__)

TextPart = Literal["probe", "choose", "report"]
"""Held-out text comes in two halves: one to choose thresholds by, one to report. A probe is a little of the
first."""
_EVALUATION_SEQUENCES = 64  # at most, of all sources of text together
_PROBE_SEQUENCES = 4


class PredictorSource(CapturedFFNs, Protocol):
    """A model, seen by a predictor fit."""

    def evaluate(
        self, configurations: Sequence[Mapping[str, PlacedPredictor]], part: TextPart
    ) -> list[Evaluation]:
        """Measure the model with several sets of predictors.

        Parameters
        ----------
        configurations : sequence of mapping of str to PlacedPredictor
            Layers that are not in a mapping run without predictor.
        part : {"probe", "choose", "report"}
            Which part of the held-out text.

        Returns
        -------
        list of Evaluation
            One per configuration.
        """

    def finetune(
        self, placed: Mapping[str, PlacedPredictor], price: float, output: Path, config: PredictorConfig
    ) -> None:
        """Train predictors, and the model if wished, with the mask of candidates on.

        Parameters
        ----------
        placed : mapping of str to PlacedPredictor
            Predictors, changed in place.
        price : float
            KL divergence that a byte per token is worth, in nats.
        output : Path
            Where a trained model is saved, in ``model``.
        config : PredictorConfig
            How to train.
        """


class HuggingFaceSource:
    """A Hugging Face directory, run by torch.

    Parameters
    ----------
    path : Path
        The directory.
    data : DataConfig
        Text to capture on and, held out of it or besides, to evaluate on.
    tokens : int
        Tokens to capture.
    weight_type : str
        What gate, up and down will be in the model file.
    seed : int
        Of the order of documents.

    Raises
    ------
    DataError
        If the text has too few tokens.
    """

    def __init__(self, path: Path, data: DataConfig, *, tokens: int, weight_type: str, seed: int = 0) -> None:
        self.model = load_model(path, dtype=torch.float32)
        if not gated_ffns(self.model):
            replace_ffns(self.model, activation_of(self.model), activation_of(self.model))
        self.layers = layers_of(self.model, weight_type)
        self._tokenizer = load_tokenizer(path)
        encode = make_encoder(self._tokenizer, data.document_end)
        split = split_of(data)
        mixture = Mixture(data, encode, split=split, seed=seed)
        count = max(tokens // data.sequence_length, 1)
        self.rows = [row for row, _ in zip(mixture, range(count), strict=False)]
        if len(self.rows) < count:
            _LOG.info("the text ends after %d tokens to capture", len(self.rows) * data.sequence_length)
        self._held_out: list[PackedSequence] = []
        sources = data.held_out or data.sources
        for source in sources:
            self._held_out += held_out_sequences(
                source,
                encode,
                split=None if data.held_out else split,
                sequence_length=data.sequence_length,
                count=-(-_EVALUATION_SEQUENCES // len(sources)),
            )
        if len(self._held_out) < 2:
            raise DataError(
                f"[fit-predictor] expected held-out text of at least two sequences, got "
                f"{len(self._held_out)}: give more text, or --held-out"
            )

    def capture(self, directory: Path, inputs: Sequence[str]) -> Mapping[str, CapturedInputs]:
        """Write what FFNs and their predictors read; see `CapturedFFNs`."""
        return capture_inputs(self.model, (batch_of([row]) for row in self.rows), directory, inputs)

    def evaluate(
        self, configurations: Sequence[Mapping[str, PlacedPredictor]], part: TextPart
    ) -> list[Evaluation]:
        """Measure the model with several sets of predictors; see `PredictorSource`."""
        rows = self._held_out[part == "report" :: 2]
        if part == "probe":
            rows = rows[:: -(-len(rows) // _PROBE_SEQUENCES)]
        return evaluate(self.model, configurations, rows)

    def finetune(
        self, placed: Mapping[str, PlacedPredictor], price: float, output: Path, config: PredictorConfig
    ) -> None:
        """Train predictors, and the model if wished, on what is not held out; see `PredictorSource`."""
        rows = self.rows[: config.first_held_out(len(self.rows))]
        if not rows:
            raise DataError(
                f"[fit-predictor] expected sequences to fine-tune on besides those held out, got "
                f"{len(self.rows)} in all: give more text, or capture more tokens"
            )
        finetune(self.model, placed, self.layers, rows, price, config)
        if config.finetune == "model":
            self.model.save_pretrained(output / "model")
            self._tokenizer.save_pretrained(output / "model")

"""Fit the predictors of a model, choose their thresholds by what the engine pays, and store both."""

import logging
import shutil
from pathlib import Path

from turbosparse.errors import ConfigError
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.layer_fit import LayerFit
from turbosparse.predict.report import PredictorReport, save_predictors, save_report
from turbosparse.predict.selection import Selection
from turbosparse.predict.source import PredictorSource

__all__ = ["fit_predictors"]

_LOG = logging.getLogger(__name__)


def fit_predictors(source: PredictorSource, output: Path, config: PredictorConfig) -> PredictorReport:
    """Capture, fit every layer, choose thresholds, fine-tune where asked, and judge the whole.

    Parameters
    ----------
    source : PredictorSource
        The model.
    output : Path
        Directory for predictors and report, and for the model where that was trained; captured states are
        stored there while it runs.
    config : PredictorConfig
        How to fit.

    Returns
    -------
    PredictorReport
        As written to ``report.json``.
    """
    output.mkdir(parents=True, exist_ok=True)
    directory = output / ".captured"
    try:
        captured = source.capture(directory, config.inputs)
        fits: dict[str, LayerFit] = {}
        for name, layer in source.layers.items():
            if config.labels == "nonzero" and layer.thresholds is None and not layer.activation.is_sparse:
                raise ConfigError(
                    f"[predictor.labels] expected cett for {layer.activation.name}, none of whose neurons is "
                    "zero, got nonzero: --labels cett --cett 0.2, or a model file with thresholds"
                )
            fits[name] = LayerFit(layer, captured[name], config)
            _LOG.info("fitted %s (%d of %d)", name, len(fits), len(source.layers))
        selection = Selection(source, fits, config)
        if config.finetune_steps:
            source.finetune(selection.to_train, selection.price, output, config)
            if config.finetune == "model":
                captured = source.capture(directory, config.inputs)
            for name, fit in fits.items():
                fit.read(captured[name])
            selection = Selection(source, fits, config)
        report = selection.report()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    save_predictors(
        {name: (fits[name].fitted.get(layer.kind), layer.threshold) for name, layer in report.layers.items()},
        {name: fit.layer for name, fit in fits.items()},
        output,
        config,
    )
    save_report(report, output)
    return report

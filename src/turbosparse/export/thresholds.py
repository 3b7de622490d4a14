"""CETT thresholds that a calibration found, carried from its model file to another of the same model."""

import re

from turbosparse.errors import ConfigError
from turbosparse.export.draft import Draft, weight_of_file
from turbosparse.runtime.model_file import (
    KEY_ACTIVATION,
    KEY_CALIBRATION,
    KEY_CETT_TARGET,
    ModelFile,
    plain_value,
)

__all__ = ["with_thresholds"]

_NAME = re.compile(r"blk\.\d+\.ffn(_gate)?_threshold(_exps|_shexp)?")


def with_thresholds(draft: Draft, calibrated: ModelFile) -> Draft:
    """Take the thresholds of a calibrated file.

    Parameters
    ----------
    draft : Draft
        A model with neuron-major down projections.
    calibrated : ModelFile
        File of the same model, of any weight type.

    Returns
    -------
    Draft
        With its thresholds and the record of how they were found.

    Raises
    ------
    ConfigError
        When the file has no thresholds, or is not of the same model.
    """
    layers, path, up = draft.num_hidden_layers, calibrated.path, draft.up
    if "threshold" not in calibrated.modes:
        raise ConfigError(f"[{path}] expected a calibrated file, got one without thresholds")
    activation = plain_value(draft.metadata[KEY_ACTIVATION])
    sizes = calibrated.tensors[up.name].shape if up.name in calibrated.tensors else "other FFNs"
    got = (calibrated.activation, calibrated.num_hidden_layers, sizes)
    if got != (activation, layers, draft.sizes):
        raise ConfigError(
            f"[{path}] expected thresholds of this model, {(activation, layers, draft.sizes)}, got {got}"
        )
    draft.require_same_weights(calibrated.dequantised(up.name), f"[{path}] expected thresholds of this model")
    weights = [weight_of_file(calibrated, name) for name in calibrated.tensors if _NAME.fullmatch(name)]
    record = {
        key: value
        for key, value in calibrated.stored_metadata().items()
        if key == KEY_CETT_TARGET or key.startswith(KEY_CALIBRATION)
    }
    return draft.adding(record, weights)

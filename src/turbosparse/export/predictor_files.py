"""Predictors that ``fit-predictor`` left in a directory, as tensors and keys of a model file."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, ModelFileError
from turbosparse.export.draft import Draft, Weight
from turbosparse.export.weight_files import WeightFiles, read_json

__all__ = ["with_predictors"]

PREDICTOR_FILE, REPORT_FILE = "predictors.safetensors", "report.json"
_SCORES = ("recall", "precision", "norm_kept", "cett", "candidate_ratio", "active_ratio")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_PARTS = ("pred_a.weight", "pred_b.weight", "pred_threshold")
_KINDS, _INPUTS = ("low_rank",), ("ffn_norm", "residual")  # what a model file can hold
_BLOCK = 32  # ranks are padded to a multiple, so that rows of every weight type fit


def with_predictors(draft: Draft, directory: Path) -> Draft:
    """Add a low-rank predictor to every layer.

    Parameters
    ----------
    draft : Draft
        A model with neuron-major down projections.
    directory : Path
        Output of ``turbosparse fit-predictor`` for the same model.

    Returns
    -------
    Draft
        With ``ffn_pred_a`` [R, D] and ``ffn_pred_b`` [F, R] in each block and ``turbosparse.predictor.*``
        keys. Ranks are padded by rows and columns of zeros to a multiple of 32.

    Raises
    ------
    ModelFileError
        When the directory holds no predictors, or broken ones.
    ConfigError
        When they are those of another model.
    """
    files = WeightFiles(directory / PREDICTOR_FILE)
    header = files.metadata
    for name, known in (("version", ("1",)), ("kind", _KINDS), ("input", _INPUTS)):
        if header.get(name) not in known:
            raise ModelFileError(
                f"[{files.path}: {name}] expected {' or '.join(known)}, got {str(header.get(name))[:80]!r}"
            )
    layers = _by_layer(files)
    expected = set(range(draft.num_hidden_layers))
    if set(layers) != expected:
        raise ConfigError(
            f"[{files.path}] expected a predictor for each of {len(expected)} layers, got "
            f"{len(layers)}{': ' + str(sorted(layers))[:60] if layers else ''}"
        )
    weights, thresholds = [], []
    for layer in sorted(layers):
        rank = _check(files, layers[layer], draft.sizes)
        padded = -(-rank // _BLOCK) * _BLOCK
        neurons, hidden = draft.sizes
        for suffix, part, shape in (
            ("ffn_pred_a", "pred_a.weight", (padded, hidden)),
            ("ffn_pred_b", "pred_b.weight", (neurons, padded)),
        ):
            name = f"blk.{layer}.{suffix}.weight"
            weights.append(Weight(name=name, shape=shape, values=_padded(files, layers[layer][part], shape)))
        thresholds.append(float(files.read(layers[layer]["pred_threshold"]).reshape(-1)[0]))
    keys = {"kind": header["kind"], "input": header["input"], "threshold": thresholds}
    keys |= _scores(directory / REPORT_FILE, [layers[layer]["pred_a.weight"] for layer in sorted(layers)])
    return draft.adding({f"turbosparse.predictor.{name}": value for name, value in keys.items()}, weights)


def _scores(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """How good the predictors were when they were fitted, for people; nothing where no report says."""
    entries = read_json(path).get("layers") if path.is_file() else None
    if not isinstance(entries, dict):
        return {}
    scores = [entries.get(name.removesuffix(".pred_a.weight"), {}).get("score", {}) for name in names]
    complete = [name for name in _SCORES if all(isinstance(score.get(name), float) for score in scores)]
    return {name: [score[name] for score in scores] for name in complete}


def _by_layer(files: WeightFiles) -> dict[int, dict[str, str]]:
    """Names of the tensors by layer and part."""
    layers: dict[int, dict[str, str]] = {}
    for name in files.shapes:
        layer, part = _LAYER.search(name), next((part for part in _PARTS if name.endswith(part)), None)
        if layer is None or part is None:
            raise ModelFileError(
                f"[{files.path}: {name}] expected a name as in model.layers.0.mlp.pred_a.weight, got another"
            )
        layers.setdefault(int(layer[1]), {})[part] = name
    return layers


def _check(files: WeightFiles, names: dict[str, str], sizes: tuple[int, int]) -> int:
    """Return the rank of a complete predictor of fitting shape."""
    missing = [part for part in _PARTS if part not in names]
    if missing:
        raise ModelFileError(
            f"[{files.path}] expected {missing[0]} beside {next(iter(names.values()))}, got none"
        )
    neurons, hidden = sizes
    a, b = (files.shapes[names[part]] for part in _PARTS[:2])
    if len(a) != 2 or len(b) != 2 or a[1] != hidden or b[0] != neurons or a[0] != b[1]:
        raise ConfigError(
            f"[{files.path}: {names['pred_a.weight']}] expected [R, {hidden}] and [{neurons}, R] as of this "
            f"model, got {list(a)} and {list(b)}"
        )
    if not np.isfinite(files.read(names["pred_threshold"])).all():
        raise ModelFileError(
            f"[{files.path}: {names['pred_threshold']}] expected a finite number, got another"
        )
    return a[0]


def _padded(files: WeightFiles, name: str, shape: tuple[int, int]) -> Callable[[], NDArray[np.float32]]:
    def read() -> NDArray[np.float32]:
        values = files.read(name)
        rows, columns = values.shape
        return np.pad(values, ((0, shape[0] - rows), (0, shape[1] - columns)))

    return read

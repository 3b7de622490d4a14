"""Predictors that ``fit-predictor`` left in a directory, as tensors and keys of a model file."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, ModelFileError
from turbosparse.export.draft import Draft, Weight
from turbosparse.export.weight_files import WeightFiles, read_json

__all__ = ["with_predictors"]

PREDICTOR_FILE, REPORT_FILE = "predictors.safetensors", "report.json"
MODEL_SAMPLE = "model.sample"  # first rows of the first up projection
_SCORES = ("recall", "precision", "norm_kept", "cett", "candidate_ratio", "active_ratio")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SHARED = ".shared_expert."
_PARTS = ("pred_a.weight", "pred_b.weight", "pred_threshold")
_KINDS, _INPUTS = ("low_rank",), ("ffn_norm", "residual")  # what a model file can hold
_BLOCK = 32  # ranks are padded to a multiple, so that rows of every weight type fit


def with_predictors(draft: Draft, directory: Path) -> Draft:
    """Add a low-rank predictor to every layer or expert.

    Parameters
    ----------
    draft : Draft
        A model with neuron-major down projections.
    directory : Path
        Output of ``turbosparse fit-predictor`` for the same model.

    Returns
    -------
    Draft
        With ``ffn_pred_a`` [R, D] and ``ffn_pred_b`` [F, R] in each block, for each expert where there are
        experts, and ``turbosparse.predictor.*`` keys. Ranks are padded by rows and columns of zeros to a
        multiple of 32, those of a block's experts to the same one.

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
    if MODEL_SAMPLE in files.shapes:  # fits of older versions have none
        draft.require_same_weights(
            files.read(MODEL_SAMPLE), f"[{files.path}] expected predictors of this model"
        )
    groups = _groups(draft)
    found = _by_ffn(files, len(groups[0][0].ffns))
    expected = {ffn for layer in groups for group in layer for ffn in group.ffns}
    if set(found) != expected:
        experts = any(group.fused for layer in groups for group in layer)
        got: list[Any] = sorted(found) if experts else [layer for layer, _ in sorted(found)]
        raise ConfigError(
            f"[{files.path}] expected a predictor for each of {len(expected)} "
            f"{'experts' if experts else 'layers'}, got {len(got)}{': ' + str(got)[:60] if got else ''}"
        )
    weights, thresholds = [], []
    for group in (group for layer in groups for group in layer):
        ranks = [_check(files, found[ffn], group) for ffn in group.ffns]
        padded = -(-max(ranks) // _BLOCK) * _BLOCK
        for part, shape in (("pred_a", (padded, group.hidden)), ("pred_b", (group.neurons, padded))):
            names = [found[ffn][f"{part}.weight"] for ffn in group.ffns]
            stacked = (len(names), *shape) if group.fused else shape
            name = f"blk.{group.ffns[0][0]}.ffn_{part}{group.suffix}.weight"
            weights.append(Weight(name=name, shape=stacked, values=_padded(files, names, stacked)))
        thresholds += [float(files.read(found[ffn]["pred_threshold"]).reshape(-1)[0]) for ffn in group.ffns]
    keys = {"kind": header["kind"], "input": header["input"], "threshold": thresholds}
    if len(found) == draft.num_hidden_layers:
        keys |= _scores(directory / REPORT_FILE, [found[ffn]["pred_a.weight"] for ffn in sorted(found)])
    return draft.adding({f"turbosparse.predictor.{name}": value for name, value in keys.items()}, weights)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """FFNs of a layer whose tensors share names: its only one, its experts, or its shared expert."""

    suffix: str
    ffns: list[tuple[int, int]]  # layer, and number in it
    neurons: int
    hidden: int

    @property
    def fused(self) -> bool:
        """Whether their matrices are one tensor."""
        return self.suffix == "_exps"


def _groups(draft: Draft) -> list[list[_Group]]:
    """The FFNs of each layer."""
    names = {weight.name for weight in draft.weights}

    def group(layer: int, suffix: str, first: int) -> _Group:
        *experts, neurons, hidden = draft.find(f"blk.{layer}.ffn_up{suffix}.weight").shape
        count = experts[0] if experts else 1
        ffns = [(layer, first + e) for e in range(count)]
        return _Group(suffix=suffix, ffns=ffns, neurons=neurons, hidden=hidden)

    layers = []
    for n in range(draft.num_hidden_layers):
        groups: list[_Group] = []
        for suffix in ("", "_exps", "_shexp"):
            if f"blk.{n}.ffn_up{suffix}.weight" in names:
                groups.append(group(n, suffix, sum(len(other.ffns) for other in groups)))
        layers.append(groups)
    return layers


def _scores(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """How good the predictors were when they were fitted, for people; nothing where no report says."""
    entries = read_json(path).get("layers") if path.is_file() else None
    if not isinstance(entries, dict):
        return {}
    scores = [entries.get(name.removesuffix(".pred_a.weight"), {}).get("score", {}) for name in names]
    complete = [name for name in _SCORES if all(isinstance(score.get(name), float) for score in scores)]
    return {name: [score[name] for score in scores] for name in complete}


def _by_ffn(files: WeightFiles, experts: int) -> dict[tuple[int, int], dict[str, str]]:
    """Names of the tensors by layer, number of the FFN in the layer, and part."""
    ffns: dict[tuple[int, int], dict[str, str]] = {}
    for name in set(files.shapes) - {MODEL_SAMPLE}:
        layer, part = _LAYER.search(name), next((part for part in _PARTS if name.endswith(part)), None)
        if layer is None or part is None:
            raise ModelFileError(
                f"[{files.path}: {name}] expected a name as in model.layers.0.mlp.pred_a.weight, got another"
            )
        expert = _EXPERT.search(name)
        number = int(expert[1]) if expert else 0
        ffns.setdefault((int(layer[1]), experts if _SHARED in name else number), {})[part] = name
    return ffns


def _check(files: WeightFiles, names: dict[str, str], group: _Group) -> int:
    """Return the rank of a complete predictor of fitting shape."""
    missing = [part for part in _PARTS if part not in names]
    if missing:
        raise ModelFileError(
            f"[{files.path}] expected {missing[0]} beside {next(iter(names.values()))}, got none"
        )
    neurons, hidden = group.neurons, group.hidden
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


def _padded(
    files: WeightFiles, names: Sequence[str], shape: tuple[int, ...]
) -> Callable[[], NDArray[np.float32]]:
    def read() -> NDArray[np.float32]:
        values = np.zeros((len(names), *shape[-2:]), np.float32)
        for target, name in zip(values, names, strict=True):
            matrix = files.read(name)
            target[: matrix.shape[0], : matrix.shape[1]] = matrix
        return values.reshape(shape)

    return read

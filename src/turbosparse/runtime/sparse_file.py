"""A model file that can skip neurons, in the making: down projections transposed, thresholds to come."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ConfigError, ModelFileError
from turbosparse.runtime.ffns import ffn_groups, ffns_of
from turbosparse.runtime.model_file import (
    KEY_ACTIVATION_PARAM,
    KEY_CALIBRATION,
    KEY_CETT_TARGET,
    KEY_REFINE,
    ModelFile,
    StoredValue,
)
from turbosparse.runtime.model_file_copy import copy_with, transposed_down, with_activation
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.weight_parts import PART_TYPE, weights_in_parts

__all__ = ["Refinement", "SparseDraft", "default_down_type", "packed_type", "row_bytes"]

_THRESHOLDS = ("ffn_gate_threshold", "ffn_threshold")
_NATIVE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def packed_type(type_name: str) -> str:
    """Say what the engine makes of a weight type.

    Parameters
    ----------
    type_name : str
        ggml type of a tensor in a file.

    Returns
    -------
    str
        The type itself where it has a kernel, else ``"Q8_0"``, which is what it is transcoded to by default.
    """
    return type_name if type_name in _NATIVE_TYPES else "Q8_0"


def default_down_type(source: ModelFile) -> str:
    """Choose the weight type of a transposed down projection.

    Parameters
    ----------
    source : ModelFile
        File with ``ffn_down``.

    Returns
    -------
    str
        The type of ``ffn_down`` where that has a kernel, but never fewer than 8 bits.

    Notes
    -----
    Blocks run along rows, so a transposed matrix is quantised anew. To 4 bits that costs much: the perplexity
    of SmolLM2-135M in Q4_0 on 2,048 tokens of held-out text is 29.0, 31.3 with ffn_down_t in Q4_0 (+8 %), and
    28.9 with Q8_0.
    """
    own = packed_type(source.tensor(ffns_of(source)[0].tensor("down")).type_name)
    return "Q8_0" if own == "Q4_0" else own


def row_bytes(type_name: str, columns: int) -> float:
    """Count the bytes of one row as the engine holds it, without padding.

    Parameters
    ----------
    type_name : str
        ggml type of a tensor in a file.
    columns : int
        Weights per row.

    Returns
    -------
    float
        Bytes.
    """
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[packed_type(type_name)]]
    return float(columns * block_bytes / block)


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """When threshold mode reads the second part of a weight."""

    neurons: float
    """For neurons whose activation is at least this times their threshold, 1 or more: 1 takes all active."""
    logits: float = 8.0
    """For logits at most this far below the largest, 0 or more, in nats."""

    def __post_init__(self) -> None:
        if not 1 <= self.neurons < math.inf:
            raise ConfigError(f"[refine] expected a ratio of at least 1, got {self.neurons}")
        if not 0 <= self.logits < math.inf:
            raise ConfigError(f"[refine logits] expected 0 or more nats, got {self.logits}")


class ThresholdPair(Protocol):
    """The thresholds of one FFN."""

    @property
    def gate_threshold(self) -> NDArray[np.float32]:
        """Of stage 1, [F]."""

    @property
    def threshold(self) -> NDArray[np.float32]:
        """Of stage 2, [F]."""


class SparseDraft:
    """The new file with all its tensors, beside its final place, so that thresholds can be tried.

    Parameters
    ----------
    source : ModelFile
        The file to make sparse; one that is sparse already gets new thresholds.
    path : Path
        Where the draft is written.
    down_type : str or None
        Weight type of the transposed down projection; None takes :func:`default_down_type`.
    refine : Refinement or None
        Store weights in two parts, and when the second counts; None leaves them whole.
    progress : callable
        Told which share of the file was written.

    Attributes
    ----------
    down_type : str
        Type of ``ffn_down_t``.
    file : ModelFile
        The draft.
    """

    def __init__(
        self,
        source: ModelFile,
        path: Path,
        down_type: str | None,
        progress: Callable[[float], None],
        *,
        refine: Refinement | None = None,
    ) -> None:
        activation = source.activation
        if activation is None or not source.gated:
            raise ModelFileError(f"[{source.path}] expected a gated FFN with a known activation, got another")
        self._ffns = ffns_of(source)
        groups = ffn_groups(self._ffns)
        tensors = []
        for group in groups:
            experts = () if group[0].expert is None else (len(group),)
            zeros = np.zeros((*experts, group[0].neurons), np.float32)
            tensors += [
                TensorSource.of_array(f"blk.{group[0].layer}.{name}{group[0].suffix}", zeros)
                for name in _THRESHOLDS
            ]
        drop = []
        if source.neuron_major_down:
            self.down_type = source.tensor(self._ffns[0].tensor("down_t")).type_name
            if down_type not in (None, self.down_type):
                raise ConfigError(
                    f"[calibration down_type] expected {self.down_type}, which the file has, got {down_type}"
                )
        elif refine is not None:
            self.down_type = PART_TYPE
            drop = [group[0].tensor("down") for group in groups]
        else:
            self.down_type = down_type or default_down_type(source)
            tensors += [
                transposed_down(source, group[0].layer, self.down_type, suffix=group[0].suffix)
                for group in groups
            ]
            drop = [group[0].tensor("down") for group in groups]
        metadata = {
            key: value
            for key, value in source.stored_metadata().items()
            if key != KEY_CETT_TARGET and not key.startswith(KEY_CALIBRATION)
        }
        if refine is not None:
            tensors += weights_in_parts(source)
            metadata[f"{KEY_REFINE}neurons"] = StoredValue("float32", refine.neurons)
            metadata[f"{KEY_REFINE}logits"] = StoredValue("float32", refine.logits)
        parameter = source.metadata.get(KEY_ACTIVATION_PARAM)
        metadata = with_activation(metadata, activation, parameter=parameter)
        copy_with(
            source,
            path,
            metadata=metadata,
            tensors=tensors,
            drop=drop,
            progress=lambda count: progress(count / source.file_bytes),
        )
        self.file = ModelFile(path)

    def set_thresholds(self, thresholds: Sequence[ThresholdPair]) -> None:
        """Write thresholds into the draft.

        Parameters
        ----------
        thresholds : sequence of ThresholdPair
            One per FFN, such as `LayerThresholds`, in the order of `turbosparse.runtime.ffns.ffns_of`.
        """
        with Path(self.file.path).open("r+b") as file:
            for ffn, own in zip(self._ffns, thresholds, strict=True):
                for name, values in zip(_THRESHOLDS, (own.gate_threshold, own.threshold), strict=True):
                    data = values.astype("<f4").tobytes()
                    start = self.file.tensor(f"blk.{ffn.layer}.{name}{ffn.suffix}").offset
                    file.seek(start + (ffn.expert or 0) * len(data))
                    file.write(data)

    def load(self, threads: int) -> _native.Model:
        """Load the draft as it is now.

        Parameters
        ----------
        threads : int
            Threads of the engine; 0 means physical cores, at most 8.

        Returns
        -------
        _native.Model
            Ready to run in threshold mode.
        """
        return _native.Model(self.file.path, threads=threads)

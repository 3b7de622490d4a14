"""What a model file holds: typed access to its keys and tensors over the native reader.

The format is docs/format.md. Writing is in ``model_file_writer`` and ``model_file_copy``.
"""

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ModelFileError

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "ARCHITECTURE_PREFIX",
    "EXPERT_NORM",
    "FORMAT_VERSION",
    "KEY_ACTIVATION",
    "KEY_ACTIVATION_PARAM",
    "KEY_ARCHITECTURE",
    "KEY_BUNDLE",
    "KEY_CALIBRATION",
    "KEY_CETT_TARGET",
    "KEY_GATED",
    "KEY_PREDICTOR",
    "KEY_REFINE",
    "KEY_VERSION",
    "ModelFile",
    "StoredValue",
    "dequantised",
    "plain_value",
]

FORMAT_VERSION = 1
KEY_ARCHITECTURE = "general.architecture"
KEY_VERSION = "turbosparse.version"
KEY_ACTIVATION = "turbosparse.activation"
KEY_ACTIVATION_PARAM = "turbosparse.activation_param"
KEY_GATED = "turbosparse.gated"
KEY_CETT_TARGET = "turbosparse.cett_target"
KEY_CALIBRATION = "turbosparse.calibration."  # prefix of the calibration's record
KEY_BUNDLE = "turbosparse.bundle."  # prefix of the keys of bundles
KEY_PREDICTOR = "turbosparse.predictor."  # prefix of all keys of the predictors
KEY_REFINE = "turbosparse.refine."  # prefix of the rules by which second parts of weights are read
_MOST = 1024  # layers, and experts of a layer

# Architectures that the engine runs, and the activation that a reader assumes where none is written.
ARCHITECTURES = {
    "llama": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "qwen2moe": "silu",
    "qwen3moe": "silu",
    "olmoe": "silu",
    "smallthinker": "relu",
}
# Whether the factors of a token's experts add up to one, under the architecture's prefix. Other readers have
# one rule per architecture and ignore the key.
EXPERT_NORM = "expert_weights_norm"
# Files with another activation carry this before the architecture, so that other readers refuse them.
ARCHITECTURE_PREFIX = "turbosparse-"
# Activation names, and whether the activation gives exact zeros.
ACTIVATIONS = {"silu": False, "gelu": False, "relu": True, "relu2": True, "fatrelu": True, "drelu": True}

Mode = Literal["dense", "exact", "threshold", "predicted"]


@dataclass(frozen=True)
class StoredValue:
    """A metadata value with the kind it has in the file, so that a copy keeps it."""

    kind: str  # "uint8" ... "float64", "bool", "string"; arrays as "uint32[]"
    value: Any


class ModelFile:
    """A GGUF model file, open for reading.

    Parameters
    ----------
    path : str or os.PathLike
        The file. It stays mapped as long as this object or an array taken from it lives.

    Raises
    ------
    ModelFileError
        When the file cannot be opened or is broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = _native.GgufFile(path)
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}

    @property
    def path(self) -> str:
        """Path the file was opened at."""
        return self._file.path

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return self._file.file_bytes

    @property
    def gguf_version(self) -> int:
        """Version of the container, 2 or 3."""
        return self._file.version

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Metadata: keys to int, float, bool, str or list of those, in file order."""
        return self._file.metadata

    def stored_metadata(self) -> dict[str, StoredValue]:
        """Give all keys with their kinds, ready to be written into another file.

        Returns
        -------
        dict
            In file order.
        """
        kinds = self._file.metadata_kinds
        return {key: StoredValue(kinds[key], value) for key, value in self.metadata.items()}

    @property
    def tensors(self) -> dict[str, _native.GgufTensor]:
        """What tensors there are, by name, in file order."""
        return self._tensors

    # ---- what the keys say ---------------------------------------------------------------------------------

    @property
    def architecture(self) -> str:
        """Architecture as written, with the prefix where the file has one."""
        return self.string(KEY_ARCHITECTURE)

    @property
    def base_architecture(self) -> str:
        """Architecture without our prefix: which graph to compute."""
        return self.architecture.removeprefix(ARCHITECTURE_PREFIX)

    @property
    def num_hidden_layers(self) -> int:
        """Number of transformer blocks, 1 to 1024 as in the engine."""
        return self._bounded(f"{self.architecture}.block_count", least=1)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, D."""
        return self.integer(f"{self.architecture}.embedding_length")

    @property
    def intermediate_size(self) -> int:
        """Number of neurons per feed-forward layer, or of an expert, F."""
        of_an_expert = f"{self.architecture}.expert_feed_forward_length"
        known = self.num_experts and of_an_expert in self.metadata
        return self.integer(of_an_expert if known else f"{self.architecture}.feed_forward_length")

    @property
    def num_experts(self) -> int:
        """Number of experts per layer, E, the shared one aside; 0 where there are none."""
        key = f"{self.architecture}.expert_count"
        return self._bounded(key, least=0) if key in self.metadata else 0

    @property
    def num_experts_per_tok(self) -> int:
        """Number of experts that a token is sent to; 0 where there are none."""
        return self.integer(f"{self.architecture}.expert_used_count") if self.num_experts else 0

    @property
    def shared_intermediate_size(self) -> int:
        """Number of neurons of the expert that all tokens share; 0 where there is none."""
        key = f"{self.architecture}.expert_shared_feed_forward_length"
        return self.integer(key) if self.num_experts and key in self.metadata else 0

    def require_no_experts(self, place: str) -> None:
        """Refuse a file with experts.

        Parameters
        ----------
        place : str
            What cannot be done with it.

        Raises
        ------
        ModelFileError
            When the file has experts.
        """
        if self.num_experts:
            raise ModelFileError(
                f"[{place}: {self.path}] expected a model without experts, got {self.num_experts} per layer"
            )

    def require_no_bundles(self) -> None:
        """Refuse a file whose FFNs lie in bundles, so that there are no tensors of them.

        Raises
        ------
        ModelFileError
            When it has bundles.
        """
        if self.has_bundles:
            raise ModelFileError(
                f"[{self.path}] expected a file without bundles, got one made by export --layout bundled; "
                "use the file it was made from"
            )

    @property
    def activation(self) -> str | None:
        """Name of the activation, or None where the file does not say and the architecture is not known."""
        if KEY_ACTIVATION not in self.metadata:
            return ARCHITECTURES.get(self.architecture)
        name = self.string(KEY_ACTIVATION)
        if name not in ACTIVATIONS:
            raise ModelFileError(f"[{KEY_ACTIVATION}] expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
        return name

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate projection."""
        stated = self.metadata.get(KEY_GATED)
        return (
            bool(stated)
            if stated is not None
            else any(
                name in self._tensors for name in ("blk.0.ffn_gate.weight", "blk.0.ffn_gate_exps.weight")
            )
        )

    @property
    def neuron_major_down(self) -> bool:
        """Whether every layer holds ``ffn_down_t``, one row per neuron, so that neurons can be skipped."""
        return self.has_bundles or self._in_every_layer("ffn_down_t.weight", "ffn_down_t_exps.weight")

    @property
    def has_bundles(self) -> bool:
        """Whether the rows of each neuron lie side by side, so that they need not all be in memory."""
        return f"{KEY_BUNDLE}parts" in self.metadata

    @property
    def modes(self) -> list[Mode]:
        """Which modes this file can run in; ``"dense"`` is always among them."""
        modes: list[Mode] = ["dense"]
        activation = self.activation
        if self.neuron_major_down:
            if activation is not None and ACTIVATIONS[activation]:
                modes.append("exact")
            if self._in_every_layer("ffn_threshold", "ffn_threshold_exps"):
                modes.append("threshold")
            if f"{KEY_PREDICTOR}kind" in self.metadata:
                modes.append("predicted")
        return modes

    def integer(self, key: str) -> int:
        """Give an integer key.

        Parameters
        ----------
        key : str
            Full name of the key.

        Returns
        -------
        int
            Its value.

        Raises
        ------
        ModelFileError
            When the key is absent or holds something else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer", value)
        return value

    def string(self, key: str) -> str:
        """Give a string key.

        Parameters
        ----------
        key : str
            Full name of the key.

        Returns
        -------
        str
            Its value.

        Raises
        ------
        ModelFileError
            When the key is absent or holds something else.
        """
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def calibration(self) -> dict[str, Any]:
        """Give the record of how the thresholds were found.

        Returns
        -------
        dict
            The ``turbosparse.calibration.*`` keys without their prefix, and ``cett_target``; empty where the
            file was never calibrated.
        """
        prefix = KEY_CALIBRATION
        record = {
            key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)
        }
        if KEY_CETT_TARGET in self.metadata:
            record["cett_target"] = self.metadata[KEY_CETT_TARGET]
        return record

    # ---- tensors -------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> _native.GgufTensor:
        """Describe one tensor.

        Parameters
        ----------
        name : str
            Its name, such as ``blk.0.ffn_up.weight``.

        Returns
        -------
        GgufTensor
            Type, shape and place.

        Raises
        ------
        ModelFileError
            When the file has no such tensor.
        """
        if name not in self._tensors:
            raise ModelFileError(f"[{self.path}] expected a tensor {name!r}, got none")
        return self._tensors[name]

    def tensor_bytes(self, name: str) -> NDArray[np.uint8]:
        """Give a tensor's bytes as they lie in the file.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        uint8, shape (nbytes,)
            Read-only view of the mapping.

        Raises
        ------
        ModelFileError
            When the file has no such tensor.
        """
        self.tensor(name)
        return self._file.tensor_bytes(name)

    def dequantised(self, name: str, *, expert: int | None = None) -> NDArray[np.float32]:
        """Give a tensor's values.

        Parameters
        ----------
        name : str
            Its name.
        expert : int, optional
            Of a tensor with a first dimension for experts, give this one's alone.

        Returns
        -------
        float32, shape as stored, without the experts' dimension where one is asked for
            Rows first; for F32 a view of the mapping where alignment allows, else a new array.

        Raises
        ------
        ModelFileError
            When the file has no such tensor, or its type cannot be dequantised.
        """
        tensor = self.tensor(name)
        data = self._file.tensor_bytes(name)
        if expert is None:
            return dequantised(data, tensor.type_name, tensor.shape)
        part = data.reshape(tensor.shape[0], -1)[expert]
        return dequantised(part, tensor.type_name, tensor.shape[1:])

    def threshold_values(
        self, name: str, neurons: int, *, expert: int | None = None
    ) -> NDArray[np.float32] | None:
        """Give the thresholds of one FFN.

        Parameters
        ----------
        name : str
            Name of the tensor.
        neurons : int
            Neurons of the FFN.
        expert : int, optional
            Which expert's, where the tensor has those of all.

        Returns
        -------
        float32, shape (F,), or None
            None where there is no such tensor.

        Raises
        ------
        ModelFileError
            When they have another type or shape, or are negative or not finite.
        """
        if name not in self._tensors:
            return None
        tensor = self._tensors[name]
        expected = f"[{self.path}: {name}] expected {neurons} F32 values of 0 or more"
        experts = () if expert is None else (self.num_experts,)
        if tensor.type_name != "F32" or tensor.shape != (*experts, neurons):
            raise ModelFileError(f"{expected}, got {tensor.type_name} of shape {tensor.shape}")
        values = self.dequantised(name, expert=expert)
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if wrong.size:
            raise ModelFileError(f"{expected}, got {values[wrong[0]]} for neuron {wrong[0]}")
        return values

    def _in_every_layer(self, *names: str) -> bool:
        """Whether every layer has one of these tensors."""
        layers = self.metadata.get(f"{self.architecture}.block_count")
        return isinstance(layers, int) and all(
            any(f"blk.{n}.{name}" in self._tensors for name in names) for n in range(layers)
        )

    def _bounded(self, key: str, *, least: int) -> int:
        """A number of layers or experts: lists of them are made, so a broken file must not say how long."""
        value = self.integer(key)
        if not least <= value <= _MOST:
            raise self._wrong(key, f"{least} to {_MOST}", value)
        return value

    def _wrong(self, key: str, expected: str, value: object) -> ModelFileError:
        got = "no such key" if value is None else repr(value)[:80]
        return ModelFileError(f"[{self.path}: key {key!r}] expected {expected}, got {got}")


def plain_value(value: Any) -> Any:
    """Take a metadata value out of its wrapping, if it has one.

    Parameters
    ----------
    value : StoredValue or any
        What a metadata mapping holds.

    Returns
    -------
    any
        bool, int, float, str or list.
    """
    return value.value if isinstance(value, StoredValue) else value


def dequantised(data: NDArray[np.uint8], type_name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Turn a tensor's bytes into numbers.

    Parameters
    ----------
    data : uint8, shape (nbytes,)
        The bytes as a GGUF file stores them.
    type_name : str
        Name of a ggml type, such as ``"Q4_0"``.
    shape : tuple of int
        Slowest dimension first.

    Returns
    -------
    float32, shape ``shape``
        The values.

    Raises
    ------
    ModelFileError
        When the ``gguf`` package cannot dequantise the type.
    """
    rows = data.reshape(math.prod(shape[:-1]), -1)
    try:
        values = dequantize(rows, GGMLQuantizationType[type_name])
    except (KeyError, NotImplementedError) as error:
        raise ModelFileError(
            f"[tensor type] expected one that can be dequantised, got {type_name}"
        ) from error
    return np.asarray(values, np.float32).reshape(shape)

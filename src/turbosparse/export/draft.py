"""A model file in the making: its keys, and its tensors as values that are read when their turn comes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ConfigError, ModelFileError
from turbosparse.runtime.model_file import KEY_ACTIVATION_PARAM, ModelFile
from turbosparse.runtime.model_file_copy import with_activation
from turbosparse.runtime.model_file_writer import TensorSource, quantised

__all__ = ["WEIGHT_TYPES", "Draft", "TypeChoice", "Weight", "draft_of_model_file", "weight_of_file"]

WEIGHT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
DOWN = re.compile(r"\.ffn_down(_exps|_shexp)?\.weight$")
_WIDE_TYPES = ("F32", "F16", "BF16", "Q8_0")
_LARGEST_DIFFERENCE = 0.15  # relative norm; 4-bit weights are off by 0.1, another model's by more than 1


@dataclass(frozen=True, kw_only=True)
class TypeChoice:
    """Weight types of the matrices; vectors are F32."""

    weights: str | None = None
    """Of all that have no choice of their own; None keeps the types of a model file."""
    down: str | None = None
    """Of the down projections; None: as the weights, but a transposed one never has fewer than 8 bits."""
    embedding: str | None = None
    """Of token_embd and output; None: as the weights, but Q8_0 with Q4_0."""
    predictor: str = "Q8_0"
    """Of predictors."""

    def __post_init__(self) -> None:
        for name in ("weights", "down", "embedding", "predictor"):
            value = getattr(self, name)
            if value is not None and value not in WEIGHT_TYPES:
                raise ConfigError(
                    f"[type of {name}] expected one of {', '.join(WEIGHT_TYPES)}, got {value!r}"
                )

    def of(self, name: str) -> str | None:
        """Choose the type of a matrix.

        Parameters
        ----------
        name : str
            Its name in the model file.

        Returns
        -------
        str or None
            A ggml type; None: as it is.
        """
        part = re.sub("_(exps|shexp)$", "", name.split(".")[-2])
        if part == "ffn_gate_inp":
            return None  # which experts a token is sent to is decided by small differences
        if part.startswith("ffn_pred_"):
            return self.predictor
        at_least_8_bits = "Q8_0" if self.weights == "Q4_0" else self.weights
        if part in ("token_embd", "output"):
            return self.embedding or at_least_8_bits
        if part == "ffn_down_t":
            return self.down or at_least_8_bits
        return (self.down if part == "ffn_down" else None) or self.weights


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor to be: its place and how to get its values."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], NDArray[np.float32]]
    own_type: str = "F32"  # what it has where nothing else is asked for
    stored: TensorSource | None = None  # as it lies in a model file, to be copied bit by bit

    def source(self, types: TypeChoice) -> TensorSource:
        """Say how it is written.

        Parameters
        ----------
        types : TypeChoice
            Types of matrices.

        Returns
        -------
        TensorSource
            Reads and quantises when it is written.

        Raises
        ------
        ModelFileError
            When its rows do not fit the type.
        """
        is_matrix = self.name.endswith(".weight") and len(self.shape) > 1
        type_name = (types.of(self.name) if is_matrix else None) or self.own_type
        if self.stored is not None and self.stored.type_name == type_name:
            return self.stored
        made = TensorSource(
            name=self.name,
            type_name=type_name,
            shape=self.shape,
            read=lambda: quantised(self.values(), type_name),
        )
        _ = made.nbytes  # refuses a type that does not fit before anything is written
        return made

    def transposed(self, name: str) -> "Weight":
        """Turn a matrix, or that of each expert, around.

        Parameters
        ----------
        name : str
            Name of the result.

        Returns
        -------
        Weight
            With 8 bits or more, since it is quantised anew.
        """
        own = self.own_type if self.own_type in _WIDE_TYPES else "Q8_0"
        *experts, rows, cols = self.shape
        return Weight(
            name=name,
            shape=(*experts, cols, rows),
            values=lambda: np.ascontiguousarray(self.values().swapaxes(-1, -2)),
            own_type=own,
        )


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Keys and tensors of a model file."""

    metadata: Mapping[str, Any]
    weights: Sequence[Weight]

    def find(self, name: str) -> Weight:
        """Find a tensor.

        Parameters
        ----------
        name : str
            Its name.

        Returns
        -------
        Weight
            The tensor.

        Raises
        ------
        ModelFileError
            When there is none.
        """
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise ModelFileError(f"[{name}] expected a tensor of this name in the model, got none")

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return len({weight.name.split(".")[1] for weight in self.weights if weight.name.startswith("blk.")})

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of experts, E, where there are any, of neurons, F, and width of the residual stream, D."""
        return self.up.shape

    @property
    def up(self) -> Weight:
        """The first layer's up projection, of all of its experts."""
        names = {weight.name for weight in self.weights}
        experts = "blk.0.ffn_up_exps.weight"
        return self.find(experts if experts in names else "blk.0.ffn_up.weight")

    def require_same_weights(self, up: NDArray[np.float32], expectation: str) -> None:
        """Refuse what was made for other weights.

        Parameters
        ----------
        up : float32, shape (..., F', D)
            Rows of the first up projection there, from its first on; all of them or fewer.
        expectation : str
            Beginning of the message.

        Raises
        ------
        ConfigError
            When they are not the rows of this model.
        """
        own = self.up.values()
        if own.ndim > up.ndim:
            own = own[0]
        own = own[..., : up.shape[-2], :]
        if own.shape != up.shape:
            raise ConfigError(f"{expectation}, got those of one of other sizes")
        difference = float(np.linalg.norm(own - up) / np.linalg.norm(own))
        if not difference <= _LARGEST_DIFFERENCE:
            raise ConfigError(f"{expectation}, got those of one whose weights differ by {difference:.0%}")

    def neuron_major(self) -> "Draft":
        """Transpose the down projections, so that neurons can be skipped.

        Returns
        -------
        Draft
            With ``ffn_down_t`` in place of ``ffn_down``.
        """
        weights = [
            weight.transposed(DOWN.sub(r".ffn_down_t\1.weight", weight.name))
            if DOWN.search(weight.name)
            else weight
            for weight in self.weights
        ]
        return Draft(metadata=self.metadata, weights=weights)

    def adding(self, metadata: Mapping[str, Any], weights: Sequence[Weight]) -> "Draft":
        """Add keys and tensors.

        Parameters
        ----------
        metadata : mapping
            Keys; they take the place of those with the same name.
        weights : sequence of Weight
            Tensors of blocks; they take the place of those with the same name.

        Returns
        -------
        Draft
            Each tensor follows the others of its block.
        """
        names = {weight.name for weight in weights}
        merged = [weight for weight in self.weights if weight.name not in names]
        for weight in weights:
            block = weight.name[: weight.name.index(".", len("blk.")) + 1]
            last = max(place for place, other in enumerate(merged) if other.name.startswith(block))
            merged.insert(last + 1, weight)
        return Draft(metadata={**self.metadata, **metadata}, weights=merged)


def draft_of_model_file(file: ModelFile, *, name: str | None = None) -> Draft:
    """Take an existing model file as it is.

    Parameters
    ----------
    file : ModelFile
        The file.
    name : str, optional
        Name of the model, for people, if it shall be another.

    Returns
    -------
    Draft
        Its keys and tensors, and its activation stated.

    Raises
    ------
    ModelFileError
        When the activation is not known, or the layers are not gated.
    """
    if file.activation is None or not file.gated:
        raise ModelFileError(f"[{file.path}] expected a gated FFN with a known activation, got another")
    metadata = with_activation(
        file.stored_metadata(), file.activation, parameter=file.metadata.get(KEY_ACTIVATION_PARAM)
    )
    if name is not None:
        metadata["general.name"] = name
    return Draft(metadata=metadata, weights=[weight_of_file(file, tensor) for tensor in file.tensors])


def weight_of_file(file: ModelFile, name: str) -> Weight:
    """Take a tensor of a model file.

    Parameters
    ----------
    file : ModelFile
        The file.
    name : str
        Name of the tensor, there and in the new file.

    Returns
    -------
    Weight
        Copied bit by bit unless another type is asked for.
    """
    tensor = file.tensor(name)
    return Weight(
        name=name,
        shape=tensor.shape,
        values=lambda: file.dequantised(name),
        own_type=tensor.type_name,
        stored=TensorSource.of_file(file, name),
    )

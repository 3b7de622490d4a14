"""From a Hugging Face directory to the draft of a model file: names, layouts, keys.

Rope in transformers turns element i of a head together with element i + C / 2. Architectures of llama's kind
turn neighbours, so rows of q and k are reordered, as llama.cpp's converter does.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse.errors import ModelFileError
from turbosparse.export.draft import Draft, Weight
from turbosparse.export.hf_config import ExpertNames, HFConfig
from turbosparse.export.model_card import card_metadata
from turbosparse.export.tokenizer_metadata import tokenizer_metadata
from turbosparse.export.weight_files import WeightFiles
from turbosparse.runtime.model_file_copy import with_activation

__all__ = ["draft_of_directory", "rope_rows"]

logger = logging.getLogger(__name__)

Array = NDArray[np.float32]
_BUFFERS = (".rotary_emb.inv_freq",)  # computed from the configuration; old checkpoints hold them


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A tensor of the directory, and which of its rows become a tensor of the model file."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None  # begin and end; None: all
    heads: int = 0  # whose rows are reordered for rope; 0: they stay
    experts: int = 0  # that many tensors, numbered at `{}` in the name, become one; 0: a single tensor
    squeezed: bool = False  # whether a matrix of one row becomes a vector

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the directory."""
        return [self.name.format(e) for e in range(self.experts)] if self.experts else [self.name]

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Shape in the model file."""
        if self.experts:
            return (self.experts, *self.shape)
        if self.squeezed:
            return self.shape[1:]
        if self.rows is None:
            return self.shape
        begin, end = self.rows
        return (end - begin, *self.shape[1:])


def draft_of_directory(directory: Path, *, name: str | None = None) -> Draft:
    """Describe the model file that a directory becomes.

    Parameters
    ----------
    directory : Path
        A Hugging Face directory: config.json, safetensors files, tokenizer.json.
    name : str, optional
        Name of the model, for people; by default that of its model card or configuration.

    Returns
    -------
    Draft
        Down projections are neuron-major where the activation gives zeros.

    Raises
    ------
    ModelFileError
        When the model is of a kind that the engine does not run, or tensors are missing, left over or of
        another shape than the configuration says.
    TokenizerError
        When the tokenizer is missing or of an unknown kind.
    """
    config, files = HFConfig(directory), WeightFiles(directory)
    weights = _weights(config, files)
    factors = config.rope_factors()
    if factors is not None:
        weights.append(Weight(name="rope_freqs.weight", shape=factors.shape, values=lambda: factors))
    keys: dict[str, Any] = {
        **config.keys(),
        **card_metadata(directory, config, name),
        **tokenizer_metadata(directory, config),
    }
    metadata = with_activation(keys, config.activation, parameter=config.activation_param)
    draft = Draft(metadata=metadata, weights=weights)
    return draft if config.activation in ("silu", "gelu") else draft.neuron_major()


def rope_rows(values: Array, heads: int) -> Array:
    """Put the halves of each head into turns: row i, then row i + C / 2.

    Parameters
    ----------
    values : float32, shape (H * C, ...)
        Rows of q or k, or their biases.
    heads : int
        H.

    Returns
    -------
    float32, same shape
        Reordered copy.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])  # [H, 2, C / 2, ...]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _weights(config: HFConfig, files: WeightFiles) -> list[Weight]:
    sources = dict(_sources(config))
    shapes = files.shapes
    used = {"lm_head.weight"} if config.tied_embeddings else set()
    for source in sources.values():
        for name in source.names:
            if name not in shapes:
                raise ModelFileError(
                    f"[{files.path}: {name}] expected a tensor of shape {source.shape}, got none"
                )
            if shapes[name] != source.shape:
                raise ModelFileError(
                    f"[{files.path}: {name}] expected shape {source.shape}, got {shapes[name]}"
                )
            used.add(name)
    unused = sorted(name for name in shapes if name not in used and not name.endswith(_BUFFERS))
    if unused:
        raise ModelFileError(
            f"[{files.path}: {unused[0]}] expected only tensors that a {config.model_type} model is computed "
            f"with, got {len(unused)} others"
        )
    return [
        Weight(
            name=name,
            shape=source.result_shape,
            values=_reader(files, source),
        )
        for name, source in sources.items()
    ]


def _reader(files: WeightFiles, source: _Source) -> Callable[[], Array]:
    def read() -> Array:
        if source.experts:
            return np.stack([files.read(name) for name in source.names])
        values = files.read(source.name)
        if source.squeezed:
            return np.ascontiguousarray(values[0])
        if source.rows is not None:
            values = values[slice(*source.rows)]
        return rope_rows(values, source.heads) if source.heads else values

    return read


def _sources(config: HFConfig) -> Iterator[tuple[str, _Source]]:
    """Names in the model file, in its order, and where each comes from."""
    V, D = config.vocab_size, config.hidden_size
    yield "token_embd.weight", _Source(name="model.embed_tokens.weight", shape=(V, D))
    for n in range(config.num_hidden_layers):
        ours, theirs = f"blk.{n}.", f"model.layers.{n}."
        yield ours + "attn_norm.weight", _Source(name=theirs + "input_layernorm.weight", shape=(D,))
        yield from _attention(config, ours, theirs + "self_attn.")
        yield ours + "ffn_norm.weight", _Source(name=theirs + "post_attention_layernorm.weight", shape=(D,))
        if config.family.experts is None:
            yield from _ffn(config, ours, theirs + "mlp.")
        else:
            yield from _experts(config, config.family.experts, ours, theirs + config.family.experts.block)
    yield "output_norm.weight", _Source(name="model.norm.weight", shape=(D,))
    if not config.tied_embeddings:
        yield "output.weight", _Source(name="lm_head.weight", shape=(V, D))


def _attention(config: HFConfig, ours: str, theirs: str) -> Iterator[tuple[str, _Source]]:
    family, D, C = config.family, config.hidden_size, config.head_dim
    heads = {
        "q": config.num_attention_heads,
        "k": config.num_key_value_heads,
        "v": config.num_key_value_heads,
    }
    total, begin = sum(heads.values()) * C, 0
    for part, count in heads.items():
        turned = count if family.permuted and part != "v" else 0
        if family.fused:
            end = begin + count * C
            source = _Source(
                name=theirs + "qkv_proj.weight", shape=(total, D), rows=(begin, end), heads=turned
            )
            begin = end
        else:
            source = _Source(name=f"{theirs}{part}_proj.weight", shape=(count * C, D), heads=turned)
        yield f"{ours}attn_{part}.weight", source
        if family.qk_norm and part != "v":
            yield f"{ours}attn_{part}_norm.weight", _Source(name=f"{theirs}{part}_norm.weight", shape=(C,))
        if family.qk_norm_all and part != "v":
            norm = _Source(name=f"{theirs}{part}_norm.weight", shape=(count * C,))
            yield f"{ours}attn_{part}_norm.weight", norm
        if family.qkv_bias:
            yield (
                f"{ours}attn_{part}.bias",
                _Source(name=f"{theirs}{part}_proj.bias", shape=(count * C,), heads=turned),
            )
    yield (
        ours + "attn_output.weight",
        _Source(name=theirs + "o_proj.weight", shape=(D, config.num_attention_heads * C)),
    )


def _ffn(config: HFConfig, ours: str, theirs: str) -> Iterator[tuple[str, _Source]]:
    D, F = config.hidden_size, config.intermediate_size
    if config.family.fused:
        both = theirs + "gate_up_proj.weight"
        yield ours + "ffn_gate.weight", _Source(name=both, shape=(2 * F, D), rows=(0, F))
        yield ours + "ffn_up.weight", _Source(name=both, shape=(2 * F, D), rows=(F, 2 * F))
    else:
        yield ours + "ffn_gate.weight", _Source(name=theirs + "gate_proj.weight", shape=(F, D))
        yield ours + "ffn_up.weight", _Source(name=theirs + "up_proj.weight", shape=(F, D))
    yield ours + "ffn_down.weight", _Source(name=theirs + "down_proj.weight", shape=(D, F))


def _experts(config: HFConfig, names: ExpertNames, ours: str, theirs: str) -> Iterator[tuple[str, _Source]]:
    assert config.experts is not None, "a family with names of experts has experts"
    D, E, F = config.hidden_size, config.experts.count, config.experts.intermediate_size
    yield ours + "ffn_gate_inp.weight", _Source(name=theirs + "gate.weight", shape=(E, D))
    for part, name, shape in (
        ("gate", names.gate, (F, D)),
        ("up", names.up, (F, D)),
        ("down", names.down, (D, F)),
    ):
        source = _Source(name=f"{theirs}experts.{{}}.{name}.weight", shape=shape, experts=E)
        yield f"{ours}ffn_{part}_exps.weight", source
    shared = config.experts.shared_intermediate_size
    if shared:
        gate = _Source(name=theirs + "shared_expert_gate.weight", shape=(1, D), squeezed=True)
        yield ours + "ffn_gate_inp_shexp.weight", gate
        for part, shape in (("gate", (shared, D)), ("up", (shared, D)), ("down", (D, shared))):
            name = f"{theirs}shared_expert.{part}_proj.weight"
            yield f"{ours}ffn_{part}_shexp.weight", _Source(name=name, shape=shape)

"""What is worth knowing about a model file, as plain values: shape, types, bytes, thresholds, calibration."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, TypeGuard

import numpy as np

from turbosparse.errors import ModelFileError
from turbosparse.runtime.ffns import ffns_of
from turbosparse.runtime.model_file import KEY_ACTIVATION_PARAM, KEY_BUNDLE, KEY_PREDICTOR, ModelFile
from turbosparse.runtime.predictors import read_predictors

__all__ = ["describe"]

FFN_TENSOR = re.compile(
    r"blk\.\d+\.ffn_((gate|up|down|down_t)(_rest)?(_exps|_shexp)?\.weight|bundles(_exps|_shexp)?)"
)


def describe(file: ModelFile, *, tensors: bool) -> dict[str, Any]:
    """Collect what is worth knowing about a model file.

    Parameters
    ----------
    file : ModelFile
        The file.
    tensors : bool
        Whether to list each tensor.

    Returns
    -------
    dict
        Plain values, ready for JSON.
    """
    record: dict[str, Any] = {
        "file": file.path,
        "file_bytes": file.file_bytes,
        "gguf_version": file.gguf_version,
        "name": file.metadata.get("general.name"),
        **_shape(file),
        "activation": file.activation,
        "activation_param": file.metadata.get(KEY_ACTIVATION_PARAM),
        "gated": file.gated,
        "neuron_major_down": file.neuron_major_down,
        "modes": file.modes,
        "tokenizer": file.metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": file.metadata.get("tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in file.metadata,
        **_weights(file),
        "thresholds": list(_thresholds(file)),
        "predictor": _predictor(file),
        "calibration": file.calibration() or None,
    }
    if tensors:
        record["tensors"] = [
            {
                "name": t.name,
                "type": t.type_name,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "offset": t.offset,
            }
            for t in file.tensors.values()
        ]
    return record


def _shape(file: ModelFile) -> dict[str, Any]:
    """Sizes by the names that Hugging Face configurations use; null where the file does not say."""
    architecture = file.architecture
    keys = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "context_length": "context_length",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
    }
    shape = {name: file.metadata.get(f"{architecture}.{key}") for name, key in keys.items()}
    if shape["num_experts"]:
        own = file.metadata.get(f"{architecture}.expert_feed_forward_length")
        shape["intermediate_size"] = own or shape["intermediate_size"]
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding is not None else None
    tied = None if embedding is None else "output.weight" not in file.tensors
    return {"architecture": architecture, **shape, "vocab_size": vocab_size, "tied_embeddings": tied}


def _weights(file: ModelFile) -> dict[str, Any]:
    parameters = weight_bytes = ffn_bytes = in_experts = 0
    types: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        values = math.prod(tensor.shape)
        if ".ffn_bundles" in tensor.name:  # bytes of rows that are as wide as the model
            parts = file.metadata.get(f"{KEY_BUNDLE}parts")
            if not isinstance(parts, list):
                raise ModelFileError(f"[{file.path}: key {KEY_BUNDLE}parts] expected a list, got {parts!r}")
            values = values // tensor.shape[-1] * len(parts) * file.hidden_size
        # A rest belongs to a weight that is counted.
        parameters += 0 if tensor.name.endswith("_rest.weight") else values
        in_experts += values if "_exps" in tensor.name else 0
        weight_bytes += tensor.nbytes
        ffn_bytes += tensor.nbytes if FFN_TENSOR.fullmatch(tensor.name) else 0
        of_type = types.setdefault(tensor.type_name, {"tensors": 0, "parameters": 0, "bytes": 0})
        of_type["tensors"] += 1
        of_type["parameters"] += values
        of_type["bytes"] += tensor.nbytes
    experts = file.num_experts
    unused = in_experts * (experts - file.num_experts_per_tok) // experts if experts else 0
    return {
        "parameters": parameters,
        "active_parameters": parameters - unused,
        "weight_bytes": weight_bytes,
        "ffn_bytes": ffn_bytes,
        "ffn_share": ffn_bytes / weight_bytes if weight_bytes else 0.0,
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
    }


def _thresholds(file: ModelFile) -> Iterator[dict[str, Any]]:
    """One entry per layer that has thresholds: the median of each stage, over all of its experts."""
    if not any(".ffn_threshold" in name for name in file.tensors):
        return
    ffns, achieved = ffns_of(file), file.calibration()
    tokens = achieved.get("ffn_tokens")
    if not _numbers(tokens) or len(tokens) != len(ffns):
        tokens = [1] * len(ffns)
    for layer, numbered in groupby(enumerate(ffns), key=lambda item: item[1].layer):
        stored = {at: thresholds for at, ffn in numbered if (thresholds := ffn.thresholds(file))}
        if not stored:
            continue
        gate, down = (
            np.concatenate(stage).astype(np.float64) for stage in zip(*stored.values(), strict=True)
        )
        weights = {at: float(tokens[at] * ffns[at].neurons) for at in stored}
        yield {
            "layer": layer,
            "median_threshold": float(np.median(down)),
            "median_gate_threshold": float(np.median(gate)),
            **{name: _mean(achieved.get(name), weights) for name in ("cett", "gate_passed", "active_ratio")},
        }


def _numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _mean(values: Any, weights: Mapping[int, float]) -> float | None:
    """Average some entries of a list, where it is one that has them."""
    if not _numbers(values) or len(values) <= max(weights) or not any(weights.values()):
        return None
    return float(np.average([values[at] for at in weights], weights=list(weights.values())))


def _predictor(file: ModelFile) -> dict[str, Any] | None:
    """What the file says of its predictors; their bytes relative to those of gate, up and down."""
    stored = read_predictors(file)
    if not stored:
        return None
    keys = {
        key.removeprefix(KEY_PREDICTOR): value
        for key, value in file.metadata.items()
        if key.startswith(KEY_PREDICTOR)
    }
    ffn_bytes = [0] * len(stored)
    for tensor in file.tensors.values():
        if FFN_TENSOR.fullmatch(tensor.name) and (layer := int(tensor.name.split(".")[1])) < len(stored):
            ffn_bytes[layer] += tensor.nbytes
    ratios = ("recall", "precision", "candidate_ratio", "active_ratio")
    layers = [
        {
            "layer": layer,
            "rank": predictor.rank,
            "types": list(predictor.types),
            "bytes": predictor.nbytes,
            "ffn_share": predictor.nbytes / max(ffn_bytes[layer], 1),
            "threshold": predictor.threshold,
            "hot": predictor.hot,
            **{name: _entry(keys.get(name), layer) for name in ratios},
        }
        for layer, predictor in enumerate(stored)
    ]
    total = sum(predictor.nbytes for predictor in stored)
    return {
        **{key: value for key, value in keys.items() if not isinstance(value, list)},
        "bytes": total,
        "ffn_share": total / max(sum(ffn_bytes), 1),
        "layers": layers,
    }


def _entry(values: Any, layer: int) -> float | None:
    return values[layer] if isinstance(values, list) and layer < len(values) else None

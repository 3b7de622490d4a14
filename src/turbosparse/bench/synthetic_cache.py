"""Files of synthetic models: made once, kept in the user's cache, and reused.

They lie in ``synthetic`` under the cache folder of turbosparse (``~/.cache/turbosparse``, or below
``$XDG_CACHE_HOME``), and their names begin with SYNTHETIC. Deleting that folder gives the disk space back.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from turbosparse.bench.benchmark import BenchConfig
from turbosparse.bench.memory_forecast import plan_memory
from turbosparse.bench.shapes import SyntheticModel
from turbosparse.bench.synthetic_weights import plain_tensors, predictor_thresholds, sparse_tensors
from turbosparse.bench.text_cases import cases_of, longest
from turbosparse.errors import ConfigError
from turbosparse.runtime.bundles import bundled
from turbosparse.runtime.default_model import cache_folder
from turbosparse.runtime.model_file import ModelFile, StoredValue
from turbosparse.runtime.model_file_writer import TensorSource, write_blank_file, write_model_file
from turbosparse.runtime.texts import CALIBRATION, read_text
from turbosparse.tokenizer import TokenType

__all__ = ["available_memory", "require_budget", "synthetic_file", "synthetic_files"]

logger = logging.getLogger(__name__)


_CONTEXT = 8192
_FOR_THE_SYSTEM = 2 << 30  # bytes of disk and memory that are left alone
_END_OF_TEXT = "<|endoftext|>"


def synthetic_files(
    model: SyntheticModel, *, with_plain: bool, progress: Callable[[float], None] = lambda count: None
) -> list[Path]:
    """Make the files of a synthetic model, or find them where they were made before.

    Parameters
    ----------
    model : SyntheticModel
        What it is to be like.
    with_plain : bool
        Also make the SwiGLU model of the same sizes and weight type that other engines can read.
    progress : callable, optional
        Called with the bytes of each tensor written.

    Returns
    -------
    list of Path
        The dReLU model, then the plain one if asked for.

    Raises
    ------
    ConfigError
        When the models would not fit into free memory together, or the files not on the disk.
    """
    return _files(model, (False, True) if with_plain else (False,), progress)


def synthetic_file(
    model: SyntheticModel, *, plain: bool, progress: Callable[[float], None] = lambda count: None
) -> Path:
    """Make one file of a synthetic model, as :func:`synthetic_files` does.

    Parameters
    ----------
    model : SyntheticModel
        What it is to be like.
    plain : bool
        The SwiGLU model that other engines can read, instead of the dReLU model.
    progress : callable, optional
        Called with the bytes of each tensor written.

    Returns
    -------
    Path
        The file.
    """
    return _files(model, (plain,), progress)[0]


def _files(model: SyntheticModel, kinds: Sequence[bool], progress: Callable[[float], None]) -> list[Path]:
    folder = cache_folder() / "synthetic"
    wanted = [folder / f"{model.file_stem(plain=plain)}.gguf" for plain in kinds]
    contents = [_contents(model, plain=plain) for plain in kinds]
    sizes = [sum(tensor.nbytes for tensor in tensors) for _, tensors in contents]
    hint = "; fewer --layers need less"
    if not model.bundled:
        _require("free memory", sum(sizes), available_memory(), hint)
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(size for path, size in zip(wanted, sizes, strict=True) if not path.exists())
    hint = f" in {folder}, which may be deleted at any time{hint}"
    if missing:
        if len(kinds) > 1:
            hint += ", --one-at-a-time less than both files"
        _require("free disk", missing, shutil.disk_usage(folder).free, hint)
    for path, (metadata, tensors) in zip(wanted, contents, strict=True):
        if not path.exists():
            logger.info("making %s", path)
            write_model_file(path, metadata, tensors, progress=progress)
    return wanted


def require_budget(model: SyntheticModel, config: BenchConfig) -> None:
    """Refuse a memory budget that is too small before a file is written for it.

    Parameters
    ----------
    model : SyntheticModel
        What is timed.
    config : BenchConfig
        With the budget.

    Raises
    ------
    ConfigError
        When the tests need more.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blank.gguf"
        write_blank_file(path, *_contents(model, plain=False))
        context = longest(cases_of(path, config, _CONTEXT))
        for threads in config.threads:
            plan = plan_memory(
                ModelFile(path),
                budget=config.memory_budget,
                context=context,
                threads=threads,
                kv_cache=config.kv_cache,
            )
            if not plan.fits:
                least, budget = -(-plan.least // 2**20), -(-config.memory_budget // 2**20)
                raise ConfigError(
                    f"[memory budget] expected at least {least} MiB for {model.file_stem(plain=False)} and a "
                    f"context of {context}, got {budget} MiB"
                )


def available_memory() -> int:
    """Say how much memory a program can still get.

    Returns
    -------
    int
        Bytes, by Linux's estimate.
    """
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("[bench --shape] expected MemAvailable in /proc/meminfo, got no such line")


def _require(what: str, needed: int, available: int, hint: str) -> None:
    needed += _FOR_THE_SYSTEM
    if available < needed:
        raise ConfigError(
            f"[bench --shape] expected {needed / 1e9:.1f} GB of {what}, got {available / 1e9:.1f} GB{hint}"
        )


def _contents(model: SyntheticModel, *, plain: bool) -> tuple[dict[str, Any], list[TensorSource]]:
    """Keys and tensors of a file."""
    metadata = {**_sizes(model, "llama" if plain else "turbosparse-llama"), **_vocabulary(model)}
    if not plain:
        metadata |= {
            "turbosparse.version": 1,
            "turbosparse.activation": "drelu",
            "turbosparse.gated": True,
        }
        if model.rank:
            metadata |= {
                "turbosparse.predictor.kind": "low_rank",
                "turbosparse.predictor.input": "ffn_norm",
                "turbosparse.predictor.threshold": predictor_thresholds(model),
            }
    metadata["general.name"] = model.file_stem(plain=plain).replace("-", " ", 1)
    if plain:
        return metadata, plain_tensors(model)
    if not model.bundled:
        return metadata, sparse_tensors(model)
    return bundled(metadata, sparse_tensors(model), hotness=_hotness(model))


def _hotness(model: SyntheticModel) -> dict[tuple[int, str], NDArray[np.float64]]:
    """Share of tokens that need each neuron; the hot ones come first as they are made."""
    experts = model.shape.num_experts
    used = model.shape.num_experts_per_tok / experts if experts else 1.0
    shares = np.concatenate([np.full(n, used * (1 - sparsity)) for n, sparsity in model.groups()])
    key, values = ("_exps", np.tile(shares, (experts, 1))) if experts else ("", shares)
    return {(layer, key): values for layer in range(model.num_hidden_layers)}


def _sizes(model: SyntheticModel, architecture: str) -> dict[str, Any]:
    shape = model.shape
    keys = {
        "block_count": model.num_hidden_layers,
        "context_length": _CONTEXT,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": 10000.0,
        "vocab_size": shape.vocab_size,
    }
    if shape.num_experts:
        keys |= {"expert_count": shape.num_experts, "expert_used_count": shape.num_experts_per_tok}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": keys[key] for key in keys}


def _vocabulary(model: SyntheticModel) -> dict[str, Any]:
    """A byte-level BPE vocabulary, learnt from the text that ships for calibration and filled up with tokens
    that no text contains."""
    size = model.shape.vocab_size
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([read_text(CALIBRATION)], trainer)
    ids = bpe.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    tokens += [f"<|unused{i}|>" for i in range(size - 1 - len(tokens))] + [_END_OF_TEXT]
    kinds = [TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": StoredValue("int32[]", [int(kind) for kind in kinds]),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": size - 1,
        "tokenizer.ggml.eos_token_id": size - 1,
        "tokenizer.ggml.add_bos_token": False,
    }

"""A mixture of experts out of a dense model: each expert starts as a copy of the FFN whose place it takes.

The mixture computes what the dense model does, whichever experts its router chooses, since their weights add
up to 1. The router starts at random; experts part because they learn from different tokens. Sparse Upcycling,
arXiv 2212.05055.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.errors import ConfigError
from turbosparse.sparsify.fresh_model import write_start

if TYPE_CHECKING:
    from turbosparse.sparsify.recipe import Recipe

__all__ = ["Upcycling", "mixture_config", "start_of", "upcycle"]

_LOG = logging.getLogger(__name__)
_DENSE_TYPES = ("llama", "mistral")
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """Experts of the mixture that a dense Llama or Mistral model becomes before it is trained."""

    num_experts: int
    """E, at least 2: so many copies of every FFN."""
    num_experts_per_tok: int = 2
    """k, 2 to E: with one, its weight would always be 1 and the router had nothing to learn from."""

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ConfigError(f"[upcycle.num_experts] expected at least 2, got {self.num_experts}")
        if not 2 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"[upcycle.num_experts_per_tok] expected 2 to {self.num_experts}, got "
                f"{self.num_experts_per_tok}"
            )


def start_of(recipe: "Recipe") -> str:
    """Say where the weights are that training starts from.

    Parameters
    ----------
    recipe : Recipe
        Any.

    Returns
    -------
    str
        The recipe's model, or the directory of the mixture that it is upcycled to.
    """
    return recipe.model if recipe.upcycle is None else str(Path(recipe.output) / "start")


def mixture_config(config: Any, upcycling: Upcycling) -> Any:
    """Return the configuration of the mixture that a dense model becomes.

    Parameters
    ----------
    config : PretrainedConfig
        Of the dense model.
    upcycling : Upcycling
        Its experts.

    Returns
    -------
    MixtralConfig
        Of the mixture.

    Raises
    ------
    ConfigError
        If the model is not a Llama or a Mistral, or has biases, which Mixtral has not.
    """
    from transformers import MixtralConfig  # noqa: PLC0415 -- slow to import

    if config.model_type not in _DENSE_TYPES:
        raise ConfigError(
            f"[upcycle] expected a dense model of type {' or '.join(_DENSE_TYPES)}, got {config.model_type}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ConfigError(f"[upcycle] expected a model without biases, got {name}")
    return MixtralConfig(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        sliding_window=getattr(config, "sliding_window", None),
        num_local_experts=upcycling.num_experts,
        num_experts_per_tok=upcycling.num_experts_per_tok,
    )


def upcycle(recipe: "Recipe") -> None:
    """Write the mixture that a recipe starts from as a Hugging Face directory, once.

    Parameters
    ----------
    recipe : Recipe
        Any; one without ``upcycle`` needs nothing.

    Raises
    ------
    ConfigError
        If the recipe's model cannot be upcycled, or the run began with another mixture.
    """
    if recipe.upcycle is None:
        return
    from turbosparse.models.registry import base_fingerprint  # noqa: PLC0415 -- imports transformers

    upcycling, start = recipe.upcycle, Path(start_of(recipe))
    base = base_fingerprint(recipe.model)
    settings = {
        "start": "upcycle",
        **{f"upcycle.{name}": value for name, value in asdict(upcycling).items()},
        "seed": recipe.seed,
        **({"base_model": base} if base else {}),
    }
    if write_start(
        start, settings, lambda folder: _write_mixture(folder, recipe.model, upcycling, recipe.seed)
    ):
        _LOG.info(
            "upcycled %s to %d experts, %d per token: %s",
            recipe.model,
            upcycling.num_experts,
            upcycling.num_experts_per_tok,
            start,
        )


def _write_mixture(folder: Path, model: str, upcycling: Upcycling, seed: int) -> None:
    import torch  # noqa: PLC0415 -- slow to import
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 -- slow to import

    from turbosparse.models import registry  # noqa: PLC0415 -- imports transformers

    config = mixture_config(registry.load_config(model), upcycling)
    dense = registry.load_model(model, dtype="auto")
    mixture = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    left = mixture.load_state_dict(shared, strict=False)
    assert not left.unexpected_keys
    assert all(".mlp." in name for name in left.missing_keys)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for of, to in zip(dense.model.layers, mixture.model.layers, strict=True):
            to.mlp.experts.gate_up_proj.copy_(torch.cat([of.mlp.gate_proj.weight, of.mlp.up_proj.weight]))
            to.mlp.experts.down_proj.copy_(of.mlp.down_proj.weight)
            to.mlp.gate.weight.normal_(std=config.initializer_range, generator=generator)
    mixture.generation_config = dense.generation_config
    mixture.save_pretrained(folder)
    registry.load_tokenizer(model).save_pretrained(folder)

"""Hugging Face classes of swapped models, so that a saved one can never load as what it was before.

An activation that transformers computes by itself (ReLU, ReLU^2 on the gate) is saved under the model's own
type with another ``hidden_act``. Any other gets the type ``turbosparse_<base type>``: a subclass of the base
model that swaps its FFNs when it is built. Without this package transformers refuses such a directory; with
it, ``AutoModelForCausalLM.from_pretrained`` works after `register` (which `load_model` calls).
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file

from turbosparse.errors import ConfigError, ModelFileError, TokenizerError
from turbosparse.models.activations import Activation, parse_activation
from turbosparse.models.gated_ffn import replace_ffns

__all__ = [
    "MODEL_TYPES",
    "activation_of",
    "activation_of_config",
    "base_fingerprint",
    "check_swappable",
    "load_config",
    "load_model",
    "load_tokenizer",
    "register",
    "swap_activation",
]

MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
)
_PREFIX = "turbosparse_"


def _hidden_act_field(config: Any) -> str:
    """Gemma 2 and later name the field differently."""
    return "hidden_act" if getattr(config, "hidden_activation", None) is None else "hidden_activation"


def _config_activation(config: Any) -> Activation:
    """Return what the FFN computes by ``hidden_act`` alone."""
    name = getattr(config, _hidden_act_field(config), None)
    if name is None:
        raise ConfigError(
            f"[{config.model_type}] expected a model whose configuration has hidden_act, got one without"
        )
    return parse_activation(str(name))


@functools.cache
def _classes(model_type: str) -> tuple[type[Any], type[Any]]:
    """Return the configuration and model class of a swapped model type, and tell transformers of them."""
    base_config: type[Any] = CONFIG_MAPPING[model_type]
    base_model: type[Any] = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    stem = base_model.__name__.removesuffix("ForCausalLM")
    config_class = type(f"TurboSparse{stem}Config", (base_config,), {"model_type": _PREFIX + model_type})

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base_model.__init__(self, config, *args, **kwargs)
        replace_ffns(self, Activation(**config.turbosparse), _config_activation(config))

    model_class = type(
        f"TurboSparse{stem}ForCausalLM", (base_model,), {"__init__": build, "config_class": config_class}
    )
    AutoConfig.register(_PREFIX + model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    conversion = get_checkpoint_conversion_mapping(model_type)
    if conversion:  # experts are one tensor in memory and many in the usual files
        register_checkpoint_conversion_mapping(_PREFIX + model_type, conversion, overwrite=True)
    return config_class, model_class


def register(model_type: str | None = None) -> None:
    """Make transformers' Auto classes know swapped models.

    Parameters
    ----------
    model_type : str, optional
        One base type of `MODEL_TYPES`; all of them if not given (imports every one of those model files).
    """
    for name in MODEL_TYPES if model_type is None else (model_type,):
        _classes(name)


def activation_of(model: Any) -> Activation:
    """Return what the FFNs of a Hugging Face model compute, by its configuration.

    Parameters
    ----------
    model : PreTrainedModel
        Any supported causal language model, swapped or not.

    Returns
    -------
    Activation
        The activation.
    """
    return activation_of_config(model.config)


def activation_of_config(config: Any) -> Activation:
    """Return what the FFNs of a model with this configuration compute.

    Parameters
    ----------
    config : PretrainedConfig
        Of any supported causal language model, swapped or not.

    Returns
    -------
    Activation
        The activation.

    Raises
    ------
    ConfigError
        If the configuration does not say.
    """
    recorded = getattr(config, "turbosparse", None)
    return Activation(**recorded) if recorded else _config_activation(config)


def load_config(path: str | Path) -> Any:
    """Load the configuration of a causal language model, swapped or not.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory or model id.

    Returns
    -------
    PretrainedConfig
        The configuration.

    Raises
    ------
    ModelFileError
        If there is none, or one of a type that transformers does not know.
    """
    if Path(path).is_file():
        raise ModelFileError(f"[{path}] expected a Hugging Face directory or model id, got a file")
    try:
        _register_type_of(path)
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        if Path(path).exists():
            raise
        raise ModelFileError(
            f"[{path}] expected a directory here, or an id on the Hugging Face hub and the hub in reach, got "
            f"neither ({str(error).splitlines()[0]})"
        ) from error
    except ValueError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelFileError(f"[{path}] expected the configuration of a model, got: {reason}") from error


def base_fingerprint(path: str | Path) -> str:
    """Tell models of one shape apart by the first row of each tensor.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory or model id.

    Returns
    -------
    str
        Hexadecimal digits that do not depend on how the tensors are spread over files; empty where there are
        no safetensors files to read.
    """
    try:
        config = cached_file(path, "config.json")
    except OSError:
        config = None
    if config is None:
        return ""
    folder = Path(config).parent
    rows: dict[str, bytes] = {}
    try:
        for file in folder.glob("model*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 -- no dict
                    part = tensors.get_slice(name)
                    row = part[:1] if part.get_shape() else tensors.get_tensor(name)
                    rows[name] = row.float().numpy().tobytes()
    except (OSError, SafetensorError):
        return ""
    digest = hashlib.sha256()
    for name in sorted(rows):
        digest.update(name.encode() + rows[name])
    return digest.hexdigest()[:16] if rows else ""


def check_swappable(config: Any) -> None:
    """Refuse a model whose activation cannot be swapped.

    Parameters
    ----------
    config : PretrainedConfig
        Its configuration.

    Raises
    ------
    ConfigError
        If its type is not of `MODEL_TYPES`, or it is swapped already.
    """
    base_type = str(config.model_type).removeprefix(_PREFIX)
    if base_type not in MODEL_TYPES:
        raise ConfigError(
            f"[swap] expected a model with gated FFNs of type {', '.join(MODEL_TYPES)}, got {base_type!r}"
        )
    if base_type != config.model_type:
        raise ConfigError(
            f"[swap] expected a model that is not swapped yet, got {activation_of_config(config)}"
        )


def swap_activation(model: Any, activation: Activation) -> Any:
    """Convert a built Hugging Face model to another FFN activation, from outside and in place.

    The weights stay the same objects. Quality is lost until the model has been trained: SmolLM2-135M goes
    from perplexity 22 to 2.6e5 by a swap to dReLU.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of one of `MODEL_TYPES`.
    activation : Activation
        What the FFNs shall compute.

    Returns
    -------
    PreTrainedModel
        The same object; its class and configuration have become those of the swapped type.

    Raises
    ------
    ConfigError
        If the model's type is not supported or has no gated FFN.
    """
    check_swappable(model.config)
    replace_ffns(model, activation, _config_activation(model.config))
    model.config.turbosparse_training = {"tokens": 0}  # training counts; export refuses what has none
    if activation.hidden_act is not None:
        setattr(model.config, _hidden_act_field(model.config), activation.hidden_act)
        return model
    config_class, model_class = _classes(model.config.model_type)
    model.config.__class__ = config_class  # submodules share this object
    model.config.model_type = config_class.model_type
    model.config.turbosparse = {"name": activation.name, "threshold": activation.threshold}
    model.__class__ = model_class
    return model


def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a model.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory or model id.

    Returns
    -------
    PreTrainedTokenizerBase
        The tokenizer.

    Raises
    ------
    TokenizerError
        If there is none, or a broken one.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise TokenizerError(f"[{path}] expected a model with a tokenizer, got: {reason}") from error


def load_model(path: str | Path, **options: Any) -> Any:
    """Load a causal language model, swapped or not; swapped ones come with their `GatedFFN` modules.

    Parameters
    ----------
    path : str or Path
        A Hugging Face directory or model id.
    **options
        Passed on to ``from_pretrained``.

    Returns
    -------
    PreTrainedModel
        The model, in evaluation mode.

    Raises
    ------
    ModelFileError
        If files are broken or weights missing; transformers itself would only warn and fill in random ones.
    """
    _register_type_of(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (ValueError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelFileError(f"[{path}] expected a whole causal language model, got: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelFileError(
            f"[{path}] expected the weights of {type(model).__name__}, got none for {len(missing)} tensors, "
            f"such as {missing[0]}"
        )
    return model.eval()


def _register_type_of(path: str | Path) -> None:
    """Make transformers know the swapped type that a directory may hold."""
    config_file = Path(path) / "config.json"
    if config_file.is_file():
        model_type = str(json.loads(config_file.read_text(encoding="utf-8")).get("model_type", ""))
        if model_type.startswith(_PREFIX):
            register(model_type.removeprefix(_PREFIX))
    else:
        register()

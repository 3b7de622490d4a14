"""A Hugging Face model, swapped or not, in lm-evaluation-harness: its own code around our loading."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from turbosparse.models.registry import load_model

__all__ = ["harness_around", "torch_harness_model"]


def torch_harness_model(path: str, *, batch_size: int = 8) -> HFLM:
    """Load a model for the harness.

    Parameters
    ----------
    path : str
        Directory or id.
    batch_size : int, default 8
        Requests at a time, 1 or more.

    Returns
    -------
    lm_eval.models.huggingface.HFLM
        In evaluation mode, on the device that torch has.
    """
    return harness_around(load_model(path), AutoTokenizer.from_pretrained(path), batch_size=batch_size)


def harness_around(model: Any, tokenizer: Any, *, batch_size: int = 8) -> HFLM:
    """Put a loaded model into the harness.

    Parameters
    ----------
    model : PreTrainedModel
        Where it is now.
    tokenizer : PreTrainedTokenizer
        Of the model.
    batch_size : int, default 8
        Requests at a time, 1 or more.

    Returns
    -------
    lm_eval.models.huggingface.HFLM
        In evaluation mode.
    """
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)

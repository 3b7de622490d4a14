"""A Hugging Face model, swapped or not, in lm-evaluation-harness: its own code around our loading."""

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from turbosparse.models.registry import load_model

__all__ = ["torch_harness_model"]


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
    model = load_model(path).eval()
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(path), batch_size=batch_size)

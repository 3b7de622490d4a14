"""What a model file says of its origin, for people: name, licence, base model, training."""

import logging
import re
from pathlib import Path
from typing import Any

import yaml

from turbosparse.export.hf_config import HFConfig

__all__ = ["card_metadata"]

logger = logging.getLogger(__name__)


def card_metadata(directory: Path, config: HFConfig, name: str | None = None) -> dict[str, Any]:
    """Collect what is known of a model's origin.

    Parameters
    ----------
    directory : Path
        A Hugging Face directory; the front matter of its README.md is read where there is one.
    config : HFConfig
        Its configuration.
    name : str, optional
        Name of the model; by default the card's, the configuration's or the directory's.

    Returns
    -------
    dict
        ``general.*`` and ``turbosparse.training.*`` keys.
    """
    card = _front_matter(directory)
    training = config.training() or {}
    title = card.get("model_name") or card.get("title")
    found = {
        "general.type": "model",
        "general.name": name or title or config.name or directory.resolve().name,
        "general.license": card.get("license"),
        "general.license.name": card.get("license_name"),
        "general.license.link": card.get("license_link"),
        "general.quantization_version": 2,
        "turbosparse.training.tokens": training.get("tokens"),
        "turbosparse.training.stage": training.get("stage"),
    }
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    for number, base in enumerate(bases if isinstance(bases, list) else []):
        found[f"general.base_model.{number}.name"] = str(base).rpartition("/")[2]
        if str(base).count("/") == 1:
            found[f"general.base_model.{number}.repo_url"] = f"https://huggingface.co/{base}"
        found["general.base_model.count"] = number + 1
    return {key: value for key, value in found.items() if isinstance(value, str | int)}


def _front_matter(directory: Path) -> dict[str, Any]:
    """The YAML between two lines of three dashes that a model card begins with; empty where there is none.

    What `sparsify` wrote also gives its heading as ``title``.
    """
    path = directory / "README.md"
    if not path.is_file():
        return {}
    try:
        card = path.read_text(encoding="utf-8")
        matter, end, body = card.removeprefix("---\n").partition("\n---")
        values = yaml.safe_load(matter) if card.startswith("---\n") and end else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        logger.warning("%s has no front matter that can be read: %s", path, error)
        return {}
    if not isinstance(values, dict):
        return {}
    heading = re.search(r"^# (.+)$", body, re.MULTILINE)
    if heading and "turbosparse" in (values.get("tags") or []):
        values["title"] = heading[1]
    return values

"""The held-out texts of a stage and their names."""

import logging
from collections.abc import Sequence
from pathlib import Path

from turbosparse.data.config import DataConfig
from turbosparse.data.held_out import HeldOutSplit
from turbosparse.data.mixture import Encoder, PackedSequence, held_out_sequences
from turbosparse.sparsify.metrics_file import read_metrics
from turbosparse.sparsify.recipe import Recipe

__all__ = ["PERPLEXITY", "evaluation_texts", "texts_of_original"]

_LOG = logging.getLogger(__name__)
PERPLEXITY = "perplexity_"
"""And the name of a held-out text: a field of the metrics."""


def evaluation_texts(
    recipe: Recipe, data: DataConfig, encode: Encoder, split: HeldOutSplit
) -> dict[str, Sequence[PackedSequence]]:
    """Pack the held-out texts of a stage.

    Parameters
    ----------
    recipe : Recipe
        Says how many sequences.
    data : DataConfig
        The stage's sources and evaluation texts.
    encode : Encoder
        Turns a document into token ids and labels.
    split : HeldOutSplit
        Which documents of the sources are held out.

    Returns
    -------
    dict of str to sequence of PackedSequence
        By names that differ; texts shorter than one sequence are left out.
    """
    texts: dict[str, Sequence[PackedSequence]] = {}
    sources = (*data.held_out, *data.sources)
    for source, name in zip(sources, _text_names([source.path for source in sources]), strict=True):
        own = source in data.held_out
        rows = held_out_sequences(
            source,
            encode,
            split=None if own else split,
            sequence_length=data.sequence_length,
            count=recipe.evaluation_sequences if own else max(recipe.evaluation_sequences // 4, 1),
        )
        if rows:
            texts[name] = rows
        else:
            _LOG.warning("[%s] has less held-out text than one sequence; it is not evaluated", source.path)
    return texts


def _text_names(paths: Sequence[str]) -> list[str]:
    """Call each text by its file's stem, or by as much of its path as tells it from the others."""
    names: list[str] = []
    for index, path in enumerate(paths):
        stem = Path(path).stem
        if [Path(other).stem for other in paths].count(stem) == 1:
            names.append(stem)
            continue
        for length in range(1, len(Path(path).parts) + 1):
            name = "/".join(Path(path).parts[-length:])
            if sum("/".join(Path(other).parts[-length:]) == name for other in paths) == 1:
                break
        else:
            name = f"{Path(path).name}#{index + 1}"  # another part of the same file
        names.append(name)
    return names


def texts_of_original(metrics: Path, stage: str | None) -> set[str]:
    """Return the texts on which a run has evaluated the original model; its stages may differ in them.

    Parameters
    ----------
    metrics : Path
        The run's metrics.
    stage : str or None
        Count what was evaluated in this stage alone, whose windows may have another length; None counts all.

    Returns
    -------
    set of str
        Names.
    """
    originals = (
        record
        for record in read_metrics(metrics)
        if record.get("event") == "original" and stage in (None, record["stage"])
    )
    names = {name for record in originals for name in record if name.startswith(PERPLEXITY)}
    return {name.removeprefix(PERPLEXITY) for name in names}

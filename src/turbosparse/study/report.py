"""Reports of studies, laid out as those of measurements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbosparse.measure.page import Page, Provenance
from turbosparse.measure.plots import Figures, draw_plots
from turbosparse.measure.report import save_page, write_numbers
from turbosparse.measure.summary import Table
from turbosparse.study import NUMBERS, experts, trade_off, training_report

__all__ = ["TITLES", "study_tables", "write_study"]

TITLES = {
    "trade-off": "What leaving out neurons costs",
    "activations": "Activation functions from scratch",
    "scale": "Activation functions by scale",
    "relufication": "One model, several activations",
    "experts": "Neurons inside of experts",
}
_FIGURES: dict[str, Figures] = {
    "trade-off": trade_off.FIGURES,
    "activations": training_report.FIGURES,
    "scale": training_report.SCALE_FIGURES,
    "relufication": training_report.FIGURES,
    "experts": experts.FIGURES,
}


def study_tables(record: Mapping[str, Any]) -> list[Table]:
    """Give the tables of a study.

    Parameters
    ----------
    record : mapping
        Of a study.

    Returns
    -------
    list of Table
        The main one first.
    """
    if "runs" in record:
        return training_report.training_tables(record)
    tables = trade_off.trade_off_tables(record)
    return tables + (experts.expert_tables(record) if record["study"] == "experts" else [])


def write_study(record: dict[str, Any], folder: Path) -> Path:
    """Write numbers, figures and the page of a study.

    Parameters
    ----------
    record : dict
        As JSON gives it: ``study``, ``model`` with a ``name``, ``text``, ``config``, ``run``, ``notes``, and
        what the study found.
    folder : Path
        Of the study.

    Returns
    -------
    Path
        The page.
    """
    write_numbers(record, folder, name=NUMBERS)
    text, kind = record["text"], record["study"]
    settings = ", ".join(
        f"{key} {value}" for key, value in record["config"].items() if not isinstance(value, dict | list)
    )
    page = Page(
        title=f"{TITLES[kind]}: {record['model']['name']}",
        opening=[_opening(record)],
        warnings=record["notes"],
        tables=study_tables(record),
        plots=draw_plots(_FIGURES[kind], [record], legend_columns=3 if kind == "scale" else 2),
        provenance=[
            Provenance(
                name=record["model"]["name"],
                run=record["run"],
                note=f"Text {text['name']}, SHA-256 {text['sha256']}. Settings: {settings}; all of them in "
                f"{NUMBERS}.",
            )
        ],
    )
    return save_page(page, folder)


def _opening(record: Mapping[str, Any]) -> str:
    text = record["text"]
    measured = (
        f"Measured on {text['tokens']:,} tokens of {text['name']} in {text['windows']} windows of "
        f"{text['context']}."
    )
    if "runs" not in record:
        model = record["model"]
        return (
            f"{model['kind']}, {model['architecture']}, activation {model['activation']}, "
            f"{model['num_hidden_layers']} layers of {model['intermediate_size']} neurons. {measured}"
        )
    runs = record["runs"]
    tokens = max(point["tokens"] for run in runs for point in run["curve"])
    return (
        f"{len(runs)} runs of {runs[0]['parameters'] / 1e6:.2g} M parameters and more, each trained on the "
        f"same {tokens:,} tokens of its seed. {measured}"
    )

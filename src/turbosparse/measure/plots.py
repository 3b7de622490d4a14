"""Drawing of a report's plots by matplotlib: one panel each, small enough to be read on a phone.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; lines differ in
style as well, so that they survive a black-and-white printer.
"""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

__all__ = [
    "Figures",
    "Plot",
    "as_floats",
    "colour",
    "draw_plots",
    "layer_axis",
    "line_style",
    "loss_axis",
    "marker",
    "percent_axis",
    "plain_log_ticks",
]

Record = dict[str, Any]
Figures = Sequence[tuple[str, str, Callable[[Any, Sequence[Record]], None]]]
"""File name without suffix, caption, and what paints it on axes from records."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "o^sDvPX*"
_SIZE = (5.2, 3.5)  # inches: 500 pixels of a page, so letters stay legible when a phone shrinks it
_SETTINGS = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "turbosparse",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure."""

    name: str
    """File name without suffix."""
    caption: str
    svg: bytes
    png: bytes

    def save(self, folder: Path) -> None:
        """Write the PNG.

        Parameters
        ----------
        folder : Path
            Where.
        """
        (folder / f"{self.name}.png").write_bytes(self.png)


def draw_plots(figures: Figures, records: Sequence[Record], *, legend_columns: int = 1) -> list[Plot]:
    """Draw figures.

    Parameters
    ----------
    figures : Figures
        What to draw.
    records : sequence of dict
        Numbers that each figure is given.
    legend_columns : int
        Columns of the legends, at least 1.

    Returns
    -------
    list of Plot
        Those there are numbers for.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    plots = []
    for name, caption, paint in figures:
        with mpl.rc_context(_SETTINGS):
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.add_subplot()
            paint(axes, records)
            if not axes.has_data():
                continue
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside lower center", ncols=legend_columns)
            plots.append(Plot(name=name, caption=caption, svg=_as(figure, "svg"), png=_as(figure, "png")))
    return plots


def _as(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def line_style(number: int, style: int | None = None) -> dict[str, Any]:
    """Give the look of the n-th line.

    Parameters
    ----------
    number : int
        From 0.
    style : int, optional
        Number of its dashes, from 0, where lines of one colour belong together.

    Returns
    -------
    dict
        Arguments of matplotlib's plot.
    """
    dashes = number if style is None else style
    return {"color": colour(number), "linestyle": _STYLES[dashes % len(_STYLES)]}


def colour(number: int) -> str:
    """Give the colour of the n-th thing.

    Parameters
    ----------
    number : int
        From 0.

    Returns
    -------
    str
        As matplotlib takes it.
    """
    return _COLOURS[number % len(_COLOURS)]


def marker(number: int) -> str:
    """Give the marker of the n-th line.

    Parameters
    ----------
    number : int
        From 0.

    Returns
    -------
    str
        As matplotlib takes it.
    """
    return _MARKERS[number % len(_MARKERS)]


def as_floats(values: Any) -> Any:
    """Make an array with NaN for what has no number.

    Parameters
    ----------
    values : sequence of float or None
        Any nesting.

    Returns
    -------
    float64 array
        Of the same shape.
    """
    return np.array(values, dtype=np.float64)


def percent_axis(axis: Any) -> None:
    """Label an axis of shares in percent.

    Parameters
    ----------
    axis : matplotlib.axis.Axis
        Changed in place.
    """
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share + 0.0:.3g}%"))


def layer_axis(axis: Any) -> None:
    """Label an axis of layers, whose numbers are whole.

    Parameters
    ----------
    axis : matplotlib.axis.Axis
        Changed in place.
    """
    axis.get_major_locator().set_params(integer=True)
    axis.set_label_text("layer")


def plain_log_ticks(axis: Any) -> None:
    """Write the numbers of a logarithmic axis as they are: 50, 100, 200.

    Parameters
    ----------
    axis : matplotlib.axis.Axis
        Changed in place.
    """
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def loss_axis(axes: Any, losses: Sequence[float], linear_below: float) -> None:
    """Make the vertical axis logarithmic where losses are large, so that small ones can be read too.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Changed in place.
    losses : sequence of float
        What is drawn, 0 and less among it.
    linear_below : float
        Up to here the axis is linear, and all of it is where no loss is larger.
    """
    if max(losses, default=0.0) > linear_below:
        axes.set_yscale("symlog", linthresh=linear_below)

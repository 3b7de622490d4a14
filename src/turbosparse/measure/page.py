"""A report as one HTML page that needs nothing else: styles, script and figures are inside."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from turbosparse.measure.plots import Plot
from turbosparse.measure.summary import Cell, Table

__all__ = ["Page", "Provenance", "html_page"]

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto;
  max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .3rem; border-bottom: 2px solid #0072B2; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 48rem; overflow-wrap: anywhere; }
.note { color: #444; font-size: .9rem; }
.warning { border-left: 4px solid #D55E00; padding-left: .6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
th { background: #f3f6f9; vertical-align: bottom; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: #f8fafc; }
code, pre { font: .85rem/1.4 ui-monospace, monospace; }
pre { background: #f3f6f9; padding: .6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
details > summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  th, td { padding: .2rem .35rem; }
  td { white-space: normal; }
  th:first-child, td:first-child { position: sticky; left: 0; background: #fff; min-width: 7rem; }
}
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 7pt; } th, td { padding: .1rem .25rem; }
  h2 { break-after: avoid; } tr { break-inside: avoid; }
  .figures { display: block; } figure { display: inline-block; width: 48%; vertical-align: top; }
}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.key;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    });
    table.tBodies[0].append(...rows);
  }));
}
// Long tables are folded on screen; paper shows all.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
"""
_LONG = 12  # rows from which a table is folded


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How numbers came about."""

    name: str
    """What was measured."""
    run: Mapping[str, Any]
    """``command``, ``finished_at``, ``seconds``, ``peak_memory_gib``, ``versions``, ``machine``."""
    note: str
    """Text and settings."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What stands on a page."""

    title: str
    opening: Sequence[str]
    """Paragraphs."""
    warnings: Sequence[str]
    tables: Sequence[Table]
    plots: Sequence[Plot]
    provenance: Sequence[Provenance]


def html_page(page: Page) -> str:
    """Lay out a report.

    Parameters
    ----------
    page : Page
        Its contents; tables of single layers come last.

    Returns
    -------
    str
        HTML that fetches nothing.
    """
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(page.title)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in page.opening),
        *(f"<p class=warning>{escape(text)}</p>" for text in page.warnings),
        *(_table(table) for table in page.tables if not _of_layers(table)),
        "<h2>Figures</h2><div class=figures>",
        *(_figure(plot) for plot in page.plots),
        "</div>",
        *(_table(table) for table in page.tables if _of_layers(table)),
        "<h2>How this was measured</h2>",
        *(_provenance(item) for item in page.provenance),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.svg).decode()
    caption = escape(plot.caption)
    return (
        f"<figure id='{plot.name}'><img alt='{caption}' src='data:image/svg+xml;base64,{data}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col><button>{escape(name)}</button></th>" for name in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    body = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    if len(table.rows) > _LONG and _of_layers(table):
        body = f"<details><summary>{len(table.rows)} rows</summary>{body}</details>"
    return f"<section><h2>{escape(table.title)}</h2><p class=note>{escape(table.note)}</p>{body}</section>"


def _of_layers(table: Table) -> bool:
    return table.header[0] == "layer"


def _cell(cell: Cell) -> str:
    """A cell that sorts by its key, or by its text; empty ones come last."""
    key = cell.text if cell.key is None else cell.key
    key = "" if key == "–" else escape(str(key), quote=True)
    text = cell.text.replace(" ± ", "\u00a0±\u00a0").replace(
        " %", "\u00a0%"
    )  # narrow screens break elsewhere
    return f"<td data-key='{key}'>{escape(text)}</td>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _provenance(item: Provenance) -> str:
    run = item.run
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    return (
        f"<p><b>{escape(item.name)}</b>, finished {escape(run['finished_at'])} after "
        f"{_duration(run['seconds'])}, largest memory {run['peak_memory_gib']:.1f} GiB with the model.</p>"
        f"<pre>{escape(run['command'])}</pre><p class=note>{escape(versions)}. {escape(machine)}. "
        f"{escape(item.note)}</p>"
    )

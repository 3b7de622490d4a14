"""What ``turbosparse inspect --memory-budget`` says."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import bytes_text, count_text, progress

if TYPE_CHECKING:
    from rich.table import Table

    from turbosparse.runtime.model_file import ModelFile

__all__ = ["describe_budget", "memory_facts", "memory_table"]


def describe_budget(file: "ModelFile", args: argparse.Namespace, *, budget: int) -> dict[str, Any]:
    """Find out what a budget would hold and how fast the file would run in it.

    Parameters
    ----------
    file : ModelFile
        The file.
    args : argparse.Namespace
        With the context, threads and the reader.
    budget : int
        Bytes.

    Returns
    -------
    dict
        Plain values, ready for JSON; ``forecast`` is None where the budget is too small or nothing depends
        on it.
    """
    from turbosparse.bench.memory_forecast import forecast, plan_memory
    from turbosparse.runtime.engine import default_context

    threads = args.threads or 0
    context = default_context(file.metadata) if args.context is None else args.context
    plan = plan_memory(
        file,
        budget=budget,
        context=context,
        threads=threads,
        kv_cache=args.kv_cache or "",
    )
    found = None
    if plan.neurons and plan.fits:
        with progress(None, "measuring memory and disk"):
            found = asdict(forecast(file, plan, threads=threads, io=args.io or ""))
    return asdict(plan) | {"fits": plan.fits, "forecast": found}


def memory_table(memory: dict[str, Any]) -> "Table":
    """Lay out what the budget holds.

    Parameters
    ----------
    memory : dict
        From `describe_budget`.

    Returns
    -------
    rich.table.Table
        A row per part.
    """
    from rich.table import Table

    title = f"in a memory budget of {bytes_text(memory['budget'])}"
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for name, size in memory["parts"].items():
        table.add_row(name, bytes_text(size))
    if memory["neurons"]:
        kept = memory["neuron_bytes"] * memory["kept"] // memory["neurons"]
        table.add_row(f"neurons: {_neurons(memory)}", bytes_text(kept))
    return table


def memory_facts(memory: dict[str, Any]) -> Iterator[str]:
    """Say the rest.

    Parameters
    ----------
    memory : dict
        From `describe_budget`.

    Yields
    ------
    str
        Lines.
    """
    if not memory["fits"]:
        yield f"too small: at least {_mebibytes(memory['least'])} needed"
    if memory["neurons"]:
        least, everything = _mebibytes(memory["least"]), _mebibytes(memory["everything"])
        yield f"smallest budget {least}; from {everything} on nothing is read from disk"
    else:
        yield "no bundles: all of it stays in memory (turbosparse export --layout bundled needs less)"
    found = memory["forecast"]
    if found is None:
        return
    speeds, on_disk = found["speeds"], found["hit_ratio"] < 1
    prediction = f"PREDICTION, mode {found['mode']}: {found['tok_per_s']:.3g} tok/s"
    yield ""
    if on_disk:
        disk = bytes_text(found["disk_bytes_per_token"])
        yield f"{prediction}, hits {found['hit_ratio']:.1%}, {disk} from disk per token"
        yield f"{found['tok_per_s_hidden']:.3g} tok/s if all reads were hidden under computing"
    else:
        yield f"{prediction}, nothing read from disk"
    yield (
        f"measured: memory {speeds['stream_gb_per_s']:.1f} GB/s as a stream, {speeds['rows_gb_per_s']:.1f} "
        f"GB/s in rows, of which a token reaches three quarters: {1e3 * found['memory_s']:.3g} ms per token"
    )
    if on_disk:
        yield (
            f"measured: {speeds['reads_per_burst']} reads at once, what a layer misses, take "
            f"{1e3 * speeds['burst_s']:.3g} ms by {speeds['io']}: {1e3 * found['disk_s']:.3g} ms per token"
        )
    yield f"assumed: {found['assumption']}; the hottest neurons are in memory"


def _neurons(memory: dict[str, Any]) -> str:
    kept, all_of_them = memory["kept"], memory["neurons"]
    text = f"room for {count_text(kept)} of {count_text(all_of_them)} ({kept / all_of_them:.1%})"
    if not memory["forecast"] or kept == all_of_them:
        return text
    return f"{text}, the hottest of which have {memory['forecast']['hit_ratio']:.1%} of the activations"


def _mebibytes(size: int) -> str:
    """Rounded up, so that what is asked for is enough."""
    return f"{-(-size // 2**20)} MiB"

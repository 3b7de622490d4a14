"""Measure speed: tokens per second of every mode, what was read for them, and how llama.cpp does beside it.

The columns are llama-bench's, then ours: active FFN neurons, megabytes read per decoded token, gigabytes per
second that this makes and their share of the read bandwidth measured with as many threads, speed relative to
the dense mode and to llama.cpp. All sides take turns, run by run; speeds are medians, ratios are medians over
pairs. Prompts are real text.

--roofline measures read bandwidth: as streams, and rows of some sizes, every tenth at random, as a sparse FFN
reads them. --profile shows where the time of a token goes: norms, projections, attention, predictor, gate,
up, down, logits, waiting for other threads. --shape makes a model of a known shape with random weights, of
which as many neurons are zero as stated: SYNTHETIC, for speed alone. Its files stay in
~/.cache/turbosparse/synthetic until you delete them.

  turbosparse bench model.gguf -t 1,2
  turbosparse bench sparse.gguf --against llama.cpp --baseline-model plain.gguf --output benchmarks/results
  turbosparse bench --shape mistral-7b --quant q4_0 --sparsity 0.9 --rank 512 --layers 4 --against llama.cpp
  turbosparse bench --roofline -t 1,2
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.bench_options import add_options, bench_config, command_line, synthetic_model
from turbosparse.cli.console import bytes_text, console, print_json, progress

if TYPE_CHECKING:
    from turbosparse.bench.benchmark import BenchConfig, Row
    from turbosparse.bench.shapes import SyntheticModel

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    int
        Exit status.
    """
    from turbosparse.bench.benchmark import bench_model, runs_per_model
    from turbosparse.bench.one_at_a_time import bench_files_one_at_a_time, bench_one_at_a_time
    from turbosparse.bench.profile import profile_model
    from turbosparse.bench.record import as_table, profile_table, result_record, roofline_table, unused_path
    from turbosparse.bench.roofline import measure_roofline
    from turbosparse.bench.synthetic_cache import require_budget

    out, config, synthetic = console(), bench_config(args), synthetic_model(args)
    models = args.models
    if synthetic is not None and config.memory_budget:
        require_budget(synthetic, config)
    if synthetic is not None and not args.one_at_a_time:
        models, config = _made(synthetic, config)
    rooflines = [measure_roofline(threads) for threads in config.threads] if args.roofline else []
    if rooflines:
        out.print(roofline_table(rooflines, width=out.width), markup=False, soft_wrap=True)
    rows: list[Row] = []
    if synthetic is not None and args.one_at_a_time:
        rows = bench_one_at_a_time(synthetic, config, progress=lambda label: progress(None, label))
    bench = bench_files_one_at_a_time if config.limited_by == "hog" else bench_model
    with progress(sum(runs_per_model(config, path) for path in models), "timing") as advance:
        for path in models:
            rows += bench(path, config, progress=lambda: advance(1))
    if rows and config.memory_limit:
        out.print(_limit_text(rows), markup=False, soft_wrap=True)
    if rows:
        out.print(as_table(rows, width=out.width), markup=False, soft_wrap=True)
    profiles = [profile for path in models for profile in profile_model(path, config)] if args.profile else []
    if profiles:
        out.print(profile_table(profiles, width=out.width), markup=False, soft_wrap=True)
    if args.output is not None or args.json:
        files = [*models, *([config.baseline_model] if config.baseline_model else [])]
        record = result_record(rows, rooflines, command=command_line(args), files=files)
        record["profiles"] = [profile.as_record() for profile in profiles]
        if args.output is not None:
            name = "-".join(path.stem for path in models) or args.shape or "roofline"
            path = unused_path(args.output, name + ("-vs-llama.cpp" if args.against else ""))
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            console(stderr=True).print(f"wrote {path}", markup=False)
        if args.json:
            print_json(record)
    return 0


def _limit_text(rows: "list[Row]") -> str:
    """How each side's memory was limited."""
    limits = [(row.backend, row.memory_limit) for row in rows if row.memory_limit is not None]
    what = (
        f"{bytes_text(limits[0][1].limit_bytes)}, without swap: the budget, and 256 MiB for the interpreter"
    )
    if limits[0][1].kind == "cgroup":
        return f"each side in a cgroup of {what}"
    sides = []
    for backend, limit in dict.fromkeys(limits):
        left, most = limit.left_bytes_min or 0, limit.left_bytes_max or 0
        locked = "locked" if limit.locked else "not locked"
        sides.append(
            f"{backend} was left {bytes_text(left)} to {bytes_text(most)} and took "
            f"{bytes_text(limit.taken_bytes_max or 0)} of it, pages of files included "
            f"({bytes_text(limit.held_bytes or 0)} held, {locked})"
        )
    return (
        f"no cgroup, but one side after the other while a process held all memory except {what}\n"
        + "\n".join(sides)
    )


def _made(synthetic: "SyntheticModel", config: "BenchConfig") -> "tuple[list[Path], BenchConfig]":
    """The synthetic model's file, and its plain twin as the baseline where there is to be one."""
    from turbosparse.bench.synthetic_cache import synthetic_files

    with progress(None, "making the synthetic model") as advance:
        sparse, *plain = synthetic_files(synthetic, with_plain=config.against_llama_cpp, progress=advance)
    return [sparse], replace(config, baseline_model=plain[0] if plain else None)

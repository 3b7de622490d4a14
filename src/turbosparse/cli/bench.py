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
    from turbosparse.bench.one_at_a_time import bench_one_at_a_time
    from turbosparse.bench.profile import profile_model
    from turbosparse.bench.record import as_table, profile_table, result_record, roofline_table, unused_path
    from turbosparse.bench.roofline import measure_roofline

    config, synthetic = bench_config(args), synthetic_model(args)
    models = args.models
    if synthetic is not None and not args.one_at_a_time:
        models, config = _made(synthetic, config)
    rooflines = [measure_roofline(threads) for threads in config.threads] if args.roofline else []
    if rooflines:
        console().print(roofline_table(rooflines), markup=False, soft_wrap=True)
    rows: list[Row] = []
    if synthetic is not None and args.one_at_a_time:
        rows = bench_one_at_a_time(synthetic, config, progress=lambda label: progress(None, label))
    with progress(sum(runs_per_model(config, path) for path in models), "timing") as advance:
        for path in models:
            rows += bench_model(path, config, progress=lambda: advance(1))
    if rows and config.memory_limit:
        limit = f"each side in a cgroup of {bytes_text(config.memory_limit)}, without swap"
        console().print(f"{limit}: the budget, and 256 MiB for the interpreter", markup=False, soft_wrap=True)
    if rows:
        console().print(as_table(rows), markup=False, soft_wrap=True)
    profiles = [profile for path in models for profile in profile_model(path, config)] if args.profile else []
    if profiles:
        console().print(profile_table(profiles), markup=False, soft_wrap=True)
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


def _made(synthetic: "SyntheticModel", config: "BenchConfig") -> "tuple[list[Path], BenchConfig]":
    """The synthetic model's file, and its plain twin as the baseline where there is to be one."""
    from turbosparse.bench.synthetic_cache import synthetic_files

    with progress(None, "making the synthetic model") as advance:
        sparse, *plain = synthetic_files(synthetic, with_plain=config.against_llama_cpp, progress=advance)
    return [sparse], replace(config, baseline_model=plain[0] if plain else None)

"""Measure speed: tokens per second of every mode, what was read for them, and how llama.cpp does beside it.

The columns are llama-bench's, then ours: active FFN neurons, megabytes read per decoded token, share of
the read bandwidth measured with as many threads, speed relative to the dense mode and to llama.cpp. All sides
take turns, run by run; speeds are medians, ratios are medians over pairs. Prompts are real text.

  turbosparse bench model.gguf -t 1,2
  turbosparse bench sparse.gguf --against llama.cpp --baseline-model plain.gguf --output benchmarks/results
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, console, print_json, progress
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.bench.benchmark import BenchConfig, Row

__all__ = ["add_arguments", "run"]

MODES = ("dense", "exact", "threshold")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="GGUF file")
    add("--mode", action="append", choices=MODES, help="repeatable; by default all that the file can run")
    add("-t", "--threads", default="0", help="thread counts, as in 1,2 (default: physical cores, at most 8)")
    add("-p", "--prompt-tokens", type=int, default=256, help="tokens of the prompt test; 0 leaves it out")
    add("-n", "--generated-tokens", type=int, default=64, help="tokens of the decode test; 0 leaves it out")
    add("-d", "--depth", type=int, default=0, help="tokens in the cache before each test")
    add("-r", "--rounds", type=int, default=5, help="timed rounds")
    add("--against", choices=["llama.cpp"], help="time it in turn; needs turbosparse[baseline]")
    add("--baseline-model", type=Path, metavar="FILE", help="what llama.cpp reads, if not MODEL itself")
    add("--isa", default="", help="instruction set of our kernels (default: the best there is)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="write DIR/DATE-NAME.json with all that is needed to repeat it",
    )
    add_json_option(parser)


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
    from turbosparse.bench.record import as_table, result_record, unused_path

    config = _config(args)
    if args.output is not None and not args.output.is_dir():
        raise ConfigError(f"[bench --output] expected a folder, got {args.output}")
    rows: list[Row] = []
    with progress(sum(runs_per_model(config, path) for path in args.models), "timing") as advance:
        for path in args.models:
            rows += bench_model(path, config, progress=lambda: advance(1))
    console().print(as_table(rows), markup=False, soft_wrap=True)
    if args.output is not None or args.json:
        files = [*args.models, *([config.baseline_model] if config.baseline_model else [])]
        record = result_record(rows, command=_command(args), files=files)
        if args.output is not None:
            name = "-".join(path.stem for path in args.models) + ("-vs-llama.cpp" if args.against else "")
            path = unused_path(args.output, name)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            console(stderr=True).print(f"wrote {path}", markup=False)
        if args.json:
            print_json(record)
    return 0


def _config(args: argparse.Namespace) -> "BenchConfig":
    from turbosparse.bench.benchmark import BenchConfig
    from turbosparse.bench.runners import require_llama_cpp

    if args.against:
        require_llama_cpp()
    try:
        threads = tuple(int(text) for text in args.threads.split(","))
    except ValueError:
        raise ConfigError(f"[bench --threads] expected numbers as in 1,2, got {args.threads!r}") from None
    return BenchConfig(
        modes=tuple(args.mode or ()),
        threads=threads,
        prompt_tokens=args.prompt_tokens,
        generated_tokens=args.generated_tokens,
        depth=args.depth,
        rounds=args.rounds,
        against_llama_cpp=args.against is not None,
        baseline_model=args.baseline_model,
        isa=args.isa,
    )


def _command(args: argparse.Namespace) -> str:
    """The command with file names only: where they lie on this machine says nothing elsewhere."""
    words = ["turbosparse", "bench", *(path.name for path in args.models)]
    for mode in args.mode or ():
        words += ["--mode", mode]
    words += ["-t", args.threads, "-p", str(args.prompt_tokens), "-n", str(args.generated_tokens)]
    words += ["-d", str(args.depth), "-r", str(args.rounds)]
    if args.against:
        words += ["--against", args.against]
    if args.baseline_model:
        words += ["--baseline-model", args.baseline_model.name]
    if args.isa:
        words += ["--isa", args.isa]
    return shlex.join(words)

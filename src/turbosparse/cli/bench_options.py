"""The options of `turbosparse bench`, what they ask for, and the command that asks for it again."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import add_json_option
from turbosparse.cli.model_options import MODES, add_memory_options, add_pin_option, memory_budget
from turbosparse.cli.outputs import check_writable
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.bench.benchmark import BenchConfig
    from turbosparse.bench.shapes import SyntheticModel

__all__ = ["add_options", "bench_config", "command_line", "synthetic_model"]

FOR_THE_INTERPRETER = 256 << 20  # bytes that a limit allows beyond the budget
# Options of synthetic models and the field of SyntheticModel that each of them sets.
_SYNTHETIC = {
    "quant": "weight_type",
    "sparsity": "sparsity",
    "rank": "rank",
    "recall": "recall",
    "precision": "precision",
    "layers": "layers",
    "hot_share": "hot_share",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("models", nargs="*", type=Path, metavar="MODEL", help="GGUF file")
    add("--mode", action="append", choices=MODES, help="repeatable; by default all that the file can run")
    add("-t", "--threads", default="0", help="thread counts, as in 1,2 (default: physical cores, at most 8)")
    add(
        "-p",
        "--prompt-tokens",
        type=int,
        default=256,
        help="tokens of the prompt test (256); 0: none",
    )
    add(
        "-n",
        "--generated-tokens",
        type=int,
        default=64,
        help="tokens of the decode test (64); 0: none",
    )
    add("-d", "--depth", default="0", help="tokens in the cache before each test (0), as in 100,4000")
    add("-r", "--rounds", type=int, default=5, help="timed rounds (5)")
    add("--against", choices=["llama.cpp"], help="time it in turn; needs turbosparse[baseline]")
    add("--baseline-model", type=Path, metavar="FILE", help="what llama.cpp reads, if not MODEL itself")
    add_pin_option(parser)
    add("--isa", default="", help="instruction set of our kernels (default: the best there is)")
    add_memory_options(parser)
    add("--roofline", action="store_true", help="measure how fast memory is read: as streams, and some rows")
    add("--profile", action="store_true", help="also the time of each part of a token, in runs of its own")
    add("--output", type=Path, metavar="DIR", help="write DIR/DATE-NAME.json with all to repeat it")
    add_json_option(parser)
    group = parser.add_argument_group(
        "synthetic models", "random weights of a known shape, for speed alone; kept in the user's cache"
    )
    add = group.add_argument
    add("--shape", metavar="NAME", help="such as mistral-7b; a wrong name lists all")
    add("--quant", metavar="TYPE", help="type of every weight: q4_0 (default), q8_0 or f16")
    add("--sparsity", type=float, metavar="S", help="share of neurons that are zero (default: 0.9)")
    add("--rank", type=int, metavar="R", help="width of the predictor, 0 for none (default: 512)")
    add("--recall", type=float, metavar="X", help="of the predictor (default: 0.95)")
    add("--precision", type=float, metavar="X", help="of the predictor (default: 0.95)")
    add("--layers", type=int, metavar="N", help="fewer layers than the shape has")
    add(
        "--hot-share",
        type=float,
        metavar="X",
        help="share of all activations that a quarter of the neurons has (default: 0.25, all alike)",
    )
    add(
        "--one-at-a-time",
        action="store_true",
        help="with --against: write, time and delete our file, then the baseline's: half the disk space",
    )


def bench_config(args: argparse.Namespace) -> "BenchConfig":
    """Collect what is to be timed.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    BenchConfig
        Checked.

    Raises
    ------
    ConfigError
        For a setting out of range, where llama.cpp is asked for and missing, or memory cannot be limited.
    """
    from turbosparse._native import GgufFile
    from turbosparse.bench.benchmark import BenchConfig
    from turbosparse.bench.memory_hog import choose_limit
    from turbosparse.bench.runners import require_llama_cpp

    if args.output is not None:
        check_writable(args.output)
    if not args.models and args.shape is None and not args.roofline:
        raise ConfigError("[bench] expected a MODEL, a --shape or --roofline, got none of them")
    if args.baseline_model is not None:
        GgufFile(args.baseline_model)
    if args.against:
        require_llama_cpp()
    threads = _numbers("threads", args.threads)
    if args.one_at_a_time and (args.shape is None or not args.against):
        raise ConfigError("[bench --one-at-a-time] expected --shape and --against beside it, got only one")
    budget = memory_budget(args) or 0
    limit = budget + FOR_THE_INTERPRETER if budget and args.against else 0
    return BenchConfig(
        modes=tuple(args.mode or ()),
        threads=threads,
        prompt_tokens=args.prompt_tokens,
        generated_tokens=args.generated_tokens,
        depths=_numbers("depth", args.depth),
        rounds=args.rounds,
        against_llama_cpp=args.against is not None,
        baseline_model=args.baseline_model,
        pin=args.pin,
        isa=args.isa,
        memory_budget=budget,
        memory_limit=limit,
        limited_by=choose_limit(limit) if limit else "cgroup",
        io=args.io or "",
        kv_cache=args.kv_cache or "",
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"[bench --{option}] expected numbers as in 1,2, got {text!r}") from None


def synthetic_model(args: argparse.Namespace) -> "SyntheticModel | None":
    """Collect what the synthetic model is to be like.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    SyntheticModel or None
        None where no shape was asked for.

    Raises
    ------
    ConfigError
        For an unknown shape, a setting out of range or one that needs a shape, and files beside it.
    """
    given = {name: getattr(args, name) for name in _SYNTHETIC if getattr(args, name) is not None}
    if args.shape is None:
        if given:
            raise ConfigError(
                f"[bench] expected --shape together with --{next(iter(given)).replace('_', '-')}"
            )
        return None
    if args.models or args.baseline_model:
        raise ConfigError(
            f"[bench --shape] expected no file beside it, got {(*args.models, args.baseline_model)[0]}"
        )
    from turbosparse.bench.shapes import SyntheticModel, shape_named

    settings: dict[str, Any] = {_SYNTHETIC[name]: value for name, value in given.items()}
    if "weight_type" in settings:
        settings["weight_type"] = settings["weight_type"].upper()
    settings["bundled"] = args.memory_budget is not None
    return SyntheticModel(name=args.shape, shape=shape_named(args.shape), **settings)


def command_line(args: argparse.Namespace) -> str:
    """Give the command that measures it again.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    str
        With file names only: where they lie on this machine says nothing elsewhere.
    """
    words = ["turbosparse", "bench", *(path.name for path in args.models)]
    for name in ("shape", *_SYNTHETIC):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for mode in args.mode or ():
        words += ["--mode", mode]
    words += ["-t", args.threads, "-p", str(args.prompt_tokens), "-n", str(args.generated_tokens)]
    words += ["-d", args.depth, "-r", str(args.rounds)]
    if args.against:
        words += ["--against", args.against]
    if args.baseline_model:
        words += ["--baseline-model", args.baseline_model.name]
    for name in ("isa", "memory_budget", "io", "kv_cache"):
        if getattr(args, name):
            words += [f"--{name.replace('_', '-')}", getattr(args, name)]
    for name in ("pin", "one_at_a_time", "roofline", "profile"):
        if getattr(args, name):
            words += [f"--{name.replace('_', '-')}"]
    return shlex.join(words)

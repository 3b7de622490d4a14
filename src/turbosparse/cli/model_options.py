"""Options that every verb which runs a model has, and what they make."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import progress, thread_count
from turbosparse.errors import ConfigError, ModelFileError, TextError

if TYPE_CHECKING:
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.sampling import SamplingConfig

__all__ = [
    "add_memory_options",
    "add_model_options",
    "add_pin_option",
    "add_sampling_options",
    "check_model_name",
    "check_modes",
    "describe",
    "memory_budget",
    "open_model",
    "read_text",
    "sampling_config",
]

MODES = ("dense", "exact", "threshold", "predicted")
IO = ("io_uring", "pread", "mmap")
KV_CACHE = ("f16", "q8_0", "f32")
TRANSCODE = ("Q8_0", "Q4_0", "F16", "BF16", "F32")


def add_model_options(parser: argparse.ArgumentParser, *, several_modes: bool = False) -> None:
    """Add the model file and how to run it.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    several_modes : bool, optional
        Whether the mode may be given more than once; then ``args.mode`` is a list.
    """
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF file")
    group = parser.add_argument_group("how to run it")
    group.add_argument(
        "--mode",
        choices=MODES,
        action="append" if several_modes else "store",
        help="how neurons are skipped; default: the first of predicted, exact, threshold, dense that it can",
    )
    group.add_argument(
        "-t", "--threads", type=thread_count, metavar="N", help="default: physical cores, at most 8"
    )
    add_pin_option(group)
    group.add_argument("--isa", metavar="NAME", help="instruction set: scalar, avx2 ...; default: the best")
    group.add_argument(
        "--transcode",
        type=str.upper,
        choices=TRANSCODE,
        default="Q8_0",
        help="what weights without a native kernel become while loading (default: Q8_0)",
    )
    add_memory_options(group)


def add_pin_option(group: argparse._ActionsContainer) -> None:
    """Add whether threads stay on their CPUs.

    Parameters
    ----------
    group : parser or argument group
        Where the option stands.
    """
    group.add_argument(
        "--pin", action="store_true", help="keep each thread on a CPU of its own, one per core first"
    )


def add_memory_options(group: argparse._ActionsContainer) -> None:
    """Add how much memory the engine may take.

    Parameters
    ----------
    group : parser or argument group
        Where the options stand.
    """
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="what the engine may hold, such as 6GiB, or auto; neurons beyond it are read from disk when "
        "needed (files of `export --layout bundled`)",
    )
    group.add_argument(
        "--io",
        choices=IO,
        help="how they are read (default: io_uring where the kernel allows it, else pread)",
    )
    group.add_argument(
        "--kv-cache",
        type=str.lower,
        choices=KV_CACHE,
        help="what keys and values are kept as; q8_0 takes half the memory of f16 and is faster at long "
        "contexts (default: f16, or f32 where weights are F32)",
    )


def memory_budget(args: argparse.Namespace) -> int | None:
    """Give the budget that `add_memory_options` was asked for.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed arguments.

    Returns
    -------
    int or None
        Bytes; None for no limit.

    Raises
    ------
    ConfigError
        For a size that is none, or a reader of what no budget leaves on disk.
    """
    from turbosparse.runtime.memory import AUTO, automatic_budget, parse_size

    if args.memory_budget is None:
        if args.io is not None:
            raise ConfigError(f"[--io] expected --memory-budget beside it, got {args.io} alone")
        return None
    return automatic_budget() if args.memory_budget == AUTO else parse_size(args.memory_budget)


def add_sampling_options(parser: argparse.ArgumentParser, default: "SamplingConfig") -> None:
    """Add how the next token is chosen.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    default : SamplingConfig
        What holds where an option is not given.
    """
    group = parser.add_argument_group("how tokens are chosen")

    options: list[tuple[str, str, type, str]] = [
        ("--temp", "temperature", float, "temperature; 0 always takes the likeliest token"),
        ("--top-k", "top_k", int, "keep the K likeliest; 0 keeps all"),
        ("--top-p", "top_p", float, "keep the likeliest that sum to this probability"),
        ("--min-p", "min_p", float, "keep those at least this likely relative to the likeliest"),
        ("--repeat-penalty", "repetition_penalty", float, "above 1 makes recent tokens less likely"),
        ("--repeat-window", "repetition_window", int, "tokens that count as recent"),
    ]
    for flag, name, kind, text in options:
        value = getattr(default, name)
        explained = f"{text} (default: {value})"
        group.add_argument(flag, dest=name, type=kind, default=value, metavar="X", help=explained)
    group.add_argument("--seed", type=int, metavar="N", help="repeat the same draws (default: a new seed)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help=r"end before this text; \n is a new line"
    )


def sampling_config(args: argparse.Namespace) -> "SamplingConfig":
    """Make what `add_sampling_options` was asked for.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed arguments.

    Returns
    -------
    SamplingConfig
        Checked.
    """
    from turbosparse.runtime.sampling import SamplingConfig

    return SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        repetition_window=args.repetition_window,
        seed=args.seed,
        stop=[text.replace("\\n", "\n") for text in args.stop],
    )


def open_model(args: argparse.Namespace, *, context: int | None = None) -> "Model":
    """Load the model file that `add_model_options` was given.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed arguments.
    context : int, optional
        Tokens of context.

    Returns
    -------
    Model
        Ready to run.
    """
    from turbosparse.runtime.engine import load

    with progress(None, f"loading {args.model.name}"):
        model = load(
            args.model,
            threads=args.threads,
            context=context,
            isa=args.isa,
            transcode=args.transcode,
            memory_budget=memory_budget(args),
            io=args.io,
            kv_cache=args.kv_cache,
        )
    if args.pin:
        model.engine.pin_threads()
    return model


_WRITTEN_BY = {"threshold": "turbosparse calibrate", "predicted": "turbosparse export --predictor"}


def check_modes(path: Path, *modes: str | None) -> None:
    """Refuse a mode that a file cannot run, before its weights are loaded.

    Parameters
    ----------
    path : Path
        Model file.
    *modes : str or None
        What was asked for; None leaves it to the file.

    Raises
    ------
    ConfigError
        If the file cannot run one of them.
    """
    from turbosparse.runtime.model_file import ModelFile

    asked = [mode for mode in modes if mode is not None]
    if not asked:
        return
    able = ModelFile(path).modes
    for mode in asked:
        if mode not in able:
            hint = _WRITTEN_BY.get(mode)
            raise ConfigError(
                f"[mode] expected a mode that {path} can run ({', '.join(able)}), got {mode}"
                + (f"; {hint} writes a file that can" if hint else "")
            )


def check_model_name(name: str) -> None:
    """Refuse what is neither on this machine nor an id on the Hugging Face hub.

    Parameters
    ----------
    name : str
        File, directory or OWNER/NAME.

    Raises
    ------
    ModelFileError
        If there is no such file.
    """
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.count("/") != 1 or name.endswith(".gguf")):
        raise ModelFileError(f"[{name}] expected a model file, directory or model id, got no such file")


def describe(model: "Model", mode: str | None) -> str:
    """Say in one line what is about to run, once its session is made.

    Parameters
    ----------
    model : Model
        The model.
    mode : str or None
        The mode that was asked for.

    Returns
    -------
    str
        Name, weights, mode, threads and instruction set.
    """
    info, engine = model.info, model.engine
    weights = "/".join(dict.fromkeys(info.ffn_types))
    was = ", ".join(f"{source} as {target}" for source, target in info.transcoded.items())
    others = [other for other in info.modes if other != model.default_mode]
    chosen = mode or model.default_mode + (f" (also {', '.join(others)})" if others else "")
    parts = [
        str(model.metadata.get("general.name", info.architecture)),
        f"{weights} ({was})" if was else weights,
        f"mode {chosen}",
        f"{engine.threads} threads",
        engine.isa,
    ]
    if engine.kv_cache == "q8_0":
        parts.append("KV cache q8_0")
    if memory := info.memory:
        neurons = info.num_hidden_layers * info.layer_neurons
        room = memory["pinned_neurons"] + memory["cached_neurons"]
        parts.append(f"{room / neurons:.0%} of the neurons in memory, the rest by {memory['io']}")
    return " | ".join(parts)


def read_text(path: Path) -> str:
    """Read a text file.

    Parameters
    ----------
    path : Path
        UTF-8.

    Returns
    -------
    str
        Its text.

    Raises
    ------
    TextError
        If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise TextError(f"[{path}] expected UTF-8 text, got {got}") from error

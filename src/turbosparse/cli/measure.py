"""Measure the sparsity of a model on a text, and write a report: a page, figures, and all numbers as JSON.

Model files run on the engine, Hugging Face directories in torch (pip install 'turbosparse[train]'); the
numbers are computed by the same functions. --compare puts measurements, or models that are measured first,
side by side.

  turbosparse measure model.gguf --text book.txt -o measured/model
  turbosparse measure path/to/model --text book.txt --tokens 50000 -o measured/other
  turbosparse measure --compare measured/model measured/other -o measured/both
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import add_json_option, console, print_json, thread_count
from turbosparse.cli.outputs import check_matplotlib, check_output
from turbosparse.errors import ConfigError

if TYPE_CHECKING:
    from turbosparse.measure.config import MeasureConfig

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="GGUF file, or Hugging Face directory or id")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text (default: the technical English that ships)")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="where the report goes")
    add("--compare", nargs="+", default=[], metavar="A", help="directories of measurements, or models")
    add("--tokens", type=int, default=10_000, help="at most so many tokens of the text (default: 10000)")
    add("--context", type=int, default=512, help="tokens per window (default: 512)")
    add("--cett", default="0.05,0.1,0.2,0.3", help="error targets (default: 0.05,0.1,0.2,0.3)")
    add("--active", default="0.1", help="the CETT target of active neurons, or nonzero (default: 0.1)")
    add("--top-k", default="0.5,0.3,0.2,0.15,0.1", help="shares kept (default: 0.5,0.3,0.2,0.15,0.1)")
    add("--quality-tokens", type=int, default=4096, help="for perplexity and KL; 0: none (default: 4096)")
    add("--sample-tokens", type=int, default=512, help="that thresholds are found on (default: 512)")
    add("--memory-mib", type=int, default=2048, help="for samples and dense predictions (default: 2048)")
    add("--predict-layers", type=int, default=0, help="fit predictors of so many layers (turbosparse[train])")
    add("-t", "--threads", type=thread_count, default=0, help="threads (default: physical cores, at most 8)")
    add("--device", default="cpu", help="where torch runs, such as cuda (default: cpu)")
    add("--seed", type=int, default=0, help="of the neurons sampled (default: 0)")
    add("--force", action="store_true", help="replace a report in DIR")
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
    if not args.model and not args.compare:
        raise ConfigError("[measure] expected a MODEL or --compare, got neither")
    config = _config(args)
    check_matplotlib()
    args.command = shlex.join(["turbosparse", *sys.argv[1:]])
    from turbosparse.cli.measure_model import brief, check_measurable, labels, measured, show
    from turbosparse.measure import PAGE
    from turbosparse.measure.report import write_page
    from turbosparse.measure.summary import overall_table, quality_table

    logging.getLogger("transformers").setLevel(logging.ERROR)
    names = [*([args.model] if args.model else []), *args.compare]
    for name in names:
        check_measurable(name, device=args.device)
    single, short = not args.compare, labels(names)
    folders = [args.output if single else args.output / label.replace("/", "-") for label in short]
    check_output(args.output, names, folders, force=args.force)
    records: list[dict[str, Any]] = []
    for name, folder in zip(names, folders, strict=True):
        records.append(measured(name, folder, args, config))
        if not single and not (Path(name) / PAGE).exists():
            write_page(records[-1:], folder)
    shown = [record["model"]["name"] for record in records]
    for record, label in zip(records, short, strict=True):
        if shown.count(record["model"]["name"]) > 1:
            record["model"]["name"] = label
    page = write_page(records, args.output)
    for table in (overall_table(records), quality_table(records)):
        show(table)
    console().print(f"wrote {page}", markup=False)
    if args.json:
        print_json({"report": str(page), "models": [brief(record) for record in records]})
    return 0


def _config(args: argparse.Namespace) -> "MeasureConfig":
    from turbosparse.measure.config import MeasureConfig

    if args.memory_mib < 1 or args.threads < 0 or args.predict_layers < 0:
        raise ConfigError(
            "[measure] expected --memory-mib of at least 1, --threads and --predict-layers of at least 0, "
            f"got {args.memory_mib}, {args.threads} and {args.predict_layers}"
        )
    return MeasureConfig(
        tokens=args.tokens,
        context=args.context,
        cett_targets=tuple(sorted(set(_numbers("--cett", args.cett)))),
        active=None if args.active == "nonzero" else _numbers("--active", args.active, most=1)[0],
        top_k=tuple(dict.fromkeys(_numbers("--top-k", args.top_k))),
        quality_tokens=args.quality_tokens,
        sample_tokens=args.sample_tokens,
        memory_bytes=args.memory_mib << 20,
        seed=args.seed,
    )


def _numbers(option: str, text: str, most: int | None = None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"[{option}] expected numbers with commas between, got {text!r}") from None
    if most and len(numbers) > most:
        raise ConfigError(f"[{option}] expected {most} number at most, got {text!r}")
    return numbers

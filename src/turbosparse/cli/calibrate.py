"""Find the thresholds that meet an error target on a text, and write a file that skips neurons.

The target is either a CETT (--cett: how far a layer's output may be off, 0.1 to 0.3 is usual) or a rise of
the perplexity (--ppl-budget: the largest CETT that keeps to it is searched). No training, no torch; minutes
on a laptop for a model of a billion parameters. The new file runs dense like the old one, and faster by
thresholds.

  turbosparse calibrate model.gguf --cett 0.2 -o sparse.gguf
  turbosparse calibrate model.gguf --text mine.txt --ppl-budget 1% -o sparse.gguf
"""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, console, print_json, progress, share_of, thread_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbosparse.runtime.calibration_report import CalibrationReport

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="GGUF file")
    add("-o", "--output", type=Path, required=True, metavar="OUT.gguf", help="file to write")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to calibrate on (default: technical English)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--cett", type=float, help="error target of every layer, above 0 and below 1")
    target.add_argument("--ppl-budget", metavar="P%", help="rise of perplexity: 1%% or 0.01")
    add(
        "--tokens",
        type=int,
        default=4096,
        help="tokens of the text to use (4096); half as many more are held out",
    )
    add(
        "--stages",
        type=int,
        choices=(1, 2),
        default=2,
        help="2: drop by the gate first; 1: only behind up (2)",
    )
    add(
        "--down-type",
        type=str.upper,
        metavar="TYPE",
        help="weight type of the transposed down projection, such as q8_0",
    )
    add(
        "--refine",
        type=float,
        metavar="K",
        help="keep weights in two parts of 4 bits; read the second for neurons at K times their threshold, "
        "and for the largest logits (1: all active neurons; 6 to 12 is usual)",
    )
    add("-t", "--threads", type=thread_count, default=0, help="threads (default: physical cores, at most 8)")
    add("--force", action="store_true", help="replace OUT.gguf if it exists")
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
    from turbosparse.runtime.calibration import calibrate
    from turbosparse.runtime.calibration_report import CalibrationConfig
    from turbosparse.runtime.sparse_file import Refinement
    from turbosparse.runtime.texts import CALIBRATION, read_text

    config = CalibrationConfig(
        cett=args.cett,
        ppl_budget=None if args.ppl_budget is None else share_of("--ppl-budget", args.ppl_budget),
        tokens=args.tokens,
        stages=args.stages,
        down_type=args.down_type,
        refine=None if args.refine is None else Refinement(neurons=args.refine),
        threads=args.threads,
    )
    text = read_text(args.text or CALIBRATION)
    report = calibrate(args.model, text, args.output, config, overwrite=args.force, progress=_bar)
    _show(report, args.output)
    if args.json:
        print_json(
            {"output": str(args.output), "cett_target": report.cett_target, **report.as_record(config)}
        )
    return 0


def _bar(label: str) -> "AbstractContextManager[Callable[[float], None]]":
    return progress(1.0, label)


def _show(report: "CalibrationReport", output: Path) -> None:
    from rich.table import Table

    from turbosparse.runtime.ffns import ffns_of
    from turbosparse.runtime.model_file import ModelFile

    names = [ffn.name.removeprefix("layer ") for ffn in ffns_of(ModelFile(output))]

    experts = len(set(report.ffn_tokens)) > 1
    reached = ["tokens"] if experts else []
    table = Table("layer", *reached, "CETT", "up rows read", "down rows read", "exact zeros", box=None)
    for name, tokens, ffn in zip(names, report.ffn_tokens, report.ffns, strict=True):
        shares = (f"{share:.1%}" for share in (ffn.gate_passed, ffn.active, ffn.zeros))
        table.add_row(name, *([str(tokens)] if experts else []), f"{ffn.cett:.4f}", *shares)
    means = (f"{report.mean(field):.1%}" for field in ("gate_passed", "active", "zeros"))
    table.add_row("mean", *([""] if experts else []), f"{report.mean('cett'):.4f}", *means)
    out = console()
    out.print(table)
    for name, ppl, tokens in (
        ("calibration text", report.ppl, report.tokens),
        ("held-out part", report.held_out_ppl, report.held_out_tokens),
    ):
        out.print(
            f"perplexity, {name} ({tokens} tokens): dense {ppl.source:.3f}, new file dense {ppl.dense:.3f}, "
            f"threshold {ppl.threshold:.3f} ({ppl.threshold / ppl.source - 1:+.2%})"
        )
    out.print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)", markup=False)

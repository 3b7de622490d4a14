"""Watch a small model run dense and sparse, side by side: texts, speed, perplexity, sparsity per layer.

Takes SmolLM2-135M-Instruct with dReLU, made sparse by turbosparse, from the source tree; without it,
SmolLM2-135M-Instruct as it is (135 million parameters, Apache-2.0; fetched once, 99 MB). A file that has no
thresholds yet, such as one of your own, gets some first, found on the text that ships with turbosparse. Under
two minutes on two cores.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse.cli.console import add_json_option, console, print_json, progress, thread_count
from turbosparse.cli.demo_report import demo_record, show_answers, show_layers, show_quality
from turbosparse.cli.demo_runs import answer, judge

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_arguments", "run"]

QUESTION = "Explain in simple words how a computer stores a file on a disk."
BEGINNING = "Backups are one of the main responsibilities of an administrator. A good backup"
CETT = 0.1  # costs SmolLM2 6.5 % of perplexity on the held-out text; 0.2 costs 32 %
CALIBRATION_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where they go.
    """
    add = parser.add_argument
    add("--model", type=Path, metavar="FILE", help="another GGUF file instead of the default model")
    add("--prompt", help="what to ask, or the beginning that a model without a chat template goes on with")
    add("--cett", type=float, help=f"find thresholds for this error of every layer; without any: {CETT}")
    add("-n", "--max-tokens", type=int, default=96, help="tokens per answer (default: 96)")
    add("-t", "--threads", type=thread_count, help="threads (default: physical cores, at most 8)")
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
    import turbosparse
    from turbosparse.runtime.default_model import default_model

    out, begin = console(), time.monotonic()
    path = args.model
    if path is None:
        path, what = default_model()
        out.print(f"[bold]Model[/]  {what}")
    if args.cett is not None or turbosparse.load(path, threads=1).info.modes == ["dense"]:
        path = _calibrate(out, path, args)
    model = turbosparse.load(path, threads=args.threads)
    judged = judge(model)
    show_layers(out, judged)
    prompt = args.prompt or (QUESTION if model.has_chat_template else BEGINNING)
    answers = answer(model, prompt, args.max_tokens)
    show_answers(out, model, prompt, answers)
    show_quality(out, model, judged)
    go_on = f"chat {path}" if model.has_chat_template else f'run {path} -p "{prompt}"'
    out.print(
        f"\nDone in {time.monotonic() - begin:.0f} s. All modes run on one file and the same weights:\n"
        f"  turbosparse {go_on}",
        highlight=False,
        soft_wrap=True,
    )
    if args.json:
        print_json(demo_record(path, answers, judged))
    return 0


def _calibrate(out: "Console", path: Path, args: argparse.Namespace) -> Path:
    """Find thresholds; the file that has them is kept in the cache."""
    from turbosparse.runtime.calibration import calibrate
    from turbosparse.runtime.calibration_report import CalibrationConfig
    from turbosparse.runtime.default_model import cache_folder
    from turbosparse.runtime.texts import CALIBRATION, read_text

    cett = CETT if args.cett is None else args.cett
    sparse_path = cache_folder() / f"{path.stem}.cett-{cett:g}.gguf"
    sparse_path.parent.mkdir(parents=True, exist_ok=True)
    config = CalibrationConfig(cett=cett, tokens=CALIBRATION_TOKENS, threads=args.threads or 0)
    out.print(
        f"[bold]Calibration[/]  thresholds so that no layer's output is off by more than {cett:.0%} "
        f"on average (CETT {cett:g}), on {CALIBRATION_TOKENS} tokens of Python's documentation"
    )
    calibrate(
        path,
        read_text(CALIBRATION),
        sparse_path,
        config,
        overwrite=True,
        progress=lambda label: progress(1.0, label),
    )
    return sparse_path

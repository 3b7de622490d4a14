"""Turn a Hugging Face model into a model file, or add predictors and thresholds to a model file.

The model may come from `turbosparse sparsify` or be any other of a supported type. The result is compared
with the original on a text before it gets its name: status 1 and NAME.failed.gguf if it computes another
function.

  turbosparse export runs/mine/distillation/model -o mine.gguf --type q8_0
  turbosparse export runs/mine/distillation/model -o mine.gguf --predictor runs/mine/predictors
  turbosparse export plain.gguf -o sparse.gguf --thresholds calibrated.gguf
  turbosparse export sparse.gguf -o bundled.gguf --layout bundled
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbosparse.cli.console import bytes_text, console, plain_text, print_json, progress
from turbosparse.cli.export_options import add_options, export_config

if TYPE_CHECKING:
    from turbosparse.export.run import ExportPlan, ExportReport

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
        0, or 1 where the file did not pass the check.
    """
    from turbosparse.export.run import export_model, plan_export
    from turbosparse.runtime.texts import HELD_OUT, read_text

    config = export_config(args)
    plan = plan_export(args.model, config)
    output = args.output or Path(f"{args.model.resolve().stem}-{plan.type_name.lower()}.gguf")
    record: dict[str, Any] = {"output": str(output), "tensors": len(plan.tensors), "bytes": plan.file_bytes()}
    check = None
    if args.dry_run:
        _show_plan(plan, output, record["bytes"])
    else:
        text = read_text(args.text or HELD_OUT)
        report = export_model(
            plan, output, text, config, overwrite=args.force, progress=lambda label: progress(1.0, label)
        )
        record["output"], check = str(report.output), report.check
        _show_report(report)
    if check is not None:
        record["check"] = {**vars(check), "passed": check.passed}
    if args.json:
        print_json(record)
    return 0 if check is None or check.passed else 1


def _show_plan(plan: "ExportPlan", output: Path, file_bytes: int) -> None:
    from rich.table import Table

    table = Table("name", "type", "shape", "bytes", box=None)
    for tensor in plan.tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(plain_text(tensor.name), tensor.type_name, shape, str(tensor.nbytes))
    out = console()
    out.print(table)
    what = f"{plan.metadata['general.architecture']}, {len(plan.tensors)} tensors, mostly {plan.type_name}"
    out.print(f"would write {output}: {what}, {file_bytes} bytes ({bytes_text(file_bytes)})", markup=False)


def _show_report(report: "ExportReport") -> None:
    out, check, wrote = console(), report.check, "wrote"
    if check is not None:
        out.print(
            f"perplexity {check.perplexity:.4f}, of the original {check.reference_perplexity:.4f} "
            f"({check.perplexity / check.reference_perplexity - 1:+.2%}), {check.tokens} tokens\n"
            f"KL mean {check.mean_kl:.2g} (limit {check.limit:g}), max {check.max_kl:.2g} nats, "
            f"same likeliest token {check.same_top_1:.1%}"
        )
        if not check.passed:
            wrote = "it computes something else, or rounding costs this model as much; kept for inspection as"
    out.print(f"{wrote} {report.output} ({bytes_text(report.output.stat().st_size)})", markup=False)

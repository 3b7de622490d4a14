"""What `turbosparse fit-predictor` shows."""

from typing import TYPE_CHECKING

from turbosparse.cli.console import console

if TYPE_CHECKING:
    from turbosparse.predict.report import PredictorReport

__all__ = ["show_report"]


def show_report(report: "PredictorReport") -> None:
    """Show the choice of every layer, the curve, the rivals, and which mode is cheaper.

    Parameters
    ----------
    report : PredictorReport
        What was found.
    """
    from rich.table import Table

    layers = Table(
        "layer", "predictor", "recall", "norm kept", "CETT", "candidates", "bytes", "exact", box=None
    )
    for name, layer in report.layers.items():
        score = layer.score
        shares = (score.recall, score.norm_kept, score.cett, score.candidate_ratio, score.bytes_ratio)
        layers.add_row(
            name, layer.kind, *(f"{share:.1%}" for share in shares), f"{layer.exact_bytes_ratio:.1%}"
        )
    points = Table("", "bytes of the FFN", "perplexity", "KL", "same top-1", box=None)
    rows = [*(("", point) for point in report.curve), ("chosen", report.chosen), *report.rivals.items()]
    for name, point in rows:
        found = point.evaluation
        points.add_row(
            name,
            f"{point.bytes_ratio:.1%}",
            f"{found.perplexity:.3f}",
            f"{found.kl_divergence:.4f}",
            f"{found.same_top1:.1%}",
        )
    out = console()
    out.print(layers)
    out.print(points)
    out.print(
        f"perplexity {report.perplexity:.3f}, with predictors {report.chosen.evaluation.perplexity:.3f} "
        f"({report.ppl_rise:+.1%}); bytes of the FFN: predicted {report.chosen.bytes_ratio:.1%}, "
        f"exact {report.exact_bytes_ratio:.1%}; cheaper: {report.cheaper}"
    )

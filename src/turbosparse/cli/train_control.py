"""Train the unswapped model on the tokens that a sparsify recipe draws, to see what sparsity alone costs.

Next-token and distillation losses stay; losses that compare with the original FFNs have no meaning here
and are replaced by the next-token loss. Give it an output directory of its own with --output.
"""

import argparse

from turbosparse.cli import sparsify

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    sparsify.add_arguments(parser)
    parser.set_defaults(control=True)


def run(args: argparse.Namespace) -> int:
    """Run the verb.

    Parameters
    ----------
    args : argparse.Namespace
        Parsed options.

    Returns
    -------
    int
        As `turbosparse sparsify`.
    """
    return sparsify.run(args)

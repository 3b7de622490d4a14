"""Show what is in a model file: its shape, types and bytes, which activation, whether neurons can be skipped.

Reads only the header and the thresholds, so it is instant for files of any size. --memory-budget says what a
budget would hold, and predicts hits and speed from what it measures of memory and disk in some three seconds.

  turbosparse inspect model.gguf
  turbosparse inspect bundled.gguf --memory-budget 6GiB
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from turbosparse.cli.console import (
    add_json_option,
    bytes_text,
    console,
    count_text,
    plain_text,
    print_json,
    thread_count,
)
from turbosparse.cli.memory_report import describe_budget, memory_facts, memory_table
from turbosparse.cli.model_options import add_memory_options, memory_budget
from turbosparse.cli.model_tables import model_tables
from turbosparse.runtime.model_description import describe
from turbosparse.runtime.model_file import ModelFile

SHAPE = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv heads": "num_key_value_heads",
    "experts": "num_experts",
    "experts per token": "num_experts_per_tok",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The verb's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="a GGUF file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    group = parser.add_argument_group("what a memory budget would hold")
    add_memory_options(group)
    group.add_argument("--context", type=int, metavar="N", help="tokens of context (default: at most 4096)")
    group.add_argument("-t", "--threads", type=thread_count, metavar="N", help="threads that compute")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the description.

    Parameters
    ----------
    args : argparse.Namespace
        As parsed.

    Returns
    -------
    int
        Exit status.
    """
    budget = memory_budget(args)
    file = ModelFile(args.model)
    record = describe(file, tensors=args.tensors or args.json)
    if budget is not None:
        record["memory"] = describe_budget(file, args, budget=budget)
    if args.json:
        print_json(record)
    else:
        _show(record)
    return 0


def _show(record: dict[str, Any]) -> None:
    from rich.table import Table

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for label, text in _facts(record):
        facts.add_row(label, plain_text(text))
    fitted, out = console(), console(wide=True)  # a line per row, also where the terminal is narrow
    with fitted.capture() as facts_captured:
        fitted.print(facts)
    with out.capture() as captured:
        for table in model_tables(record):
            out.print()
            out.print(table)
        if memory := record.get("memory"):
            out.print()
            out.print(memory_table(memory))
            for line in memory_facts(memory):
                out.print(line, markup=False, soft_wrap=True)
    # Tables pad every line to one width; nobody wants that in a file.
    lines = (facts_captured.get() + captured.get()).splitlines()
    sys.stdout.writelines(line.rstrip() + "\n" for line in lines)


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", f"{record['file']}  {bytes_text(record['file_bytes'])}, GGUF v{record['gguf_version']}"
    if record["name"]:
        yield "name", str(record["name"])
    active = f", {count_text(record['active_parameters'])} for a token" if record["num_experts"] else ""
    yield "architecture", f"{record['architecture']}, {count_text(record['parameters'])} parameters{active}"
    yield "shape", ", ".join(f"{label} {record[key]}" for label, key in SHAPE.items() if record[key])
    tied = {True: ", tied embeddings", False: ", untied embeddings", None: ""}[record["tied_embeddings"]]
    yield "vocabulary", f"{record['vocab_size']} tokens{tied}, context of {record['context_length']}"
    template = "with a chat template" if record["chat_template"] else "no chat template"
    yield "tokenizer", f"{record['tokenizer'] or 'none'} ({record['pre_tokenizer'] or '-'}), {template}"
    parameter = f" ({record['activation_param']:g})" if record["activation_param"] is not None else ""
    gated = "gated" if record["gated"] else "not gated"
    yield "activation", f"{record['activation'] or 'not stated'}{parameter}, {gated}"
    yield "feed-forward", f"{bytes_text(record['ffn_bytes'])}, {record['ffn_share']:.0%} of all weights"
    down = "ffn_down_t: one row per neuron" if record["neuron_major_down"] else "ffn_down: runs dense only"
    yield "modes", f"{', '.join(record['modes'])}  ({down})"
    if predictor := record["predictor"]:
        cost = f"{bytes_text(predictor['bytes'])}, {predictor['ffn_share']:.1%} of the feed-forward bytes"
        yield "predictor", f"{predictor['kind']} on {predictor['input']}, {cost}"
    for key, value in (record["calibration"] or {}).items():
        if not isinstance(value, list):
            yield key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)

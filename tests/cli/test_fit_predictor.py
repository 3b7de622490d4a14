"""The verb fit-predictor: how its options are read; tests/predict and tests/export run it."""

import argparse

import pytest

from turbosparse.cli.fit_predictor import add_arguments


@pytest.mark.parametrize("name", ["q4_0", "Q4_0"])
def test_types_are_spelled_in_either_case(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = ["--text", "a.txt", "-o", "out", "--weight-type", name, "--predictor-type", name]
    args = parser.parse_args(["model", *options])
    assert (args.weight_type, args.predictor_type) == ("Q4_0", "Q4_0")

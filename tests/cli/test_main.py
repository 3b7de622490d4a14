"""The frame of the command line: verbs, errors as one line, exit statuses."""

import argparse
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model
from turbosparse import __version__
from turbosparse.cli.main import VERBS, main
from turbosparse.errors import ModelFileError, TurboSparseError

Run = Callable[[argparse.Namespace], int]


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    logger = logging.getLogger("turbosparse")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Installs a verb `try` that does what it is given."""

    def install(run: Run) -> None:
        module = types.ModuleType("a_verb", "Try something.")
        vars(module).update(
            run=run, add_arguments=lambda parser: parser.add_argument("--count", type=int, default=1)
        )
        monkeypatch.setitem(sys.modules, "a_verb", module)
        monkeypatch.setitem(VERBS, "try", ("a_verb", "try something"))

    return install


def raising(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name, (_, summary) in VERBS.items():
        assert name in shown
        assert summary in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"turbosparse {__version__}\n"


def test_the_verbs_arguments_and_status_are_passed_on(verb: Callable[[Run], None]) -> None:
    verb(lambda args: args.count)
    assert main(["try"]) == 1
    assert main(["try", "--count", "7"]) == 7
    assert main(["-v", "try", "-v", "--count", "0"]) == 0
    assert logging.getLogger("turbosparse").level == logging.DEBUG


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspekt"], "expected a verb, got 'inspekt'; did you mean inspect?"),
        (["xyzzy"], f"expected a verb, got 'xyzzy'; one of {', '.join(VERBS)}"),
        (["--nope"], "unrecognized arguments: --nope (see: turbosparse --help)"),
        (["inspect"], "the following arguments are required: MODEL (see: turbosparse inspect --help)"),
        (["inspect", "a", "b"], "unrecognized arguments: b (see: turbosparse inspect --help)"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"turbosparse: error: {message}\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModelFileError("[m.gguf] expected a, got b"), "[m.gguf] expected a, got b"),
        (TurboSparseError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "t.txt"), "[t.txt] No such file or directory"),
        (FileNotFoundError(2, "No such file", "a\x1b[2J\nb"), "[a\ufffd[2J b] No such file"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError("5 requested and 3 written"), "5 requested and 3 written"),
        (
            OSError("No connection to 'https://huggingface.co'\nSee the documentation"),
            "[model] expected a directory here, or an id on the Hugging Face hub and the hub in reach, "
            "got neither (No connection to 'https://huggingface.co')",
        ),
        (
            UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid"),
            "[text] expected UTF-8, got byte 0xff at position 2",
        ),
        (
            MemoryError(),
            "[memory] expected room for the model and its cache, got none: it does not fit this machine",
        ),
    ],
)
def test_errors_are_one_line(
    error: Exception, message: str, verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))
    assert main(["try"]) == 2
    assert capsys.readouterr() == ("", f"turbosparse: error: {message}\n")


def test_debug_shows_where_an_error_came_from(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(ModelFileError("[x] expected y, got z")))
    assert main(["try", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("turbosparse: error: [x] expected y, got z\n")


def test_our_own_bugs_are_not_hidden(verb: Callable[[Run], None]) -> None:
    verb(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["try"])


def test_ctrl_c_is_quiet(verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(KeyboardInterrupt()))
    assert main(["try"]) == 130
    assert capsys.readouterr() == ("", "")


def test_warnings_and_progress_go_to_stderr(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        logging.getLogger("turbosparse.runtime").info("loading")
        logging.getLogger("turbosparse.runtime").warning("%d types transcoded", 2)
        return 0

    verb(run)
    assert main(["try"]) == 0
    assert capsys.readouterr() == ("", "turbosparse: warning: 2 types transcoded\n")
    assert main(["try", "-v"]) == 0
    shown = "turbosparse: info: loading\nturbosparse: warning: 2 types transcoded\n"
    assert capsys.readouterr() == ("", shown)


def test_every_verb_has_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for name in VERBS:
        with pytest.raises(SystemExit) as leaving:
            main([name, "--help"])
        assert leaving.value.code == 0
        assert f"usage: turbosparse {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "{}"],
        ["export", "{}", "--dry-run", "-o", "out.gguf"],  # through a rich console
        ["run", "--help"],
        ["--version"],
    ],
)
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, arguments: list[str]) -> None:
    """`turbosparse ... | head -1` ends without a word."""
    make_tiny_model(tmp_path / "m.gguf")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "turbosparse", *(a.format(tmp_path / "m.gguf") for a in arguments)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_the_output_is_one_line(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m.gguf")
    command = [sys.executable, "-m", "turbosparse", "inspect", str(tmp_path / "m.gguf")]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (2, "turbosparse: error: No space left on device\n")


def test_text_that_the_terminal_cannot_show_is_replaced() -> None:
    code = "import sys; from turbosparse.cli import main; print(main.main([])); print('\\u4e16')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("0\n?\n")


def test_a_terminated_program_cleans_up(tmp_path: Path) -> None:
    """SIGTERM runs the `finally` blocks, as Ctrl-C does."""
    code = f"""
import os, signal, sys, types
from turbosparse.cli.main import VERBS, main
def run(args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        open({str(tmp_path / "cleaned")!r}, "w").close()
sys.modules["a_verb"] = types.SimpleNamespace(__doc__="", run=run, add_arguments=lambda parser: None)
VERBS["try"] = ("a_verb", "")
sys.exit(main(["try"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(("package", "extra"), [("torch", "train"), ("lm_eval.api", "eval")])
def test_a_missing_extra_is_one_line(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], package: str, extra: str
) -> None:
    verb(raising(ModuleNotFoundError(f"No module named {package!r}", name=package)))
    assert main(["try"]) == 2
    name = package.partition(".")[0]
    expected = f"[{name}] expected this package, got none: pip install 'turbosparse[{extra}]'"
    assert capsys.readouterr().err == f"turbosparse: error: {expected}\n"


def test_a_missing_module_of_our_own_is_a_bug(verb: Callable[[Run], None]) -> None:
    verb(raising(ModuleNotFoundError("No module named 'turbosparse.nothing'", name="turbosparse.nothing")))
    with pytest.raises(ModuleNotFoundError):
        main(["try"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "none.gguf", "--tasks", "hellaswag"],
        ["fit-predictor", "no/such/model", "--text", "a.txt", "-o", "out"],
        ["sparsify", "--model", "no/such/model", "--text", "a.txt", "--output", "out"],
    ],
)
def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    assert "expected a model file, directory or model id, got no such file" in capsys.readouterr().err

"""Files and functions stay as small as CONTRIBUTING.md says."""

import ast
from pathlib import Path

import pytest

from turbosparse.cli.main import VERBS

ROOT = Path(__file__).parents[2]
PYTHON = sorted((ROOT / "src").rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "native").rglob("*") if path.suffix in {".cpp", ".h", ".inl"})
VERB_FILES = {ROOT / "src" / (module.replace(".", "/") + ".py") for module, _ in VERBS.values()}
MOST_LINES_OF_A_FUNCTION = 60


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def docstring_lines(tree: ast.Module) -> int:
    """Lines that docstrings take, which the linter asks for."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    return sum((node.body[0].end_lineno or 0) - node.body[0].lineno + 1 for node in nodes)


def test_files_are_found() -> None:
    assert len(PYTHON) > 20
    assert len(NATIVE) > 20


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert lines(path) <= (300 if ROOT / "native" / "kernels" in path.parents else 500)


@pytest.mark.parametrize("path", sorted(VERB_FILES & set(PYTHON)), ids=lambda path: path.name)
def test_verbs_are_short(path: Path) -> None:
    assert lines(path) - docstring_lines(ast.parse(path.read_text(encoding="utf-8"))) <= 120


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    long = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if size > MOST_LINES_OF_A_FUNCTION:
                long[node.name] = size
    assert long == {}

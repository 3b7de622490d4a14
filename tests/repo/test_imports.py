"""What may import what, and what importing costs. (`make lint` checks the same rooms with import-linter.)"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "turbosparse"
TRAINING = {"models", "data", "measure", "predict", "sparsify", "study"}
SERVING = {"runtime", "serve", "_native"}
FORBIDDEN = {
    **dict.fromkeys(("runtime", "serve", "sparsity", "tokenizer"), TRAINING | {"torch", "transformers"}),
    **dict.fromkeys(TRAINING, SERVING),
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Rooms of this package (by bare name) and foreign packages that a module imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {
        name.split(".")[1] if name.startswith("turbosparse.") else name.split(".")[0]
        for name in names
        if name != "turbosparse"
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_columns_stay_apart(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(path) & FORBIDDEN.get(room, set()) == set()


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after running code."""
    report = "import sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_is_cheap() -> None:
    assert not {"torch", "transformers", "gguf", "tokenizers", "rich"} & modules_after("import turbosparse")


def test_help_imports_nothing_heavy() -> None:
    code = "from turbosparse.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not {"torch", "transformers", "numpy", "gguf", "tokenizers", "rich"} & modules_after(code)


def test_the_serving_column_works_without_torch() -> None:
    rooms = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in {"runtime", "sparsity"}]
    names = [
        ".".join(("turbosparse", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in rooms
    ]
    assert not {"torch", "transformers"} & modules_after("import " + ", ".join(names))

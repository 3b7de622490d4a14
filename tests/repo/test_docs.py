"""Documents say what the program does: the example of docs/format.md, the commands of README.md."""

from pathlib import Path

import pytest

from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.cli.main import main

ROOT = Path(__file__).parents[2]
FORMAT = ROOT / "docs" / "format.md"
MARK = "<!-- made by tests/repo/test_docs.py; the test fails when it is out of date -->\n"
MODEL = TinyModel(
    activation="drelu",
    down_t=True,
    threshold=0.1,
    gate_threshold=0.05,
    num_hidden_layers=1,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def hexdump(data: bytes) -> str:
    rows = (data[at : at + 16] for at in range(0, len(data), 16))
    return "".join(
        f"{16 * n:08x}  {row.hex(' '):<47}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in row)}\n"
        for n, row in enumerate(rows)
    )


def example(folder: Path, shown: str) -> str:
    """The end of docs/format.md, with what `inspect` showed of the file in that folder."""
    data = (folder / "example.gguf").read_bytes()
    return f"{MARK}```\n$ turbosparse inspect --tensors example.gguf\n{shown}\n{hexdump(data[:144])}```\n"


def test_the_example_of_the_format_is_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_model(tmp_path / "example.gguf", MODEL)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--tensors", "example.gguf"]) == 0
    expected = example(tmp_path, capsys.readouterr().out)
    text = FORMAT.read_text(encoding="utf-8")
    assert text[text.index(MARK) :] == expected, f"put this at the end of docs/format.md:\n{expected}"


def test_readme_opens_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text(encoding="utf-8")[:2500]
    assert "make demo" in head
    assert "make test" in head


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    targets = [part.split(")", 1)[0].split("#")[0] for part in text.split("](")[1:]]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (ROOT / "docs" / target).exists()] == []

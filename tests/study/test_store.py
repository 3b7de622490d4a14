"""Finished results are kept, whole, and belong to one study with one set of settings."""

from pathlib import Path

import pytest

from turbosparse.errors import ConfigError
from turbosparse.study.store import Store


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"value": 2.5, "missing": float("nan")}

    first = Store(tmp_path, "scale", {"seed": 1}).result("CETT 0.1 / x", compute)
    again = Store(tmp_path, "scale", {"seed": 1}).result("CETT 0.1 / x", compute)
    assert first == again
    assert (again["value"], again["missing"], len(calls)) == (2.5, None, 1)
    assert again["seconds"] >= 0


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, "scale", {})

    def fail() -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.result("a", fail)
    assert store.result("a", lambda: {"value": 1})["value"] == 1
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("experts", {"seed": 1}, "expected the study experts or nothing there, got scale"),
        ("scale", {"seed": 2}, "expected the seed that this study began with, 1, got 2"),
        ("scale", {"seed": 1, "tokens": 5}, "expected the tokens .* null, got 5"),
    ],
)
def test_another_study_is_refused(tmp_path: Path, kind: str, settings: dict[str, int], message: str) -> None:
    Store(tmp_path, "scale", {"seed": 1})
    with pytest.raises(ConfigError, match=message):
        Store(tmp_path, kind, settings)


def test_a_fingerprint_stands_for_a_path(tmp_path: Path) -> None:
    begun = {"model": "a.gguf", "model_fingerprint": "12"}
    Store(tmp_path, "trade-off", begun)
    Store(tmp_path, "trade-off", begun | {"model": "./a.gguf"})
    with pytest.raises(ConfigError, match="expected the model_fingerprint that this study began with"):
        Store(tmp_path, "trade-off", begun | {"model_fingerprint": "34"})


def test_a_study_without_fingerprints_goes_on_and_gets_them(tmp_path: Path) -> None:
    Store(tmp_path, "trade-off", {"model": "a.gguf", "seed": 1})
    with pytest.raises(ConfigError, match="expected the model that this study began with"):
        Store(tmp_path, "trade-off", {"model": "b.gguf", "model_fingerprint": "12", "seed": 1})
    Store(tmp_path, "trade-off", {"model": "a.gguf", "model_fingerprint": "12", "seed": 1})
    with pytest.raises(ConfigError, match="expected the model_fingerprint"):
        Store(tmp_path, "trade-off", {"model": "a.gguf", "model_fingerprint": "34", "seed": 1})


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\x00"])
def test_broken_files_are_named(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path, "scale", {"seed": 1})
    store.result("a", lambda: {"value": 1})
    for path in (tmp_path / "results" / "a.json", tmp_path / "begun.json"):
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\[.*a.json\] expected what a study kept, got another text"):
        store.result("a", lambda: {"value": 1})
    with pytest.raises(ConfigError, match=r"\[.*begun.json\] expected what a study kept"):
        Store(tmp_path, "scale", {"seed": 1})

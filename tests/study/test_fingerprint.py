"""Fingerprints follow what is in models and texts."""

import json
import shutil
from pathlib import Path

from tests.tiny_hf import make_hf_model
from turbosparse.data.config import DataConfig, SourceConfig
from turbosparse.study.fingerprint import model_fingerprint, texts_fingerprint


def test_a_file_is_told_by_its_bytes(tmp_path: Path) -> None:
    path, size = tmp_path / "a.gguf", 9 << 20
    path.write_bytes(bytes(size))
    first = model_fingerprint(str(path))
    copy = shutil.copy(path, tmp_path / "b.gguf")
    assert model_fingerprint(str(copy)) == first
    seen = {first}
    for at in (0, 70_000, size - 1):
        changed = bytearray(size)
        changed[at : at + (1 << 17)] = b"x" * min(1 << 17, size - at)
        path.write_bytes(changed)
        seen.add(model_fingerprint(str(path)))
    path.write_bytes(bytes(size + 1))
    assert len(seen | {model_fingerprint(str(path))}) == 5


def test_a_directory_is_told_by_weights_and_configuration(tmp_path: Path) -> None:
    model = make_hf_model("llama")
    model.save_pretrained(tmp_path / "a")
    first = model_fingerprint(str(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b")
    assert model_fingerprint(str(tmp_path / "b")) == first
    config = json.loads((tmp_path / "b" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"rope_theta": 7}), encoding="utf-8")
    model.model.layers[0].mlp.up_proj.weight.data[0] = 0
    model.save_pretrained(tmp_path / "a")
    assert len({first, *(model_fingerprint(str(tmp_path / name)) for name in "ab")}) == 3


def test_texts_are_told_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one", encoding="utf-8")
    (tmp_path / "2.txt").write_text("two", encoding="utf-8")
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "*.txt")),))
    first = texts_fingerprint(data)
    assert texts_fingerprint(data) == first
    (tmp_path / "2.txt").write_text("three", encoding="utf-8")
    assert texts_fingerprint(data) != first

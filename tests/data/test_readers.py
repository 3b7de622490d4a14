"""Readers: every format, every position, and broken records."""

import json
from pathlib import Path

import pytest

from turbosparse.data.config import DataConfig, SourceConfig
from turbosparse.data.held_out import split_of
from turbosparse.data.readers import DocumentReader, open_reader
from turbosparse.errors import DataError

TEXTS = [f"document {i} " + "äbc\n\n" * i for i in range(12)]


def write(directory: Path, kind: str) -> SourceConfig:
    if kind == "text":
        path = directory / "a.txt"
        path.write_text("\n\n\n".join(TEXTS), encoding="utf-8")
    elif kind == "jsonl":
        path = directory / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = directory / "a.parquet"
        parquet.write_table(pyarrow.table({"text": TEXTS, "other": list(range(12))}), path, row_group_size=5)
        if kind == "hub":  # a directory stands for a repository of the hub
            pytest.importorskip("datasets")
            return SourceConfig(path=str(directory))
    return SourceConfig(path=str(path))


def read_all(reader: DocumentReader) -> list[str]:
    return [str(document).strip() for document in reader]


EXPECTED = [text.strip() for text in TEXTS]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "hub"])
def test_every_document_and_every_position(kind: str, tmp_path: Path) -> None:
    config = write(tmp_path, kind)
    reader = open_reader(config)
    positions = [reader.tell()]
    found = []
    while (document := reader.read()) is not None:
        found.append(str(document).strip())
        positions.append(json.loads(json.dumps(reader.tell())))
    assert found == EXPECTED
    for index, position in enumerate(positions):
        again = open_reader(config)
        again.seek(position)
        assert read_all(again) == EXPECTED[index:]


def test_a_document_longer_than_a_chunk(tmp_path: Path) -> None:
    long = "x" * 2_500_000
    path = tmp_path / "a.txt"
    path.write_text("first\n\n\n" + long + "\n\n\nlast", encoding="utf-8")
    assert read_all(open_reader(SourceConfig(path=str(path)))) == ["first", long, "last"]


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n\n\n{name}2", encoding="utf-8")
    assert read_all(open_reader(SourceConfig(path=str(tmp_path / "*.txt")))) == ["a1", "a2", "b1", "b2"]


def test_chats_are_read_as_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    assert open_reader(SourceConfig(path=str(path), field="messages")).read() == messages


def test_token_ids_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [3, 4]}\n{"input_ids": [3, true]}\n', encoding="utf-8")
    reader = open_reader(SourceConfig(path=str(path), field="input_ids"))
    assert list(reader) == [[3, 4]]
    assert reader.corrupt == 1


@pytest.mark.parametrize(
    "value",
    [
        '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]',
        '[{"role": "user", "content": "\\ud800"}]',
        '[{"role": "user"}, 3]',
        '"half a pair: \\ud800"',
        "[3, -1]",
        "[]",
    ],
)
def test_values_that_cannot_be_trained_on_are_counted(value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": {value}}}\n{{"text": "fine"}}\n', encoding="utf-8")
    reader = open_reader(SourceConfig(path=str(path)))
    assert list(reader) == ["fine"]
    assert reader.corrupt == 1


def test_corrupt_lines_are_counted_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"text": "fine"}\n'
    path.write_bytes(good.encode() + b'{"text": \xff\n' + b'{"other": 1}\n' + good.encode() * 50)
    reader = open_reader(SourceConfig(path=str(path)), max_corrupt_percent=2)
    assert len(read_all(reader)) == 51
    assert reader.corrupt == 2
    with pytest.raises(DataError, match="at most 1 % unreadable records, got 2 of 3"):
        read_all(open_reader(SourceConfig(path=str(path)), max_corrupt_percent=1))


def test_text_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\n\n\xff\xfe\n\n\nalso good")
    reader = open_reader(SourceConfig(path=str(path)))
    assert read_all(reader) == ["good", "also good"]
    assert reader.corrupt == 1


def test_missing_file_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt\] expected a file or a dataset id"):
        open_reader(SourceConfig(path=str(tmp_path / "nothing.txt")))
    config = write(tmp_path, "parquet")
    with pytest.raises(DataError, match="expected a column 'body', got text, other"):
        read_all(open_reader(SourceConfig(path=config.path, field="body")))


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="expected a parquet file"):
        read_all(open_reader(SourceConfig(path=str(path))))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    config = write(tmp_path, "parquet")
    data = bytearray(Path(config.path).read_bytes())
    data[4:60] = b"x" * 56
    Path(config.path).write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet\] expected a whole parquet file, got"):
        read_all(open_reader(config))


def test_parquet_text_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"\xff", b"fine"]).view(pyarrow.utf8())}), path)
    reader = open_reader(SourceConfig(path=str(path)))
    assert read_all(reader) == ["fine"]
    assert reader.corrupt == 1


def test_files_of_no_known_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz\] expected text, jsonl or parquet, got a compressed"):
        open_reader(SourceConfig(path=str(path)))
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"}\n]', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json\] expected one JSON object per line, got a JSON array"):
        read_all(open_reader(SourceConfig(path=str(path))))


def test_evaluation_text_may_have_as_many_corrupt_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("broken\n" * 5 + '{"text": "fine"}\n', encoding="utf-8")
    source = SourceConfig(path=str(path))
    split = split_of(DataConfig(sources=(source,), held_out=(source,), max_corrupt_percent=6))
    assert split.is_held_out("fine")

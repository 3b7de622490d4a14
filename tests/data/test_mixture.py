"""The mixture: shares, packing, held-out documents, resuming, and sources that run dry."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_hf import make_texts, make_tokenizer
from turbosparse.data.config import DataConfig, SourceConfig
from turbosparse.data.encoding import make_encoder
from turbosparse.data.held_out import HeldOutSplit, document_hash
from turbosparse.data.mixture import Mixture, PackedSequence, held_out_sequences
from turbosparse.data.readers import Document
from turbosparse.errors import ConfigError, DataError

END = 0


def encode(document: Document) -> tuple[list[int], list[int]]:
    ids = [*str(document).encode(), END]
    return ids, ids


def make(
    sources: tuple[SourceConfig, ...],
    *,
    seed: int = 0,
    split: HeldOutSplit | None = None,
    length: int = 32,
    shuffle: int = 7,
    cut: int = 0,
) -> Mixture:
    config = DataConfig(
        sources=sources, sequence_length=length, shuffle_documents=shuffle, max_document_characters=cut
    )
    return Mixture(config, encode, split=split or HeldOutSplit(0), seed=seed)


def take(mixture: Mixture, count: int) -> list[PackedSequence]:
    return [sequence for sequence, _ in zip(mixture, range(count), strict=False)]


def saved(mixture: Mixture) -> dict[str, Any]:
    """State of a mixture, as a checkpoint holds it."""
    state: dict[str, Any] = json.loads(json.dumps(mixture.state()))
    return state


def documents_of(rows: list[PackedSequence]) -> set[int]:
    """Numbers of the texts "document N ..." that begin in some rows."""
    stream = bytes(token for row in rows for token in row.input_ids)
    return {int(number) for number in re.findall(rb"document (\d+) ", stream)}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceConfig, ...]:
    texts = make_texts(tmp_path)
    return SourceConfig(path=str(texts["text"]), weight=3), SourceConfig(path=str(texts["jsonl"]), weight=1)


def test_shares_hold_at_every_moment(sources: tuple[SourceConfig, ...]) -> None:
    mixture = make(sources)
    for _, count in zip(mixture, range(1, 60), strict=False):
        drawn = [source["tokens"] for source in mixture.report().values()]
        assert sum(drawn) == 32 * count
        assert abs(drawn[0] - 3 * drawn[1]) <= 3 * 32
    report = mixture.report()[sources[0].path]
    assert report["token_share"] == pytest.approx(0.75, abs=0.02)


def test_packing_keeps_every_token_and_marks_documents(sources: tuple[SourceConfig, ...]) -> None:
    rows = take(make(sources[:1]), 40)
    stream = [token for row in rows for token in row.input_ids]
    texts = bytes(stream).split(bytes([END]))[:-1]
    originals = {str(text).encode() for text in Path(sources[0].path).read_text("utf-8").split("\n\n\n")}
    assert set(texts) <= originals
    for row in rows:
        assert len(row.input_ids) == len(row.position_ids) == len(row.labels) == 32
        assert row.position_ids[0] == 0
        for i in range(1, 32):
            starts = row.input_ids[i - 1] == END
            assert row.position_ids[i] == (0 if starts else row.position_ids[i - 1] + 1)


def test_the_seed_decides_the_order(sources: tuple[SourceConfig, ...]) -> None:
    assert take(make(sources), 20) == take(make(sources), 20)
    assert take(make(sources), 20) != take(make(sources, seed=1), 20)


@pytest.mark.parametrize("done", [0, 1, 7, 33, 90])  # 90 is in the second pass
def test_resume_at_the_exact_sequence(sources: tuple[SourceConfig, ...], done: int) -> None:
    mixture = make(sources, split=HeldOutSplit(10))
    take(mixture, done)
    state = saved(mixture)
    expected = take(mixture, 60)
    again = make(sources, split=HeldOutSplit(10))
    again.restore(state)
    assert take(again, 60) == expected
    assert again.state() == mixture.state()


@pytest.fixture
def hub(tmp_path: Path) -> SourceConfig:
    """A directory that stands for a repository of the hub, 25 rows in two files."""
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, rows in (("a", range(15)), ("b", range(15, 25))):
        texts = [f"document {row} " + "x" * (row * 7 % 40) for row in rows]
        parquet.write_table(
            pyarrow.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=4, compression="none"
        )
    return SourceConfig(path=str(tmp_path))


def test_resume_of_a_hub_dataset_at_every_sequence(hub: SourceConfig) -> None:
    mixture, again, twice = (make((hub,), split=HeldOutSplit(10), shuffle=4) for _ in range(3))
    states, rows = [saved(mixture)], []
    for row, _ in zip(mixture, range(70), strict=False):
        rows.append(row)
        states.append(saved(mixture))
    assert states[60]["sources"][0]["counts"]["passes"] >= 2
    for done in range(60):
        again.restore(states[done])
        assert take(again, 10) == rows[done : done + 10]
        twice.restore(saved(again))
        assert take(twice, 4) == take(again, 4)


def test_the_first_block_of_a_hub_dataset_is_whole_after_a_resume(hub: SourceConfig) -> None:
    mixture, again = (make((hub,), shuffle=25) for _ in range(2))
    take(mixture, 1)
    again.restore(saved(mixture))
    assert saved(again)["sources"][0]["block_start"]["row"] == 0
    assert documents_of(take(again, 80)) == set(range(25))


def test_a_state_of_a_hub_dataset_by_an_older_version(hub: SourceConfig) -> None:
    mixture, again = (make((hub,), shuffle=4) for _ in range(2))
    take(mixture, 12)
    state = saved(mixture)
    (source,) = state["sources"]
    source["block_start"] = source["block_start"]["dataset"]
    again.restore(state)
    assert documents_of(take(again, 80)) == set(range(25))


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("txt", [3, 1, 0, 4, 2, 6, 5, 8, 9, 7, 10, 11, 3, 2, 0, 1, 4, 5, 9, 7, 8, 6, 11, 10]),
        ("jsonl", [3, 1, 0, 4, 2, 8, 5, 9, 7, 6, 10, 11, 3, 2, 0, 1, 4, 8, 7, 6, 5, 9, 11, 10]),
        ("parquet", [3, 1, 0, 4, 2, 8, 7, 5, 6, 9, 11, 10, 3, 2, 0, 1, 4, 5, 8, 6, 9, 7, 10, 11]),
    ],
)
def test_the_order_of_files_stays_as_it_was(kind: str, order: list[int], tmp_path: Path) -> None:
    path, texts = tmp_path / f"a.{kind}", [f"document {number}" for number in range(12)]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        path.write_text("\n\n\n".join(texts), encoding="utf-8")
    rows = take(make((SourceConfig(path=str(path)),), length=16, shuffle=5, seed=3), 22)
    stream = bytes(token for row in rows for token in row.input_ids).decode()
    assert [int(number) for number in re.findall(r"document (\d+)\0", stream)][:24] == order


def test_few_unreadable_records_of_many_do_not_stop_a_resume(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n} " * 3}) for n in range(3000)]
    for broken in (1001, 1003, 1005):
        lines[broken] = "{broken"
    (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    mixture, again = (make((SourceConfig(path=str(tmp_path / "many.jsonl")),), shuffle=500) for _ in range(2))
    drawn = iter(mixture)
    while next(counts["corrupt_records"] for counts in mixture.report().values()) < 3:
        next(drawn)
    again.restore(saved(mixture))
    assert again.report() == mixture.report()
    assert take(again, 50) == take(mixture, 50)
    assert again.report() == mixture.report()


def test_unreadable_records_within_the_limit_are_not_counted_twice(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {n} " * 3}) for n in range(60)]
    lines[10] = "{broken"  # 1 of fewer than 100 is what 1 % tolerates
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "few.jsonl"))
    mixture, again = (make((source,), shuffle=60) for _ in range(2))
    take(mixture, 5)
    again.restore(saved(mixture))
    assert again.report() == mixture.report()
    assert take(again, 10) == take(mixture, 10)


CHAT_OF_TWO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def chats(path: Path, *, bad: tuple[int, ...], count: int = 300) -> SourceConfig:
    """Write chats, some of which a template of user and assistant in turn refuses."""
    records = []
    for number in range(count):
        messages = [{**message, "content": f"{message['content']} {number}"} for message in CHAT_OF_TWO]
        records.append(json.dumps({"messages": messages[::-1] if number in bad else messages}))
    path.write_text("\n".join(records) + "\n", encoding="utf-8")
    return SourceConfig(path=str(path), field="messages")


STRICT_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_that_the_template_refuses_is_an_unreadable_record(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATE
    source = chats(tmp_path / "chats.jsonl", bad=(40, 250))
    data = DataConfig(sources=(source,), sequence_length=64, shuffle_documents=50)
    split, encoder = HeldOutSplit(0), make_encoder(tokenizer)
    mixture, again = (Mixture(data, encoder, split=split) for _ in range(2))
    drawn = iter(mixture)
    while (counts := mixture.report()[source.path])["corrupt_records"] < 2:
        next(drawn)
        if counts["corrupt_records"] == 1:
            again.restore(saved(mixture))
            assert again.report() == mixture.report()
    assert counts["passes"] == 0
    rows = take(again, 200)
    assert mixture.report()[source.path]["corrupt_records"] == 2
    stream = [token for row in rows for token in row.input_ids]
    assert "hi 41\n" in tokenizer.decode(stream)
    assert "hi 40\n" not in tokenizer.decode(stream)
    held_out = held_out_sequences(source, encoder, split=None, sequence_length=16, count=1000)
    text = tokenizer.decode([token for row in held_out for token in row.input_ids])
    assert ("hi 39\n" in text, "hi 40\n" in text, "hi 41\n" in text) == (True, False, True)


def test_too_many_chats_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATE
    source = chats(tmp_path / "chats.jsonl", bad=tuple(range(0, 300, 3)))
    data = DataConfig(sources=(source,), sequence_length=64, shuffle_documents=50)
    mixture = Mixture(data, make_encoder(tokenizer), split=HeldOutSplit(0))
    with pytest.raises(DataError, match=r"chats\.jsonl\] .* at most 1 % .* roles must alternate"):
        take(mixture, 100)
    source = chats(tmp_path / "chats.jsonl", bad=tuple(range(300)))
    with pytest.raises(DataError, match=r"chats\.jsonl\] expected documents to train on, got none"):
        Mixture(
            DataConfig(sources=(source,), max_corrupt_percent=100),
            make_encoder(tokenizer),
            split=HeldOutSplit(0),
        )


def test_a_tokenizer_that_does_not_fit_is_reported_when_sources_are_opened(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    source = chats(tmp_path / "chats.jsonl", bad=())
    with pytest.raises(DataError, match="expected a tokenizer with a chat template, got one without"):
        Mixture(DataConfig(sources=(source,)), make_encoder(tokenizer), split=HeldOutSplit(0))
    path = tmp_path / "ids.jsonl"
    path.write_text('{"text": [1, 999]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"\[token ids\] expected ids of the model's vocabulary"):
        Mixture(
            DataConfig(sources=(SourceConfig(path=str(path)),)),
            make_encoder(tokenizer),
            split=HeldOutSplit(0),
        )


def test_unreadable_records_are_counted_over_a_resume(tmp_path: Path) -> None:
    lines = ["{broken" if n % 10 == 5 else json.dumps({"text": f"document {n} " * 20}) for n in range(60)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "some.jsonl")),),
        sequence_length=64,
        shuffle_documents=16,
        held_out_percent=0,
        max_corrupt_percent=20,
    )
    mixture, again = (Mixture(data, encode, split=HeldOutSplit(0), seed=1) for _ in range(2))
    drawn = iter(mixture)
    while next(counts["corrupt_records"] for counts in mixture.report().values()) < 4:
        next(drawn)
    again.restore(saved(mixture))
    assert again.report() == mixture.report()
    others = iter(again)
    for _ in range(100):
        assert next(drawn) == next(others)
    assert again.report() == mixture.report()


def test_held_out_documents_are_never_drawn(sources: tuple[SourceConfig, ...], tmp_path: Path) -> None:
    excluded = "11: planted"
    path = Path(sources[0].path)
    path.write_text(path.read_text("utf-8") + f"\n\n\n{excluded} ", encoding="utf-8")
    split = HeldOutSplit(20, {document_hash(excluded)})
    mixture = make(sources[:1], split=split)
    drawn = bytes(token for row in take(mixture, 100) for token in row.input_ids).split(bytes([END]))
    documents = path.read_text("utf-8").split("\n\n\n")
    held_out = [text for text in documents if split.is_held_out(text)]
    assert 2 <= len(held_out) <= 25
    assert not {text.strip().encode() for text in held_out} & set(drawn)
    rows = held_out_sequences(sources[0], encode, split=split, sequence_length=16, count=5)
    assert len(rows) == 5
    text = "\0".join(document.strip() for document in held_out).encode()
    assert all(bytes(row.input_ids) in text for row in rows)


def test_held_out_text_is_not_looked_for_without_end(
    sources: tuple[SourceConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbosparse.data.mixture._MOST_CHARACTERS", 500)
    rows = held_out_sequences(sources[0], encode, split=None, sequence_length=16, count=5)
    start = Path(sources[0].path).read_text("utf-8").replace("\n\n\n", "\0")[:800].encode()
    assert len(rows) == 5
    assert all(bytes(row.input_ids) in start for row in rows)


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 20, 1000])
def test_held_out_windows_are_spread_and_none_comes_twice(count: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{number:03}." for number in range(33)), encoding="utf-8")
    rows = held_out_sequences(
        SourceConfig(path=str(path)), encode, split=None, sequence_length=16, count=count
    )
    numbers = [int(bytes(row.input_ids[:3]).decode()) // 4 for row in rows]
    assert numbers == ([i * 8 // count for i in range(count)] if count <= 8 else list(range(8)))


def test_what_every_document_begins_with_is_not_predicted_in_held_out_text(tmp_path: Path) -> None:
    def from_one(document: Document) -> tuple[list[int], list[int]]:
        ids, _ = encode(document)
        return [1, *ids], [-100, *ids]

    path = tmp_path / "a.txt"
    path.write_text("\n\n\n".join(["a cat", "a hat", "a mat"] * 4), encoding="utf-8")
    rows = held_out_sequences(SourceConfig(path=str(path)), from_one, split=None, sequence_length=16, count=9)
    for row in rows:
        assert row.labels == [-100 if number == 1 else number for number in row.input_ids]


def test_long_documents_are_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"paragraph {i} " + "x" * (i % 60) for i in range(200)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    config = DataConfig(
        sources=(SourceConfig(path=str(path), on_end="stop"),),
        sequence_length=32,
        max_document_characters=200,
    )
    mixture = Mixture(config, encode, split=HeldOutSplit(0))
    rows = take(mixture, 10_000)
    pieces = bytes(token for row in rows for token in row.input_ids).split(bytes([END]))[:-1]
    assert max(map(len, pieces)) <= 200
    found = [paragraph for piece in pieces for paragraph in piece.decode().split("\n\n")]
    assert found != paragraphs[: len(found)]
    assert set(found) <= set(paragraphs)
    assert len(found) > 190


def test_chats_are_held_out_by_their_content() -> None:
    split = HeldOutSplit(0, {document_hash("a b")})
    assert split.is_held_out([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_a_source_that_stops_leaves_its_share_to_the_others(sources: tuple[SourceConfig, ...]) -> None:
    first = SourceConfig(path=sources[0].path, weight=3, on_end="stop")
    mixture = make((first, sources[1]))
    rows = take(mixture, 300)
    assert len(rows) == 300
    report = mixture.report()
    assert report[first.path]["documents"] == 60
    assert report[sources[1].path]["passes"] >= 1
    both_stop = tuple(SourceConfig(path=source.path, on_end="stop") for source in sources)
    assert 0 < len(take(make(both_stop), 10_000)) < 400


@pytest.mark.parametrize(
    ("on_end", "what"), [("repeat", "they are repeated"), ("stop", "other sources fill its share")]
)
def test_a_source_that_runs_dry_is_named_once(
    sources: tuple[SourceConfig, ...], on_end: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    take(make((SourceConfig(path=sources[0].path, on_end=on_end),)), 1000)
    (message,) = caplog.messages
    assert f"{sources[0].path}] expected more documents, got the end after 60" in message
    assert message.endswith(what)


def test_sources_of_one_path_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "two"}\n' * 20, encoding="utf-8")
    text = SourceConfig(path=str(path))
    mixture = make((text, SourceConfig(path=str(path), field="body"), text), length=16)
    take(mixture, 5)  # draws one more
    report = mixture.report()
    assert list(report) == [f"{path} (text)", f"{path} (body)", f"{path} (text) #2"]
    assert [source["tokens"] for source in report.values()] == [32, 32, 32]


def test_a_source_that_must_not_run_dry(sources: tuple[SourceConfig, ...]) -> None:
    config = SourceConfig(path=sources[0].path, on_end="error")
    with pytest.raises(DataError, match=r"stories\.txt\] expected enough documents .* got the end after 60"):
        take(make((config,)), 10_000)


def test_an_empty_source(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.txt\] expected documents to train on, got none$"):
        make((SourceConfig(path=str(path)),))


def test_a_source_that_is_held_out_as_a_whole(sources: tuple[SourceConfig, ...]) -> None:
    with pytest.raises(DataError, match=r"stories\.txt\] .* to train on, got none: all 60 are held out"):
        make(sources, split=HeldOutSplit(100))


def test_a_state_of_other_sources_is_refused(sources: tuple[SourceConfig, ...]) -> None:
    state = make(sources[:1]).state()
    with pytest.raises(DataError, match=r"\[resume\] expected the sources"):
        make(sources).restore(state)


def test_a_state_of_another_order_is_refused(sources: tuple[SourceConfig, ...]) -> None:
    state = make(sources).state()
    with pytest.raises(DataError, match=r"\[resume\] expected seed 0 as before, got 9"):
        make(sources, seed=9).restore(state)
    with pytest.raises(DataError, match=r"\[resume\] expected shuffle_documents 7 as before, got 3"):
        make(sources, shuffle=3).restore(state)
    with pytest.raises(DataError, match=r"\[resume\] expected max_document_characters 0 as before, got 500"):
        make(sources, cut=500).restore(state)
    with pytest.raises(DataError, match=r"\[resume\] expected held_out_percent 0 as before, got 5"):
        make(sources, split=HeldOutSplit(5)).restore(state)


def test_weights_that_sum_to_nothing() -> None:
    with pytest.raises(ConfigError, match="weights that sum to more than 0"):
        DataConfig(sources=(SourceConfig(path="a.txt", weight=0),))
    with pytest.raises(ConfigError, match="at least one source"):
        DataConfig(sources=())

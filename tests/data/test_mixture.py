"""The mixture: shares, packing, held-out documents, resuming, and sources that run dry."""

import json
from pathlib import Path

import pytest

from tests.tiny_hf import make_texts
from turbosparse.data.config import DataConfig, SourceConfig
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
    state = json.loads(json.dumps(mixture.state()))
    expected = take(mixture, 60)
    again = make(sources, split=HeldOutSplit(10))
    again.restore(state)
    assert take(again, 60) == expected
    assert again.state() == mixture.state()


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
    again.restore(json.loads(json.dumps(mixture.state())))
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

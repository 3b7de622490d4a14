"""The library's front door on a tiny model: streams, stops, limits, cache reuse, interrupts."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import turbosparse
from tests.tiny_model import TinyModel, make_tiny_model
from turbosparse.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    ModelFileError,
    TextError,
    TokenizerError,
)
from turbosparse.runtime.engine import Model, load
from turbosparse.runtime.sampling import SamplingConfig

PROMPT = "the cat and the hat and the "
NEVER_ENDS = SamplingConfig(logit_bias={i: -float("inf") for i in range(264, 267)})  # no control tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    make_tiny_model(path)
    return turbosparse.load(path, threads=1)


def sparse_model(folder: Path) -> Model:
    make_tiny_model(folder / "drelu.gguf", TinyModel(activation="drelu", down_t=True))
    return load(folder / "drelu.gguf", threads=2)


def test_greedy_tokens_are_the_argmax_of_the_logits(model: Model) -> None:
    answer = model.generate(PROMPT, max_tokens=12, sampling=NEVER_ENDS)
    text = answer.read()
    ids = model.prompt_ids(PROMPT)
    for token in answer.stats.ids:
        assert token == np.argmax(model.logits(ids)[-1, :264])
        ids.append(token)
    assert text == model.tokenizer.decode(answer.stats.ids)
    assert answer.stats.finish_reason == "length"
    assert answer.stats.tokens == 12


def test_a_streamed_answer_tells_what_it_cost(model: Model) -> None:
    answer = model.generate(PROMPT, max_tokens=8, sampling=NEVER_ENDS, cache=model.new_cache())
    pieces = list(answer)
    stats = answer.stats
    assert len(pieces) > 1
    assert (stats.prompt_tokens, stats.reused_tokens) == (len(model.prompt_ids(PROMPT)), 0)
    assert stats.decode_steps == stats.tokens - 1 == 7
    assert stats.active_ratio == 1.0
    assert stats.bytes_per_token is not None
    assert stats.bytes_per_token > 0
    assert stats.prompt_tok_per_s is not None
    assert stats.decode_tok_per_s is not None
    assert stats.mode == "dense"


def test_prompts_as_text_ids_and_messages(model: Model) -> None:
    by_ids = model.generate(model.prompt_ids(PROMPT), max_tokens=4).read()
    assert model.generate(PROMPT, max_tokens=4).read() == by_ids
    ids = model.prompt_ids([{"role": "user", "content": "the"}])
    assert model.prompt_ids("the", chat=True) == ids
    assert model.tokenizer.decode(ids, skip_special=False).endswith("<|im_start|>assistant\n")
    assert np.array_equal(model.prompt_ids(np.array([1, 2])), [1, 2])  # type: ignore[arg-type]


def test_a_seed_repeats_and_a_stop_string_cuts(model: Model) -> None:
    sampling = SamplingConfig(temperature=1.5, seed=7, logit_bias=NEVER_ENDS.logit_bias)
    first = model.generate(PROMPT, max_tokens=20, sampling=sampling).read()
    assert model.generate(PROMPT, max_tokens=20, sampling=sampling).read() == first
    stop = first[3:5]
    cut = SamplingConfig(temperature=1.5, seed=7, logit_bias=NEVER_ENDS.logit_bias, stop=[stop])
    answer = model.generate(PROMPT, max_tokens=20, sampling=cut)
    assert answer.read() == first[: first.index(stop)]
    assert answer.stats.finish_reason == "stop"


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(model: Model) -> None:
    end = model.tokenizer.eos_id
    assert end is not None
    answer = model.generate(PROMPT, sampling=SamplingConfig(logit_bias={end: 1e4}))
    assert answer.read() == ""
    assert answer.stats.finish_reason == "stop"
    assert answer.stats.ids == []
    assert answer.stats.active_ratio is None


def test_the_next_turn_computes_only_what_is_new(model: Model) -> None:
    cache = model.new_cache()
    ids = model.prompt_ids(PROMPT)
    first = model.generate(ids, max_tokens=5, sampling=NEVER_ENDS, cache=cache)
    first.read()
    longer = [*ids, *first.stats.ids, 5, 6, 7]
    reused = model.generate(longer, max_tokens=5, sampling=NEVER_ENDS, cache=cache)
    fresh = model.generate(longer, max_tokens=5, sampling=NEVER_ENDS, cache=model.new_cache())
    assert reused.read() == fresh.read()
    assert reused.stats.ids == fresh.stats.ids
    assert reused.stats.reused_tokens == len(ids) + 4  # the fifth token was never computed
    again = model.generate(longer, max_tokens=5, sampling=NEVER_ENDS, cache=cache)
    again.read()
    assert again.stats.reused_tokens == len(longer) - 1
    assert again.stats.ids == fresh.stats.ids


def test_another_mode_reuses_nothing(tmp_path: Path) -> None:
    model = sparse_model(tmp_path)
    assert model.info.modes == ["dense", "exact"]
    assert model.default_mode == "exact"
    dense = model.generate(PROMPT, max_tokens=6, mode="dense")
    exact = model.generate(PROMPT, max_tokens=6)
    assert exact.read() == dense.read()
    assert exact.stats.reused_tokens == 0
    assert exact.stats.ids == dense.stats.ids
    assert exact.stats.active_ratio is not None
    assert exact.stats.active_ratio < 0.5


def test_a_closed_answer_leaves_the_model_usable(model: Model) -> None:
    answer = model.generate(PROMPT, max_tokens=50, sampling=NEVER_ENDS)
    first = next(answer)
    answer.close()
    assert answer.stats.finish_reason == "interrupted"
    assert list(answer) == []
    assert model.generate(PROMPT, max_tokens=50, sampling=NEVER_ENDS).read().startswith(first)


def test_two_answers_at_once_need_two_caches(model: Model) -> None:
    alone = model.generate(PROMPT, max_tokens=20, sampling=NEVER_ENDS).read()
    first = model.generate(PROMPT, max_tokens=20, sampling=NEVER_ENDS)
    begun = next(first)
    beside = model.generate("in the land", max_tokens=20, sampling=NEVER_ENDS, cache=model.new_cache())
    next(beside)
    assert begun + first.read() == alone
    second = model.generate(PROMPT, max_tokens=20, sampling=NEVER_ENDS)
    next(second)
    assert model.generate("in the land", max_tokens=3).read() != ""
    with pytest.raises(EngineError, match="expected one answer at a time"):
        second.read()
    assert model.generate(PROMPT, max_tokens=20, sampling=NEVER_ENDS).read() == alone


def test_an_answer_can_be_stopped_from_outside(model: Model) -> None:
    stop = threading.Event()
    answer = model.generate(PROMPT, max_tokens=50, sampling=NEVER_ENDS, should_stop=stop.is_set)
    next(answer)
    stop.set()
    assert "".join(answer) is not None
    assert answer.stats.finish_reason == "interrupted"
    assert answer.stats.tokens < 50
    before = model.generate(PROMPT, should_stop=stop.is_set)
    assert before.read() == ""
    assert before.stats.finish_reason == "interrupted"
    assert before.stats.active_ratio is before.stats.bytes_per_token is None  # not the answer's before it


def test_the_end_of_the_context(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    small = Model(model.engine, model.metadata, context=32)
    answer = small.generate("a" * 30, max_tokens=50, sampling=NEVER_ENDS)
    answer.read()
    assert answer.stats.tokens == 3  # the last one needs no room
    assert answer.stats.finish_reason == "length"
    with pytest.raises(ContextLengthError, match=r"\[prompt\] expected at most 32 tokens .*, got 40"):
        small.generate("a" * 40)
    with caplog.at_level(logging.WARNING, logger="turbosparse"):
        cut = small.generate("b" * 10 + "a" * 40, max_tokens=50, sampling=NEVER_ENDS, truncate=True)
    assert "only the last 24 are used" in caplog.text
    assert cut.read() == small.generate("a" * 24, max_tokens=50, sampling=NEVER_ENDS).read()
    with pytest.raises(ContextLengthError, match="got 33"):
        small.logits(list(range(33)))


def test_truncation_keeps_the_begin_of_sequence(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "bos.gguf", TinyModel(extra_metadata={"tokenizer.ggml.add_bos_token": True}))
    model = load(tmp_path / "bos.gguf", context=16)
    bos = model.tokenizer.bos_id
    assert model.prompt_ids("a")[0] == bos == model.window_bos_id
    cut = model.generate("b" * 20 + "a" * 20, max_tokens=4, truncate=True)
    assert cut.stats.prompt_tokens == 12
    same = model.generate("a" * 11, max_tokens=4)
    assert cut.read() == same.read()


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt(model: Model, prompt: str | list[int]) -> None:
    with pytest.raises(TextError, match=r"\[prompt\] expected at least one token"):
        model.generate(prompt)


def test_settings_out_of_range(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[max_tokens\] expected 1 or more, got 0"):
        model.generate("a", max_tokens=0)
    with pytest.raises(ModelFileError, match="exact"):
        model.generate("a", mode="exact").read()
    with pytest.raises(ConfigError, match=r"\[ids\]"):
        model.logits([10_000])
    path = tmp_path / "tiny.gguf"
    make_tiny_model(path)
    with pytest.raises(ConfigError, match=r"\[threads\] expected 1 to \d+ \(CPUs of this process\), got 0"):
        load(path, threads=0)
    too_many = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(ConfigError, match=rf"\[threads\] expected 1 to {too_many - 1} .*, got {too_many}"):
        load(path, threads=too_many)
    with pytest.raises(ConfigError, match=r"\[context\] expected 1 to 256 tokens"):
        load(path, context=257)
    with pytest.raises(ConfigError, match="isa"):
        load(path, isa="mmx")


def test_a_file_without_tokenizer_still_gives_logits(model: Model) -> None:
    metadata = {k: v for k, v in model.metadata.items() if not k.startswith("tokenizer")}
    bare = Model(model.engine, metadata)
    assert bare.logits([1, 2, 3]).shape == (3, 267)
    impossible: list[Any] = [[2**32 + 1], [2**70], [1.5], [[1]], ["a"]]
    for ids in impossible:
        with pytest.raises(ConfigError, match=r"\[ids\] expected"):
            bare.logits(ids)
    with pytest.raises(TokenizerError, match="expected the key tokenizer"):
        bare.generate("text")


def test_what_was_transcoded_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tiny_model(tmp_path / "q4_1.gguf", TinyModel(weight_type="Q4_1"))
    with caplog.at_level(logging.INFO, logger="turbosparse"):
        load(tmp_path / "q4_1.gguf")
    assert "Q4_1 has no native kernel; transcoded to Q8_0" in caplog.text


def test_the_package_imports_lazily() -> None:
    assert turbosparse.Model is Model
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        turbosparse.nothing  # noqa: B018 -- the access is the test

"""Stop strings in a stream of text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbosparse.runtime.generation import StopMatcher

texts = st.text("abc", max_size=30)


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(texts, max_size=12))
def test_a_stream_ends_where_the_whole_text_would(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched:
            break
    # The same, on the text as far as it had come: pieces after the first match are never generated.
    whole = ""
    for piece in pieces:
        whole += piece
        found = [at for stop in stops if (at := whole.find(stop)) >= 0]
        if found:
            assert matcher.matched
            assert shown == whole[: min(found)]
            return
    assert not matcher.matched
    assert shown + matcher.finish() == whole


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["ab", "cd"], ["ab", "cd"]),
        (["a", "b\n", "\nUser", ": no"], ["a", "b", "\n"]),
        (["\n\n", "User: hm"], ["\n", ""]),
        (["\nUse", "less"], ["", "\nUseless"]),
    ],
)
def test_only_what_may_become_a_stop_string_waits(pieces: list[str], shown: list[str]) -> None:
    matcher = StopMatcher(["\nUser:"])
    assert [matcher.push(piece) for piece in pieces][: len(shown)] == shown

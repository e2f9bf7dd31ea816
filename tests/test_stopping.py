"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_openelm import InputError
from mlx_openelm.generation.stopping import StopStrings

few_letters = st.text("abc", max_size=12)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(st.lists(few_letters, max_size=12), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_the_text_before_the_first_stop_string_comes_out(
    pieces: list[str], strings: list[str]
) -> None:
    stop = StopStrings(strings)
    out, fed = "", ""
    for piece in pieces:
        out += stop.feed(piece)
        fed += piece
        if stop.found:
            break
        # What is held back could still begin a stop string; nothing more is held back than that.
        held = fed[len(out) :]
        assert fed.startswith(out)
        assert not held or any(s.startswith(held) for s in strings)
    out += stop.finish()
    text = "".join(pieces)
    # The earliest end of a match decides where it stops, as pieces arrive.
    starts = [text.find(s) for s in strings if s in text]
    if not starts:
        assert out == text
        assert not stop.found
    else:
        assert stop.found
        assert fed[: min(i for i in map(fed.find, strings) if i >= 0)] == out


def test_letter_by_letter() -> None:
    stop = StopStrings(["END", "E!"])
    assert [stop.feed(c) for c in "a EN E END x"] == ["a", " ", "", "", "EN ", "", "E "] + 5 * [""]
    assert stop.found
    assert stop.finish() == ""


def test_what_was_held_back_comes_out_at_the_end() -> None:
    stop = StopStrings(["END"])
    assert stop.feed("the EN") == "the "
    assert stop.finish() == "EN"


def test_an_empty_string_is_refused() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        StopStrings(["a", ""])

"""Stop strings across token borders, against a dumb version that looks at the whole text again and again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tgi_gateway.prompt.stops import matcher


def dumb(text: str, stops: list[str], keep: bool) -> tuple[str, bool]:
    """(what a reader sees of `text` in the end, whether it was stopped)."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ends:
            return (text[:end] if keep else text[: end - max(map(len, ends))]), True
    return text, False


def stream(pieces: list[str], stops: list[str], keep: bool) -> tuple[list[str], bool]:
    """What is shown after each piece until it stops; the flushed rest is the last entry."""
    found = matcher(stops, keep)
    assert found is not None
    shown = []
    for piece in pieces:
        text, stopped = found.push(piece)
        shown.append(text)
        if stopped:
            return [*shown, found.flush()], True
    return [*shown, found.flush()], False


letters = st.text("ab\n\U0001f600", max_size=5)
pieces_of_text = st.lists(letters, max_size=12)
stop_lists = st.lists(st.text("ab\n\U0001f600", min_size=1, max_size=6), min_size=1, max_size=5)


@given(pieces_of_text, stop_lists, st.booleans())
def test_the_shown_text_is_that_of_the_dumb_version(pieces: list[str], stops: list[str], keep: bool) -> None:
    shown, stopped = stream(pieces, stops, keep)
    assert ("".join(shown), stopped) == dumb("".join(pieces), stops, keep)


@given(pieces_of_text, stop_lists)
def test_only_text_that_may_become_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    shown, _ = stream(pieces, stops, keep=False)
    for count in range(len(shown) - 1):
        so_far = "".join(pieces[: count + 1])
        _, stopped = dumb(so_far, stops, keep=False)
        if not stopped:
            held = next(
                n for n in range(len(so_far), -1, -1) if any(s.startswith(so_far[len(so_far) - n :]) for s in stops)
            )
            assert "".join(shown[: count + 1]) == so_far[: len(so_far) - held]


@given(pieces_of_text, stop_lists)
def test_with_keep_nothing_is_held_back(pieces: list[str], stops: list[str]) -> None:
    shown, stopped = stream(pieces, stops, keep=True)
    whole = len(shown) - 2 if stopped else len(shown) - 1
    assert shown[:whole] == pieces[:whole]
    assert shown[-1] == ""


def test_a_stop_string_is_found_across_pieces() -> None:
    assert stream(["Hello", " wor", "ld", " again"], ["world"], keep=False) == (["Hello", " ", "", ""], True)
    assert stream(["Hello", " wor", "ld!", " again"], ["world"], keep=True) == (["Hello", " wor", "ld", ""], True)


def test_text_held_back_in_vain_comes_with_the_next_piece() -> None:
    assert stream(["a st", "o", "ve"], ["stop"], keep=False) == (["a ", "", "stove", ""], False)


def test_flush_gives_back_what_never_became_a_stop_string() -> None:
    assert stream(["the st"], ["stop"], keep=False) == (["the ", "st"], False)


def test_after_a_match_nothing_more_is_shown() -> None:
    for keep in (True, False):
        found = matcher(["END"], keep)
        assert found is not None
        assert found.push("xENDy")[1]
        assert found.push("more") == ("", True)
        assert found.flush() == ""


def test_the_string_that_is_complete_first_wins() -> None:
    assert stream(["xabcd"], ["abcd", "bc"], keep=False) == (["xa", ""], True)


def test_of_strings_ending_together_the_longest_is_dropped() -> None:
    assert stream(["x\n\nUser:"], ["User:", "\n\nUser:"], keep=False) == (["x", ""], True)


def test_without_stop_strings_there_is_no_matcher() -> None:
    assert matcher([], keep=True) is None
    assert matcher([""], keep=False) is None


def test_a_long_stop_string_held_back_piece_by_piece_is_released_whole() -> None:
    stop = "ab" * 2000 + "c"
    pieces = list("ab" * 2000 + "d")
    shown, stopped = stream(pieces, [stop], keep=False)
    assert not stopped
    assert "".join(shown) == "".join(pieces)
    assert all(not text for text in shown[:-2])


@given(pieces_of_text, stop_lists, st.booleans())
def test_the_match_is_the_longest_that_is_complete_first(pieces: list[str], stops: list[str], keep: bool) -> None:
    found = matcher(stops, keep)
    assert found is not None
    text = ""
    for piece in pieces:
        text += piece
        if found.push(piece)[1]:
            break
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len) if ends else None
    assert found.matched == expected

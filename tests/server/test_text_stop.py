"""Stop strings: the same answer however the text is cut."""

from __future__ import annotations

import itertools

import pytest

from jamba_server.server.text.parts import Part, Text
from jamba_server.server.text.stop import StopStrings


def feed(stops: tuple[str, ...], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """Returns the text that the filter has returned, and the stop string."""
    matcher = StopStrings(stops, include=include)
    emitted = ""
    for piece in pieces:
        emitted += text_of(matcher.push(Text(piece)))
        if matcher.matched is not None:
            assert matcher.push(Text("more")) == []
            assert matcher.flush() == []
            return emitted, matcher.matched
    return emitted + text_of(matcher.flush()), None


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def expected(stops: tuple[str, ...], text: str, *, include: bool) -> tuple[str, str | None]:
    """Returns what the definition says: the shortest beginning of the text that ends with a stop string, and the
    longest such string."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def splits(text: str) -> list[list[str]]:
    """Every way to cut `text` into pieces."""
    ways: list[list[str]] = []
    for cuts in itertools.product((False, True), repeat=max(len(text) - 1, 0)):
        pieces = [text[0]]
        for char, cut in zip(text[1:], cuts, strict=True):
            if cut:
                pieces.append(char)
            else:
                pieces[-1] += char
        ways.append(pieces)
    return ways


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("\n\nUser:",), "Hi.\n\n\nUser: x"),
        (("aab",), "aaaabaab"),
        (("abab", "ba"), "xabbabab"),
        (("abcd", "bc"), "zabcdz"),  # "bc" is complete first
        (("cd", "abcd"), "zabcdz"),  # both end together: the longest
        (("abc",), "ababab"),
        (("é", "😀!"), "a😀😀!é"),
        ((), "nothing"),
    ],
)
def test_every_split_gives_the_text_up_to_the_first_completed_stop_string(
    stops: tuple[str, ...], text: str, include: bool
) -> None:
    results = {feed(stops, pieces, include=include) for pieces in splits(text)}
    assert results == {expected(stops, text, include=include)}


def test_all_short_texts_over_two_letters() -> None:
    for length in range(1, 8):
        for letters in itertools.product("ab", repeat=length):
            text = "".join(letters)
            for stops in (("aba",), ("ab", "bb"), ("aab", "ba", "bbb")):
                assert feed(stops, list(text)) == expected(stops, text, include=False)
                assert feed(stops, [text]) == expected(stops, text, include=False)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(("END", "<|"), include=False)
    pieces = ["The E", "N", "EN", "<x", "<"]
    assert [text_of(matcher.push(Text(piece))) for piece in pieces] == ["The ", "", "EN", "EN<x", ""]
    assert text_of(matcher.flush()) == "<"
    assert matcher.matched is None

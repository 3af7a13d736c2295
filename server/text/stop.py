"""Finds stop strings in a text that arrives in pieces."""

from __future__ import annotations

from jamba_server.server.text.parts import Part, Text


class StopStrings:
    """The content filter that finds the first stop string in a reply and ends the reply there.

    It reads all that the model writes. A stop string therefore also ends a reply inside thoughts and tool calls, as in
    vLLM. The attribute `matched` is the stop string, or None if no stop string has been found.

    If several stop strings end at the same character, the longest one counts, because it begins first. The result does
    not depend on how the text is divided into pieces. Each stop string is matched by a Knuth-Morris-Pratt automaton, so
    the time is linear in the length of the text. If `include` is true, the stop string stays in the text.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        assert all(stops), "an empty stop string would match at every position"
        self._stops = stops
        self._include = include
        self._borders = [_borders(stop) for stop in stops]
        # _matched[i] is the length in characters of the longest prefix of stops[i] with which the text ends.
        self._matched = [0] * len(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, part: Part) -> list[Part]:
        """Appends a piece of text and returns the text that is certain to belong to the reply.

        The longest end of the text that could be the beginning of a stop string is held back. After a stop string has
        been found, every further call returns no text.
        """
        assert isinstance(part, Text), "stop strings are searched before the text is divided into parts"
        text = self._push(part.text) if self.matched is None else ""
        return [Text(text)] if text else []

    def _push(self, text: str) -> str:
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            self._advance(char)
            complete = [stop for stop, count in zip(self._stops, self._matched, strict=True) if count == len(stop)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return pending[: position if self._include else position - len(self.matched)]
        emitted = len(pending) - max(self._matched, default=0)
        self._held = pending[emitted:]
        return pending[:emitted]

    def flush(self) -> list[Part]:
        """Returns the text that `push` has held back. This method must be called at the end of the reply."""
        held, self._held = self._held, ""
        return [Text(held)] if held else []

    def _advance(self, char: str) -> None:
        for index, stop in enumerate(self._stops):
            count = self._matched[index]
            while count and (count == len(stop) or stop[count] != char):
                count = self._borders[index][count - 1]
            self._matched[index] = count + (stop[count] == char)


def _borders(stop: str) -> list[int]:
    """Returns the Knuth-Morris-Pratt failure table of the string `stop`.

    Item i is the length of the longest proper prefix of stop[:i + 1] that is also a suffix of stop[:i + 1].
    """
    borders = [0] * len(stop)
    for index in range(1, len(stop)):
        count = borders[index - 1]
        while count and stop[count] != stop[index]:
            count = borders[count - 1]
        borders[index] = count + (stop[count] == stop[index])
    return borders

"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations


class StopStrings:
    """Ends a text at the first stop string that is completed in it.

    Of several that end at the same character the longest wins: it begins first. The rule looks at characters alone,
    so it does not matter how the text is cut. Each stop string is a Knuth-Morris-Pratt automaton, hence the time is
    linear in the text whatever the strings. `include` keeps the stop string in the text.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = stops
        self._include = include
        self._borders = [_borders(stop) for stop in stops]
        # matched[i]: how many characters of stops[i] the text so far ends with, the longest such number
        self._matched = [0] * len(stops)
        self._held = ""
        self._stop: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be emitted now, and the stop string that ended it; after that, nothing more comes.

        The longest end of the text that could begin a stop string is held back.
        """
        if self._stop is not None:
            return "", self._stop
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            self._advance(char)
            complete = [stop for stop, count in zip(self._stops, self._matched, strict=True) if count == len(stop)]
            if complete:
                self._stop = max(complete, key=len)
                self._held = ""
                return pending[: position if self._include else position - len(self._stop)], self._stop
        emitted = len(pending) - max(self._matched, default=0)
        self._held = pending[emitted:]
        return pending[:emitted], None

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> None:
        for index, stop in enumerate(self._stops):
            count = self._matched[index]
            while count and (count == len(stop) or stop[count] != char):
                count = self._borders[index][count - 1]
            self._matched[index] = count + (stop[count] == char)


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of the longest proper prefix of it that is also its end."""
    borders = [0] * len(stop)
    for index in range(1, len(stop)):
        count = borders[index - 1]
        while count and stop[count] != stop[index]:
            count = borders[count - 1]
        borders[index] = count + (stop[count] == stop[index])
    return borders

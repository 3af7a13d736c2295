"""Finds the tool calls in a model's reply.

Jamba models write calls in one of two forms: as an array, `<tool_calls>[{...}, {...}]</tool_calls>` (Jamba 1.5 to 1.7),
or as one object between tags, `<tool_call>{...}</tool_call>` (Jamba 2 and Jamba Reasoning). Each object has the name of
a function and its arguments: `{"name": "f", "arguments": {...}}`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from jamba_server.server.text.filters import Tags, partial_tag
from jamba_server.server.text.json_scanner import JsonScanner
from jamba_server.server.text.parts import Part, Text, ToolCall

ToolStyle = Literal["jamba", "hermes"]
TOOL_TAGS: Final[dict[ToolStyle, Tags]] = {
    "jamba": Tags("<tool_calls>", "</tool_calls>"),
    "hermes": Tags("<tool_call>", "</tool_call>"),
}

# Number of open brackets at a position that is inside the JSON object of a call but outside of its arguments.
_CALL_DEPTH = 1
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN_CALLS = re.compile(r"[ \t\r\n,]*")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*\{')

# Says where in the reply the text so far ends. "text": in ordinary text. "block": after a start tag. "array": between
# the calls of an array. "call": inside the JSON object of a call. "end": after the last call of a block, where the end
# tag is expected.
_Place = Literal["text", "block", "array", "call", "end"]


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


@dataclass(slots=True)
class _Block:
    """The block that is being read: the text between a start tag and an end tag of tool calls.

    `held` is the text of the block that was not returned yet. It is returned as ordinary text if the next call is not
    valid. `has_calls` says whether a call of the block was returned, and `has_text` whether other text of the block was
    returned.
    """

    held: list[str]
    in_array: bool = False
    has_calls: bool = False
    has_text: bool = False


@dataclass(slots=True)
class _Pending:
    """The tool call that is being read, whose JSON object is not complete yet.

    `pieces` has the text of the object so far, without arguments that were already returned. `begun` says whether the
    call's name was returned before the call was complete. `in_arguments` says whether the text ends inside arguments
    that are returned piece by piece.
    """

    scanner: JsonScanner = field(default_factory=JsonScanner)
    pieces: list[str] = field(default_factory=list[str])
    head_checked: bool = False
    begun: bool = False
    in_arguments: bool = False


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallOptions:
    """Options for reading the tool calls of a reply.

    `names` are the functions that may be called, and `max_calls` is the maximum number of calls. If `early` is true, a
    grammar guarantees that every call is valid, so the arguments of a call are returned while the model writes them.
    Otherwise a call is returned when it is complete.
    """

    style: ToolStyle
    names: frozenset[str]
    max_calls: int | None = None
    early: bool = False

    @property
    def tags(self) -> Tags:
        return TOOL_TAGS[self.style]


class ToolCallFilter:
    """A content filter that turns the tool calls in a reply's text into `ToolCall` parts.

    A call is accepted if it is valid JSON, names a function that may be called and has an object as its arguments. The
    arguments may also be a string that holds the JSON text of an object. The arguments are returned as the model wrote
    them. Everything else is returned as ordinary text, so nothing that the model wrote is lost: invalid calls with
    their tags, calls of unknown functions, and the text before, between and after calls. Only white space that stands
    alone between calls, or between a call and the beginning or end of the reply, is left out.

    In both styles, a block may have one object or an array of objects. Calls are also accepted if the end tag is
    missing. The time is linear in the length of the text.
    """

    def __init__(self, options: ToolCallOptions, *, new_id: Callable[[], str] = new_call_id) -> None:
        self._options, self._new_id = options, new_id
        self._start, self._end = options.tags
        self.num_calls = 0
        self.is_cut_off = (
            False  # whether the last call is incomplete, which is possible if arguments are returned piece by piece
        )
        self._place: _Place = "text"
        self._parts: list[Part] = []  # the parts of the reply that the current call of `push` or `flush` will return
        # The last characters of the text, which are held back because they may be the beginning of a tag.
        self._partial = ""
        # White space that is held back: it is left out unless other text follows before the next call.
        self._space: list[str] = []
        # Whether all text since the last call, or since the start of the reply, was white space.
        self._only_space = True
        self._block = _Block([])
        self._call = _Pending()

    def push(self, part: Part) -> list[Part]:
        if not isinstance(part, Text):
            return [part]
        text, self._partial = self._partial + part.text, ""
        at = 0
        while at < len(text):
            at = self._read(text, at)
        return self._take_parts()

    def flush(self) -> list[Part]:
        """Must be called at the end of the reply. Returns the text that was held back because it could have become a
        call."""
        between_calls = self._place in ("array", "end") and self._block.has_calls and not self._block.has_text
        if self._place != "text" and not between_calls:
            self._give_up()
        self._say(self._partial)
        if not self.num_calls:
            self._parts += [Text(space) for space in self._space]
        return self._take_parts()

    def _take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # Each of the following methods reads `text` from the offset `at` on and returns the offset behind what it read ----

    def _read(self, text: str, at: int) -> int:
        match self._place:
            case "text":
                return self._read_text(text, at)
            case "block":
                return self._read_block(text, at)
            case "array":
                return self._read_array(text, at)
            case "call":
                return self._read_call(text, at)
            case "end":
                return self._read_end(text, at)

    def _read_text(self, text: str, at: int) -> int:
        found = text.find(self._start, at)
        if found >= 0:
            self._say(text[at:found])
            self._block, self._place = _Block([self._start]), "block"
            return found + len(self._start)
        end = len(text) - partial_tag(text[at:], self._start)
        self._say(text[at:end])
        self._partial = text[end:]
        return len(text)

    def _read_block(self, text: str, at: int) -> int:
        at = self._hold(_SPACE, text, at)
        match text[at : at + 1]:
            case "":
                return at
            case "[":
                self._block.held.append("[")
                self._block.in_array, self._place = True, "array"
                return at + 1
            case "{":
                self._call, self._place = _Pending(), "call"
                return at
            case _:
                return self._give_up(at)

    def _read_array(self, text: str, at: int) -> int:
        at = self._hold(_BETWEEN_CALLS, text, at)
        match text[at : at + 1]:
            case "":
                return at
            case "]":
                self._block.has_text |= not self._block.has_calls  # an array without calls is returned as ordinary text
                self._block.held = [*self._block.held, "]"] if self._block.has_text else []
                self._place = "end"
                return at + 1
            case "{":
                self._call, self._place = _Pending(), "call"
                return at
            case _:
                return self._give_up(at)

    def _read_call(self, text: str, at: int) -> int:
        call = self._call
        end = call.scanner.step(text, at)
        piece = text[at:end]
        if call.in_arguments:
            self._parts.append(ToolCall(self.num_calls, "", "", piece))
            call.in_arguments = call.scanner.depth > _CALL_DEPTH
        else:
            call.pieces.append(piece)
            if self._options.early and call.scanner.depth > _CALL_DEPTH and not call.head_checked:
                self._begin_early()
        if call.scanner.broken:
            return self._give_up(end)
        if call.scanner.depth == 0:
            self._end_call()
        return end

    def _read_end(self, text: str, at: int) -> int:
        at = self._hold(_SPACE, text, at)
        tag = text[at : at + len(self._end)]
        if tag == self._end:
            if self._block.has_text:
                self._say("".join(self._block.held) + tag)
            self._place = "text"
            return at + len(tag)
        if at + len(tag) == len(text) and self._end.startswith(tag):
            self._partial = tag
            return len(text)
        return self._give_up(at)

    # The following methods change what is held back and what is delivered ---------------------------------------------

    def _hold(self, pattern: re.Pattern[str], text: str, at: int) -> int:
        match = pattern.match(text, at)
        assert match is not None, "the patterns match the empty text"
        if match[0]:
            self._block.held.append(match[0])
        return match.end()

    def _begin_early(self) -> None:
        """Returns the name of the current call to the caller of `push`, if the text so far ends where the call's
        arguments begin."""
        self._call.head_checked = True
        head = _HEAD.fullmatch("".join(self._call.pieces))
        if head is not None and self._may_call(head[1]):
            self._call.begun = self._call.in_arguments = True
            self._call.scanner.lift_limit()  # the grammar guarantees that the arguments are valid
            self._deliver(ToolCall(self.num_calls, self._new_id(), head[1], "{"))

    def _end_call(self) -> None:
        """Handles the end of the current call's JSON object. The call is returned as a tool call if it is valid, and
        otherwise as text."""
        if self._call.begun:
            self.num_calls += 1
        elif (call := self._decode_call()) is not None:
            self._deliver(call)
            self.num_calls += 1
        else:
            self._say("".join((*self._block.held, *self._call.pieces)))
            self._block.held, self._block.has_text = [], True
        self._place = "array" if self._block.in_array else "end"

    def _decode_call(self) -> ToolCall | None:
        """Decodes the current call. Returns None if the call is not valid or names a function that may not be
        called."""
        try:
            call = msgspec.json.decode("".join(self._call.pieces), type=_Call)
            arguments = bytes(call.arguments).decode()
            if arguments.startswith('"'):
                arguments = msgspec.json.decode(arguments, type=str) or "{}"
                msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, RecursionError):
            return None
        if arguments == "null":
            arguments = "{}"
        if not arguments.lstrip().startswith("{") or not self._may_call(call.name):
            return None
        return ToolCall(self.num_calls, self._new_id(), call.name, arguments)

    def _may_call(self, name: str) -> bool:
        limit = self._options.max_calls
        return name in self._options.names and (limit is None or self.num_calls < limit)

    def _deliver(self, call: ToolCall) -> None:
        """Adds a call, or its beginning, to the parts that are returned. The tag and the white space before the call
        are dropped."""
        self._parts.append(call)
        self._block.held, self._block.has_calls = [], True
        self._space, self._only_space = [], True

    def _give_up(self, at: int = 0) -> int:
        """Stops reading the current block, because it is not valid. The text of the block that was held back becomes
        ordinary text. Returns `at`, the offset from which the text is read on as ordinary text."""
        if self._place == "call" and self._call.begun:
            self.num_calls += 1
            self.is_cut_off = True
        else:
            self._say("".join((*self._block.held, *(self._call.pieces if self._place == "call" else ()))))
        self._place = "text"
        return at

    def _say(self, text: str) -> None:
        """Adds ordinary text to the parts that are returned. White space after a call is held back until other text
        follows."""
        if not text:
            return
        if self._only_space and text.isspace():
            self._space.append(text)
            return
        self._parts += [Text(space) for space in self._space]
        self._space, self._only_space = [], False
        self._parts.append(Text(text))

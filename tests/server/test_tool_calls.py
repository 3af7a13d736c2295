"""Tool calls in a reply: the vectors of vLLM's parsers and many more, however the text is cut."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall, join
from jamba_server.server.text.tool_calls import ToolCallFilter, ToolCallOptions, ToolStyle

NAMES = frozenset({"f", "get_current_weather", "get_weather", "g"})
DALLAS = '{"city": "Dallas", "state": "TX", "unit": "fahrenheit"}'
ODD_STRINGS = r'{"q": "</tool_call> \" } ] \\", "u": "\u00e9\ud83d\ude00 é"}'
F = '{"name": "f", "arguments": {"x": 1}}'


def call(index: int, name: str, arguments: str) -> ToolCall:
    return ToolCall(index, f"id{index}", name, arguments)


def run(style: ToolStyle, pieces: list[str], *, early: bool = False, max_calls: int | None = None) -> tuple[Part, ...]:
    ids = (f"id{number}" for number in itertools.count())
    options = ToolCallOptions(style=style, names=NAMES, early=early, max_calls=max_calls)
    reader = ToolCallFilter(options, new_id=lambda: next(ids))
    parts = [part for piece in pieces for part in reader.push(Text(piece))]
    return join([*parts, *reader.flush()])


def all_ways(text: str) -> list[list[str]]:
    """One piece, single characters, every cut into two, and some cuts into more."""
    draw = random.Random(text)
    cuts = [sorted(draw.sample(range(1, len(text)), min(3, len(text) - 1))) for _ in range(20)]
    more = [[text[a:b] for a, b in itertools.pairwise([0, *cut, len(text)])] for cut in cuts]
    return [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text))), *more]


JAMBA = [
    # the vectors of vLLM's parser of this format
    ("This is a test", [Text("This is a test")]),
    (
        f' <tool_calls>[\n    {{"name": "get_current_weather", "arguments": {DALLAS}}}\n]</tool_calls>',
        [call(0, "get_current_weather", DALLAS)],
    ),
    (
        ' Sure! let me call the tool for you.<tool_calls>[\n    {"name": "get_current_weather", "arguments": '
        f"{DALLAS}}}\n]</tool_calls>",
        [Text(" Sure! let me call the tool for you."), call(0, "get_current_weather", DALLAS)],
    ),
    (
        f' <tool_calls>[\n    {{"name": "get_current_weather", "arguments": {DALLAS}}},\n    '
        f'{{"name": "get_current_weather", "arguments": {DALLAS}}}\n]</tool_calls>',
        [call(0, "get_current_weather", DALLAS), call(1, "get_current_weather", DALLAS)],
    ),
    # text around calls
    (f"a<tool_calls>[{F}]</tool_calls>b", [Text("a"), call(0, "f", '{"x": 1}'), Text("b")]),
    (
        f"a\n<tool_calls>[{F}]</tool_calls>\n b <tool_calls>[{F}]</tool_calls> \n",
        [Text("a\n"), call(0, "f", '{"x": 1}'), Text("\n b "), call(1, "f", '{"x": 1}')],
    ),
    ("  \n ", [Text("  \n ")]),
    # one object instead of an array; no end tag; a comma too many
    (f"<tool_calls>{F}</tool_calls>", [call(0, "f", '{"x": 1}')]),
    (f"<tool_calls>[{F}]", [call(0, "f", '{"x": 1}')]),
    (f"<tool_calls>[{F}] then", [call(0, "f", '{"x": 1}'), Text(" then")]),
    (f"<tool_calls>[{F},]</tool_calls>", [call(0, "f", '{"x": 1}')]),
    # the end of the reply inside a block
    (f"<tool_calls>[{F}, ", [call(0, "f", '{"x": 1}')]),
    (f'<tool_calls>[{F}, {{"name"', [call(0, "f", '{"x": 1}'), Text(', {"name"')]),
    ("<tool_calls>[", [Text("<tool_calls>[")]),
    ("<tool_cal", [Text("<tool_cal")]),
    (' <tool_calls>[{"name": "f", "arg', [Text(' <tool_calls>[{"name": "f", "arg')]),
    # broken calls are text
    ("<tool_calls>[]</tool_calls>", [Text("<tool_calls>[]</tool_calls>")]),
    ("<tool_calls>what?</tool_calls>", [Text("<tool_calls>what?</tool_calls>")]),
    (f"<tool_calls><tool_calls>[{F}]</tool_calls>", [Text("<tool_calls>"), call(0, "f", '{"x": 1}')]),
    (
        f'<tool_calls>[{{"name": "nobody", "arguments": {{}}}}, {F}]</tool_calls>.',
        [
            Text('<tool_calls>[{"name": "nobody", "arguments": {}}'),
            call(0, "f", '{"x": 1}'),
            Text("]</tool_calls>."),
        ],
    ),
]
HERMES = [
    (f"<tool_call>\n{F}\n</tool_call>", [call(0, "f", '{"x": 1}')]),
    (
        f"Both.\n<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>",
        [Text("Both.\n"), call(0, "f", '{"x": 1}'), call(1, "f", '{"x": 1}')],
    ),
    (f"<tool_call>{F}{F}</tool_call>", [call(0, "f", '{"x": 1}'), Text(f"{F}</tool_call>")]),
    (f"<tool_call>[{F},{F}]</tool_call>", [call(0, "f", '{"x": 1}'), call(1, "f", '{"x": 1}')]),
    # tags, quotes, brackets and escapes inside of strings
    (
        f'<tool_call>{{"name": "f", "arguments": {ODD_STRINGS}}}</tool_call>',
        [call(0, "f", ODD_STRINGS)],
    ),
    # the model's own text of the arguments is kept, white space and key order included
    (
        '<tool_call>{"arguments": { "b":1,\n "a" : [1.50, -2e3, true, null, {"c": []}] }, "name": "g"}</tool_call>',
        [call(0, "g", '{ "b":1,\n "a" : [1.50, -2e3, true, null, {"c": []}] }')],
    ),
    # arguments as a string, null, empty or missing
    (
        r'<tool_call>{"name": "f", "arguments": "{\"x\": \"y \\\" z\"}"}</tool_call>',
        [call(0, "f", r'{"x": "y \" z"}')],
    ),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [call(0, "f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', [call(0, "f", "{}")]),
    ('<tool_call>{"name": "f"}</tool_call>', [call(0, "f", "{}")]),
    ('<tool_call>{"id": 7, "name": "f", "arguments": {}}</tool_call>', [call(0, "f", "{}")]),
    # a start tag of the other style is text
    (f"<tool_calls>[{F}]</tool_calls>", [Text(f"<tool_calls>[{F}]</tool_calls>")]),
]
BROKEN = [
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "[1]"}',
    '{"name": "f", "arguments": "hello"}',
    '{"name": "f", "arguments": {"x": 01}}',
    '{"name": "f", "arguments": {"x" 1}}',
    '{"name": "f", "arguments": {"x": NaN}}',
    '{"name": "f", "arguments": {"x": "\n"}}',
    '{"name": "f", "arguments": {"x": 1]}',
    '{"name": "f", "arguments": {"x": "\\ud800"}}',
    "{'name': 'f'}",
    '{"name": "F", "arguments": {}}',
    '{"name": 1, "arguments": {}}',
    '{"arguments": {}}',
    '{"name": "f", "arguments": ' + '{"a": ' * 200 + "1" + "}" * 201,
    "",
    "7",
    "</tool_call>",
]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("text", "expected"), JAMBA)
def test_jamba(text: str, expected: list[Part], early: bool) -> None:
    for pieces in all_ways(text):
        assert run("jamba", pieces, early=early) == tuple(expected), pieces


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("text", "expected"), HERMES)
def test_hermes(text: str, expected: list[Part], early: bool) -> None:
    for pieces in all_ways(text):
        assert run("hermes", pieces, early=early) == tuple(expected), pieces


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_call_is_text_and_the_next_one_is_a_call(broken: str) -> None:
    text = f"a <tool_call>{broken}</tool_call> b <tool_call>{F}</tool_call>"
    expected = (Text(f"a <tool_call>{broken}</tool_call> b "), call(0, "f", '{"x": 1}'))
    for pieces in all_ways(text):
        assert run("hermes", pieces) == expected, pieces


def test_a_call_is_delivered_as_soon_as_it_is_complete() -> None:
    reader = ToolCallFilter(ToolCallOptions(style="jamba", names=NAMES))
    assert reader.push(Text(f"<tool_calls>[{F[:-1]}")) == []
    [first] = reader.push(Text("}"))
    assert isinstance(first, ToolCall)
    assert (first.name, first.arguments, first.id[:5], len(first.id)) == ("f", '{"x": 1}', "call_", 29)


def test_arguments_that_are_surely_valid_are_delivered_early() -> None:
    reader = ToolCallFilter(ToolCallOptions(style="hermes", names=NAMES, early=True), new_id=lambda: "id0")
    pieces = ["<tool_call>", '{"name"', ':"f","arg', 'uments":{', '"a":"b', '}"', "}", "}", "</tool_call>"]
    parts = [join(reader.push(Text(piece))) for piece in pieces]
    more = [(ToolCall(0, "", "", piece),) for piece in ('"a":"b', '}"', "}")]
    assert parts == [(), (), (), (ToolCall(0, "id0", "f", "{"),), *more, (), ()]
    assert reader.flush() == []


def test_early_arguments_end_with_the_reply() -> None:
    for pieces in all_ways('<tool_calls>[{"name": "f", "arguments": {"x": "a'):
        assert run("jamba", pieces, early=True) == (call(0, "f", '{"x": "a'),)


def test_calls_beyond_the_limit_are_text() -> None:
    text = f"<tool_calls>[{F}, {F}]</tool_calls>"
    for early in (False, True):
        for pieces in all_ways(text):
            assert run("jamba", pieces, max_calls=1, early=early) == (
                call(0, "f", '{"x": 1}'),
                Text(f", {F}]</tool_calls>"),
            )


def test_thoughts_pass_through() -> None:
    thought = Reasoning(f"<tool_call>{F}</tool_call>")
    assert ToolCallFilter(ToolCallOptions(style="hermes", names=NAMES)).push(thought) == [thought]


def test_random_texts_lose_nothing_and_do_not_depend_on_the_cut() -> None:
    draw = random.Random(5)
    bits = [
        "<tool_call>",
        "</tool_call>",
        F,
        '{"name": "f", ',
        '"arguments": ',
        "{}",
        "}",
        "[",
        "]",
        ",",
        " ",
        "x",
        '"',
        "\\",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(bits, k=draw.randrange(1, 9)))
        whole = run("hermes", [text])
        assert run("hermes", list(text)) == whole, text
        if not any(isinstance(part, ToolCall) for part in whole):
            assert whole == (Text(text),)


def test_every_json_object_comes_through_as_it_is() -> None:
    draw = random.Random(6)

    def value(depth: int) -> object:
        kind = draw.randrange(4 if depth else 2)
        if kind == 0:
            return draw.choice([1, -2.5, True, None, 1e300])
        if kind == 1:
            return "".join(draw.choices('ab"\\{}[]<>/\n\té😀', k=draw.randrange(8)))
        return (
            [value(depth - 1) for _ in range(3)] if kind == 2 else {str(value(0)): value(depth - 1) for _ in range(3)}
        )

    for _ in range(200):
        arguments = json.dumps({"k": value(3)}, ensure_ascii=draw.random() < 0.5)
        text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
        for early in (False, True):
            assert run("hermes", [text], early=early) == run("hermes", list(text), early=early)
            assert run("hermes", [text], early=early) == (call(0, "f", arguments),)


@pytest.mark.parametrize("unit", ["<tool_call>", '<tool_call>{"', "{", " ", f"<tool_call>{F}", "</tool_ca"])
def test_long_texts(unit: str) -> None:
    """A reader whose time is quadratic would take minutes for these texts."""
    text = "<tool_call>" + unit * (100_000 // len(unit))
    assert run("hermes", [text]) == run("hermes", list(text))


def test_arguments_that_a_grammar_allows_may_nest_without_limit() -> None:
    deep = '{"x": ' * 300 + "1" + "}" * 300
    text = f'<tool_calls>[{{"name": "f", "arguments": {deep}}}]</tool_calls>'
    assert run("jamba", [text], early=True) == (call(0, "f", deep),)
    assert run("jamba", list(text), early=True) == (call(0, "f", deep),)
    assert run("jamba", [text]) == (Text(text),)  # without a grammar nothing protects the clients' readers

"""Thoughts and content are told apart, however the text is cut; the whole chain of filters."""

from __future__ import annotations

import itertools
import random

import pytest

from jamba_server.server.text.filters import Chain, Filter
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall, join
from jamba_server.server.text.reasoning import ReasoningFilter
from jamba_server.server.text.stop import StopStrings
from jamba_server.server.text.tool_calls import ToolCallFilter, ToolCallOptions


def run(filters: list[Filter], pieces: list[str]) -> tuple[Part, ...]:
    chain = Chain(filters)
    return join([*(part for piece in pieces for part in chain.push(Text(piece))), *chain.flush()])


def all_ways(text: str) -> list[list[str]]:
    return [[text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))]


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        # the prompt has opened the tag
        (True, "a b\n</think>\n\nc\n", [Reasoning("a b"), Text("c\n")]),
        (True, "\n\na\n\nb\n\n</think>c", [Reasoning("a\n\nb"), Text("c")]),
        (True, "</think>\n\nc", [Text("c")]),
        (True, "\n</think>\n", []),
        (True, "never ends\n", [Reasoning("never ends\n")]),
        (True, "cut </thi", [Reasoning("cut </thi")]),
        (True, "a </think > </ </think>b</think>c", [Reasoning("a </think > </ "), Text("b</think>c")]),
        (True, "a</think> \n<think>b", [Reasoning("a"), Text(" \n<think>b")]),
        # the reply opens the tag, or has no thoughts
        (False, "<think>\na\n</think>\n\nb", [Reasoning("a"), Text("b")]),
        (False, " \n <think>a</think>b", [Reasoning("a"), Text("b")]),
        (False, "b <think>a</think>", [Text("b <think>a</think>")]),
        (False, "\n\nb", [Text("\n\nb")]),
        (False, "<thin", [Text("<thin")]),
        (False, " \n", [Text(" \n")]),
        (False, " " * 33 + "<think>a</think>", [Text(" " * 33 + "<think>a</think>")]),
        (False, "", []),
    ],
)
def test_thoughts(thinking: bool, text: str, expected: list[Part]) -> None:
    for pieces in all_ways(text):
        assert run([ReasoningFilter(thinking=thinking)], pieces) == tuple(expected), pieces


def test_thoughts_are_delivered_as_they_come() -> None:
    thoughts = ReasoningFilter(thinking=True)
    pieces = ["\na", " b\n", "c <", "/", "think>", "\n", "\nd", "\n"]
    parts = [list(thoughts.push(Text(piece))) for piece in pieces]
    expected = [Reasoning("a"), Reasoning(" b"), Reasoning("\nc "), None, None, None, Text("d"), Text("\n")]
    assert parts == [[part] if part else [] for part in expected]


def test_it_says_whether_the_model_still_thinks() -> None:
    thoughts = ReasoningFilter(thinking=False)
    states: list[bool] = []
    for piece in ("\n", "<think>", "a", "</think>", "b"):
        list(thoughts.push(Text(piece)))
        states.append(thoughts.thinking)
    assert states == [False, True, True, False, False]


CALL = '<tool_call>{"name": "f", "arguments": {"a": "</think> STOP"}}</tool_call>'


def chain(*stops: str, thinking: bool = True) -> list[Filter]:
    return [
        StopStrings(stops, include=False),
        ReasoningFilter(thinking=thinking),
        ToolCallFilter(ToolCallOptions(style="hermes", names=frozenset("f")), new_id=lambda: "id"),
    ]


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (
            (),
            f"I call {CALL}\n</think>\n\n{CALL}\n",
            [Reasoning(f"I call {CALL[: CALL.index('</think>')]}"), Text(' STOP"}}</tool_call>\n</think>\n\n'), 0],
        ),
        ((), f"x\n</think>\n\n{CALL}", [Reasoning("x"), 0]),
        ((), f"x\n</think>\n\nOK.\n{CALL}", [Reasoning("x"), Text("OK.\n"), 0]),
        # stop strings are searched in all that the model writes, as in vLLM
        (("STOP",), "x STOP</think>y", [Reasoning("x ")]),
        (("think>",), "x</think>y", [Reasoning("x</")]),
        (("STOP",), f"x</think>{CALL}", [Reasoning("x"), Text(CALL[: CALL.index("STOP")])]),
    ],
)
def test_the_chain(stops: tuple[str, ...], text: str, expected: list[Part | int]) -> None:
    call = ToolCall(0, "id", "f", '{"a": "</think> STOP"}')
    for pieces in all_ways(text):
        assert run(chain(*stops), pieces) == tuple(call if part == 0 else part for part in expected), pieces


def test_random_texts_do_not_depend_on_the_cut() -> None:
    draw = random.Random(7)
    bits = ["<think>", "</think>", CALL, "\n", "\n", " ", "x", "ST", "OP", "<", "/"]
    for _ in range(2000):
        text = "".join(draw.choices(bits, k=draw.randrange(1, 10)))
        thinking = draw.random() < 0.5
        results = {run(chain("STOP", thinking=thinking), pieces) for pieces in ([text], list(text))}
        cuts = sorted(draw.sample(range(len(text)), min(3, len(text))))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert results == {run(chain("STOP", thinking=thinking), pieces)}, text

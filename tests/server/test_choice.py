"""Tokens to deltas: however the engine cuts its updates, the same text, log-probabilities and end come out."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from jamba_server.engine.types import Request, SamplingParams, TokenUpdate
from jamba_server.server.http.choice import MIN_LOGPROB, Choice, ChoiceDelta, TextOptions, merge
from jamba_server.server.text.parts import Reasoning, Text, ToolCall
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tool_calls import ToolCallOptions
from tests.server.conftest import Ids
from tests.server.fake_engine import EOS, score

TEXT = " hello € the STOP STOPS 漢"


def make(tokenizer: Tokenizer, options: TextOptions, *, prompt: list[int], min_tokens: int = 0) -> Choice:
    params = SamplingParams(logprobs=1, prompt_logprobs=1 if options.echo else None, min_tokens=min_tokens)
    return Choice(Request(id="r", prompt=prompt, params=params), 0, tokenizer, options)


def cut(prompt: list[int], tokens: list[int], borders: list[int], *, echo: bool) -> list[TokenUpdate]:
    """Returns the updates of a reply: the prompt's scores, the tokens and EOS in one row, which is cut at `borders`."""
    num_prompt = len(prompt) if echo else 0
    row = [*prompt[:num_prompt], *tokens]
    updates: list[TokenUpdate] = []
    for start, end in pairwise([0, *borders, len(row)]):
        new = row[max(start, num_prompt) : end]
        prompt_part = range(min(start, num_prompt), min(end, num_prompt))
        updates.append(
            TokenUpdate(
                request_id="r",
                token_ids=new,
                logprobs=[score(t, 1) for t in new],
                prompt_logprobs=[None if i == 0 else score(row[i], 1) for i in prompt_part],
                finish_reason="stop" if end == len(row) else None,
                stop_token_id=EOS if end == len(row) else None,
            )
        )
    return updates


def run(choice: Choice, updates: list[TokenUpdate]) -> ChoiceDelta:
    deltas: list[ChoiceDelta] = []
    for update in updates:
        if (delta := choice.take(update)) is not None:
            assert delta.parts or delta.finish_reason
            deltas.append(delta)
        if choice.finish_reason:
            break
    return merge(deltas)


@pytest.mark.parametrize(
    "options",
    [
        TextOptions(),
        TextOptions(strip_leading_space=True, skip_special_tokens=False),
        TextOptions(stops=("STOPS", "nothing")),
        TextOptions(stops=("P S", "OP"), include_stop=True),
        TextOptions(echo=True, stops=("the S",)),
    ],
)
def test_the_cut_does_not_matter(tokenizer: Tokenizer, ids: Ids, options: TextOptions) -> None:
    draw = random.Random(3)
    prompt, tokens = [1, *ids(" the STOPS €")], [*ids(TEXT), EOS]
    length = len(tokens) + (len(prompt) if options.echo else 0)

    def result(borders: list[int]) -> tuple[ChoiceDelta, int]:
        choice = make(tokenizer, options, prompt=prompt)
        return run(choice, cut(prompt, tokens, borders, echo=options.echo)), choice.num_tokens

    expected = result(list(range(1, length)))
    for _ in range(50):
        borders = sorted(draw.sample(range(1, length), draw.randrange(length)))
        assert result(borders) == expected


def test_min_tokens_come_before_a_stop_string(tokenizer: Tokenizer, ids: Ids) -> None:
    tokens = ids("aXbXc")
    choice = make(tokenizer, TextOptions(stops=("X",)), prompt=[1], min_tokens=2)
    delta = run(choice, cut([1], [*tokens, EOS], [], echo=False))
    assert (delta.text, delta.stop_reason, choice.num_tokens) == ("aXb", "X", 4)


def test_what_comes_after_a_stop_string_does_not_count(tokenizer: Tokenizer, ids: Ids) -> None:
    choice = make(tokenizer, TextOptions(stops=("X",)), prompt=[1])
    delta = run(choice, cut([1], [*ids("aXbc"), EOS], [], echo=False))
    assert (delta.text, len(delta.scores), choice.num_tokens) == ("a", 2, 2)


def test_half_a_character_at_the_end_is_a_replacement(tokenizer: Tokenizer, ids: Ids) -> None:
    choice = make(tokenizer, TextOptions(), prompt=[1])
    update = TokenUpdate(request_id="r", token_ids=ids("a€")[:-1], finish_reason="length")
    assert run(choice, [update]).text == "a\ufffd"


def test_a_stop_string_within_the_flushed_tail_ends_the_choice(tokenizer: Tokenizer, ids: Ids) -> None:
    choice = make(tokenizer, TextOptions(stops=("a\ufffd",)), prompt=[1])
    update = TokenUpdate(request_id="r", token_ids=ids("ba€")[:-1], finish_reason="length")
    delta = run(choice, [update])
    assert (delta.text, delta.finish_reason) == ("b", "stop")


def test_what_could_have_begun_a_stop_string_is_flushed_at_the_end(tokenizer: Tokenizer, ids: Ids) -> None:
    choice = make(tokenizer, TextOptions(stops=("STOP",)), prompt=[1])
    delta = run(choice, [TokenUpdate(request_id="r", token_ids=ids("abST"), finish_reason="length")])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("abST", "length", None)


CALLS = ToolCallOptions(style="jamba", names=frozenset({"f"}))
CALL = ' a <tool_calls>[{"name": "f", "arguments": {"x": "€"}}]</tool_calls> STOP b'


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tags are special tokens."""
    pieces = re.split("(</?tool_calls>)", text)
    special = tokenizer.special_tokens
    return [
        token
        for piece in pieces
        for token in ([special[piece]] if piece in special else tokenizer.encode(piece, add_special_tokens=False))
    ]


@pytest.mark.parametrize("stops", [(), ("STOP",)])
@pytest.mark.parametrize("early", [False, True])
def test_the_cut_does_not_matter_to_thoughts_and_calls(
    tokenizer: Tokenizer, stops: tuple[str, ...], early: bool
) -> None:
    draw = random.Random(4)
    tokens = [*tokens_of(tokenizer, f"\nth€ STO\n</think>\n{CALL}"), EOS]
    options = TextOptions(stops=stops, thinking=True, tool_calls=replace(CALLS, early=early))

    def result(borders: list[int]) -> tuple[ChoiceDelta, int, int]:
        choice = make(tokenizer, options, prompt=[1])
        delta = run(choice, cut([1], tokens, borders, echo=False))
        parts = tuple(replace(part, id="") if isinstance(part, ToolCall) else part for part in delta.parts)
        return replace(delta, parts=parts), choice.num_tokens, choice.num_reasoning_tokens

    expected = result(list(range(1, len(tokens))))
    delta, num_tokens, num_reasoning_tokens = expected
    rest = Text(" " if stops else " STOP b")
    assert delta.parts[:3] == (Reasoning("th€ STO"), Text(" a "), ToolCall(0, "", "f", '{"x": "€"}'))
    assert delta.parts[3:] == (() if stops else (rest,))
    assert delta.finish_reason == "tool_calls"
    assert (list(delta.token_ids), len(delta.scores)) == (tokens[:num_tokens], num_tokens)
    thoughts = tokens_of(tokenizer, "\nth€ STO\n</think>")
    assert num_reasoning_tokens == len(thoughts)
    for _ in range(50):
        borders = sorted(draw.sample(range(1, len(tokens)), draw.randrange(len(tokens))))
        assert result(borders) == expected


def test_special_tokens_that_the_filters_need_are_not_skipped(tokenizer: Tokenizer) -> None:
    tokens = tokens_of(tokenizer, " <tool_calls>a</tool_calls>")
    update = TokenUpdate(request_id="r", token_ids=[*tokens, EOS], finish_reason="length")
    assert run(make(tokenizer, TextOptions(tool_calls=CALLS), prompt=[1]), [update]).text == (
        " <tool_calls>a</tool_calls>"  # it is no call, so it stays as it is
    )
    assert run(make(tokenizer, TextOptions(), prompt=[1]), [update]).text == " a"


def test_calls_do_not_hide_that_a_reply_was_cut_off(tokenizer: Tokenizer) -> None:
    update = TokenUpdate(request_id="r", token_ids=tokens_of(tokenizer, CALL), finish_reason="length")
    delta = run(make(tokenizer, TextOptions(tool_calls=CALLS), prompt=[1]), [update])
    assert (delta.finish_reason, len(delta.parts)) == ("length", 3)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_the_text_of_a_stop_token(tokenizer: Tokenizer, ids: Ids, include: bool, text: str) -> None:
    tokens = ids("ab")
    choice = make(tokenizer, TextOptions(include_stop=include), prompt=[1])
    update = TokenUpdate(request_id="r", token_ids=tokens, finish_reason="stop", stop_token_id=tokens[-1])
    assert run(choice, [update]).text == text


def test_log_probabilities_are_finite(tokenizer: Tokenizer, ids: Ids) -> None:
    tokens = ids("a")
    logprob = score(tokens[0], 1)
    endless = type(logprob)(logprob.token_id, float("-inf"), ((5, float("-inf")),))
    choice = make(tokenizer, TextOptions(), prompt=[1])
    update = TokenUpdate(request_id="r", token_ids=tokens, logprobs=[endless], finish_reason="length")
    [entry] = run(choice, [update]).scores
    assert (entry.logprob, entry.top) == (MIN_LOGPROB, ((5, MIN_LOGPROB),))

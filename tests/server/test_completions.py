"""/v1/completions through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest

from jamba_server.engine.types import Request, TokenLogprob, TokenUpdate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import HELLO, Bench, Ids
from tests.server.fake_engine import EOS, MAX_MODEL_LEN, Event, says, score

PATH = "/v1/completions"
BOS = 1


async def complete(bench: Bench, **body: Any) -> dict[str, Any]:
    async with bench.http() as http:
        response = await http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_reply(bench: Bench, ids: Ids) -> None:
    async with bench.openai() as client:
        reply = await client.completions.create(model="jamba", prompt="hello", max_tokens=50)
    assert reply.id.startswith("cmpl-")
    assert (reply.object, reply.model) == ("text_completion", "jamba")
    [choice] = reply.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, HELLO, "stop", None)
    assert bench.engine.requests[0].prompt == [BOS, *ids("hello")]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(ids(HELLO)) + 1


async def test_the_default_is_16_tokens(bench: Bench) -> None:
    reply = await complete(bench, prompt="hello")
    assert bench.engine.requests[0].params.max_tokens == 16
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [[BOS]]),
        ("hello", [[BOS, "hello"]]),
        (["hello", "the"], [[BOS, "hello"], [BOS, "the"]]),
        ([7, 9], [[7, 9]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
    ],
)
async def test_shapes_of_a_prompt(bench: Bench, ids: Ids, prompt: object, expected: list[list[int | str]]) -> None:
    reply = await complete(bench, prompt=prompt)
    wanted = [[t for part in row for t in (ids(part) if isinstance(part, str) else [part])] for row in expected]
    assert [request.prompt for request in bench.engine.requests] == wanted
    assert len(reply["choices"]) == len(wanted)
    assert reply["usage"]["prompt_tokens"] == sum(len(row) for row in wanted)


async def test_choices_are_prompt_major(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids("a"), ids("b"))
    reply = await complete(bench, prompt=["hello", "the"], n=2, best_of=2)
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [(0, "a"), (1, "b"), (2, "a"), (3, "b")]
    requests = bench.engine.requests
    assert [request.index for request in requests] == [0, 1, 0, 1]
    assert requests[0].group == requests[1].group != requests[2].group == requests[3].group
    assert requests[0].params.seed == requests[1].params.seed != requests[2].params.seed
    assert reply["usage"]["prompt_tokens"] == len(requests[0].prompt) + len(requests[2].prompt)


async def test_add_special_tokens(bench: Bench, ids: Ids) -> None:
    await complete(bench, prompt="hello", add_special_tokens=False)
    assert bench.engine.requests[0].prompt == ids("hello")


async def test_special_tokens_in_the_text_are_text(bench: Bench, tokenizer: Tokenizer) -> None:
    await complete(bench, prompt="<|eom|>")
    assert tokenizer.special_tokens["<|eom|>"] not in bench.engine.requests[0].prompt


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|eom|>b")])
async def test_skip_special_tokens(bench: Bench, ids: Ids, tokenizer: Tokenizer, skip: bool, text: str) -> None:
    bench.engine.script = says([*ids("a"), tokenizer.special_tokens["<|eom|>"], *ids("b")])
    reply = await complete(bench, prompt="x", skip_special_tokens=skip)
    assert reply["choices"][0]["text"] == text


async def test_logprobs(bench: Bench, ids: Ids, tokenizer: Tokenizer) -> None:
    bench.engine.script = says(ids(" hello €x"))
    async with bench.openai() as client:
        reply = await client.completions.create(model="jamba", prompt="x", logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    tokens = [*ids(" hello €x"), EOS]
    assert logprobs.tokens == [tokenizer.token_text(t) for t in tokens]
    assert logprobs.token_logprobs == [score(t, 0).logprob for t in tokens]
    assert logprobs.text_offset is not None
    start = len(ids(" hello "))  # of the three bytes of the sign, which share one place
    assert logprobs.text_offset[start:] == [7, 7, 7, 8, 9]
    assert logprobs.top_logprobs is not None
    best = tokenizer.token_text(1800)
    assert logprobs.top_logprobs[0] == {best: -1 / 8, " hello": score(tokens[0], 0).logprob}


async def test_logprobs_0_are_of_the_chosen_tokens(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" hello"))
    logprobs = (await complete(bench, prompt="x", logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {" hello": score(ids(" hello")[0], 0).logprob}


async def test_of_tokens_that_look_alike_the_best_counts(bench: Bench, ids: Ids) -> None:
    first, second, third = ids("€")  # each of which alone is U+FFFD
    logprob = TokenLogprob(third, -3.0, ((first, -1.0), (second, -2.0)))

    def script(request: Request) -> Iterator[Event]:
        yield TokenUpdate(request_id=request.id, token_ids=[third], logprobs=[logprob], finish_reason="length")

    bench.engine.script = script
    logprobs = (await complete(bench, prompt="x", logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["\ufffd"]
    assert logprobs["token_logprobs"] == [-3.0]
    assert logprobs["top_logprobs"] == [{"\ufffd": -1.0}]


async def test_echo(bench: Bench) -> None:
    reply = await complete(bench, prompt="Say €:", echo=True)
    assert reply["choices"][0]["text"] == "Say €:" + HELLO
    assert reply["choices"][0]["logprobs"] is None
    assert bench.engine.requests[0].params.prompt_logprobs is None


async def test_echo_with_logprobs(bench: Bench, ids: Ids, tokenizer: Tokenizer) -> None:
    bench.engine.script = says(ids(" the"))
    choice = (await complete(bench, prompt=" hello x", echo=True, logprobs=1))["choices"][0]
    tokens = [BOS, *ids(" hello x"), *ids(" the"), EOS]
    assert choice["text"] == " hello x the"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [tokenizer.token_text(t) for t in tokens]
    assert logprobs["tokens"][0] == "<|startoftext|>"  # it has an entry, but its text is not echoed
    assert logprobs["token_logprobs"] == [None, *(score(t, 0).logprob for t in tokens[1:])]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, *accumulate((len(t) for t in logprobs["tokens"][1:-1]), initial=0)]


@pytest.mark.parametrize("skip", [True, False])
async def test_the_text_of_bos_is_not_echoed(bench: Bench, skip: bool) -> None:
    reply = await complete(bench, prompt="a<|eom|>", echo=True, skip_special_tokens=skip, max_tokens=1)
    assert reply["choices"][0]["text"].startswith("a<|eom|>")


@pytest.mark.parametrize("logprobs", [None, 0, 3])
async def test_max_tokens_0_scores_the_prompt(bench: Bench, ids: Ids, logprobs: int | None) -> None:
    bench.engine.script = says([])
    reply = await complete(bench, prompt=" hello the world", echo=True, max_tokens=0, logprobs=logprobs)
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" hello the world", "length")
    assert reply["usage"]["completion_tokens"] == 0
    if logprobs is not None:
        assert len(choice["logprobs"]["tokens"]) == 1 + len(ids(" hello the world"))


async def test_a_stop_string_does_not_end_the_echo(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" in END out"))
    choice = (await complete(bench, prompt="END of", echo=True, stop="END"))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("END of in ", "stop", "END")


async def test_a_prompt_that_ends_within_a_character_is_finished_by_the_reply(bench: Bench, ids: Ids) -> None:
    first, *rest = ids("€")
    bench.engine.script = says(rest)
    assert (await complete(bench, prompt=[first], echo=True))["choices"][0]["text"] == "€"


async def test_a_stop_token_of_the_request_is_named(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" hello"))
    reply = await complete(bench, prompt="x", stop_token_ids=[EOS])
    assert reply["choices"][0]["stop_reason"] == EOS
    reply = await complete(bench, prompt="x", stop_token_ids=[5])
    assert reply["choices"][0]["stop_reason"] is None


async def test_lm_eval_s_request(bench: Bench, ids: Ids) -> None:
    """The fields that lm-eval's local-completions sends to score a continuation."""
    prompt = [[BOS, *ids(" hello the")]]
    reply = await complete(
        bench, model="jamba", prompt=prompt, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    logprobs = reply["choices"][0]["logprobs"]
    scored = logprobs["token_logprobs"][1:-1]
    assert scored == [score(t, 0).logprob for t in ids(" hello the")]
    assert all(max(top.values()) >= s for top, s in zip(logprobs["top_logprobs"][1:-1], scored, strict=True))


@pytest.mark.parametrize(("fields", "limit"), [({"max_tokens": -1}, None), ({"max_completion_tokens": 5}, 5), ({}, 16)])
async def test_the_longest_reply(bench: Bench, fields: dict[str, Any], limit: int | None) -> None:
    await complete(bench, prompt=[5, 6], **fields)
    assert bench.engine.requests[0].params.max_tokens == (limit or MAX_MODEL_LEN - 2)


@pytest.mark.parametrize("add", [True, False])
async def test_the_text_of_the_begin_of_text_token_is_that_token_and_no_second_one(
    bench: Bench, ids: Ids, add: bool
) -> None:
    body = {"prompt": "<|startoftext|> hello", "add_special_tokens": add}
    async with bench.http() as http:
        reply = await http.post(PATH, json=body)
        tokens = await http.post("/tokenize", json=body)
        plain = await http.post(PATH, json={"prompt": " hello <|startoftext|>"})
    for response in (reply, tokens):
        assert response.headers["x-warning"] == (
            "the prompt begins with the text of <|startoftext|>, which was read as that token; no second one was added"
        )
    assert tokens.json()["tokens"] == bench.engine.requests[0].prompt == [BOS, *ids(" hello")]
    assert "x-warning" not in plain.headers
    assert bench.engine.requests[1].prompt == [BOS, *ids(" hello <|startoftext|>")]  # elsewhere it is text


async def test_bad_words_and_the_salt_arrive(bench: Bench, ids: Ids) -> None:
    await complete(bench, prompt=["a", "b"], bad_words=["hello"], allowed_token_ids=[7], cache_salt="s", n=2)
    assert {request.cache_salt for request in bench.engine.requests} == {"s"}
    for request in bench.engine.requests:
        assert request.params.bad_words == (tuple(ids("hello")), tuple(ids(" hello")))
        assert request.params.allowed_token_ids == (7,)

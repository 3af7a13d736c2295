"""/tokenize, /detokenize, /tokenizer_info, and what makes text of tokens beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.asgi import TIMEOUT_SECONDS
from tests.server.conftest import TEMPLATE, Bench, Ids, MakeBench, chat
from tests.server.fake_engine import MAX_MODEL_LEN

CHAT = "/v1/chat/completions"


async def test_tokenize(bench: Bench, ids: Ids, tokenizer: Tokenizer) -> None:
    async with bench.http() as http:
        with_bos = (await http.post("/tokenize", json={"prompt": " hello", "return_token_strs": True})).json()
        plain = (await http.post("/tokenize", json={"prompt": " hello", "add_special_tokens": False})).json()
        messages = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
        turn = (await http.post("/tokenize", json=messages)).json()
    assert with_bos == {
        "count": 2,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [1, *ids(" hello")],
        "token_strs": ["<|startoftext|>", " hello"],
    }
    assert (plain["tokens"], plain["token_strs"]) == (ids(" hello"), None)
    expected = "<|startoftext|><|bom|><|user|> Hi<|eom|>"
    assert tokenizer.decode(turn["tokens"], skip_special_tokens=False) == expected


async def test_detokenize(bench: Bench, ids: Ids) -> None:
    async with bench.http() as http:
        text = (await http.post("/detokenize", json={"tokens": [1, *ids(" hello €")]})).json()
        nothing = (await http.post("/detokenize", json={"tokens": []})).json()
    assert (text, nothing) == ({"prompt": "<|startoftext|> hello €"}, {"prompt": ""})


async def test_tokenizer_info_is_what_lm_eval_reads(bench: Bench, make_bench: MakeBench, tokenizer: Tokenizer) -> None:
    async with bench.http() as http:
        info = (await http.get("/tokenizer_info")).json()
        for name in ("bos_token", "eos_token", "pad_token"):
            body = {"prompt": info[name], "add_special_tokens": False}
            assert (await http.post("/tokenize", json=body)).json()["tokens"] == [info[f"{name}_id"]]
        # with BOS before it, or with more text, it is text that the model reads as such
        text = (
            await http.post("/tokenize", json={"prompt": info["eos_token"] + "a", "add_special_tokens": False})
        ).json()
    assert info["chat_template"] == TEMPLATE
    assert info["model_max_length"] == MAX_MODEL_LEN
    assert info["vocab_size"] == tokenizer.vocab_size
    assert info["eos_token"] == tokenizer.named_tokens["eos_token"]
    assert not set(text["tokens"]) & set(tokenizer.special_tokens.values())
    async with make_bench(template=None).http() as http:
        assert (await http.get("/tokenizer_info")).json() == {**info, "chat_template": None}


LONG_TEXTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ids to text": ("/detokenize", {"tokens": [1, 2, 3]}, "decode"),
    "token strings": ("/tokenize", {"prompt": " hello", "return_token_strs": True}, "token_text"),
    "log-probabilities of a chat": (CHAT, chat(logprobs=True, top_logprobs=2), "token_text"),
    "log-probabilities of a completion": ("/v1/completions", {"prompt": "a", "logprobs": 2}, "token_text"),
}


@pytest.mark.parametrize("name", LONG_TEXTS)
async def test_texts_are_made_while_other_requests_are_answered(
    bench: Bench, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, body, method = LONG_TEXTS[name]
    begun, another_was_answered = threading.Event(), threading.Event()
    original = getattr(tokenizer, method)

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert another_was_answered.wait(TIMEOUT_SECONDS), "the event loop waits for this text"
        return original(*args, **kwargs)

    monkeypatch.setattr(tokenizer, method, slow)
    async with bench.http() as http:
        reply = asyncio.create_task(http.post(path, json=body))
        assert await asyncio.to_thread(begun.wait, TIMEOUT_SECONDS)
        assert (await http.get("/health")).status_code == 200
        another_was_answered.set()
        assert (await reply).status_code == 200


async def test_a_conversation_that_cannot_fit_is_refused_before_it_is_tokenised(bench: Bench) -> None:
    messages = [{"role": "user", "content": "word " * 400_000}]
    async with bench.http() as http:
        for path, body in ((CHAT, {"messages": messages}), ("/tokenize", {"messages": messages})):
            error = (await http.post(path, json=body)).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"reasoning_effort": "high"}),
        ("/v1/chat/completions/render", {"reasoning_effort": "high"}),
        ("/v1/chat/completions", {"reasoning_effort": "high"}),
    ],
)
async def test_an_effort_that_the_template_does_not_read_is_listed(bench: Bench, path: str, body: Any) -> None:
    async with bench.http() as http:
        reply = await http.post(path, json=chat(**body))
    assert reply.status_code == 200
    assert reply.headers["X-Ignored-Fields"] == "reasoning_effort"

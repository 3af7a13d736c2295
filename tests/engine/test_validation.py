"""Ranges of a request's numbers: the last value allowed, the first refused, and what the refusal says."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import pytest

from jamba_server.engine.errors import ContextTooLong, ModelCannot, RequestRejected
from jamba_server.engine.types import RequestKind, SamplingParams
from jamba_server.engine.validation import MAX_GRAMMAR_CHARS, clamp_max_tokens, validate, validate_kind, validate_prompt
from tests.engine.scripted_engine import INFO

VOCAB = 100

ALLOWED: list[dict[str, object]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 2.0},
    {"top_p": 1e-9},
    {"top_k": 0},
    {"top_k": 2**31 - 1},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 2.0},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"logit_bias": {0: -100.0, 99: 100.0}},
    {"max_tokens": 0},
    {"max_tokens": 10**15},
    {"max_tokens": 7, "min_tokens": 7},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"logprobs": 20, "prompt_logprobs": 0},
    {"stop_token_ids": tuple(range(VOCAB)) + (0,) * 28},
    {"allowed_token_ids": (0, 99)},
    {"allowed_token_ids": (5, 6), "bad_words": ((6, 5), (5, 6))},
    {"bad_words": ((0,), (99, 0)) * 64},
    {"seed": 2**63 - 1},
    {"seed": -(2**63)},
    {"grammar": "x" * MAX_GRAMMAR_CHARS},
    {"thinking_token_budget": 0, "thinking_end": (0, 99)},
]

REFUSED: list[tuple[str, object]] = [
    ("temperature", -0.01),
    ("temperature", 2.01),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -1),
    ("top_k", 2**31),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("logit_bias", {100: 0.0}),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {5: 100.1}),
    ("logit_bias", {5: -100.1}),
    ("max_tokens", -1),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("stop_token_ids", (3, 100)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (3,) * 129),
    ("allowed_token_ids", (100,)),
    ("allowed_token_ids", (-1, 3)),
    ("allowed_token_ids", (3,) * 4097),
    ("bad_words", ((),)),
    ("bad_words", ((1, 100),)),
    ("bad_words", ((1,),) * 129),
    ("bad_words", tuple((n,) for n in range(100))),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("grammar", "x" * (MAX_GRAMMAR_CHARS + 1)),
    ("thinking_token_budget", 5),
    ("thinking_token_budget", -1),
    ("thinking_end", (100,)),
    ("thinking_end", (1,) * 33),
]

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def make_params(fields: dict[str, object]) -> SamplingParams:
    return msgspec.structs.replace(SamplingParams(), **fields)


@pytest.mark.parametrize("fields", ALLOWED, ids=str)
def test_allowed(fields: dict[str, object]) -> None:
    validate(make_params(fields), vocab_size=VOCAB)


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_refused(field: str, value: object) -> None:
    with pytest.raises(RequestRejected) as refusal:
        validate(make_params({field: value}), vocab_size=VOCAB)
    assert refusal.value.param == field
    assert str(refusal.value).startswith(field)


def test_a_reply_that_must_go_on_needs_a_token_that_does_not_end_it() -> None:
    params = make_params({"allowed_token_ids": (2, 7), "stop_token_ids": (7,), "min_tokens": 1})
    validate(msgspec.structs.replace(params, min_tokens=0), vocab_size=VOCAB, eos_token_ids=(2,))
    with pytest.raises(RequestRejected, match="leaves no token to choose"):
        validate(params, vocab_size=VOCAB, eos_token_ids=(2,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FLOATS)
def test_not_finite_is_refused(field: str, value: float) -> None:
    with pytest.raises(RequestRejected) as refusal:
        validate(make_params({field: value}), vocab_size=VOCAB)
    assert refusal.value.param == field


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_bias_is_refused(value: float) -> None:
    with pytest.raises(RequestRejected) as refusal:
        validate(make_params({"logit_bias": {4: value}}), vocab_size=VOCAB)
    assert refusal.value.param == "logit_bias"


def test_300_biases_are_the_limit() -> None:
    validate(make_params({"logit_bias": dict.fromkeys(range(300), 1.0)}), vocab_size=1000)
    with pytest.raises(RequestRejected, match="has 301 entries; the limit is 300"):
        validate(make_params({"logit_bias": dict.fromkeys(range(301), 1.0)}), vocab_size=1000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.5}, "temperature is 2.5; it must be at least 0 and at most 2."),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1."),
        ({"logit_bias": {7: 101.0}}, "logit_bias[7] is 101.0; it must be at least -100 and at most 100."),
        ({"logit_bias": {100: 1.0}}, "logit_bias has token id 100; ids are 0 to 99."),
        ({"stop_token_ids": (-5,)}, "stop_token_ids has token id -5; ids are 0 to 99."),
        (
            {"allowed_token_ids": (5, 6), "bad_words": ((5,), (6, 6))},
            "allowed_token_ids leaves no token to choose: bad_words or min_tokens forbid all allowed tokens.",
        ),
        ({"min_tokens": 20}, "min_tokens is 20; it must not exceed max_tokens, which is 16."),
    ],
)
def test_messages_name_field_value_and_limit(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestRejected) as refusal:
        validate(make_params(fields), vocab_size=VOCAB)
    assert str(refusal.value) == message


def check_prompt(prompt: list[int], *, max_tokens: int = 16) -> None:
    validate_prompt(prompt, vocab_size=VOCAB, max_model_len=8, max_tokens=max_tokens, param="messages")


def test_prompt_leaves_room_for_one_token() -> None:
    check_prompt([0, 99] * 3 + [5])
    with pytest.raises(ContextTooLong) as refusal:
        check_prompt([1] * 8)
    assert (refusal.value.length, refusal.value.limit, refusal.value.param) == (8, 8, "messages")
    assert refusal.value.code == "context_length_exceeded"


def test_prompt_to_be_scored_fills_the_context() -> None:
    check_prompt([1] * 8, max_tokens=0)
    with pytest.raises(ContextTooLong, match="is 8 tokens; the prompt has 9"):
        check_prompt([1] * 9, max_tokens=0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "messages is empty; it needs at least one token."),
        ([1, 100], "messages has token id 100 at position 1; ids are 0 to 99."),
        ([1, 2, -1, 100], "messages has token id -1 at position 2; ids are 0 to 99."),
    ],
)
def test_bad_prompts(prompt: list[int], message: str) -> None:
    with pytest.raises(RequestRejected) as refusal:
        check_prompt(prompt)
    assert str(refusal.value) == message
    assert refusal.value.param == "messages"


def test_max_tokens_is_cut_to_the_context() -> None:
    params = SamplingParams(max_tokens=10**12, min_tokens=50, top_k=3)
    assert clamp_max_tokens(params, 30, 64) == SamplingParams(max_tokens=34, min_tokens=34, top_k=3)
    assert clamp_max_tokens(params, 4, 64) == SamplingParams(max_tokens=60, min_tokens=50, top_k=3)
    assert clamp_max_tokens(SamplingParams(max_tokens=0), 64, 64) == SamplingParams(max_tokens=0)


def test_max_tokens_that_fits_stays() -> None:
    params = SamplingParams(max_tokens=34)
    assert clamp_max_tokens(params, 30, 64) is params


def test_validation_does_without_torch() -> None:
    code = "import sys, engine.validation, engine.sampling.keys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("labels", "served", "refused"),
    [
        ((), ("generate", "score", "embed"), {"classify": "without a classifier's head"}),
        (("no", "yes"), ("classify", "embed"), dict.fromkeys(("generate", "score"), "is a classifier")),
    ],
)
def test_kinds_that_the_model_cannot_serve_are_refused(
    labels: tuple[str, ...], served: tuple[RequestKind, ...], refused: dict[RequestKind, str]
) -> None:
    info = msgspec.structs.replace(INFO, labels=labels)
    for kind in served:
        validate_kind(kind, info)
    for kind, why in refused.items():
        with pytest.raises(ModelCannot, match=why):
            validate_kind(kind, info)

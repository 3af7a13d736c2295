"""Checks the prompt and the parameters of a request when the request arrives. This module does not import torch.

A value out of range raises `RequestRejected`, whose message names the field, its value and the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from jamba_server.engine.errors import ContextTooLong, ModelCannot, RequestRejected
from jamba_server.engine.types import MAX_LOGPROBS, EngineInfo, RequestKind, SamplingParams

MAX_LOGIT_BIAS_ENTRIES = 300  # maximum number of entries in logit_bias; OpenAI's API has the same limit
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128  # maximum number of forbidden token sequences; each bad word becomes one or two sequences
MAX_ALLOWED_TOKEN_IDS = 4096  # maximum per request; limits the time for copying these ids to the device in each step
MAX_GRAMMAR_CHARS = 1 << 19  # maximum number of characters of a grammar, which bounds the time to read it
MAX_THINKING_END = 32  # maximum number of tokens of the tag that ends the model's reasoning
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


class Range(NamedTuple):
    """The numbers from `low` to `high`. `high` is included, and `low` is included unless `open` is true."""

    low: float
    high: float
    open: bool = False


# The allowed ranges of request fields: those of OpenAI's API, or those of vLLM for fields that OpenAI's API does not
# have. vLLM has no upper limit for repetition_penalty; here this field has an upper limit, so that float32 logits stay
# finite. The HTTP schemas and `GenerationDefaults` use the same table.
RANGES: Mapping[str, Range] = MappingProxyType(
    {
        "temperature": Range(0, 2),
        "top_p": Range(0, 1, open=True),
        "top_k": Range(0, INT32_MAX),
        "min_p": Range(0, 1),
        "repetition_penalty": Range(0.01, 2),
        "presence_penalty": Range(-2, 2),
        "frequency_penalty": Range(-2, 2),
        "logit_bias": Range(-100, 100),
        "seed": Range(-INT64_MAX - 1, INT64_MAX),
        # in addition to this range, the function `clamp_max_tokens` limits max_tokens to the space left in the context
        "max_tokens": Range(0, INT64_MAX),
        "min_tokens": Range(0, INT64_MAX),
        "logprobs": Range(0, MAX_LOGPROBS),
        "prompt_logprobs": Range(0, MAX_LOGPROBS),
        "thinking_token_budget": Range(0, INT64_MAX),
    }
)


def validate(params: SamplingParams, *, vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> None:
    """Raises RequestRejected for a parameter that is out of range or contradicts another parameter."""
    for name in RANGES:
        if name != "logit_bias" and (value := getattr(params, name)) is not None:
            _check_range(name, value)
    if params.min_tokens > params.max_tokens:
        _reject("min_tokens", f"is {params.min_tokens}; it must not exceed max_tokens, which is {params.max_tokens}")
    _check_logit_bias(params.logit_bias, vocab_size)
    _check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size, limit=MAX_STOP_TOKEN_IDS)
    _check_token_ids("allowed_token_ids", params.allowed_token_ids, vocab_size, limit=MAX_ALLOWED_TOKEN_IDS)
    _check_bad_words(params, vocab_size)
    _check_grammar(params.grammar)
    _check_thinking(params, vocab_size)
    _check_choice_is_left(params, vocab_size, eos_token_ids)


def validate_kind(kind: RequestKind, info: EngineInfo) -> None:
    """Raises ModelCannot if the model cannot serve requests of this kind. A language model has no classifier's head,
    and a classifier has no language model head. Both have hidden states."""
    if info.labels and kind in ("generate", "score"):
        raise ModelCannot(
            f"This model is a classifier ({info.architecture}): it cannot generate text or give the probabilities of "
            "tokens. It serves /classify, /pooling, /v1/embeddings, and with one label /v1/score and /v1/rerank."
        )
    if not info.labels and kind == "classify":
        raise ModelCannot(
            f"This model is a language model ({info.architecture}) without a classifier's head. It serves /classify if "
            "the request has `labels` or the server runs with --classify-labels."
        )


def validate_prompt(
    prompt: list[int], *, vocab_size: int, max_model_len: int, max_tokens: int, param: str = "prompt"
) -> None:
    """Raises RequestRejected for an empty prompt or an unknown token id. Raises ContextTooLong if the prompt leaves no
    room for the first token of a reply, or, with max_tokens 0, if the prompt itself is longer than the context. `param`
    is the name of the request's field that has the prompt."""
    if not prompt:
        _reject(param, "is empty; it needs at least one token")
    if len(prompt) > max_model_len - min(max_tokens, 1):
        raise ContextTooLong(length=len(prompt), limit=max_model_len, param=param, has_reply=max_tokens > 0)
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        position, token_id = next((i, t) for i, t in enumerate(prompt) if not 0 <= t < vocab_size)
        _reject(param, f"has token id {token_id} at position {position}; ids are 0 to {vocab_size - 1}")


def clamp_max_tokens(params: SamplingParams, prompt_len: int, max_model_len: int) -> SamplingParams:
    """Returns `params` with max_tokens reduced to the number of tokens that fit into the context after the prompt. If
    min_tokens is larger than the new max_tokens, min_tokens is reduced to the same number."""
    max_tokens = min(params.max_tokens, max_model_len - prompt_len)
    assert max_tokens >= 0, "the prompt was not validated"
    if max_tokens == params.max_tokens:
        return params
    return msgspec.structs.replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens))


def _check_logit_bias(logit_bias: dict[int, float], vocab_size: int) -> None:
    if len(logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
        _reject("logit_bias", f"has {len(logit_bias)} entries; the limit is {MAX_LOGIT_BIAS_ENTRIES}")
    for token_id, bias in logit_bias.items():
        _check_token_id("logit_bias", token_id, vocab_size)
        _check_range("logit_bias", bias, item=f"[{token_id}]")


def _check_token_ids(param: str, token_ids: tuple[int, ...], vocab_size: int, *, limit: int) -> None:
    if len(token_ids) > limit:
        _reject(param, f"has {len(token_ids)} entries; the limit is {limit}")
    for token_id in token_ids:
        _check_token_id(param, token_id, vocab_size)


def _check_bad_words(params: SamplingParams, vocab_size: int) -> None:
    if len(params.bad_words) > MAX_BAD_WORDS:
        _reject("bad_words", f"has {len(params.bad_words)} sequences of tokens; the limit is {MAX_BAD_WORDS}")
    for word in params.bad_words:
        if not word:
            _reject("bad_words", "has an empty word; a word needs at least one token")
        for token_id in word:
            _check_token_id("bad_words", token_id, vocab_size)


def _check_grammar(grammar: str) -> None:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        _reject("grammar", f"has {len(grammar)} characters; the limit is {MAX_GRAMMAR_CHARS}")


def _check_thinking(params: SamplingParams, vocab_size: int) -> None:
    if params.thinking_token_budget is not None and not params.thinking_end:
        _reject("thinking_token_budget", "is set, but this model has no tokens that end its thoughts")
    _check_token_ids("thinking_end", params.thinking_end, vocab_size, limit=MAX_THINKING_END)


def _check_choice_is_left(params: SamplingParams, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
    """Raises RequestRejected if a reply could reach a point where every token is forbidden. Only the last two tokens of
    each bad word are considered, so a few requests are rejected although the engine could run them."""
    if not (params.bad_words or params.allowed_token_ids):
        return
    always = {word[-1] for word in params.bad_words if len(word) == 1}
    if params.min_tokens:
        always.update(eos_token_ids, params.stop_token_ids)
    # maps a token id to the ids of the tokens that a bad word can forbid directly after that token
    after: dict[int, set[int]] = {}
    for word in params.bad_words:
        if len(word) > 1:
            after.setdefault(word[-2], set()).add(word[-1])
    allowed = set(params.allowed_token_ids)
    worst = [always | ends for ends in (set[int](), *after.values())]
    if any(allowed <= forbidden if allowed else len(forbidden) == vocab_size for forbidden in worst):
        param = "allowed_token_ids" if params.allowed_token_ids else "bad_words"
        _reject(param, "leaves no token to choose: bad_words or min_tokens forbid all allowed tokens")


def _check_token_id(param: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        _reject(param, f"has token id {token_id}; ids are 0 to {vocab_size - 1}")


def _check_range(param: str, value: float, *, item: str = "") -> None:
    """Raises RequestRejected if `value` is outside the field's range. NaN counts as outside."""
    low, high, is_open = RANGES[param]
    if not ((low < value if is_open else low <= value) and value <= high):
        lower = f"above {low}" if is_open else f"at least {low}"
        _reject(param, f"is {value}; it must be {lower} and at most {high}", item=item)


def _reject(param: str, message: str, *, item: str = "") -> None:
    raise RequestRejected(f"{param}{item} {message}.", param=param)

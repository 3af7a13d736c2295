"""The range of every number in a request, checked once, where requests enter. No torch.

A refusal is a `RequestRejected` that names the field, its value and the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from jamba_server.engine.errors import ContextTooLong, RequestRejected
from jamba_server.engine.types import MAX_LOGPROBS, SamplingParams

MAX_LOGIT_BIAS_ENTRIES = 300  # OpenAI's limit
MAX_STOP_TOKEN_IDS = 128
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


class Range(NamedTuple):
    """The numbers from `low` to `high`, which are both allowed; but not `low` itself if it is `open`."""

    low: float
    high: float
    open: bool = False


# OpenAI's, and vLLM's for what OpenAI lacks; repetition_penalty, which vLLM leaves open above 0, is bounded so that
# float32 logits stay finite. The server's schemas and `GenerationDefaults` read them here.
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
        "max_tokens": Range(0, INT64_MAX),  # cut to the context later
        "min_tokens": Range(0, INT64_MAX),
        "logprobs": Range(0, MAX_LOGPROBS),
        "prompt_logprobs": Range(0, MAX_LOGPROBS),
    }
)


def validate(params: SamplingParams, *, vocab_size: int) -> None:
    """Raises RequestRejected."""
    for name in RANGES:
        if name != "logit_bias" and (value := getattr(params, name)) is not None:
            _check_range(name, value)
    if params.min_tokens > params.max_tokens:
        _reject("min_tokens", f"is {params.min_tokens}; it must not exceed max_tokens, which is {params.max_tokens}")
    _check_logit_bias(params.logit_bias, vocab_size)
    _check_stop_token_ids(params.stop_token_ids, vocab_size)


def validate_prompt(
    prompt: list[int], *, vocab_size: int, max_model_len: int, max_tokens: int, param: str = "prompt"
) -> None:
    """Raises RequestRejected, and ContextTooLong where the prompt leaves no room for a reply's first token (or, with
    max_tokens 0, for itself). `param` is the request's field that the prompt came from."""
    if not prompt:
        _reject(param, "is empty; it needs at least one token")
    if len(prompt) > max_model_len - min(max_tokens, 1):
        raise ContextTooLong(length=len(prompt), limit=max_model_len, param=param)
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        position, token_id = next((i, t) for i, t in enumerate(prompt) if not 0 <= t < vocab_size)
        _reject(param, f"has token id {token_id} at position {position}; ids are 0 to {vocab_size - 1}")


def clamp_max_tokens(params: SamplingParams, prompt_len: int, max_model_len: int) -> SamplingParams:
    """`params` with max_tokens, and min_tokens with it, cut to what the context leaves after the prompt."""
    max_tokens = min(params.max_tokens, max_model_len - prompt_len)
    assert max_tokens >= 0, "prompt was not validated"
    if max_tokens == params.max_tokens:
        return params
    return msgspec.structs.replace(params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens))


def _check_logit_bias(logit_bias: dict[int, float], vocab_size: int) -> None:
    if len(logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
        _reject("logit_bias", f"has {len(logit_bias)} entries; the limit is {MAX_LOGIT_BIAS_ENTRIES}")
    for token_id, bias in logit_bias.items():
        _check_token_id("logit_bias", token_id, vocab_size)
        _check_range("logit_bias", bias, item=f"[{token_id}]")


def _check_stop_token_ids(stop_token_ids: tuple[int, ...], vocab_size: int) -> None:
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        _reject("stop_token_ids", f"has {len(stop_token_ids)} entries; the limit is {MAX_STOP_TOKEN_IDS}")
    for token_id in stop_token_ids:
        _check_token_id("stop_token_ids", token_id, vocab_size)


def _check_token_id(param: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        _reject(param, f"has token id {token_id}; ids are 0 to {vocab_size - 1}")


def _check_range(param: str, value: float, *, item: str = "") -> None:
    """Refuses what is not within the field's range; NaN is within nothing."""
    low, high, is_open = RANGES[param]
    if not ((low < value if is_open else low <= value) and value <= high):
        lower = f"above {low}" if is_open else f"at least {low}"
        _reject(param, f"is {value}; it must be {lower} and at most {high}", item=item)


def _reject(param: str, message: str, *, item: str = "") -> None:
    raise RequestRejected(f"{param}{item} {message}.", param=param)

"""Builds the engine's sampling parameters from the fields of an HTTP request and checks them against the engine's
limits.

If the request leaves out a sampling parameter, its default comes from the model's file generation_config.json.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.types import BACKGROUND_PRIORITY, EngineInfo, SamplingParams
from jamba_server.engine.validation import clamp_max_tokens, validate, validate_kind, validate_prompt
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.errors import is_background
from jamba_server.server.http.generation import Prompt
from jamba_server.server.http.schemas.base import INT32_MAX, GenerationBody

T = TypeVar("T")


class HasInfo(Protocol):
    """The type of an object that has the engine's limits as its property `info`, such as the engine's client."""

    @property
    def info(self) -> EngineInfo: ...


def sampling_params(
    body: GenerationBody,
    defaults: GenerationDefaults,
    *,
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
    grammar: str = "",
) -> SamplingParams:
    """Returns the sampling parameters of a request.

    The argument `bad_words` has the token ids of the texts in the body's field `bad_words`. The argument `seed` is used
    if the body has no seed. The argument `logprobs` is the number of most likely tokens that the reply lists at each
    position of the generated text. The argument `prompt_logprobs` is the same number for each position of the prompt.
    The value None means no log-probabilities.
    """
    top_k = _first(body.top_k, defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=_first(body.temperature, defaults.temperature),
        top_p=_first(body.top_p, defaults.top_p),
        top_k=0 if top_k == -1 else top_k,
        min_p=_first(body.min_p, defaults.min_p),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        bad_words=bad_words,
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        seed=seed if body.seed is None else body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def admit_prompt(
    token_ids: list[int],
    params: SamplingParams,
    engine: HasInfo,
    *,
    param: str,
    save_positions: tuple[int, ...] = (),
    message_starts: tuple[int, ...] = (),
) -> Prompt:
    """Checks a prompt and its sampling parameters against the limits of the engine, and returns a `Prompt` object.

    In the result, `max_tokens` is at most the number of tokens that the context has room for after the prompt. Raises
    RequestRejected if the prompt or a parameter exceeds a limit. The argument `param` is the name of the request field
    that has the prompt; an error about the prompt names this field.
    """
    info = engine.info
    validate_kind("generate", info)
    validate(params, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids)
    validate_prompt(
        token_ids,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_tokens=params.max_tokens,
        param=param,
    )
    clamped = clamp_max_tokens(params, len(token_ids), info.max_model_len)
    return Prompt(token_ids, clamped, save_positions, message_starts)


def engine_priority(priority: int | None, scope: Scope, *, enabled: bool) -> int:
    """Returns the priority of a request in the engine, from the value of its field `priority`. Lines of batches run in
    the background; among them, their own priorities count.

    Raises RequestRejected for a priority if the server does not have the option `enable_priority`.
    """
    if priority and not enabled:
        raise RequestRejected(
            f"priority is {priority}, but this server was started without --enable-priority.", param="priority"
        )
    return (priority or 0) + (BACKGROUND_PRIORITY + INT32_MAX + 1 if is_background(scope) else 0)


def _first(requested: T | None, default: T) -> T:
    return default if requested is None else requested

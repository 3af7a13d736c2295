"""Turns the texts of requests into token ids and checks them."""

from __future__ import annotations

from collections.abc import Sequence

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.validation import validate_prompt
from jamba_server.server.http.services import Services


async def encode_inputs(
    services: Services, inputs: Sequence[str | list[int]], *, param: str, add_special_tokens: bool = True
) -> list[list[int]]:
    """Returns the token ids of texts and of lists of token ids. Raises RequestRejected for an input that is empty, too
    long or has unknown ids; `param` is the request's field that has the inputs."""
    tokens: list[list[int]] = []
    for position, given in enumerate(inputs):
        ids = given
        if isinstance(given, str):
            services.check_size(given, param=param)
            ids = await services.encode_prompt(given, add_special_tokens=add_special_tokens)
        assert isinstance(ids, list)
        check_prompt(services, ids, param=f"{param}.{position}" if len(inputs) > 1 else param)
        tokens.append(ids)
    return tokens


async def encode_pairs(services: Services, pairs: Sequence[tuple[str, str]], *, param: str) -> list[list[int]]:
    """Returns the token ids of pairs of texts, as the post-processor in tokenizer.json joins them."""
    tokens: list[list[int]] = []
    for position, (first, second) in enumerate(pairs):
        services.check_size(first + second, param=param)
        ids = await services.in_thread(lambda pair=(first, second): services.tokenizer.encode_pair(*pair))
        check_prompt(services, ids, param=f"{param}.{position}")
        tokens.append(ids)
    return tokens


def check_prompt(services: Services, token_ids: list[int], *, param: str) -> None:
    info = services.engine.info
    limits = {"vocab_size": info.vocab_size, "max_model_len": info.max_model_len}
    validate_prompt(token_ids, **limits, max_tokens=0, param=param)


def without_padding(services: Services, token_ids: list[int]) -> list[int]:
    """Returns the tokens up to the last one that is not padding. A classifier's answer is read there, as in
    transformers; in a causal model, later tokens do not change it."""
    pad, end = services.engine.info.pad_token_id, len(token_ids)
    while end > 1 and token_ids[end - 1] == pad:
        end -= 1
    return token_ids[:end]


async def encode_labels(services: Services, labels: Sequence[str], *, param: str) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of label words. Raises RequestRejected if a label has no token or is longer than the
    context, or if two labels have the same tokens."""
    for position, label in enumerate(labels):
        services.check_size(label, param=f"{param}.{position}")
    encode = services.tokenizer.encode
    tokens = await services.in_thread(lambda: [tuple(encode(label, add_special_tokens=False)) for label in labels])
    for position, ids in enumerate(tokens):
        if not ids:
            raise RequestRejected(f"The label {labels[position]!r} has no token.", param=f"{param}.{position}")
        if ids in tokens[:position]:
            other = labels[tokens.index(ids)]
            raise RequestRejected(
                f"The labels {other!r} and {labels[position]!r} have the same tokens.", param=f"{param}.{position}"
            )
    return tuple(tokens)


def check_labels_fit(services: Services, prompts: Sequence[list[int]], labels: Sequence[tuple[int, ...]]) -> None:
    """Raises RequestRejected if a prompt and a label together are longer than the context."""
    limit, longest = services.engine.info.max_model_len, max(prompts, key=len)
    for position, label in enumerate(labels):
        if len(longest) + len(label) > limit:
            raise RequestRejected(
                f"labels.{position} has {len(label)} tokens and the longest input {len(longest)}; together they may "
                f"have at most {limit}, which is this model's maximum context length.",
                param=f"labels.{position}",
                code="context_length_exceeded",
            )

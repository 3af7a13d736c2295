"""Rows of /v1/completions."""

from __future__ import annotations

from tests.conformance import shared_rows
from tests.conformance.rows import Inert, Refused, Row, params, some

TEXT = "choices.0.text"

ROWS = [
    *shared_rows.sampling_rows(TEXT),
    *shared_rows.FORM_ROWS,
    *shared_rows.RESPONSE_FORMAT_ROWS,
    *shared_rows.STREAM_ROWS,
    *(row for row in shared_rows.LENGTH_ROWS),
    *shared_rows.DETAIL_ROWS,
    Row(field="prompt", body={"prompt": "Who?"}, prompt="Who?"),
    Row(field="prompt", body={"prompt": ["Hi", "Who?"]}, engine={"1.prompt": some}, reply={"choices.1.index": 1}),
    Row(field="prompt", body={"prompt": [5, 6, 7]}, engine={"0.prompt": [5, 6, 7]}),
    Row(field="prompt", body={"prompt": [[5], [6, 7]]}, engine={"1.prompt": [6, 7]}),
    Row(field="echo", body={"echo": True}, reply={TEXT: "Hi hello the world"}),
    Row(
        field="logprobs",
        body={"logprobs": 2},
        engine=params(logprobs=2),
        reply={"choices.0.logprobs.top_logprobs.0": some},
    ),
    Row(
        field="echo",
        base={"logprobs": 1},
        body={"echo": True},
        engine=params(prompt_logprobs=1),
        reply={"choices.0.logprobs.token_logprobs.0": None},
    ),
    Row(
        field="prompt_logprobs",
        body={"prompt_logprobs": 1},
        engine=params(prompt_logprobs=1),
        reply={"choices.0.prompt_logprobs": some},
        streamed=False,
    ),
    Row(
        field="add_special_tokens",
        body={"add_special_tokens": False},
        engine={"0.prompt.0": lambda token: token != 1},  # 1 is <|startoftext|>
    ),
]
INERT = [
    *shared_rows.INERT,
    *shared_rows.INERT_FORMS,
    *shared_rows.INERT_RESPONSE_FORMATS,
    Inert("store", {"store": True}),
    Inert("best_of", {"best_of": 1}),
]
REFUSED = [
    *shared_rows.REFUSED,
    *shared_rows.REFUSED_STREAM,
    Refused("best_of", {"best_of": 2}),
    Refused("suffix", {"suffix": "the end"}),
]

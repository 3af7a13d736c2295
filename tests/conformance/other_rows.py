"""Rows of /tokenize, and the paths whose requests have no body."""

from __future__ import annotations

from tests.conformance.chat_rows import MESSAGE_ROWS, TEMPLATE_ROWS, TOOLS
from tests.conformance.rows import Row, some

PROMPT = {"prompt": "Hi"}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
# Each of these requests gives other tokens, or a reply with another field, than without the row's field.
TOKENIZE = [
    Row(field="prompt", base={"prompt": "Ho"}, body={"prompt": "Hi"}, prompt="Hi"),
    Row(
        field="messages",
        base={"prompt": "Ho"},
        body={"prompt": None, **MESSAGES},
        prompt="Hi",
    ),
    Row(field="add_special_tokens", base=PROMPT, body={"add_special_tokens": False}, reply={"count": 2}),
    Row(field="return_token_strs", base=PROMPT, body={"return_token_strs": True}, reply={"token_strs": some}),
    Row(
        field="tools",
        base={"messages": [{"role": "user", "content": "Hi"}]},
        body={"tools": TOOLS},
        prompt="get_weather",
    ),
    *(
        Row(
            field=row.field,
            base={**MESSAGES, **row.base},
            body=row.body,
            prompt=row.prompt,
            headers=row.headers,
            model=row.model,
        )
        for row in (*MESSAGE_ROWS, *TEMPLATE_ROWS)
    ),
]
PATHS = {
    "/v1/models",
    "/v1/models/{model}",
    "/v1/streams/{stream_id}",
    "/v1/responses/{response_id}",
    # tests/server/test_sessions.py calls these.
    "/v1/sessions",
    "/v1/sessions/{name}",
    "/v1/sessions/{name}/export",  # tests/server/test_session_files.py calls it
    "/v1/responses/{response_id}/cancel",
    "/v1/responses/{response_id}/input_items",
    "/tokenizer_info",
    "/server_info",  # tests/server/page calls it
    "/api/hello",
    # tests/server/test_operations.py and test_pages.py call these.
    "/health",
    "/ready",
    "/live",
    "/version",
    "/metrics",
    "/",
}

"""Rows of /v1/files and /v1/batches: what a field changes in the reply, and values that are refused."""

from __future__ import annotations

from typing import Any

from tests.conformance.rows import DIFFERS, Refused, Row

FILE = {"purpose": "batch", "file": ("in.jsonl", b'{"custom_id": "a"}\n')}
EXPIRES = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "7200"}
UPLOAD = [
    Row(field="file", base=FILE, body={"file": ("other.jsonl", b"{}\n{}\n")}, reply={"filename": "other.jsonl"}),
    Row(field="file", base=FILE, body={"file": ("in.jsonl", b"{}\n{}\n")}, reply={"bytes": 6}),
    Row(field="expires_after[anchor]", base=FILE, body=EXPIRES, reply={"expires_at": DIFFERS}),
    Row(field="expires_after[seconds]", base=FILE, body=EXPIRES, reply={"expires_at": DIFFERS}),
]
REFUSED_UPLOADS = [
    Refused("purpose", {"purpose": "fine-tune"}),
    Refused("purpose", {"purpose": "batch_output"}),
    Refused("expires_after[anchor]", EXPIRES | {"expires_after[anchor]": "now"}),
    Refused("expires_after[seconds]", EXPIRES | {"expires_after[seconds]": "3599"}),
    Refused("unknown", {"unknown": "1"}),
]

BATCH: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
BATCHES = [
    Row(field="input_file_id", body={"input_file_id": "another"}, reply={"input_file_id": DIFFERS}),
    Row(field="endpoint", body={"endpoint": "/v1/completions"}, reply={"endpoint": "/v1/completions"}),
    Row(field="endpoint", body={"endpoint": "/v1/responses"}, reply={"endpoint": "/v1/responses"}),
    Row(field="endpoint", body={"endpoint": "/v1/embeddings"}, reply={"endpoint": "/v1/embeddings"}),
    Row(
        field="completion_window",
        body={"completion_window": "90m"},
        reply={"completion_window": "90m", "expires_at": DIFFERS},
    ),
    Row(field="metadata", body={"metadata": {"job": "7"}}, reply={"metadata": {"job": "7"}}),
]
OUTPUT_EXPIRES = {"output_expires_after": {"anchor": "created_at", "seconds": 7200}}
REFUSED_BATCHES = [
    Refused("input_file_id", {"input_file_id": "file-none"}),
    Refused("endpoint", {"endpoint": "/v1/moderations"}),
    Refused("completion_window", {"completion_window": "soon"}),
    Refused("completion_window", {"completion_window": "31d"}),
    Refused("metadata", {"metadata": {"a": 5}}, "metadata.a"),
    Refused("output_expires_after.anchor", {"output_expires_after": {"anchor": "now", "seconds": 7200}}),
    Refused("output_expires_after.seconds", {"output_expires_after": {"anchor": "created_at", "seconds": 5}}),
    Refused("completion_windo", {"completion_windo": "24h"}),
]
PATHS = {
    "/v1/files/{file_id}",
    "/v1/files/{file_id}/content",
    "/v1/batches/{batch_id}",
    "/v1/batches/{batch_id}/cancel",
}

"""The replies of /v1/files, and the form with which a file is uploaded."""

from __future__ import annotations

from typing import Any, Literal

from jamba_server.server.http.schemas.base import Reply, if_any

MIN_LIFETIME_SECONDS, MAX_LIFETIME_SECONDS = 3600, 30 * 24 * 3600  # limits of `expires_after`, as in OpenAI's API


class FileObject(Reply):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = if_any
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(Reply):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


class DeletedFile(Reply):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


# The fields of an upload, for the OpenAPI document. FastAPI does not read uploads itself, because it would keep them in
# its own temporary files.
UPLOAD_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "The content, one JSON object per line."},
        "purpose": {"type": "string", "enum": ["batch"], "description": "What the file is for."},
        "expires_after[anchor]": {
            "type": "string",
            "enum": ["created_at"],
            "description": "The time from which `expires_after[seconds]` counts.",
        },
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": MIN_LIFETIME_SECONDS,
            "maximum": MAX_LIFETIME_SECONDS,
            "description": "Seconds after which the file is deleted. Default: 30 days.",
        },
    },
}
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_FORM}}}
}

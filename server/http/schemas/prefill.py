"""The requests and replies of /v1/prefill, by which a decode server has a prompt computed (`--role`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jamba_server.server.http.schemas.base import Reply, RequestBody
from jamba_server.server.http.schemas.completions import TokenIds

MAX_SALT_CHARS = 4096
MAX_POSITIONS = 4096
_HEX = r"^[0-9a-f]{64}$"
SegmentKey = Annotated[str, Field(pattern=_HEX)]


class PrefillRequest(RequestBody):
    """A prompt to compute. The state after its last token is saved."""

    prompt: Annotated[TokenIds, Field(description="The token ids.")]
    fingerprint: Annotated[
        str,
        Field(pattern=_HEX, description="The fingerprint of the model and the configuration that must be used."),
    ]
    cache_salt: Annotated[
        str,
        Field(max_length=MAX_SALT_CHARS, description="The whole salt of the prefix cache, with the owner of the key."),
    ] = ""
    priority: Annotated[
        int, Field(ge=-(2**31), le=2**53, description="The priority in the engine. Lower values run first.")
    ] = 0
    save_positions: Annotated[
        tuple[Annotated[int, Field(ge=0, strict=True)], ...],
        Field(
            max_length=MAX_POSITIONS,
            strict=False,
            description="Further numbers of tokens after which the state is saved.",
        ),
    ] = ()


class SegmentSize(Reply):
    """A segment that ends after `end` tokens of the prompt, and begins where the one before it ends. Its file has
    `num_bytes` bytes."""

    end: int
    num_bytes: int


class PrefillReply(Reply):
    """The segments of the prompt, which are in the disk tier now. `cached_tokens` of the prompt were there before."""

    segments: list[SegmentSize]
    cached_tokens: int

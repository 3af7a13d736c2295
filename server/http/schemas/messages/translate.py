"""Turns the conversation of a request for /v1/messages into the messages that chat templates read.

Chat templates expect one message for each tool result, a string as the content of every message, and tool calls in a
separate key. In Anthropic's messages, tool results, texts and tool calls are all blocks in the content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.schemas.messages.content import (
    Block,
    InputMessage,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from jamba_server.server.http.schemas.messages.request import Conversation

TemplateMessage = dict[str, object]

MAX_MARKS = 4  # maximum number of cache_control marks in a request; Anthropic's API has the same limit
# Claude Code, a client, begins the first system block with this line. The line has a hash that changes with every
# request. It is removed because it is not meant for the model, and because no request would find its prompt in the
# prefix cache if the first line always differed.
_BILLING_LINE = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Translated:
    """A conversation in the form that chat templates read.

    The field `save_after` has the indices of the messages that have a `cache_control` mark, in ascending order. The
    field `left_out` names the kinds of blocks that the model does not read.
    """

    messages: tuple[TemplateMessage, ...]
    save_after: tuple[int, ...]
    left_out: frozenset[str]


def translate(body: Conversation) -> Translated:
    """Returns the conversation of a request. Raises RequestRejected if it has more than MAX_MARKS marks."""
    _check_marks(body)
    messages: list[TemplateMessage] = []
    marked: set[int] = set()
    system = _system_texts(body)
    if system:
        messages.append({"role": "system", "content": "\n".join(block.text for block in system)})
        # Chat templates put the definitions of the tools into the system message, so a cache mark of a tool applies to
        # that message.
        if any(item.cache_control for item in (*_system_blocks(body), *(body.tools or ()))):
            marked.add(0)
    for message in body.messages:
        for turn, is_marked in _turns(message):
            messages.append(turn)
            if is_marked:
                marked.add(len(messages) - 1)
    if body.cache_control is not None:
        marked.add(len(messages) - 1)
    blocks = (block for message in body.messages for block in message.blocks)
    redacted = any(isinstance(block, RedactedThinkingBlock) for block in blocks)
    left_out = frozenset({"blocks of redacted thinking"} if redacted else ())
    return Translated(tuple(messages), tuple(sorted(marked)), left_out)


def _system_blocks(body: Conversation) -> Sequence[TextBlock]:
    if isinstance(body.system, str):
        return [TextBlock(type="text", text=body.system)]
    return body.system or []


def _system_texts(body: Conversation) -> list[TextBlock]:
    """Returns the text blocks of the system message. A billing line of the client at the start of the first block is
    removed. If the block has nothing else, the whole block is removed."""
    blocks = list(_system_blocks(body))
    if blocks and (line := _BILLING_LINE.match(blocks[0].text)):
        rest = blocks[0].text[line.end() :]
        blocks[:1] = [TextBlock(type="text", text=rest)] if rest else []
    return blocks


def _turns(message: InputMessage) -> Iterable[tuple[TemplateMessage, bool]]:
    """Yields the messages for the chat template that one message of the request becomes. The second item of each pair
    says whether the message has a `cache_control` mark.

    An assistant's message stays one message. A user's message becomes one message for each tool result, and one for
    each group of texts between them.
    """
    blocks = message.blocks
    if message.role == "assistant":
        yield _assistant_turn(blocks), any(_is_marked(block) for block in blocks)
        return
    texts: list[TextBlock] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block)
            continue
        assert isinstance(block, ToolResultBlock), "the schema allows texts and tool results only"
        if texts:
            yield _text_turn(message.role, texts)
            texts = []
        yield _tool_turn(block), _is_marked(block)
    if texts or not blocks:
        yield _text_turn(message.role, texts)


def _text_turn(role: str, texts: Sequence[TextBlock]) -> tuple[TemplateMessage, bool]:
    turn: TemplateMessage = {"role": role, "content": "\n".join(block.text for block in texts)}
    return turn, any(block.cache_control for block in texts)


def _tool_turn(block: ToolResultBlock) -> TemplateMessage:
    """Returns the message for the chat template with the result of a tool call. Templates do not read a field
    `is_error`, so an error is mentioned in the text."""
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        "content": f"Error: {text}" if block.is_error else text,
    }


def _assistant_turn(blocks: Sequence[Block]) -> TemplateMessage:
    """Returns the message for the chat template with an earlier reply of the model. The texts of its blocks are joined
    without a separator, because they are pieces of one text."""
    turn: TemplateMessage = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    if reasoning := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        turn["reasoning_content"] = reasoning
    if calls := [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]:
        turn["tool_calls"] = calls
    return turn


def _call(block: ToolUseBlock) -> TemplateMessage:
    # The default separators of json.dumps put a space after each comma and colon. The chat templates do the same, so
    # the model was trained with such JSON.
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _is_marked(block: Block) -> bool:
    if isinstance(block, ToolResultBlock):
        parts = block.content if isinstance(block.content, list) else []
        return any(item.cache_control for item in (block, *parts))
    return bool(getattr(block, "cache_control", None))


def _check_marks(body: Conversation) -> None:
    items = (body, *_system_blocks(body), *(body.tools or ()))
    number = sum(item.cache_control is not None for item in items)
    number += sum(_is_marked(block) for message in body.messages for block in message.blocks)
    if number > MAX_MARKS:
        raise RequestRejected(
            f"The request has {number} `cache_control` marks; at most {MAX_MARKS} are allowed.", param="cache_control"
        )

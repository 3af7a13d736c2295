"""Bodies of requests as Claude Code sends them, for a conversation in which the agent uses its tools."""

from __future__ import annotations

import hashlib
import json
from typing import Any

HEADERS = {
    "user-agent": "claude-cli/2.1.177 (external, cli)",
    "x-app": "cli",
    "anthropic-dangerous-direct-browser-access": "true",
}
BETAS = [
    "claude-code-20250219",
    "interleaved-thinking-2025-05-14",
    "context-management-2025-06-27",
    "prompt-caching-scope-2026-01-05",
    "effort-2025-11-24",
]
_EPHEMERAL = {"type": "ephemeral"}
_IDENTITY = "You are Claude Code, Anthropic's official CLI for Claude."
_RULES = """You are an interactive agent that helps users with software engineering tasks.
Use the tools that are available to you to read, search and change files, and to run commands.

# Tone
 - Be short. Your output is shown in a terminal.
 - Only use a tool to complete a task. Never use a tool to speak to the user.

# Doing tasks
 - Read a file before you change it.
 - Do not add features that nobody asked for.
 - When a command fails, read the message and find the cause before you try again.

# Environment
 - Working directory: /home/user/project
 - Platform: linux
"""
_REMINDER = (
    "<system-reminder>\nThe user has a file CLAUDE.md: write tests first, keep functions short.\n</system-reminder>"
)


def _tool(name: str, purpose: str, **properties: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": purpose,
        "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {key: {"type": "string", "description": text} for key, text in properties.items()},
            "required": [next(iter(properties))],
            "additionalProperties": False,
        },
        "eager_input_streaming": True,
    }


TOOLS = [
    _tool("Bash", "Runs a command in a shell.", command="The command to run", description="What the command does"),
    _tool("Read", "Reads a file.", file_path="The absolute path of the file"),
    _tool("Write", "Writes a file.", file_path="The absolute path of the file", content="The text to write"),
    _tool("Grep", "Searches files.", pattern="The regular expression", path="The folder to search"),
]
TASK_UPDATE = {
    "name": "TaskUpdate",
    "description": "Changes the status of a task in the list of tasks.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "taskId": {"type": "string", "enum": ["1", "2", "3"]},
            "status": {"type": "string", "enum": ["pending", "in_progress", "completed"]},
        },
        "required": ["taskId", "status"],
        "additionalProperties": False,
    },
}
RESULTS = [
    "total 12\n-rw-r--r-- 1 user user 120 main.py\n-rw-r--r-- 1 user user 80 test_main.py",
    "     1\tdef add(a, b):\n     2\t    return a - b",
    "1 failed, 3 passed in 0.12s",
]


def body(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A request for the next message. The hash in the first line of the system message changes with the messages."""
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:5]
    billing = f"x-anthropic-billing-header: cc_version=2.1.177.{digest[:3]}; cc_entrypoint=cli; cch={digest};"
    return {
        "model": "jamba-demo",
        "max_tokens": 64,
        "system": [
            {"type": "text", "text": billing},
            {"type": "text", "text": _IDENTITY, "cache_control": _EPHEMERAL},
            {"type": "text", "text": _RULES, "cache_control": _EPHEMERAL},
        ],
        "messages": _marked(messages),
        "tools": [*TOOLS, TASK_UPDATE],
        "metadata": {"user_id": json.dumps({"device_id": "d", "account_uuid": "", "session_id": "s"})},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        **more,
    }


def first_message(task: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": _REMINDER}, {"type": "text", "text": task}]}


def answer_to(reply: list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    """What Claude Code sends after a reply: the results of its tool calls, or the user's next request."""
    calls = [block for block in reply if block["type"] == "tool_use"]
    results = [
        {"tool_use_id": call["id"], "type": "tool_result", "content": RESULTS[turn % 3], "is_error": turn % 3 == 2}
        for call in calls
    ]
    if results:
        reminder = {"role": "system", "content": "The file main.py was changed by the user."}
        return [{"role": "user", "content": results}, *([reminder] if turn == 4 else [])]
    return [{"role": "user", "content": [{"type": "text", "text": f"Now do step {turn}, please."}]}]


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a mark on the last block of the last user message."""
    position = max(i for i, message in enumerate(messages) if message["role"] == "user")
    blocks = messages[position]["content"]
    marked = {**messages[position], "content": [*blocks[:-1], {**blocks[-1], "cache_control": _EPHEMERAL}]}
    return [*messages[:position], marked, *messages[position + 1 :]]

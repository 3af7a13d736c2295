"""Bodies of requests as the Codex CLI sends them, for a conversation in which the agent uses its tools."""

from __future__ import annotations

from typing import Any

HEADERS = {
    "originator": "codex_cli_rs",
    "user-agent": "codex_cli_rs/0.154.0 (Debian 12.0.0; x86_64) xterm",
    "session_id": "019aa062-b48c-7ce1-9f0d-3a7d1b1f0001",
    "accept": "text/event-stream",
}
SESSION = HEADERS["session_id"]
_INSTRUCTIONS = """You are Codex, a coding agent that runs in a terminal on the user's computer.

# How you work
- Read the files that matter before you change them.
- Make the smallest change that solves the problem at its root.
- Run the tests after each change, and say what you saw.
- Never undo changes that you did not make.

# Answers
- Be short and friendly. Name files by their paths.
"""
_PERMISSIONS = """<permissions instructions>
Commands run in a sandbox. Writing outside of the project needs approval.
</permissions instructions>"""
_ENVIRONMENT = "<environment_context>\n  <cwd>/home/user/project</cwd>\n  <shell>bash</shell>\n</environment_context>"


def _function(name: str, description: str, **properties: str) -> dict[str, Any]:
    return {
        "type": "function",
        "name": name,
        "description": description,
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": text} for key, text in properties.items()},
            "required": [next(iter(properties))],
            "additionalProperties": False,
        },
    }


TOOLS = [
    _function("exec_command", "Runs a command in a shell.", cmd="The command to run.", workdir="The folder."),
    _function("write_stdin", "Writes characters to a running command.", chars="The characters."),
    _function("update_plan", "Updates the plan of the task.", explanation="Why the plan changes."),
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" /.+/s'},
    },
    {
        "type": "namespace",
        "name": "mcp__docs__",
        "description": "Tools of the MCP server docs.",
        "tools": [_function("search", "Searches the documentation.", query="What to look for.")],
    },
    {"type": "web_search", "external_web_access": False},
]
RESULTS = [
    "Exit code: 0\nWall time: 0.1 seconds\nOutput:\nmain.py\ntest_main.py\n",
    "Exit code: 1\nWall time: 0.6 seconds\nOutput:\n1 failed, 3 passed\n",
    "Exit code: 0\nWall time: 0.1 seconds\nOutput:\ndef add(a, b):\n    return a - b\n",
]


def message(role: str, *texts: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text} for text in texts]}


def first_items(task: str) -> list[dict[str, Any]]:
    return [message("developer", _PERMISSIONS), message("user", _ENVIRONMENT), message("user", task)]


def body(items: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A request for the next response. Codex sends the whole conversation each time and lets the server store none."""
    return {
        "model": "jamba-demo",
        "instructions": _INSTRUCTIONS,
        "input": items,
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": SESSION,
        "client_metadata": {"x-codex-installation-id": "5c1b2f7e-6a52-4c1d-8a4e-1c9f1c2d3e4f"},
        **more,
    }


def sent_back(item: dict[str, Any]) -> dict[str, Any]:
    """An output item as Codex sends it back: without its id and status, and reasoning without its text."""
    kept = {key: value for key, value in item.items() if key not in ("id", "status") and value is not None}
    match item["type"]:
        case "message":
            parts = [{"type": "output_text", "text": part["text"]} for part in item["content"]]
            return kept | {"content": parts}
        case "reasoning":
            return {key: value for key, value in kept.items() if key != "content"}
        case _:
            return kept


def answers(items: list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    """What follows the items of a response: the results of its calls, or what the user says next.

    In the middle of the conversation Codex also tells the model that the permissions have changed.
    """
    calls = [item for item in items if item["type"] == "function_call"]
    results: list[dict[str, Any]] = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": RESULTS[turn % len(RESULTS)]}
        for call in calls
    ]
    if turn == 4:
        results.append(message("developer", "The user has approved all commands."))
    return results if calls else [*results, message("user", "Go on.")]

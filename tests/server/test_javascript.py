"""The official JavaScript client streams a tool call and the reply to its result.

`npm install --prefix tests/server/javascript` installs the client; `.ci/run` does that."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import says
from tests.server.served_model import JAMBA_CALL, JAMBA_TEMPLATE, PARIS, serve

FOLDER = Path(__file__).parent / "javascript"
SECONDS = 60.0  # only a test that fails waits for so long
ANSWER = " The sky is blue."


async def run_node(script: str, *arguments: str) -> Any:
    node = shutil.which("node")
    if node is None or not (FOLDER / "node_modules" / "openai").is_dir():
        pytest.skip(f"node, or the client that `npm install --prefix {FOLDER.name}` brings, is not installed")
    process = await asyncio.create_subprocess_exec(
        node, str(FOLDER / script), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


async def test_a_tool_call_and_the_reply_to_its_result(tmp_path: Path) -> None:
    async with serve(tmp_path, "jamba-1.5", JAMBA_TEMPLATE) as model:
        replies = iter((JAMBA_CALL, ANSWER))
        model.bench.engine.script = lambda request: says(model.tokens(next(replies)))(request)
        async with model.bench.served() as address:
            first, second = await run_node("stream_tool_call.mjs", f"{address}/v1")
    choice = first["completion"]["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]) == (
        "tool_calls",
        call["function"] | {"name": "get_weather", "arguments": PARIS},
    )
    streamed = [piece for delta in first["deltas"] for piece in delta.get("tool_calls") or []]
    assert "".join(piece["function"].get("arguments") or "" for piece in streamed) == PARIS
    assert call["id"] in json.dumps(first["deltas"])
    assert second["completion"]["choices"][0]["message"]["content"] == ANSWER.strip()

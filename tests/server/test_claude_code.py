"""Claude Code's requests on a real engine: every turn is answered, and nearly all of each prompt comes from the
cache."""

from __future__ import annotations

from typing import Any, cast

import httpx
from anthropic import AsyncAnthropic

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server import claude_code
from tests.server.real_engine import served_engine

NUM_TURNS = 10


async def test_a_conversation_of_ten_turns_reads_its_prompts_from_the_cache() -> None:
    config = ServerConfig(served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with served_engine(config, engine) as openai:
        address = str(openai.base_url).removesuffix("/v1/")
        await _probe(address)
        async with AsyncAnthropic(
            base_url=address, auth_token="none", max_retries=0, default_headers=claude_code.HEADERS
        ) as client:
            await _talk(client)
    await engine.close()


async def _probe(address: str) -> None:
    """The requests that Claude Code sends before its first message."""
    async with httpx.AsyncClient(base_url=address) as http:
        assert (await http.head("/")).status_code == 200
        assert (await http.head("/api/hello")).status_code == 200
        quota = {"model": "jamba-demo", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}
        reply = await http.post("/v1/messages?beta=true", json=quota)
        assert reply.status_code == 200
        assert reply.json()["usage"]["output_tokens"] <= 1
        warm_up = {**quota, "max_tokens": 0, "system": "You name conversations. Answer with at most five words."}
        replies = [(await http.post("/v1/messages", json=warm_up)).json() for _ in range(2)]
        assert [(reply["content"], reply["stop_reason"]) for reply in replies] == [([], "max_tokens")] * 2
        assert replies[1]["usage"]["cache_read_input_tokens"] > 0


async def _talk(client: AsyncAnthropic) -> None:
    messages = [claude_code.first_message("The tests of this project fail. Find out why and repair it.")]
    for turn in range(NUM_TURNS):
        # The small model would not call a tool by itself. It completes this call, because its arguments are short.
        choice = {"type": "tool", "name": "TaskUpdate", "disable_parallel_tool_use": True}
        body: Any = claude_code.body(messages, **({"tool_choice": choice} if turn % 2 == 0 else {}))
        async with client.beta.messages.stream(**body, betas=claude_code.BETAS) as stream:
            assert "context_management" in stream.response.headers["x-ignored-fields"]
            reply = await stream.get_final_message()
        counted = await client.beta.messages.count_tokens(
            **{name: body[name] for name in ("model", "system", "messages", "tools", "thinking")}
        )
        usage = reply.usage
        read, created = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        assert counted.input_tokens == usage.input_tokens + read + created
        if turn:
            assert read >= 0.9 * counted.input_tokens, (turn, usage)
        assert reply.content
        content = [cast("dict[str, Any]", block.to_dict()) for block in reply.content]
        if turn % 2 == 0:
            assert reply.stop_reason == "tool_use"
            [call] = content
            assert call["name"] == "TaskUpdate" and set(call["input"]) == {"taskId", "status"}
        else:
            assert reply.stop_reason in ("end_turn", "max_tokens")
            assert [block["type"] for block in content] == ["text"]
        messages += [{"role": "assistant", "content": content}, *claude_code.answer_to(content, turn)]

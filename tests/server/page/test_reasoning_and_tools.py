"""Thoughts are folded, tool calls are shown, and their results go back to the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.page.conftest import visit
from tests.server.served_model import HERMES_CALL, PARIS, REASONING_TEMPLATE, serve

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_thoughts_are_folded_and_sent_back(browser: Any, tmp_path: Path) -> None:
    async with serve(tmp_path, "reasoning", REASONING_TEMPLATE) as model:
        model.say("First I think.\n</think>\n\nThen I answer.")
        async with model.bench.served() as address, visit(browser, address) as seen:
            await seen.send("Hi")
            assert await seen.replies() == ["Then I answer."]
            thoughts = seen.page.get_by_text("First I think.")
            assert not await thoughts.is_visible()
            await seen.page.locator("summary").click()
            assert await thoughts.is_visible()
            async with seen.page.expect_request("**/v1/chat/completions") as sent:
                await seen.send("And?")
            messages = json.loads((await sent.value).post_data)["messages"]
            sent_back = {name: text.strip() for name, text in messages[1].items()}
            assert sent_back == {"role": "assistant", "content": "Then I answer.", "reasoning": "First I think."}
            await seen.settled()


async def test_a_tool_call_and_its_result(browser: Any, tmp_path: Path) -> None:
    async with serve(tmp_path, "reasoning", REASONING_TEMPLATE) as model:
        model.say(f"</think>\n\n{HERMES_CALL}")
        async with model.bench.served() as address, visit(browser, address) as seen:
            await seen.page.get_by_role("checkbox", name="Tools").check()
            await seen.send("What is the weather in Paris?")
            await seen.settled()
            call = seen.page.get_by_label("Tool call: get_weather")
            assert json.loads(await call.locator("pre").inner_text()) == json.loads(PARIS)
            model.say("</think>\n\nIt is sunny.")
            await seen.page.get_by_label("Result of get_weather").fill("sunny, 21 degrees")
            await seen.page.get_by_role("button", name="Send this result").click()
            assert (await seen.replies())[-1] == "It is sunny."
            assert "sunny, 21 degrees" in model.prompt and '"city": "Paris"' in model.prompt
            assert await seen.page.get_by_role("button", name="Send this result").count() == 0

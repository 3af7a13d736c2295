"""The page before the real engine and the demonstration model: what the prefix cache saves is shown. The screenshots of
the documents are made here.

`UPDATE_SCREENSHOTS=1 pytest tests/server/page` writes them to docs/; otherwise they go to a temporary folder."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.page.conftest import PHONE, Visit, visit
from tests.server.real_engine import served_engine

pytestmark = pytest.mark.asyncio(loop_scope="package")
DOCS = Path(__file__).parent.parent.parent.parent / "docs"
MAX_BYTES = 200_000
SYSTEM = "You tell short stories for small children."
SETTINGS = {"#system": SYSTEM, "#temperature": "0.5", "#maxTokens": "200", "#seed": "3"}
STORY = "Tell me a story about a dog and a ball."
NEXT = "Was it a happy story, and how many stars does it get?"
SCHEMA = """{
  "type": "object",
  "properties": {
    "happy": {"type": "boolean"},
    "stars": {"enum": [1, 2, 3, 4, 5]}
  },
  "required": ["happy", "stars"],
  "additionalProperties": false
}"""
LOAD = {"messages": [{"role": "user", "content": STORY}], "max_tokens": 2000, "ignore_eos": True}
LOAD_SECONDS = 9  # the screenshot of the server shows so much of its work


async def shoot(visit: Visit, folder: Path, name: str) -> None:
    path = folder / f"{name}.png"
    await visit.page.screenshot(path=path)
    assert 10_000 < path.stat().st_size < MAX_BYTES


async def talk(visit: Visit) -> list[list[int]]:
    """Asks two questions, the second one with a JSON schema. Returns the cached prompt tokens and all prompt tokens of
    each reply, as the page shows them."""
    for field, value in SETTINGS.items():
        await visit.page.locator(field).fill(value)
    await visit.send(STORY)
    await visit.settled()
    await visit.page.get_by_role("checkbox", name="JSON schema").check()
    await visit.page.locator("#schema").fill(SCHEMA)
    await visit.send(NEXT)
    await visit.settled()
    texts = await visit.page.locator(".receipt > span:nth-child(2)").all_inner_texts()
    return [[int(word) for word in text.split() if word.isdecimal()] for text in texts]


async def work(address: str) -> None:
    """Keeps the engine busy for LOAD_SECONDS."""
    async with httpx.AsyncClient(timeout=LOAD_SECONDS) as http:
        requests = [asyncio.create_task(http.post(f"{address}/v1/chat/completions", json=LOAD)) for _ in range(6)]
        await asyncio.wait(requests, timeout=LOAD_SECONDS)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


async def test_the_second_question_costs_only_what_is_new(browser: Any, tmp_path: Path) -> None:
    folder = DOCS if os.environ.get("UPDATE_SCREENSHOTS") else tmp_path
    config = ServerConfig(served_model_name=("jamba-demo",), threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    try:
        async with served_engine(config, engine) as client:
            address = str(client.base_url).removesuffix("/v1/")
            wide = {"width": 1440, "height": 810}
            async with visit(browser, address, viewport=wide, color_scheme="light") as seen:
                first, second = await talk(seen)
                assert first[0] == 0
                assert first[1] < second[0] < second[1]  # all of the first question and its reply
                assert set(json.loads(await seen.page.locator("figure code").inner_text())) == {"happy", "stars"}
                await shoot(seen, folder, "page-light")
                state = await seen.page.context.storage_state()
            async with visit(browser, address, viewport=wide, color_scheme="dark", storage_state=state) as seen:
                await seen.page.get_by_role("link", name="Server", exact=True).click()
                await seen.page.get_by_text("Memory", exact=True).wait_for()
                if folder == DOCS:
                    await work(address)
                await shoot(seen, folder, "page-dark")
            phone = {"viewport": PHONE, "has_touch": True, "device_scale_factor": 1.5, "storage_state": state}
            async with visit(browser, address, color_scheme="dark", **phone) as seen:
                await shoot(seen, folder, "page-phone")
    finally:
        await engine.close()

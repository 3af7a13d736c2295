"""A conversation on the chat page, in a browser: it streams, stops, branches, and is still there after a reload."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Ids
from tests.server.fake_engine import NUM_CACHED, says
from tests.server.page.conftest import REPLY, OpenPage, Visit

pytestmark = pytest.mark.asyncio(loop_scope="package")


def prompt(bench: Any, tokenizer: Any) -> str:
    return tokenizer.decode(bench.engine.requests[-1].prompt, skip_special_tokens=False)


async def test_a_message_streams_and_says_what_it_cost(open_page: OpenPage) -> None:
    async with open_page() as (visit, bench):
        bench.engine.limit = 7  # tokens, after which the engine stalls
        await visit.send("Hi there")
        await bench.engine.stalled.wait()
        reply = visit.page.locator(".turn.assistant .content")
        await reply.get_by_text("Hello,").wait_for()
        assert await reply.inner_text() != "Hello, world."
        assert await visit.page.locator("#turns").get_attribute("aria-busy") == "true"
        bench.engine.resume.set()
        assert await visit.replies() == ["Hello, world."]
        assert await reply.locator("strong").inner_text() == "world"
        sent = bench.engine.requests[-1]
        receipt = await visit.page.locator(".receipt").inner_text()
        assert f"{NUM_CACHED} of {len(sent.prompt)} prompt tokens cached" in receipt
        assert "first token" in receipt
        assert await visit.page.locator("#status").inner_text() != ""


async def test_the_page_works_behind_a_path_of_a_proxy(open_page: OpenPage) -> None:
    async with open_page(root_path="/jamba") as (visit, _):
        await visit.send("Hi there")
        assert await visit.replies() == ["Hello, world."]
        assert {url.removeprefix(visit.address)[:7] for url in visit.requested} == {"/", "/jamba/"}


async def test_escape_stops_and_the_engine_is_told(open_page: OpenPage) -> None:
    async with open_page() as (visit, bench):
        bench.engine.limit = 5
        await visit.send("Hi")
        await bench.engine.stalled.wait()
        await visit.page.get_by_role("button", name="Stop").wait_for()
        await visit.page.keyboard.press("Escape")
        await visit.settled()
        await bench.engine.left.wait()
        assert bench.engine.aborted == [bench.engine.requests[0].id]
        assert "stopped" in await visit.page.locator(".receipt").inner_text()


async def test_a_conversation_outlives_a_reload(open_page: OpenPage) -> None:
    async with open_page() as (visit, bench):
        await visit.send("First question")
        await visit.replies()
        bench.engine.limit = bench.engine.num_updates + 3
        await visit.send("Second question")
        await bench.engine.stalled.wait()
        await visit.page.locator(".turn.assistant").nth(1).get_by_text("Hel").wait_for()
        await visit.page.reload()
        questions = await visit.page.locator(".turn.user .content").all_inner_texts()
        assert questions == ["First question", "Second question"]
        first, second = await visit.replies()
        assert first == "Hello, world."
        assert second == "Hello"[: len(second)] and second
        assert "interrupted" in await visit.page.locator(".receipt").nth(1).inner_text()
        assert await visit.page.locator("#conversations li").count() == 1


async def test_an_edited_turn_is_another_branch(open_page: OpenPage, ids: Ids, tokenizer: Any) -> None:
    async with open_page() as (visit, bench):
        page = visit.page
        await visit.send("One")
        await visit.replies()
        bench.engine.script = says(ids("Bye."))
        await page.get_by_role("button", name="Edit").click()
        await page.get_by_label("Edited message").fill("Two")
        await page.keyboard.press("Enter")
        assert await visit.replies() == ["Bye."]
        assert "One" not in prompt(bench, tokenizer) and "Two" in prompt(bench, tokenizer)
        assert await page.locator(".turn.user .branches").inner_text() == "2 / 2"
        await page.get_by_role("button", name="Version before").click()
        assert await visit.replies() == ["Hello, world."]
        assert await page.locator(".turn.user .content").inner_text() == "One"


async def test_a_reply_is_regenerated_and_the_next_question_follows_the_chosen_one(
    open_page: OpenPage, ids: Ids, tokenizer: Any
) -> None:
    async with open_page() as (visit, bench):
        await visit.send("One")
        await visit.replies()
        bench.engine.script = says(ids("Bye."))
        await visit.page.get_by_role("button", name="Regenerate").click()
        assert await visit.replies() == ["Bye."]
        await visit.page.get_by_role("button", name="Version before").click()
        await visit.send("More")
        await visit.replies()
        assert "**world**" in prompt(bench, tokenizer) and "Bye." not in prompt(bench, tokenizer)


async def test_settings_are_sent_and_remembered(open_page: OpenPage, tokenizer: Any) -> None:
    fields = {"#system": "Be brief.", "#temperature": "0.5", "#topP": "0.25", "#maxTokens": "6", "#seed": "11"}
    async with open_page() as (visit, bench):
        for field, value in fields.items():
            await visit.page.locator(field).fill(value)
        await visit.send("Hi")
        await visit.replies()
        params = bench.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.25, 6, 11)
        assert "Be brief." in prompt(bench, tokenizer)
        assert "reached the maximum of tokens" in await visit.page.locator(".receipt").inner_text()
        await visit.page.get_by_role("button", name="New conversation").click()
        values = [await visit.page.locator(field).input_value() for field in fields]
        assert values == list(fields.values())
        await visit.page.locator("#temperature").fill("3")
        assert await visit.page.get_by_text("From 0 to 2, or empty.").is_visible()


async def test_what_is_typed_outlasts_the_arrival_of_the_names_of_the_models(open_page: OpenPage) -> None:
    async with open_page() as (visit, _):
        asked, arrive = asyncio.Event(), asyncio.Event()

        async def late(route: Any) -> None:
            asked.set()
            await arrive.wait()
            await route.continue_()

        await visit.page.route("**/v1/models", late)
        await visit.page.reload()
        await asked.wait()
        await visit.page.locator("#system").focus()
        await visit.page.keyboard.type("Be ")
        arrive.set()
        await visit.page.locator("#model").wait_for()
        await visit.page.keyboard.type("brief.")
        assert await visit.page.locator("#system").input_value() == "Be brief."


async def test_a_json_schema_is_strict_and_the_reply_is_shown_as_json(open_page: OpenPage) -> None:
    async with open_page('{"name":"Rex","age":3}') as (visit, bench):
        await visit.page.get_by_role("checkbox", name="JSON schema").check()
        async with visit.page.expect_request("**/v1/chat/completions") as sent:
            await visit.send("Invent a dog.")
        [reply] = await visit.replies()
        assert '{\n  "name": "Rex",\n  "age": 3\n}' in reply
        form = json.loads((await sent.value).post_data)["response_format"]
        assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
        assert bench.engine.requests[-1].params.grammar
        await visit.page.locator("#schema").fill("{")
        await visit.send("Another")
        await visit.settled()
        assert "JSON schema:" in await visit.page.locator(".failure").inner_text()
        assert len(bench.engine.requests) == 1


async def test_an_error_of_the_server_is_shown_and_tried_again(open_page: OpenPage, ids: Ids) -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError("planted")

    async with open_page() as (visit, bench):
        working, bench.engine.script = bench.engine.script, fails
        await visit.send("Hi")
        await visit.settled()
        assert "unexpected error" in await visit.page.locator(".failure").inner_text()
        bench.engine.script = working
        await visit.page.get_by_role("button", name="Try again").click()
        assert await visit.replies() == ["Hello, world."]
        assert await visit.page.locator(".branches").count() == 0  # the failed reply is gone


async def test_a_refused_key_and_then_a_good_one(open_page: OpenPage) -> None:
    async with open_page(api_key=("good",)) as (visit, bench):
        page = visit.page
        dialog = page.get_by_role("dialog")
        await visit.send("Hi")
        await dialog.get_by_text("This server asks for a key.").wait_for()
        await page.get_by_label("Key", exact=True).fill("bad")
        await page.get_by_role("button", name="Use this key").click()
        await dialog.get_by_text("The server refused this key.").wait_for()
        await page.get_by_label("Key", exact=True).fill("good")
        await page.keyboard.press("Enter")
        await page.locator(".turn.assistant .content strong").wait_for()
        assert await visit.replies() == ["Hello, world."]
        assert len(bench.engine.requests) == 1
        assert await page.evaluate("Object.values(localStorage).join().includes('good')") is False
        await page.reload()
        await visit.send("Again")
        await page.locator(".turn.assistant .content strong").nth(1).wait_for()


async def test_an_export_has_the_messages(open_page: OpenPage) -> None:
    async with open_page() as (visit, _):
        await visit.page.locator("#system").fill("Be brief.")
        await visit.send("What is this?")
        await visit.replies()
        async with visit.page.expect_download() as started:
            await visit.page.get_by_role("button", name="Export").click()
        download = await started.value
        assert download.suggested_filename == "What-is-this.json"
        path = Path(await download.path())
        exported = json.loads(await asyncio.to_thread(path.read_text, encoding="utf-8"))
        assert exported["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is this?"},
            {"role": "assistant", "content": REPLY},
        ]


async def conversations(visit: Visit) -> list[str]:
    return await visit.page.locator("#conversations li button:first-child").all_inner_texts()


async def test_conversations_are_listed_deleted_and_brought_back(open_page: OpenPage) -> None:
    async with open_page() as (visit, _):
        page = visit.page
        for text in ("One", "Two"):
            await page.get_by_role("button", name="New conversation").click()
            await visit.send(text)
            await visit.replies()
        assert await conversations(visit) == ["Two", "One"]
        await page.get_by_role("button", name="Delete Two").click()
        assert await conversations(visit) == ["One"]
        await page.get_by_role("button", name="Undo").click()
        assert await conversations(visit) == ["Two", "One"]
        await page.get_by_role("button", name="Delete One").click()
        await page.reload()
        assert await conversations(visit) == ["Two"]


async def test_full_and_denied_storage_are_said(open_page: OpenPage) -> None:
    full = "void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); })"
    getter = "{ get() { throw new DOMException('no', 'SecurityError'); } }"
    denied = f"Object.defineProperty(window, 'localStorage', {getter})"
    async with open_page() as (visit, _):
        await visit.send("Hi")
        await visit.replies()
        await visit.page.evaluate(full)
        await visit.send("More")
        await visit.page.get_by_role("alert").get_by_text("The browser's storage is full").wait_for()
        await visit.settled()
        await visit.page.add_init_script(denied)
        await visit.page.reload()
        await visit.page.get_by_role("alert").get_by_text("The browser lets this page store nothing").wait_for()
        await visit.send("It still works")
        assert await visit.replies() == ["Hello, world."]

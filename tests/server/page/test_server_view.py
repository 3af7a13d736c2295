"""The view of the server: numbers of /metrics and /server_info, asked for only while somebody can see them."""

from __future__ import annotations

import pytest

from jamba_server.engine.types import EngineStats
from tests.server.page.conftest import OpenPage, Visit

pytestmark = pytest.mark.asyncio(loop_scope="package")
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_blocks_used=5,
    kv_blocks_capacity=10,
    saved_states=7,
    prefix_queries_total=1000,
    prefix_hits_total=750,
)


def scrapes(visit: Visit) -> int:
    return sum(url.endswith("/metrics") for url in visit.requested)


async def card(visit: Visit, title: str) -> str:
    found = visit.page.locator(".card").filter(has=visit.page.get_by_role("heading", name=title, exact=True))
    return " ".join((await found.inner_text()).split())


async def test_the_numbers_are_those_of_the_server(open_page: OpenPage) -> None:
    async with open_page() as (visit, bench):
        bench.engine.stats = STATS
        await visit.page.get_by_role("link", name="Server", exact=True).click()
        await visit.page.get_by_text("Memory", exact=True).wait_for()
        assert await card(visit, "Running") == "Running 3 2 waiting"
        assert await card(visit, "From the prefix cache") == "From the prefix cache 75 % of 1,000 prompt tokens"
        assert await card(visit, "KV pages in use") == "KV pages in use 50 % of 160 tokens"
        assert (await card(visit, "Saved states")).startswith("Saved states 7")
        assert "JambaForCausalLM" in await card(visit, "Model")
        assert "4 running, 4 saved" in await card(visit, "Memory")


async def test_it_asks_only_while_it_is_seen(open_page: OpenPage) -> None:
    """The browser's clock is the test's."""
    async with open_page() as (visit, _):
        page = visit.page
        await page.clock.install()
        await page.reload()
        await page.clock.run_for(10_000)
        assert scrapes(visit) == 0
        await page.get_by_role("link", name="Server", exact=True).click()
        await page.get_by_text("Memory", exact=True).wait_for()
        for _ in range(2):
            async with page.expect_response("**/metrics"):
                await page.clock.run_for(2000)
        assert scrapes(visit) >= 3
        hide = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }})"
        changed = "document.dispatchEvent(new Event('visibilitychange'))"
        await page.evaluate(f"{hide.format('true')}; {changed}")
        seen = scrapes(visit)
        await page.clock.run_for(10_000)
        assert scrapes(visit) == seen
        async with page.expect_response("**/metrics"):
            await page.evaluate(f"{hide.format('false')}; {changed}")
        seen = scrapes(visit)
        await page.get_by_role("link", name="Chat", exact=True).click()
        await page.clock.run_for(10_000)
        assert scrapes(visit) <= seen + 1  # one may have been under way


async def test_a_key_is_asked_for(open_page: OpenPage) -> None:
    async with open_page(api_key=("good",)) as (visit, _):
        await visit.page.get_by_role("link", name="Server", exact=True).click()
        await visit.page.get_by_label("Key", exact=True).fill("good")
        await visit.page.keyboard.press("Enter")
        await visit.page.get_by_text("Memory", exact=True).wait_for()

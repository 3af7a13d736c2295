"""A headless Chromium, and the chat page in it.

The tests need Debian's package `chromium` and the Python package `playwright`; without them they are skipped. `.ci/run`
installs both."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from tests.server.conftest import Bench, Ids, MakeBench
from tests.server.fake_engine import says
from tests.server.served_model import LongEngine

Page = Any  # playwright's, whose types are not installed everywhere
MILLISECONDS = 10_000.0  # only a test that fails waits for so long
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 780}
# Chromium finds no host but this one, so nothing leaves the machine even if a test fails.
SWITCHES = ("--disable-dev-shm-usage", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
REPLY = "Hello, **world**."


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def browser() -> AsyncGenerator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright, which drives chromium, is not installed (pip install playwright)")
    async_playwright: Any = importlib.import_module("playwright.async_api").async_playwright
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's sandbox does not start as root
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium, args=[*sandbox, *SWITCHES])
        yield launched
        await launched.close()


@dataclass
class Visit:
    """The page, opened in a browser that has never seen it, and all that it asked for."""

    page: Page
    address: str
    requested: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])

    async def send(self, text: str) -> None:
        await self.page.get_by_label("Message", exact=True).fill(text)
        await self.page.keyboard.press("Enter")

    async def settled(self) -> None:
        """Returns when no reply is under way."""
        await self.page.locator("#turns[aria-busy=false]").wait_for()

    async def replies(self) -> list[str]:
        await self.settled()
        return await self.page.locator(".turn.assistant .content").all_inner_texts()


@asynccontextmanager
async def visit(browser: Any, address: str, **settings: Any) -> AsyncGenerator[Visit]:
    """Opens the page. At the end, checks that it asked no other origin for anything and had no errors."""
    settings = {"viewport": DESKTOP, "reduced_motion": "reduce"} | settings
    context = await browser.new_context(**settings)
    context.set_default_timeout(MILLISECONDS)
    page = await context.new_page()
    visited = Visit(page, address)

    def heard(message: Any) -> None:
        # Chromium reports replies with an error status in this way. The page shows them, and tests look at that.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            visited.problems.append(message.text)

    context.on("request", lambda request: visited.requested.append(request.url))
    page.on("console", heard)
    page.on("pageerror", lambda error: visited.problems.append(str(error)))
    await page.goto(address)
    yield visited
    await context.close()
    assert visited.problems == []
    assert [url for url in visited.requested if not url.startswith(f"{address}/")] == []


OpenPage = Callable[..., AbstractAsyncContextManager[tuple[Visit, Bench]]]


@pytest.fixture
def open_page(browser: Any, make_bench: MakeBench, ids: Ids) -> OpenPage:
    """Serves an application whose model says `reply`, and opens its page. `settings` are the server's options."""

    @asynccontextmanager
    async def open_it(
        reply: str = REPLY, browser_settings: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncGenerator[tuple[Visit, Bench]]:
        bench = make_bench(engine=LongEngine(says(ids(reply))), **settings)
        async with bench.served() as address, visit(browser, address, **(browser_settings or {})) as visited:
            yield visited, bench

    return open_it

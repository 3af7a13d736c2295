"""The page for people who use a keyboard, a screen reader, a phone, or other colours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Ids
from tests.server.fake_engine import says
from tests.server.page.conftest import DESKTOP, PHONE, OpenPage, Page

pytestmark = pytest.mark.asyncio(loop_scope="package")

FOLDER = Path(__file__).parent
AXE = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
REPLY = """## Head

Some `code` and a [link](https://a.example/).

```python
print(1)
```

| a | b |
| - | - |
| 1 | 2 |
"""
# The name of the focused element and whether its focus can be seen, or null at the end of the page.
FOCUSED = """(() => {
    const at = document.activeElement;
    if (at === document.body) return null;
    const name = at.getAttribute('aria-label') ?? at.textContent;
    const ring = getComputedStyle(at).outlineStyle !== 'none';
    return [name.trim(), ring || getComputedStyle(at.parentElement).boxShadow !== 'none'];
})()"""
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": DESKTOP},
    "dark": {"color_scheme": "dark", "viewport": DESKTOP},
    "phone": {"color_scheme": "light", "viewport": PHONE, "has_touch": True},
}


async def issues(page: Page) -> list[str]:
    """The serious and critical findings of axe-core, as rule and place."""
    result = await page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert len(result["passes"]) > 20  # it has looked
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("look", LOOKS)
async def test_axe_finds_nothing_serious(open_page: OpenPage, ids: Ids, look: str) -> None:
    if not AXE.is_file():
        pytest.skip(f"axe-core is not installed (npm install --prefix {FOLDER.relative_to(FOLDER.parents[2])})")

    def fails(_: Any) -> Any:
        raise RuntimeError("planted")

    async with open_page(REPLY, browser_settings=LOOKS[look]) as (visit, bench):
        page = visit.page
        await page.evaluate(await asyncio.to_thread(AXE.read_text, encoding="utf-8"))
        found = {"welcome": await issues(page)}
        await visit.send("Hi")
        await visit.settled()
        bench.engine.script = says(ids("Other."))
        await page.get_by_label("Regenerate").click()
        await visit.settled()
        await page.get_by_label("Version before").click()
        bench.engine.script = fails
        await visit.send("More")
        await visit.settled()
        found["turns"] = await issues(page)
        await page.get_by_label("Edit", exact=True).first.click()
        if look == "phone":
            await page.locator("#list-toggle").click()
            found["list"] = await issues(page)
            await page.locator("#settings-toggle").click()
        await page.get_by_role("checkbox", name="JSON schema").check()
        await page.get_by_role("checkbox", name="Tools").check()
        found["settings"] = await issues(page)
        await page.locator("#key-button").click()
        found["key"] = await issues(page)
        await page.keyboard.press("Escape")
        await page.get_by_role("link", name="Server", exact=True).click()
        await page.get_by_text("Memory", exact=True).wait_for()
        found["server"] = await issues(page)
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(overflow) <= 0
    assert {state: each for state, each in found.items() if each} == {}


async def test_the_keyboard_alone_is_enough(open_page: OpenPage) -> None:
    async with open_page() as (visit, bench):
        page = visit.page
        assert await page.evaluate("document.activeElement.id") == "input"
        await page.keyboard.type("one")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("two")
        await page.keyboard.press("Enter")
        await visit.settled()
        assert await page.locator(".turn.user .content").text_content() == "one\ntwo"
        assert len(bench.engine.requests) == 1
        assert await page.evaluate("document.activeElement.id") == "input"
        order: list[str] = []
        await page.evaluate("document.querySelector('.skip').focus()")
        while focused := await page.evaluate(FOCUSED):
            name, is_visible = focused
            order.append(name)
            assert is_visible, order
            await page.keyboard.press("Tab")
        names = ["Skip to the message box", "Conversations", "Chat", "Server", "API key", "New conversation"]
        names += ["Edit", "Regenerate", "Message", "Send"]
        places = [order.index(name) for name in names]
        assert places == sorted(places)


async def test_a_phone_has_panels_that_open_and_close(open_page: OpenPage) -> None:
    async with open_page(browser_settings=LOOKS["phone"]) as (visit, _):
        page = visit.page
        panels = [page.locator("#list"), page.locator("#settings")]
        assert [await panel.is_visible() for panel in panels] == [False, False]
        await page.locator("#settings-toggle").click()
        assert [await panel.is_visible() for panel in panels] == [False, True]
        await page.locator("#list-toggle").click()
        assert [await panel.is_visible() for panel in panels] == [True, False]
        await page.keyboard.press("Escape")
        assert [await panel.is_visible() for panel in panels] == [False, False]
        assert await page.evaluate("document.activeElement.id") == "list-toggle"


async def test_the_theme_follows_the_system_until_it_is_chosen(open_page: OpenPage) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    async with open_page(browser_settings=LOOKS["light"]) as (visit, _):
        page = visit.page
        light = await page.evaluate(ground)
        await page.emulate_media(color_scheme="dark")
        dark = await page.evaluate(ground)
        assert light != dark
        await page.get_by_label("Switch between light and dark").click()
        assert await page.evaluate(ground) == light
        await page.reload()
        assert await page.evaluate(ground) == light

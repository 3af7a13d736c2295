"""What a model, a user or a stored conversation says never becomes markup of the page, and never makes it ask another
site."""

from __future__ import annotations

import pytest

from jamba_server.server.http.page.files import POLICY
from tests.server.page.conftest import OpenPage

pytestmark = pytest.mark.asyncio(loop_scope="package")

ATTACKS = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 1">

<svg onload="window.hacked = 1"><a href="javascript:hack()">a</a></svg>

[click](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>) <javascript:hack()>

![pixel](https://evil.example/pixel.png) [x](https://good.example/" onclick="window.hacked=1)

`<b>code</b>` **<i>bold</i>** # <u>heading</u>

| <b>a</b> | b |
| --- | --- |
| <img src=y onerror=window.hacked=1> | b |

```html"><script>window.hacked = 1</script>
<script>window.hacked = 1</script>
"""
ELEMENTS = "script, img, svg:not(.icon), b, i, u, iframe, [onerror], [onclick], [onload], [style]"


async def test_an_attack_in_a_reply_and_in_a_message_is_text(open_page: OpenPage) -> None:
    async with open_page(ATTACKS) as (visit, _):
        await visit.send(ATTACKS)
        await visit.settled()
        await visit.page.reload()
        turns = visit.page.locator("#turns")
        await turns.locator(".turn.assistant table").wait_for()
        assert await turns.locator(".content").locator(ELEMENTS).count() == 0
        assert await visit.page.evaluate("window.hacked") is None
        shown = await turns.locator(".turn.assistant .content").inner_text()
        assert "<script>window.hacked = 1</script>" in shown and "<b>code</b>" in shown
        assert await turns.locator(".turn.user .content").text_content() == ATTACKS
        links = await turns.locator("a").evaluate_all("links => links.map(link => new URL(link.href).protocol)")
        assert set(links) <= {"https:"}
        assert not any("evil.example" in url for url in visit.requested)


async def test_the_browser_refuses_markup_from_scripts(open_page: OpenPage) -> None:
    """The policy of the page would stop a mistake in our own scripts, too."""
    async with open_page() as (visit, _):
        with pytest.raises(Exception, match="TrustedHTML"):
            await visit.page.evaluate("document.body.innerHTML = '<b>x</b>'")
        visit.problems.clear()
        response = await visit.page.request.get(visit.address, headers={"accept": "text/html"})
        assert response.headers["content-security-policy"] == POLICY
        assert "unsafe" not in POLICY


HOSTILE = (
    "> " * 20_000 + "a",
    "- " * 20_000 + "a",
    "\n".join("  " * depth + "- a" for depth in range(300)),
    "*a **b _c " * 1_900,
    "[" * 19_000,
    "![a](" * 3_800,
    "".join("`" * (length % 150 + 1) + "a" for length in range(250)),
    "https://" * 2_400,
    "\\*" * 9_000,
    "**a " * 4_500 + "a** " * 100,
    "| a " * 10_000 + "\n" + "| - " * 10_000,
    "a\n" * 9_000,
    "```" + " " * 100_000 + "`",
    "~" * 100_000 + "`",
    "# " + " " * 100_000 + "\r",
    "a|b\n|-" + " " * 100_000 + "x",
    " " * 100_000 + "|\n" + " " * 100_000 + "|-x",
)


async def test_a_hostile_text_is_rendered_in_time(open_page: OpenPage) -> None:
    """Nesting and searches have limits, so the time is at most proportional to a text. The shortest of three times
    counts, because the machine may be busy."""
    async with open_page() as (visit, _):
        script = """async (text) => {
            const { MarkdownView } = await import('./page/markdown.js');
            const times = [1, 2, 3].map(() => {
                const began = performance.now();
                new MarkdownView(document.createElement('div')).update(text);
                return performance.now() - began;
            });
            return Math.min(...times);
        }"""
        slow = {text[:20]: took for text in HOSTILE if (took := await visit.page.evaluate(script, text)) > 500}
        assert slow == {}


async def test_markdown(open_page: OpenPage) -> None:
    """Some constructs whose tree is easily wrong, as nested lists of [tag, children...]."""
    cases = {
        "a *b **c** d*": [["p", "a ", ["em", "b ", ["strong", "c"], " d"]]],
        "snake_case_name and 2 * 3 * 4": [["p", "snake_case_name and 2 * 3 * 4"]],
        "``a`b`` `c": [["p", ["code", "a`b"], " ", "`", "c"]],
        "1. a\n2. b\n   - c\n3. d": [["ol", ["li", "a"], ["li", "b", ["ul", ["li", "c"]]], ["li", "d"]]],
        "3. a\n\n4. b": [["ol", ["li", "a"], ["li", "b"]]],
        "# T #\ntext": [["h3", "T"], ["p", "text"]],
        "#   T  ": [["h3", "T"]],
        "| a |\n | :-: | \n| b |": [["div", ["table", ["thead", ["tr", ["th", "a"]]], ["tbody", ["tr", ["td", "b"]]]]]],
        "a\nb": [["p", "a", ["br"], "b"]],
        "> a\n> > b": [["blockquote", ["p", "a"], ["blockquote", ["p", "b"]]]],
        r"\*a\* \<b>": [["p", "*", "a", "*", " ", "<", "b>"]],
        "see https://x.example/a_b_c.": [["p", "see ", ["a", "https://x.example/a_b_c"], "."]],
        "* * *": [["hr"]],
        "**unclosed *text": [["p", "**unclosed *text"]],
    }
    script = """async (text) => {
        const { MarkdownView } = await import('./page/markdown.js');
        const box = document.createElement('div');
        const view = new MarkdownView(box);
        for (let end = 1; end <= text.length; end++) view.update(text.slice(0, end)); // as a stream does
        const tree = (node) => node.nodeType === 3 ? node.data
            : [node.tagName.toLowerCase(), ...[...node.childNodes].map(tree)];
        return tree(box).slice(1);
    }"""
    async with open_page() as (visit, _):
        found = {text: await visit.page.evaluate(script, text) for text in cases}
    assert found == cases


async def test_a_streamed_code_block_grows_and_is_copied(open_page: OpenPage) -> None:
    code = "a = 1\n\nb = '<b>'\n"
    async with open_page(
        f"Code:\n\n```python\n{code}```\nDone.", browser_settings={"permissions": ["clipboard-read", "clipboard-write"]}
    ) as (visit, _):
        await visit.send("Hi")
        await visit.settled()
        assert await visit.page.locator("figure code").inner_text() == code.rstrip("\n")
        await visit.page.get_by_role("button", name="Copy code").click()
        await visit.page.get_by_text("Copied").first.wait_for()
        assert await visit.page.evaluate("navigator.clipboard.readText()") == code.rstrip("\n")

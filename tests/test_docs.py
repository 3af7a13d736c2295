"""Checks of the documents: links resolve, chapters are short, and figures name the run that they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jamba_server.server.config import OPTIONS
from tools import api_page, options_page, schema_suite

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MAX_README_WORDS = 1200
MAX_PLAIN_WORDS = 150  # of a chapter that has neither a list nor a table nor a picture


def anchors(page: Path) -> set[str]:
    """Returns the anchors that a page's headings have on GitHub and similar sites."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yields (path, anchor) of each link to a file of this project."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page: Path) -> None:
    broken: list[str] = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def test_the_readme_is_short() -> None:
    text = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(text.split()) <= MAX_README_WORDS


def test_chapters_of_the_architecture_without_a_list_are_short() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    long: dict[str, int] = {}
    for chapter in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = chapter.partition("\n")
        if not re.search(r"^(\||\*|\d+\.|```)", body, flags=re.MULTILINE) and len(body.split()) > MAX_PLAIN_WORDS:
            long[title] = len(body.split())
    assert long == {}


def test_tables_of_figures_in_the_readme_name_their_run() -> None:
    """A chapter whose table has a rate in it links to a file of benchmarks/results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for chapter in re.split(r"^## ", text, flags=re.MULTILINE):
        if re.search(r"^\|.*(tokens/s|tok/s)", chapter, flags=re.MULTILINE):
            assert "benchmarks/results/" in chapter, chapter.splitlines()[0]


@pytest.mark.parametrize("page", api_page.PAGES, ids=lambda path: path.name)
def test_the_api_pages_have_every_field_of_the_schemas(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert api_page.rendered(text) == text


def test_the_page_of_structured_outputs_has_what_is_accepted() -> None:
    assert schema_suite.rendered() == schema_suite.PAGE.read_text(encoding="utf-8")


def test_the_options_page_has_every_option_in_its_group() -> None:
    page = options_page.PAGE.read_text(encoding="utf-8")
    assert options_page.rendered() == page
    assert re.findall(r"^## (\w+)$", page, flags=re.MULTILINE) == ["Server", "Model", "Memory", "Expert"]
    flags = re.findall(r"^\| `(--[\w-]+)`", page, flags=re.MULTILINE)
    assert sorted(flags) == sorted(option.flag for option in OPTIONS.values() if option.name != "model")

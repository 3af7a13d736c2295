"""The files of the chat page as the server sends them. No browser is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jamba_server.server.http.page.files import FOLDER, POLICY
from tests.server.conftest import MakeBench

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
MAX_LINES = 500
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")


def loaded(text: str) -> set[str]:
    """The addresses that a file loads."""
    pattern = r"""(?:src|href)="([^"#]*)"|from "([^"]*)"|import "([^"]*)"|\burl\(["']?([^)"']*)"""
    return {address for match in re.findall(pattern, text) for address in match if address}


@pytest.mark.parametrize("prefix", ["", "/jamba"])
async def test_the_page_and_its_files_need_no_key_and_no_other_server(make_bench: MakeBench, prefix: str) -> None:
    async with make_bench(root_path=prefix, api_key=("key",)).http() as http:
        page = await http.get(f"{prefix}/", headers=HTML)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == POLICY
        assert page.headers["vary"] == "Accept"
        addresses = loaded(page.text) - {f"{prefix}/docs"}
        assert {address.removeprefix(f"{prefix}/page/") for address in addresses} <= set(FILES)
        for name in FILES:
            file = await http.get(f"{prefix}/page/{name}")
            assert file.status_code == 200, name
            assert file.headers["x-content-type-options"] == "nosniff"
            expected = {"./" + each for each in FILES}
            assert {address for address in loaded(file.text) if not address.startswith("#")} <= expected, name
        assert "style=" not in page.text and "onclick=" not in page.text  # the policy forbids both
        assert not re.search(r"<script>|<style>", page.text)
        assert (await http.get(f"{prefix}/page/../server_info")).status_code in (401, 404)


async def test_a_browser_that_has_a_file_gets_304(make_bench: MakeBench) -> None:
    async with make_bench().http() as http:
        for path in ("/", "/page/main.js"):
            first = await http.get(path, headers=HTML)
            again = await http.get(path, headers=HTML | {"If-None-Match": first.headers["etag"]})
            other = await http.get(path, headers=HTML | {"If-None-Match": '"other"'})
            assert (first.status_code, again.status_code, other.status_code) == (200, 304, 200)
            assert again.content == b""
            assert first.headers["cache-control"] == "no-cache"  # a new version of the server is seen at once


async def test_programs_still_get_json(make_bench: MakeBench) -> None:
    async with make_bench().http() as http:
        reply = await http.get("/")
    assert reply.json()["name"] == "jamba-server"
    assert reply.headers["vary"] == "Accept"


async def test_without_ui_there_is_no_page(make_bench: MakeBench) -> None:
    async with make_bench(ui=False).http() as http:
        root = await http.get("/", headers=HTML)
        statuses = {(await http.get(f"/page/{name}")).status_code for name in FILES}
    assert "main.js" not in root.text and "/docs" in root.text
    assert statuses == {404}


async def test_no_request_reads_a_file(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a request reads a file")

    bench = make_bench()
    for name in ("open", "read_bytes", "read_text", "stat"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr("builtins.open", refuse)
    async with bench.http() as http:
        for path in ("/", "/page/main.js", "/page/nothing.js"):
            assert (await http.get(path, headers=HTML)).status_code in (200, 404)


def test_the_sources_are_short() -> None:
    """Small enough to be read: the page has no build step, and what is served is what was written."""
    lengths = {name: len((FOLDER / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert {name: length for name, length in lengths.items() if length >= MAX_LINES} == {}
    unsafe = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function")
    assert [name for name in FILES if unsafe.search((FOLDER / name).read_text(encoding="utf-8"))] == []


async def test_server_info(make_bench: MakeBench) -> None:
    async with make_bench(api_key=("key",)).http() as http:
        refused = await http.get("/server_info")
        reply = await http.get("/server_info", headers={"x-api-key": "key"})
    assert refused.status_code == 401
    assert reply.json()["memory"] == {
        "weight_bytes": 1,
        "kv_bytes": 1,
        "kv_tokens": 160,
        "state_bytes": 1,
        "running_sequences": 4,
        "saved_states": 4,
    }
    assert reply.json()["batch_invariant"] is True


async def test_server_info_while_the_model_loads(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.engine.load("weights", 0.5)
    async with bench.http() as http:
        assert (await http.get("/server_info")).status_code == 503

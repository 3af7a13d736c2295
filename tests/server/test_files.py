"""Files: they go to the disk while they arrive, within limits, and belong to the owner of the API key."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import FileObject

from jamba_server.engine.errors import ConfigError
from jamba_server.server.http.files.store import FileStore
from jamba_server.server.http.files.table import FileTable
from jamba_server.server.http.files.upload import clean_name
from tests.conformance.strict import check
from tests.server.conftest import Bench, MakeBench

LINE = b'{"custom_id": "a"}\n'
FORM: Any = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", LINE)}}
FILES = "jamba_server.server.http.files"


@pytest.fixture
def bench(make_bench: MakeBench, tmp_path: Path) -> Bench:
    return make_bench(data_dir=str(tmp_path))


def stored(tmp_path: Path) -> list[str]:
    """The names of contents in the folder."""
    return sorted(path.name for path in (tmp_path / "files").glob("file-*"))


async def make(client: AsyncOpenAI, name: str = "in.jsonl", content: bytes = LINE, **fields: Any) -> FileObject:
    return await client.files.create(file=(name, content), purpose="batch", **fields)


async def test_a_file_is_kept_listed_read_and_deleted(bench: Bench, tmp_path: Path) -> None:
    async with bench.openai() as client:
        raw = await client.files.with_raw_response.create(file=("ä b.jsonl", LINE * 50_000), purpose="batch")
        check(FileObject, raw.text)
        made = raw.parse()
        assert (made.filename, made.bytes, made.purpose) == ("ä b.jsonl", len(LINE) * 50_000, "batch")
        assert made.expires_at == made.created_at + 30 * 24 * 3600
        assert stored(tmp_path) == [made.id]
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.content(made.id)).content == LINE * 50_000
        assert [file async for file in client.files.list()] == [made]
        assert (await client.files.delete(made.id)).deleted
        assert stored(tmp_path) == []
        for call in (client.files.retrieve(made.id), client.files.content(made.id), client.files.delete(made.id)):
            with pytest.raises(openai.NotFoundError):
                await call


async def test_the_list_has_pages(bench: Bench) -> None:
    async with bench.openai() as client:
        made = [(await make(client)).id for _ in range(5)]
        assert [file.id async for file in client.files.list(limit=2)] == made[::-1]
        assert [file.id async for file in client.files.list(limit=2, order="asc")] == made
        page = await client.files.list(limit=2, order="asc", after=made[2])
        assert [file.id for file in page.data] == made[3:]
        assert not page.has_more
        assert [file.id async for file in client.files.list(purpose="batch_output")] == []
        with pytest.raises(openai.BadRequestError) as error:
            await client.files.list(after="file-none")
        assert error.value.param == "after"


async def test_a_file_is_deleted_when_its_time_has_come(bench: Bench, tmp_path: Path) -> None:
    services = bench.app.state.services
    async with bench.openai() as client:
        short = await make(client, expires_after={"anchor": "created_at", "seconds": 3600})
        long = await make(client)
        assert short.expires_at == short.created_at + 3600
        clock = services.files.now
        services.files.now = lambda: clock() + 3600
        services.batches.changed.set()
        for _ in range(1000):
            if stored(tmp_path) == [long.id]:
                break
            await asyncio.sleep(0.005)
        assert [file.id async for file in client.files.list()] == [long.id]


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({**FORM, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({**FORM, "data": {}}, "purpose"),
        ({"data": {"purpose": "batch"}, "files": {"other": ("a", b"b")}}, "other"),
        ({"data": {"purpose": "batch", "unknown": "1"}, "files": FORM["files"]}, "unknown"),
        ({"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", b"")}}, "file"),
        ({"data": {"purpose": "batch", "file": "text"}, "files": [("x", ("a", b""))]}, "file"),
        ({**FORM, "files": [("file", ("a", LINE)), ("file", ("b", LINE))]}, "file"),
        ({**FORM, "data": {"purpose": ["batch", "batch"]}}, "purpose"),
        ({**FORM, "data": {"purpose": "b" * 1000}}, "purpose"),
        ({**FORM, "data": {"purpose": "batch", "expires_after[seconds]": "3600"}}, "expires_after[anchor]"),
        (
            {**FORM, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}},
            "expires_after[seconds]",
        ),
        (
            {
                **FORM,
                "data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            },
            "expires_after[seconds]",
        ),
    ],
)
async def test_a_wrong_form_is_refused_by_name_and_leaves_nothing(
    bench: Bench, tmp_path: Path, form: Any, param: str
) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/files", **form)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert stored(tmp_path) == []
    assert bench.app.state.services.files.total == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"no form at all", 400),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nab', 400),
        (b"--b\r\n" + b"X" * 100_000, 400),
        (b"".join(b'--b\r\nContent-Disposition: form-data; name="purpose%d"\r\n\r\n\r\n' % i for i in range(99)), 400),
    ],
)
async def test_a_malformed_form_is_refused(bench: Bench, tmp_path: Path, body: bytes, status: int) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    async with bench.http() as http:
        assert (await http.post("/v1/files", content=body, headers=headers)).status_code == status
        for type_ in ("application/json", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 1000):
            reply = await http.post("/v1/files", content=body, headers={"content-type": type_})
            assert reply.status_code == (415 if type_ == "application/json" else 400)
            assert ("no boundary" in reply.text) == (type_ == "multipart/form-data")
    assert stored(tmp_path) == []


async def test_headers_of_parts_are_limited(bench: Bench) -> None:
    async with bench.http() as http:
        for name, status in (("a" * 1900, 200), ("a" * 2100, 400)):
            reply = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": (name, LINE)})
            assert (reply.status_code, "2048 bytes" in reply.text) == (status, status == 400)


async def test_limits_of_one_file_and_of_all_together(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{FILES}.store.MAX_UPLOAD_BYTES", 50_000)
    bench = make_bench(data_dir=str(tmp_path), max_file_bytes=100_000)
    store = bench.app.state.services.files
    async with bench.openai() as client:
        with pytest.raises(openai.APIStatusError) as error:
            await make(client, content=b"a" * 50_001)
        assert error.value.status_code == 413
        assert store.total == 0
        made = [await make(client, content=b"a" * 40_000) for _ in range(2)]
        with pytest.raises(openai.APIStatusError, match="--max-file-bytes") as error:
            await make(client, content=b"a" * 40_000)
        assert error.value.status_code == 413
        await client.files.delete(made[0].id)
        await make(client, content=b"a" * 40_000)
        assert store.total == 80_000
        for _ in range(4):
            await make(client, content=b"a")  # a small file counts as a block of the disk
        with pytest.raises(openai.APIStatusError):
            await make(client, content=b"a")
    assert FileStore(tmp_path, max_bytes=100_000).total == store.total, "a new start counts the same"


async def test_the_content_goes_to_the_disk_while_it_arrives_and_is_gone_after_a_disconnect(
    bench: Bench, tmp_path: Path
) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    seen: list[int] = []

    async def body() -> AsyncGenerator[bytes]:
        yield head
        for _ in range(8):
            yield b"a" * 1024**2
            await asyncio.sleep(0.02)
            seen.append(sum(path.stat().st_size for path in (tmp_path / "files").glob("*.part")))
        raise ConnectionResetError

    headers = {"content-type": "multipart/form-data; boundary=b"}
    async with bench.served() as address, httpx.AsyncClient(base_url=address) as http:
        with pytest.raises(ConnectionResetError):
            await http.post("/v1/files", content=body(), headers=headers)
        for _ in range(1000):
            if not stored(tmp_path):
                break
            await asyncio.sleep(0.005)
    assert max(seen) > 2 * 1024**2
    assert stored(tmp_path) == []
    assert bench.app.state.services.files.total == 0


async def test_a_start_removes_what_a_kill_has_left(bench: Bench, make_bench: MakeBench, tmp_path: Path) -> None:
    async with bench.openai() as client:
        made = await make(client)
    for name in ("file-1.part", "file-2"):
        (tmp_path / "files" / name).write_bytes(b"a")
    async with make_bench(data_dir=str(tmp_path)).openai() as client:
        assert stored(tmp_path) == [made.id]
        assert (await client.files.content(made.id)).content == LINE


async def test_a_full_disk_leaves_nothing_behind(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def lines() -> Iterator[bytes]:
        yield LINE
        raise OSError(errno.ENOSPC, "No space left on device")

    services = bench.app.state.services
    async with bench.openai() as client:
        with monkeypatch.context() as patch:
            patch.setattr(FileTable, "put", full)
            with pytest.raises(openai.InternalServerError, match="disk is full"):
                await make(client)
        with pytest.raises(OSError, match="No space"):
            await services.files.put_result("file-r", "", "r.jsonl", lines, None)
        assert stored(tmp_path) == []
        assert services.files.total == 0
        made = await make(client)
        assert (tmp_path / "files" / made.id).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("settings", [{}, {"max_file_bytes": 0, "data_dir": "somewhere"}])
async def test_a_server_without_a_folder_refuses_files(
    make_bench: MakeBench, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with make_bench(**settings).openai() as client:
        for call in (make(client), client.files.list(), client.files.retrieve("file-1")):
            with pytest.raises(openai.BadRequestError) as error:
                await call
            assert error.value.code == "files_disabled"
        assert [batch async for batch in client.batches.list()] == []
        with pytest.raises(openai.BadRequestError):
            await client.batches.create(input_file_id="file-1", endpoint="/v1/completions", completion_window="24h")


async def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = FileStore(tmp_path, max_bytes=1)
    with pytest.raises(ConfigError, match="another server"):
        FileStore(tmp_path, max_bytes=1)
    await first.close()
    await FileStore(tmp_path, max_bytes=1).close()
    (tmp_path / "files" / "lock").unlink()
    (tmp_path / "files" / "lock").mkdir()
    with pytest.raises(ConfigError, match="lock cannot be written"):
        FileStore(tmp_path, max_bytes=1)


def test_names_of_files_are_shown_without_folders_and_control_characters() -> None:
    assert clean_name(b"../../etc/passwd") == "passwd"
    assert clean_name(b"C:\\a\\b.jsonl") == "b.jsonl"
    assert clean_name(b"a\x00\r\nb") == "ab"
    assert clean_name(b"/") == "file"
    assert len(clean_name(b"a" * 10_000)) == 255

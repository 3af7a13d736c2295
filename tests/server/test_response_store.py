"""What the store of responses keeps, for whom, and what it forgets first."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from jamba_server.engine.errors import ConfigError, Overloaded, RequestRejected, ResponseNotFound
from jamba_server.server.http.store import database
from jamba_server.server.http.store.database import StoredResponse
from jamba_server.server.http.store.responses import FILE_NAME, ResponseStore
from jamba_server.server.http.store.sqlite import create_tables

OWNER = "key"


def stored(id_: str, previous: str | None = None, *, owner: str = OWNER, text: str = "Hi") -> StoredResponse:
    return StoredResponse(
        id=id_,
        owner=owner,
        previous_id=previous,
        input=json.dumps([{"id": f"in_{id_}", "type": "message", "text": text}]).encode(),
        response=json.dumps({"id": id_, "output": [{"id": f"out_{id_}", "type": "message"}]}).encode(),
    )


async def put(store: ResponseStore, *responses: StoredResponse) -> None:
    for response in responses:
        assert await store.put(response, [f"in_{response.id}", f"out_{response.id}"])


async def kept(store: ResponseStore, *ids: str, owner: str = OWNER) -> list[str]:
    found: list[str] = []
    for id_ in ids:
        try:
            found.append((await store.get(id_, owner)).id)
        except ResponseNotFound:
            continue
    return found


def make(folder: Path | None = None, *, max_responses: int = 100, max_bytes: int = 100_000) -> ResponseStore:
    return ResponseStore(folder, max_responses=max_responses, max_bytes=max_bytes)


async def conversation(store: ResponseStore, id_: str, *, max_bytes: int = 100_000) -> list[str]:
    return [item["id"] for item in await store.conversation(id_, OWNER, max_bytes=max_bytes)]


async def test_lengths_of_conversations() -> None:
    store = make()
    await put(store, stored("a"), stored("b", "a"), stored("c", "b"), stored("d", "b"), stored("late", "gone"))
    await put(store, stored("x", "y"), stored("y", "x"), stored("theirs", owner="other"))
    lengths = await store.lengths([None, "d", "c", "b", "late", "x", "theirs", "none"], OWNER)
    wanted = {None: 0, "b": 2, "c": 3, "d": 3, "late": 1, "x": 2, "theirs": 0, "none": 0}
    assert {id_: lengths[id_] for id_ in wanted} == wanted


async def test_a_conversation_is_the_items_of_its_responses() -> None:
    store = make()
    await put(store, stored("a"), stored("b", "a"), stored("c", "b"), stored("other", "a"))
    assert await conversation(store, "c") == ["in_a", "out_a", "in_b", "out_b", "in_c", "out_c"]
    assert await conversation(store, "other") == ["in_a", "out_a", "in_other", "out_other"]
    await store.close()


async def test_another_owner_finds_nothing() -> None:
    store = make()
    await put(store, stored("a"), stored("theirs", owner="them"))
    for owner, mine in ((OWNER, "a"), ("them", "theirs"), ("", None)):
        assert await kept(store, "a", "theirs", owner=owner) == ([mine] if mine else [])
        assert bool(await store.items(["in_a"], owner, max_bytes=1000)) == (owner == OWNER)
    with pytest.raises(ResponseNotFound):
        await store.delete("a", "them")
    with pytest.raises(RequestRejected, match="'theirs' is not stored"):
        await conversation(store, "theirs")
    # A response of another owner is not read even if a chain leads to it.
    await put(store, stored("b", "theirs"))
    with pytest.raises(RequestRejected, match="'theirs' is not stored"):
        await conversation(store, "b")
    assert await kept(store, "a") == ["a"]
    await store.close()


async def test_the_response_that_has_not_been_used_for_longest_goes_first() -> None:
    store = make(max_responses=3)
    await put(store, stored("a"), stored("b"), stored("c"))
    await conversation(store, "a")
    await put(store, stored("d"))
    assert await kept(store, "a", "b", "c", "d") == ["a", "c", "d"]
    await store.close()


async def test_bytes_are_limited_too() -> None:
    size = stored("a").size
    store = make(max_bytes=3 * size)
    await put(store, *(stored(name) for name in "abcde"))
    assert await kept(store, *"abcde") == ["c", "d", "e"]
    large = stored("f", text="x" * (3 * size))
    assert not await store.put(large, [])
    assert await kept(store, *"abcdef") == ["c", "d", "e"]
    await store.close()


async def test_a_conversation_loses_its_end_before_its_beginning() -> None:
    store = make(max_responses=4)
    await put(store, stored("a"), stored("b", "a"), stored("c", "b"))
    await put(store, stored("x"), stored("y"))
    assert await kept(store, *"abcxy") == ["a", "b", "x", "y"]
    assert await conversation(store, "b") == ["in_a", "out_a", "in_b", "out_b"]
    await store.close()


async def test_a_deleted_response_cannot_be_continued() -> None:
    store = make()
    await put(store, stored("a"), stored("b", "a"))
    await store.delete("a", OWNER)
    assert await kept(store, "a", "b") == ["b"]
    assert await store.items(["in_a"], OWNER, max_bytes=1000) == {}
    with pytest.raises(RequestRejected, match="'a' is not stored") as caught:
        await conversation(store, "b")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(ResponseNotFound):
        await store.delete("a", OWNER)
    await store.close()


async def test_a_conversation_that_is_too_large_is_not_read() -> None:
    store = make()
    await put(store, stored("a"), stored("b", "a"))
    size = stored("a").size + stored("b").size
    assert len(await conversation(store, "b", max_bytes=size)) == 4
    with pytest.raises(RequestRejected, match=f"has {size} bytes; at most {size - 1}"):
        await conversation(store, "b", max_bytes=size - 1)
    await store.close()


async def test_items_are_found_by_their_ids() -> None:
    store = make()
    await put(store, stored("a"), stored("b", "a", text="Ho"))
    found = await store.items(["in_b", "out_a", "in_z", "out_b", "in_b"], OWNER, max_bytes=1000)
    assert found == {
        "in_b": {"id": "in_b", "type": "message", "text": "Ho"},
        "out_a": {"id": "out_a", "type": "message"},
        "out_b": {"id": "out_b", "type": "message"},
    }
    await store.close()


async def test_items_that_are_too_large_together_are_not_read() -> None:
    store = make()
    first, second = stored("a", text="x" * 500), stored("b", text="y" * 500)
    await put(store, first, second)
    assert len(await store.items(["in_a"], OWNER, max_bytes=first.size)) == 1
    with pytest.raises(RequestRejected, match=r"The referenced items have \d+ bytes; at most 1000 are read"):
        await store.items(["in_a"] * 2, OWNER, max_bytes=1000)  # one item, whose text the prompt would have twice
    with pytest.raises(RequestRejected, match="The responses to which the item references lead have"):
        await store.items(["out_a", "out_b"], OWNER, max_bytes=first.size + second.size - 1)
    await store.close()


async def test_a_restart_keeps_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = make(folder)
    await put(store, stored("a"), stored("b", "a"))
    await store.close()
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600
    store = make(folder)
    assert await conversation(store, "b") == ["in_a", "out_a", "in_b", "out_b"]
    await store.close()
    store = make(folder, max_responses=1)  # a smaller limit holds from the start
    assert len(await kept(store, "a", "b")) == 1
    await store.close()


async def test_a_server_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """The connection is not closed, as after SIGKILL: what a second one reads is what was committed."""
    store = make(tmp_path)
    await put(store, stored("a"))
    second = make(tmp_path)
    assert await kept(second, "a") == ["a"]
    await second.close()
    await store.close()


async def test_a_deleted_text_is_no_longer_in_the_file(tmp_path: Path) -> None:
    store = make(tmp_path)
    await put(store, stored("a", text="secret words"), stored("b"))
    await store.delete("a", OWNER)
    await store.close()
    assert b"secret words" not in (tmp_path / FILE_NAME).read_bytes()


async def test_many_tasks_share_the_store() -> None:
    store = make()
    await asyncio.gather(*(put(store, stored(str(number))) for number in range(50)))
    assert len(await kept(store, *map(str, range(50)))) == 50
    await store.close()


@pytest.mark.parametrize("limits", [{"max_responses": 0}, {"max_bytes": 0}])
async def test_a_limit_of_zero_keeps_nothing(tmp_path: Path, limits: dict[str, int]) -> None:
    store = make(tmp_path, **limits)
    assert not store.enabled
    assert not await store.put(stored("a"), [])
    assert await kept(store, "a") == []
    assert os.listdir(tmp_path) == []
    await store.close()


async def test_a_write_that_fails_is_no_error_of_the_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME) as other:
        other.execute("DROP TABLE items")
    other.close()
    assert not await store.put(stored("a"), ["in_a"])
    assert "a is not stored: no such table: items" in caplog.text
    assert await kept(store, "a") == []  # nothing of the failed write stays
    await store.close()


def test_a_file_that_is_no_database_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"something else, long enough to have a header " * 20)
    with pytest.raises(ConfigError, match=r"responses\.sqlite cannot be used: file is not a database"):
        make(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        make(blocked)


def test_a_file_of_another_version_stops_the_start(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.executescript("CREATE TABLE t (x); PRAGMA user_version = 7;")
    connection.close()
    with pytest.raises(ConfigError, match="has version 7 and not 1"):
        make(tmp_path)


async def test_a_conversation_is_read_from_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    await put(store, stored("a"), stored("b", "a"))
    connection = store._database._connection  # pyright: ignore[reportPrivateUsage]
    connection.execute("PRAGMA query_only = ON")  # every write fails, as on a full disk
    assert await conversation(store, "b") == ["in_a", "out_a", "in_b", "out_b"]
    assert "cannot be marked as used" in caplog.text
    assert not await store.put(stored("c", "b"), [])
    connection.execute("PRAGMA query_only = OFF")
    await put(store, stored("c", "b"))
    await store.close()


async def test_a_file_that_is_damaged_while_the_server_runs(tmp_path: Path) -> None:
    store = make(tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME) as other:
        other.execute("DROP TABLE responses")
    other.close()
    for read in (store.get("a", OWNER), store.delete("a", OWNER), store.items(["a"], OWNER, max_bytes=9)):
        with pytest.raises(Overloaded, match="cannot be used at present: no such table"):
            await read
    await store.close()


async def test_responses_that_refer_to_each_other_in_a_circle(tmp_path: Path) -> None:
    store = make(tmp_path)
    await put(store, stored("a"), stored("b", "a"))
    with sqlite3.connect(tmp_path / FILE_NAME) as other:
        other.execute("UPDATE responses SET previous_id = 'b' WHERE id = 'a'")
    other.close()
    with pytest.raises(RequestRejected, match="is not stored"):
        await conversation(store, "b")
    await store.close()


async def test_two_servers_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path)
    second = make(tmp_path)
    connection, schema = second._database._connection, database._SCHEMA  # pyright: ignore[reportPrivateUsage]
    create_tables(connection, schema, database.VERSION)  # as if both had found an empty file
    await put(first, stored("a"))
    await put(second, stored("b", "a"))
    assert await conversation(first, "b") == ["in_a", "out_a", "in_b", "out_b"]
    links = first._database.chain("b", OWNER)  # pyright: ignore[reportPrivateUsage]
    await second.delete("a", OWNER)
    monkeypatch.setattr(first._database, "chain", lambda *_: links)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RequestRejected, match="'a' is not stored"):
        await conversation(first, "b")
    await first.close()
    await second.close()

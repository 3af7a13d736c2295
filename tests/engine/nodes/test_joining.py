"""Who may join node 0: refusals by name, late ranks, strangers, and the time limits."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.nodes.coordinator import Coordinator, listen
from jamba_server.engine.nodes.messages import (
    CannotStart,
    FirstMessage,
    Hello,
    RankHello,
    Refused,
    Start,
    Stop,
    ToNode,
    Welcome,
    receive,
    send,
)
from jamba_server.engine.nodes.terms import Terms, difference, terms_of
from jamba_server.engine.process.child import Child
from tests.engine.nodes.machines import HOST, PATIENCE, Flags, first_node, other_node, parsed
from tests.engine.nodes.test_nodes import STAGES, TENSOR, until_awaited
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joining")
    save_tiny(folder)
    return folder


@pytest.fixture
async def coordinator(folder: Path) -> AsyncGenerator[Coordinator]:
    """Node 0 without an engine."""
    engine = first_node(folder, TENSOR)
    await engine.coordinator.start()
    yield engine.coordinator
    await engine.coordinator.close("the test is over", failed=False)


def terms(folder: Path, flags: Flags = TENSOR) -> Terms:
    return terms_of(parsed(folder, (*flags, "--master-addr", HOST)).engine(folder))


async def said(coordinator: Coordinator, message: FirstMessage) -> tuple[asyncio.StreamWriter, object]:
    """What node 0 answers to the first message of a connection. None means that it ends the connection."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(*coordinator.address)
        send(writer, message)
        return writer, await receive(reader, ToNode)


async def test_a_mismatched_option_is_refused_by_name(coordinator: Coordinator, folder: Path) -> None:
    async with other_node(folder, (*TENSOR, "--block-size", "32"), coordinator.address[1]) as machine:
        assert await machine.ends() == 1
        assert "node 0 refuses this node: block_size is 32 on node 1, but 16 on node 0" in machine.log


async def test_a_mismatched_model_is_refused_by_name(coordinator: Coordinator, tmp_path: Path) -> None:
    save_tiny(tmp_path, seed=1)
    async with other_node(tmp_path, TENSOR, coordinator.address[1]) as machine:
        assert await machine.ends() == 1
        assert "the model's file model.safetensors on node 1 differs from that on node 0." in machine.log


def test_every_difference_has_a_name(folder: Path, tmp_path: Path) -> None:
    own = terms(folder)
    assert difference(own, terms(folder, (*TENSOR, "--numa", "none")), 1) is None
    assert difference(own, terms(folder, (*TENSOR, "--enable-priority", "true")), 1) == (
        "enable_priority is True on node 1, but False on node 0; they must be the same."
    )
    for changes, message in (
        ({"nnodes": 3}, "nnodes is 3 on node 1, but 2 on node 0; they must be the same."),
        ({"versions": {**own.versions, "torch": "9.9"}}, "the version of torch is 9.9 on node 1, but "),
        ({"versions": {**own.versions, "source": "0"}}, "the source code of jamba-server on node 1 differs from "),
        ({"options": {**own.options, "new": 1}}, "new is 1 on node 1, but None on node 0; they must be the same."),
        ({"files": {**own.files, "new.safetensors": "0"}}, "the model of node 1 has a file new.safetensors, but that "),
        ({"files": {"config.json": own.files["config.json"]}}, "the model of node 0 has a file "),
    ):
        assert (difference(own, msgspec.structs.replace(own, **changes), 1) or "").startswith(message), message
    (tmp_path / "tokenizer.json").write_text("{}")
    assert difference(own, terms(folder, (*TENSOR, "--tokenizer", str(tmp_path))), 1) is not None
    assert terms(folder, (*TENSOR, "--load-format", "dummy")).files.keys() == {"config.json"}


async def test_numbers_of_nodes_are_checked(coordinator: Coordinator, folder: Path) -> None:
    for node in (0, 2, -1):
        writer, answer = await said(coordinator, Hello(node, terms(folder)))
        writer.close()
        reason = f"node_rank is {node}; node 0 expects other nodes from 1 to 1."
        assert answer == Refused(reason, final=True)


async def test_a_second_node_of_a_number_waits_until_the_first_has_left(coordinator: Coordinator, folder: Path) -> None:
    first, answer = await said(coordinator, Hello(1, terms(folder)))
    assert answer == Welcome()
    second, answer = await said(coordinator, Hello(1, terms(folder)))
    second.close()
    assert answer == Refused(f"node 1 has joined already, from {HOST}.", final=False)
    first.close()
    await until_node_leaves(coordinator)
    third, answer = await said(coordinator, Hello(1, terms(folder)))
    third.close()
    assert answer == Welcome()


async def test_only_ranks_of_the_present_incarnation_are_connected(coordinator: Coordinator, folder: Path) -> None:
    """A node that leaves and joins again while its ranks are awaited starts them in the next incarnation."""
    counts = list[int]()

    async def spawn(ranks: Sequence[socket.socket]) -> Child:
        counts.append(len(ranks))
        raise OSError("no process")

    spawned = asyncio.create_task(coordinator.spawn(spawn))
    reader, first = await joined(coordinator, folder)
    old = await receive(reader, ToNode)
    assert isinstance(old, Start) and old.incarnation == 1
    first.close()
    await until_node_leaves(coordinator)
    reader, second = await joined(coordinator, folder)
    new = await receive(reader, ToNode)
    assert isinstance(new, Start) and new.incarnation == 2
    for late in (RankHello(1, old.token, 1), RankHello(2, old.token, 1), RankHello(2, new.token, 0)):
        writer, answer = await said(coordinator, late)
        writer.close()
        assert answer is None
    _, rank = await asyncio.open_connection(*coordinator.address)
    send(rank, RankHello(2, new.token, 1))
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(OSError, match="no process"):
            await spawned
        assert counts == [1]
        assert await receive(reader, ToNode) == Stop(2)
    rank.close()
    second.close()


async def joined(coordinator: Coordinator, folder: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The connection of a node 1 that has joined."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection(*coordinator.address)
        send(writer, Hello(1, terms(folder)))
        assert await receive(reader, ToNode) == Welcome()
    return reader, writer


async def test_a_node_that_cannot_start_its_ranks_is_named(coordinator: Coordinator, folder: Path) -> None:
    async def spawn(ranks: Sequence[socket.socket]) -> Child:
        raise AssertionError(ranks)

    spawned = asyncio.create_task(coordinator.spawn(spawn))
    reader, writer = await joined(coordinator, folder)
    async with asyncio.timeout(PATIENCE):
        assert isinstance(await receive(reader, ToNode), Start)
        send(writer, CannotStart(1, "no memory"))
        with pytest.raises(OSError, match="node 1 cannot start its ranks: no memory"):
            await spawned
        assert await receive(reader, ToNode) == Stop(1)
    writer.close()


async def until_node_leaves(coordinator: Coordinator) -> None:
    async with asyncio.timeout(PATIENCE):
        while not coordinator.awaited:
            await asyncio.sleep(0.01)


async def test_late_ranks_and_strangers_are_dropped(coordinator: Coordinator, folder: Path) -> None:
    """None of them keeps a node from joining."""
    for message in (RankHello(0, "", 1), RankHello(0, "ß", 1), RankHello(7, "0" * 32, 1)):
        writer, answer = await said(coordinator, message)
        writer.close()
        assert answer is None
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"JMB1\xff\xff\xff\x3f", b"JMB1\x01\x00\x00\x00\xc1", b""):
        reader, writer = await asyncio.open_connection(*coordinator.address)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionResetError):  # the system says so if node 0 has not read everything
                assert await reader.read() == b""
        writer.close()
    writer, answer = await said(coordinator, Hello(1, terms(folder)))
    writer.close()
    assert answer == Welcome()


async def test_a_missing_node_ends_node_0_after_the_time_limit(folder: Path) -> None:
    engine = first_node(folder, (*STAGES, "--node-timeout", "0.05"))
    with pytest.raises(ConfigError, match=r"^node 1 of 2 did not join node 0 at .* within 0.05 s \(--node-timeout\)$"):
        await engine.start()
    await engine.close()


async def test_a_missing_node_0_ends_a_node_after_the_time_limit(folder: Path) -> None:
    with listen(HOST, 0) as silent:  # it accepts connections, but never answers
        flags = (*STAGES, "--node-timeout", "0.05")
        async with other_node(folder, flags, silent.getsockname()[1]) as machine:
            assert await machine.ends() == 1
            assert "could not be joined within 0.05 s (--node-timeout): it has not answered." in machine.log


async def test_a_node_waits_for_node_0(folder: Path) -> None:
    with listen(HOST, 0) as taken:
        port = taken.getsockname()[1]
    async with other_node(folder, STAGES, port) as machine:
        await machine.says("cannot be joined yet: .*refused")
        machine.process.terminate()
        assert await machine.ends() == 0


async def test_closing_ends_the_wait_for_a_node(folder: Path) -> None:
    engine = first_node(folder, STAGES)
    start = asyncio.create_task(engine.start())
    await until_awaited(engine, "node 1 of 2")
    assert "node 1 of 2 must join; " in engine.health.reason
    async with asyncio.timeout(PATIENCE):
        await engine.close()
        with pytest.raises(ConfigError, match="the server is shutting down"):
            await start


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--master-addr 192\.0\.2\.1 with --master-port 0 cannot be used: "):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--nnodes", "2"), "nnodes is 2; it needs master_addr"),
        (("--node-rank", "1"), "node_rank is 1; it must be less than nnodes, which is 1"),
        (("--master-addr", HOST), "master_addr is '127.0.0.1', but nnodes is 1"),
        (
            ("--nnodes", "2", "--node-rank", "1", "--master-addr", HOST, "--master-port", "0"),
            "master_port is 0, which is for node 0 only",
        ),
        (
            ("--nnodes", "2", "--master-addr", HOST, "--data-parallel-size", "2"),
            "data_parallel_size 2 does not work with nnodes 2 yet",
        ),
    ],
)
def test_options_that_contradict_each_other(folder: Path, flags: Flags, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(folder, flags)


def test_ranks_must_be_divisible_among_nodes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="nnodes is 2, but tensor_parallel_size 1 and pipeline_parallel_size 3"):
        first_node(folder, ("--nnodes", "2", "--pipeline-parallel-size", "3"))

"""Connections: deadlines of headers and unread bodies, a limit on their number, and file descriptors that run short."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import resource
import socket
import subprocess
import sys
from typing import Any

import pytest

from jamba_server.server.cli.server import fit_queue, limit_connections
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.connections import acceptor as acceptor_module
from jamba_server.server.http.connections import protocol as protocol_module
from jamba_server.server.http.connections.descriptors import connections_that_fit, open_descriptors, raise_soft_limit
from jamba_server.server.http.connections.protocol import LINGER_SECONDS, REFUSAL_SECONDS, SEND_GRACE_SECONDS
from tests.server.conftest import Bench
from tests.server.edge_server import SECONDS, FakeConnection, edge_server

HEADERS = b"Host: server\r\nContent-Type: application/json\r\n"
LIVE = b"GET /live HTTP/1.1\r\n" + HEADERS + b"\r\n"
KEEP_ALIVE = 75


def reply_of(written: bytes) -> tuple[int, dict[str, str], bytes]:
    """Returns the status, the headers and the body of the last reply in `written`."""
    head, _, body = written[written.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


# Deadlines ------------------------------------------------------------------------------------------------------------


async def test_headers_that_do_not_end_get_408(bench: Bench) -> None:
    client = FakeConnection(bench)
    assert client.loop.pending == [20.0]
    for byte in b"GET /live HTTP/1.1\r\nHost":  # a byte now and then does not buy time
        await client.sends(bytes([byte]))
    assert len(client.loop.timers) == 1
    client.loop.expire()
    status, headers, body = reply_of(client.transport.written)
    assert (status, headers["connection"], client.transport.closed) == (408, "close", True)
    assert json.loads(body)["error"]["code"] == "request_timeout"
    await client.finish()


async def test_a_client_that_reads_nothing_is_cut_off(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(LIVE)
    client.transport.unread = 100_000
    client.protocol.pause_writing()
    send = next(timer for timer in client.loop.timers if timer.seconds == 60.0 + SEND_GRACE_SECONDS)
    client.transport.unread = 70_000  # it reads slowly
    send.call()
    assert not client.transport.closed
    later = client.loop.timers[-1]
    assert later is not send and later.seconds == send.seconds
    later.call()
    assert client.transport.aborted
    await client.finish()


async def test_a_client_that_reads_in_time_is_not_cut_off(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(LIVE)
    client.transport.unread = 100_000
    client.protocol.pause_writing()
    client.transport.unread = 10
    client.protocol.resume_writing()
    assert client.loop.timers[-1].cancelled
    client.protocol.timeout_keep_alive_handler()  # the connection is closed, and its last bytes are still unread
    assert client.transport.closed and not client.loop.timers[-1].cancelled
    client.loop.timers[-1].call()
    assert client.transport.aborted
    await client.finish()


async def test_a_client_that_never_reads_its_reply_holds_no_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_module, "SEND_GRACE_SECONDS", 0.0)
    counts = bench.app.state.services.edge.connections
    async with edge_server(bench, send_timeout=0.1) as (_, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        while not counts.num_open:
            await asyncio.sleep(0.005)
        # So many replies fit neither into the buffers of the kernel nor into that of the client, which reads nothing.
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 200)
        async with asyncio.timeout(SECONDS):
            while counts.num_open:
                await asyncio.sleep(0.01)
        writer.close()


async def test_a_connection_that_sends_nothing_is_closed(bench: Bench) -> None:
    client = FakeConnection(bench)
    client.loop.expire()
    assert (client.transport.written, client.transport.closed) == (b"", True)
    await client.finish()
    assert client.num_lost == 1


async def test_an_idle_connection_has_the_keep_alive_time_only(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(LIVE)
    assert reply_of(client.transport.written)[0] == 200
    assert client.loop.pending == [KEEP_ALIVE]
    client.loop.expire()
    assert client.transport.closed
    await client.finish()


async def test_the_next_request_has_a_deadline_from_its_first_byte(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(LIVE)
    await client.sends(b"G")
    await client.sends(b"ET /li")
    assert client.loop.pending == [20.0]
    await client.sends(LIVE.removeprefix(b"GET /li"))
    assert client.loop.pending == [KEEP_ALIVE]
    assert client.transport.written.count(b"HTTP/1.1 200") == 2
    await client.finish()


async def test_a_pipelined_beginning_has_a_deadline(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(LIVE + b"GET /li")
    assert 20.0 in client.loop.pending
    await client.finish()


async def test_a_request_under_way_has_no_deadline_of_the_connection(bench: Bench) -> None:
    client = FakeConnection(bench)
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n" + HEADERS + b"\r\n"
    await client.sends(head + b'{"pro')
    assert client.loop.pending == []
    await client.finish()


async def test_a_body_that_nobody_reads_gets_a_short_time(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(b"POST /nothing HTTP/1.1\r\nContent-Length: 20\r\n" + HEADERS + b"\r\n")
    assert reply_of(client.transport.written)[0] == 404
    assert LINGER_SECONDS in client.loop.pending
    await client.sends(b"x" * 10)
    assert client.loop.pending == [LINGER_SECONDS]
    await client.sends(b"x" * 10 + b"GET")  # the rest of the body, and the next request
    assert client.loop.pending == [20.0]
    await client.sends(LIVE.removeprefix(b"GET"))
    assert reply_of(client.transport.written)[0] == 200
    await client.finish()


async def test_an_unread_body_that_does_not_end_closes_the_connection(bench: Bench) -> None:
    client = FakeConnection(bench)
    await client.sends(b"POST /nothing HTTP/1.1\r\nContent-Length: 20\r\n" + HEADERS + b"\r\n")
    await client.sends(b"x")
    client.loop.expire()
    assert client.transport.closed
    assert client.transport.written.count(b"HTTP/1.1") == 1
    await client.finish()


# Too many connections -------------------------------------------------------------------------------------------------


async def test_a_refused_connection_gets_503_with_retry_after(bench: Bench) -> None:
    client = FakeConnection(bench, refused=True)
    assert client.loop.pending == [REFUSAL_SECONDS]
    body = b'{"prompt": "a"}'
    await client.sends(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n" % len(body) + HEADERS + b"\r\n")
    await client.sends(body)
    status, headers, content = reply_of(client.transport.written)
    assert (status, headers["connection"], headers["content-type"]) == (503, "close", "application/json")
    assert int(headers["retry-after"]) > 0
    assert "--max-connections" in json.loads(content)["error"]["message"]
    assert client.transport.closed
    assert bench.engine.requests == []
    await client.finish()


async def test_a_crowded_server_closes_connections_after_their_replies(bench: Bench) -> None:
    client = FakeConnection(bench, crowded=True)
    await client.sends(LIVE)
    status, headers, _ = reply_of(client.transport.written)
    assert (status, headers["connection"], client.transport.closed) == (200, "close", True)
    await client.finish()


async def ask(port: int) -> tuple[int, bool]:
    """The status of the reply to one request, and whether there is a header Retry-After."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(LIVE)
        status, headers, _ = reply_of(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS))
        return status, "retry-after" in headers
    finally:
        writer.close()


async def test_no_connection_beyond_the_limit_is_reset(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four idle connections take all places. Two others at a time are told so; the rest wait for their turn."""
    monkeypatch.setattr(acceptor_module, "REFUSALS", 2)
    async with edge_server(bench, max_connections=4) as (_, port):
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        assert await asyncio.gather(*(ask(port) for _ in range(30))) == [(503, True)] * 30
        counts = bench.app.state.services.edge.connections
        assert counts.num_refused == 30
        for _, writer in idle:
            writer.close()
        while counts.num_open:
            await asyncio.sleep(0.005)
        assert await ask(port) == (200, False)
        text = (await bench.http().get("/metrics")).text
    assert 'jamba_http_connections_refused_total{model_name="jamba"} 30.0' in text


async def test_accepting_goes_on_after_an_error_of_the_system(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor_module, "RETRY_SECONDS", 0.001)
    errors = [OSError(errno.ENFILE, "Too many open files in system"), ConnectionAbortedError()]
    accept = socket.socket.accept

    def failing(listener: socket.socket) -> Any:
        if errors:
            raise errors.pop(0)
        return accept(listener)

    async with edge_server(bench) as (_, port):
        monkeypatch.setattr(socket.socket, "accept", failing)
        assert await ask(port) == (200, False)
    assert "a connection cannot be accepted: [Errno 23]" in caplog.text


# Limits of the process ------------------------------------------------------------------------------------------------


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        limit = raise_soft_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit
        assert limit == hard or hard == resource.RLIM_INFINITY or limit == 2**20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_leave_descriptors_for_everything_else() -> None:
    fitting = connections_that_fit(1024, refusals=32)
    assert 1024 - fitting - 32 - open_descriptors() >= 32
    assert connections_that_fit(10, refusals=32) == 1


def test_the_queue_fits_the_connections(caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(max_num_seqs=64)
    assert fit_queue(config, 2000) is config
    assert fit_queue(config, 900).max_queue_requests == 900 - 64
    assert "max_queue_requests 1024 is reduced to 836" in caplog.text
    assert fit_queue(ServerConfig(max_queue_requests=0), 10).max_queue_requests == 0


def test_more_connections_than_descriptors_are_reduced(caplog: pytest.LogCaptureFixture) -> None:
    assert limit_connections(ServerConfig(max_connections=7)) == 7
    most = limit_connections(ServerConfig())
    assert limit_connections(ServerConfig(max_connections=most + 10**7)) < most + 100
    assert f"max_connections {most + 10**7} is reduced" in caplog.text


async def ask_all(port: int, number: int) -> list[tuple[int, bool]]:
    return await asyncio.gather(*(ask(port) for _ in range(number)))


def test_a_burst_of_first_requests_under_a_low_limit_of_open_files() -> None:
    """200 requests at once at a server that may open 128 files: none is reset, none gets 500."""
    limited = ("sh", "-c", 'ulimit -Sn 128 && ulimit -Hn 128 && exec "$@"', "sh")
    serve = (sys.executable, "-m", "jamba_server", "serve", "--port", "0", "--threads", "1")
    with subprocess.Popen((*limited, *serve), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = None
            while found is None and (line := process.stderr.readline()):
                found = re.search(r": ready +listening on http://127.0.0.1:(\d+)/v1 ", line)
            assert found is not None
            outcomes = asyncio.run(ask_all(int(found[1]), 200))
            assert set(outcomes) <= {(200, False), (503, True)}
            assert (200, False) in outcomes
        finally:
            process.terminate()
            process.communicate()

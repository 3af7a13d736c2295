"""Files that are read again while the server runs: keys and certificates."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.reload import Reloader, Watched
from jamba_server.server.cli.server import watched_files
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.connections import acceptor
from jamba_server.server.http.connections.tls import tls_context
from jamba_server.server.http.limits.key_file import read_keys
from jamba_server.server.http.limits.keys import Keys
from tests.server.conftest import Bench
from tests.server.edge_server import SECONDS, edge_server


def test_only_a_changed_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file, read = tmp_path / "file", list[str]()
    file.write_text("a")
    reloader = Reloader([Watched(name="it", paths=[str(file)], read=lambda: read.append(file.read_text()))])
    reloader.check()
    assert read == []
    file.write_text("bb")
    reloader.check()
    reloader.check()
    assert (read, caplog.messages) == (["bb"], ["it read again"])
    reloader.read_all()
    assert read == ["bb", "bb"]
    other = tmp_path / "other"  # Kubernetes replaces a mounted secret by renaming a link
    other.write_text("cc")
    os.replace(other, file)
    reloader.check()
    assert read[2:] == ["cc"]


async def test_keys_change_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    config = ServerConfig(api_key=("flag",), api_key_file=str(file))
    keys = Keys(read_keys(config.api_key, config.api_key_file))
    reloader = Reloader(watched_files(config, keys, http=None))  # pyright: ignore[reportArgumentType]
    task = asyncio.create_task(reloader.watch(interval=0.001))
    file.write_text("new key\n")
    while keys.owner_of([b"new key"]) is None:
        await asyncio.sleep(0.001)
    task.cancel()
    assert (keys.owner_of([b"old"]), keys.owner_of([b"flag"]) is None) == (None, False)
    file.write_text("\n")
    reloader.check()
    assert keys.owner_of([b"new key"]) is not None
    assert "the API keys not read again" in caplog.text
    file.unlink()
    reloader.check()
    assert keys.owner_of([b"new key"]) is not None


def certificate(folder: Path, name: str) -> tuple[str, str]:
    """The files of a new certificate and its key, for the host `name`."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    files = (str(folder / f"{name}.crt"), str(folder / f"{name}.key"))
    command = (openssl, "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", f"/CN={name}", "-days", "1")
    subprocess.run((*command, "-out", files[0], "-keyout", files[1]), check=True, capture_output=True)
    return files


async def presented(port: int) -> bytes:
    """The certificate that the server presents to a new connection."""

    def connect() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as client:
            client.sendall(b"GET /live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            found = client.getpeercert(binary_form=True)
            assert found is not None
            return found

    return await asyncio.to_thread(connect)


def read(path: str) -> str:
    return Path(path).read_text()


def sends_no_handshake(port: int) -> bytes:
    """What a client gets that speaks plain HTTP to a server with TLS."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return plain.recv(100)


async def test_new_connections_use_the_new_certificate(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first, first_key), (second, second_key) = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    used, used_key = str(tmp_path / "used.crt"), str(tmp_path / "used.key")
    shutil.copy(first, used)
    shutil.copy(first_key, used_key)
    config = ServerConfig(ssl_certfile=used, ssl_keyfile=used_key)
    async with edge_server(bench, tls=tls_context(config)) as (server, port):
        reloader = Reloader(watched_files(config, Keys([]), server))
        before = await presented(port)
        shutil.copy(second, used)
        reloader.check()  # the key does not belong to the new certificate yet
        assert "the TLS certificate not read again" in caplog.text
        assert await presented(port) == before
        shutil.copy(second_key, used_key)
        reloader.check()
        after = await presented(port)
        assert not (await asyncio.to_thread(sends_no_handshake, port)).startswith(b"HTTP")
        assert await presented(port) == after
    assert after == ssl.PEM_cert_to_DER_cert(read(second))


async def test_a_handshake_that_does_not_end_holds_no_connection(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "HANDSHAKE_SECONDS", 0.1)
    crt, key = certificate(tmp_path, "a")
    counts = bench.app.state.services.edge.connections
    tls = tls_context(ServerConfig(ssl_certfile=crt, ssl_keyfile=key))
    async with edge_server(bench, tls=tls, max_connections=3) as (_, port):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        silent[1].sendall(b"\x16\x03\x01\x02\x00")  # the beginning of a handshake
        async with asyncio.timeout(SECONDS):
            while counts.num_open < 3:
                await asyncio.sleep(0.005)
            silent[2].close()
            while counts.num_open:
                await asyncio.sleep(0.01)
        await presented(port)
        for each in silent:
            each.close()


def test_an_encrypted_key_is_an_error_and_no_question(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "a")
    encrypted = tmp_path / "encrypted.key"
    command = ("openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", str(encrypted))
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="cannot be used"):
        tls_context(ServerConfig(ssl_certfile=crt, ssl_keyfile=str(encrypted)))

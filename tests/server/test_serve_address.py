"""The address and the certificate of `jamba serve` are checked before a model is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.application import run
from jamba_server.server.cli.serve import bind, is_loopback
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.connections.tls import tls_context


def test_an_address_in_use_is_found_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["jamba", "serve", "--port", str(port), "/no/such/model"])
        with pytest.raises(SystemExit) as ended:
            run()
    assert ended.value.code == f"jamba: --port {port} of --host 127.0.0.1 cannot be used: Address already in use."


def test_an_address_of_nobody() -> None:
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_an_ipv6_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.write_text("no certificate")
    config = ServerConfig(ssl_keyfile=str(file), ssl_certfile=str(file))
    with pytest.raises(ConfigError, match="ssl_keyfile and ssl_certfile cannot be used"):
        tls_context(config)

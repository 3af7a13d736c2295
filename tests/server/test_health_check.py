"""The health check of a container: wherever the server listens, over TLS as well."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jamba_server.server.cli.health import url_of, written_down

ROOT = Path(__file__).parent.parent.parent


def check(file: Path) -> tuple[int, str]:
    """Runs the health check of the image, and returns its exit status and output."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    [words] = re.findall(r"HEALTHCHECK [^\n]*\\\n +CMD (\[.*\])", dockerfile)
    _, *arguments = json.loads(words)
    environment = {**os.environ, "JAMBA_ADDRESS_FILE": str(file), "http_proxy": "http://192.0.2.1:9"}
    done = subprocess.run(
        (sys.executable, *arguments), env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" and self.server.healthy else 503)  # pyright: ignore
        self.end_headers()
        self.wfile.write(b"loading")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def server(host: str, certificate: Path | None = None, *, healthy: bool = True) -> Generator[str]:
    """Its URL, which its listener says."""
    with http.server.ThreadingHTTPServer((host, 0), Answer) as found:
        found.healthy = healthy  # pyright: ignore[reportAttributeAccessIssue]
        url = url_of(found.socket, tls=certificate is not None)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            found.socket = context.wrap_socket(found.socket, server_side=True)
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield url
        finally:
            found.shutdown()
            thread.join()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    file = tmp_path / "self-signed.pem"
    command = (openssl, "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=elsewhere", "-days", "1")
    subprocess.run((*command, "-keyout", str(file), "-out", str(tmp_path / "cert")), check=True, capture_output=True)
    file.write_text(file.read_text() + (tmp_path / "cert").read_text())
    return file


def test_it_asks_where_the_server_listens(tmp_path: Path) -> None:
    file = tmp_path / "address"
    with server("0.0.0.0") as url, written_down(url, str(file)):
        assert url.startswith("http://127.0.0.1:")
        assert check(file) == (0, f"{url}/health: 200\n")
    status, words = check(file)
    assert (status, "No server has written its address" in words) == (1, True)


def test_it_asks_over_tls_whatever_the_certificate_says(tmp_path: Path, certificate: Path) -> None:
    file = tmp_path / "address"
    with server("127.0.0.1", certificate) as url, written_down(url, str(file)):
        assert url.startswith("https://")
        assert check(file) == (0, f"{url}/health: 200\n")


def test_what_is_not_healthy_is_told(tmp_path: Path) -> None:
    file = tmp_path / "address"
    with server("127.0.0.1", healthy=False) as url, written_down(url, str(file)):
        assert check(file) == (1, f"{url}/health: 503 loading\n")


def test_addresses_of_version_6_are_written_as_urls_are() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.create_server(("::", 0), family=socket.AF_INET6) as listener:
        assert url_of(listener, tls=False) == f"http://[::1]:{listener.getsockname()[1]}"


def test_a_file_that_cannot_be_written_does_not_stop_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with written_down("http://127.0.0.1:1", str(tmp_path / "missing" / "address")):
        pass
    assert "address cannot be written: No such file or directory" in caplog.text

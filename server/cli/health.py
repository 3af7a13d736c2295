"""The health check of a container. It asks a server for /health, at the address that the server has written into a
file.

    JAMBA_ADDRESS_FILE=FILE python -m jamba_server.server.cli.health

This module imports only the standard library, because the container starts it every few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "JAMBA_ADDRESS_FILE"
SECONDS = 4.0  # time limit for the server's answer to /health, in seconds
# A server can listen at an address that means "all addresses of this machine". Each such address is mapped to an
# address at which a process on this machine reaches the server.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """Returns the URL at which a process on the same machine reaches the server that listens on `listener`."""
    address: tuple[str, int] = listener.getsockname()[:2]
    host, port = LOOPBACK.get(address[0], address[0]), address[1]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def written_down(url: str, file: str | None) -> Generator[None]:
    """Writes `url` into `file`, and deletes the file at the end of the `with` block. Does nothing if `file` is None.

    If the file cannot be written, the server still runs, since its file system may be read-only. Only the health check
    fails.
    """
    if file is None:
        yield
        return
    path = Path(file)
    try:
        path.write_text(url, encoding="ascii")
    except OSError as error:
        logger.warning("--address-file %s cannot be written: %s", file, error.strerror)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def main() -> None:
    """Prints the HTTP status of the reply to /health. Exits with status 1 if there is no reply or if that status is an
    error."""
    if not (file := os.environ.get(VARIABLE)):
        sys.exit(f"{VARIABLE} is not set; it names the file of the server's option --address-file.")
    try:
        url = Path(file).read_text(encoding="ascii") + "/health"
    except OSError as error:
        sys.exit(f"No server has written its address into {file}: {error.strerror}.")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = (
        False,
        ssl.CERT_NONE,
    )  # the certificate was made for the public host name, so it does not match the local address in `url`
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),  # an empty mapping means no proxy, since a proxy cannot reach a local address
        urllib.request.HTTPSHandler(context=context),
    )
    try:
        with opener.open(url, timeout=SECONDS) as answer:
            print(f"{url}: {answer.status}")
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code} {error.read().decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main()

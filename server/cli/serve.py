"""Implements `jamba serve`: opens the socket for requests, finds the model and runs the server.

Modules that take long to import are imported after the first lines of the log.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
from dataclasses import replace

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.health import url_of, written_down
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.settings import ALL, Model, with_options
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import DESCRIPTION
from jamba_server.server.version import package_version

logger = logging.getLogger(__name__)


@with_options(ALL)
def serve(config: ServerConfig, model: Model = None) -> None:
    """Serve a model over HTTP with OpenAI's API."""
    configure_logging(config.log_level.upper(), config.log_format)
    greet(config)
    if (nodes := config.nodes()) is not None and nodes.rank > 0:
        from jamba_server.server.cli.node import run_node

        run_node(config, nodes)
        return
    # The socket is bound before the model loads, so that an error is reported at once if the port is in use.
    listener = bind(config.host, config.port)
    # If a client does not read, the HTTP code ends its stream after `send_timeout` seconds. But bytes may still wait in
    # the kernel's buffers, and the connection stays open until they are sent. This option makes the kernel drop such a
    # connection.
    limit_unread(listener, 2 * config.send_timeout)
    with listener, written_down(url_of(listener, tls=config.ssl_certfile is not None), config.address_file):
        from rich.console import Console

        from jamba_server.server.cli.checkpoint import find_checkpoint
        from jamba_server.server.cli.terminal import LoadProgress
        from jamba_server.server.text.rendering.process import TemplateProcesses

        checkpoint = find_checkpoint(config)
        if not config.served_model_name:
            config = replace(config, served_model_name=(checkpoint.name,))
        # The process that renders templates starts while this process imports the server's modules.
        with TemplateProcesses() as templates, LoadProgress(Console(stderr=True)) as progress:
            from jamba_server.server.cli.server import Server

            Server(config, checkpoint, listener, progress, templates).run()


def greet(config: ServerConfig) -> None:
    """Logs the version, the model and the options that differ from their defaults."""
    logger.info("jamba-server %s: %s", package_version(), config.model or DESCRIPTION)
    logger.info("options   %s", json.dumps(config.non_defaults(), ensure_ascii=False))
    if config.node_rank == 0 and not config.needs_key and not is_loopback(config.host):
        logger.warning(
            "listening on %s without --api-key: everyone who reaches this address may use the server", config.host
        )


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at `host` and `port`. Raises ConfigError if that address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # raises OSError if another server already listens on this port
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port {port} of --host {host} cannot be used: {error.strerror}.") from error
    return listener


def limit_unread(listener: socket.socket, seconds: float) -> None:
    """Makes the operating system close a connection of `listener` if bytes wait to be sent and the client has read
    nothing for `seconds` seconds. Does nothing on systems without the socket option TCP_USER_TIMEOUT."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(int(1000 * seconds), 2**31 - 1))


def is_loopback(host: str) -> bool:
    """Returns whether only processes on this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

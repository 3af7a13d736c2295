"""The class `HttpServer` is uvicorn's server, except that this package accepts the connections and limits them."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Generator

import uvicorn

from jamba_server.server.http.connections.acceptor import Acceptor
from jamba_server.server.http.connections.counts import ConnectionCounts
from jamba_server.server.http.connections.protocol import Connection, Manner


class HttpServer(uvicorn.Server):
    """A version of uvicorn's server that serves at most `max_connections` connections at a time and sets deadlines for
    what their clients send.

    The class installs no signal handlers. With uvicorn's handlers, SIGTERM would close the listening sockets at once,
    and /ready could not answer 503 while running requests finish.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        *,
        max_connections: int,
        header_timeout: float,
        send_timeout: float,
        counts: ConnectionCounts,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` is the TLS context, or None for plain HTTP. A client must send its headers in `header_timeout`
        seconds. A client that reads nothing of its reply for `send_timeout` seconds is cut off."""
        super().__init__(config)
        self._listener, self._max_connections = listener, max_connections
        self._header_timeout, self._send_timeout = header_timeout, send_timeout
        self._counts = counts
        # The TLS context for connections that are accepted from now on; it is replaced when the certificate changes.
        self.tls = tls
        self.acceptor: Acceptor | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Installs no signal handler, because the class `cli.server.Server` installs its own."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # The empty list keeps uvicorn from opening a socket, because the class `Acceptor` accepts the connections.
        await super().startup(sockets=[])
        if self.started:
            self.acceptor = Acceptor(
                self._listener,
                self._connect,
                limit=self._max_connections,
                tls=lambda: self.tls,
                counts=self._counts,
            )
            self.acceptor.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.acceptor is not None:
            self.acceptor.close()
        await super().shutdown(sockets=[])

    def _connect(self, refused: bool, lost: Callable[[], None]) -> Connection:
        assert self.acceptor is not None
        acceptor = self.acceptor
        manner = Manner(
            header_seconds=self._header_timeout,
            send_seconds=self._send_timeout,
            refused=refused,
            crowded=lambda: acceptor.crowded,
            lost=lost,
        )
        return Connection(self.config, self.server_state, self.lifespan.state, manner)

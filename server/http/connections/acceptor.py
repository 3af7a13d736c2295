"""The class `Acceptor` accepts connections, but never so many that the process runs out of file descriptors."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from jamba_server.server.http.connections.counts import ConnectionCounts
from jamba_server.server.http.connections.protocol import Connection

logger = logging.getLogger(__name__)

# After accepting this number of connections, the event loop does its other work before it accepts more.
ACCEPTED_AT_ONCE = 64
BACKLOG = 2048  # number of connections that the kernel keeps until they are accepted; the kernel may allow fewer
# Number of connections beyond the limit that may be open at the same time; they only get a reply with status 503.
REFUSALS = 32
# If more than this share of the allowed connections is open, a connection is closed after its reply.
CROWDED_SHARE = 0.75
HANDSHAKE_SECONDS = 20.0
# After an error of the operating system, such as too many open files, no connection is accepted for this time.
RETRY_SECONDS = 0.1

# The type of a function that makes the asyncio protocol object of a new connection. Its arguments are whether the
# connection is refused, and a function to call when the connection has ended.
Connect = Callable[[bool, Callable[[], None]], Connection]


class Acceptor:
    """Accepts the connections of one listening socket in the running event loop.

    At most `limit` connections are served at the same time. Up to REFUSALS further connections are accepted and get
    status 503. All others wait in the kernel's queue until a connection ends. The server of asyncio would instead
    accept connections until the process has no file descriptor left.
    """

    def __init__(
        self,
        listener: socket.socket,
        connect: Connect,
        *,
        limit: int,
        tls: Callable[[], ssl.SSLContext | None],
        counts: ConnectionCounts,
    ) -> None:
        """The function `tls` returns the TLS context for the next connection, or None for plain HTTP."""
        self._listener, self._connect, self._limit, self._tls = listener, connect, limit, tls
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = self._closed = False
        self._counts = counts

    @property
    def crowded(self) -> bool:
        """Returns whether so many connections are open that each connection is closed after its reply, to make room for
        others."""
        return self._counts.num_open > CROWDED_SHARE * self._limit

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accepts no further connections. Open connections and the listening socket stay open."""
        self._closed = True
        self._pause()

    def _resume(self) -> None:
        if not (self._accepting or self._closed):
            self._accepting = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if self._counts.num_open >= self._limit + REFUSALS:
                self._pause()
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("a connection cannot be accepted: %s", error)
                self._pause()
                self._loop.call_later(RETRY_SECONDS, self._resume)
                return
            self._open(connection)

    def _open(self, connection: socket.socket) -> None:
        refused = self._counts.num_open >= self._limit
        self._counts.num_open += 1
        self._counts.num_refused += refused
        task = self._loop.create_task(self._attach(connection, refused))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach(self, connection: socket.socket, refused: bool) -> None:
        """Makes the asyncio transport and protocol of an accepted socket. With TLS, the handshake comes first."""
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._counts.num_open -= 1
                self._resume()

        context = self._tls()
        try:
            connection.setblocking(False)
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                # Without this option, the kernel would delay a small event of a stream until the client has
                # acknowledged the packet before it.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: self._connect(refused, end),
                connection,
                ssl=context,
                ssl_handshake_timeout=None if context is None else HANDSHAKE_SECONDS,
            )
        # The TLS handshake failed (ssl.SSLError is a subclass of OSError), or the client has disconnected.
        except OSError as error:
            logger.debug("a connection ended before its first request: %s", error)
            connection.close()
            end()
        except BaseException:
            connection.close()
            end()
            raise

"""Node 0's side: accepts the other nodes, and gathers the ranks of each incarnation of the engine."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.nodes.messages import (
    MALFORMED,
    CannotStart,
    Farewell,
    Hello,
    RankHello,
    Refused,
    Start,
    Stop,
    Welcome,
    notice_silence,
    receive,
    receive_first,
    send,
)
from jamba_server.engine.nodes.options import NodeOptions
from jamba_server.engine.nodes.terms import difference, terms_of
from jamba_server.engine.process.child import Child
from jamba_server.engine.start.rank_options import num_ranks, ranks_per_node

logger = logging.getLogger(__name__)

HELLO_SECONDS: Final = 10.0  # a new connection must send its first message within this time
START_SECONDS: Final = 60.0  # all nodes must have connected their ranks within this time
REMINDER_SECONDS: Final = 30.0  # time between two log lines that say which nodes are awaited
# When a node has left, the engine process notices that by itself and ends. If it still runs after this time, it is
# killed.
NOTICE_SECONDS: Final = 5.0
FAREWELL_SECONDS: Final = 2.0  # the last message to the nodes must be sent within this time


class NodesMissing(OSError):
    """Not all nodes have joined within --node-timeout seconds."""


class Node:
    """A node that has joined."""

    def __init__(self, rank: int, host: str, writer: asyncio.StreamWriter) -> None:
        self.rank, self.host, self.writer = rank, host, writer


class Coordinator:
    """Listens for the other nodes as long as the server runs. An engine is started only when all nodes have joined and
    have connected their ranks. When it ends, the nodes are told to end their ranks."""

    def __init__(self, config: EngineConfig, options: NodeOptions) -> None:
        """Raises ConfigError if node 0 cannot listen at its address."""
        self._config, self._options = config, options
        self._listener = listen(options.address, options.port)
        self._remote_ranks = range(ranks_per_node(config), num_ranks(config))
        self._nodes: dict[int, Node] = {}
        self._incarnation, self._token = 0, ""
        self._connected: dict[int, socket.socket] = {}  # the connections of the present incarnation's ranks, by rank
        self._obstacle: str | None = None  # says why a node cannot start its ranks
        self._child: Child | None = None
        self._changed, self._closing = asyncio.Event(), False
        self._tasks: set[asyncio.Task[None]] = set()
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._address = "{}:{}".format(*self.address)

    async def start(self) -> None:
        """Reads parts of the model's files, and begins to accept nodes. Raises CheckpointError."""
        self._terms = await asyncio.to_thread(terms_of, self._config)
        each = ranks_per_node(self._config)
        ranks = "1 rank" if each == 1 else f"{each} ranks"
        logger.info("nodes     %d with %s each; node 0 listens at %s", self._options.count, ranks, self._address)
        self._run(self._accept())

    @property
    def awaited(self) -> str:
        """Says which nodes are missing, or is empty if all have joined."""
        missing = [str(node) for node in range(1, self._options.count) if node not in self._nodes]
        if not missing:
            return ""
        return f"{'node' if len(missing) == 1 else 'nodes'} {', '.join(missing)} of {self._options.count}"

    async def spawn(self, spawn: Callable[..., Awaitable[Child]]) -> Child:
        """Starts an engine process when all ranks of the other nodes are connected. `spawn` gets their connections, in
        the order of the ranks. Raises OSError if that is not possible, and NodesMissing if nodes have not joined in
        time."""
        connections = await self._gather()
        try:
            child = await spawn(ranks=connections)
        except OSError:
            self._stop_ranks(self._incarnation)
            raise
        finally:
            self._drop_connections()
        self._child = child
        self._run(self._stop_after(child, self._incarnation))
        return child

    def stop_waiting(self) -> None:
        """Makes `spawn` raise OSError if it still waits."""
        self._closing = True
        self._changed.set()

    async def close(self, reason: str, *, failed: bool) -> None:
        """Tells all nodes that node 0 ends, and stops to listen."""
        self.stop_waiting()
        for node in self._nodes.values():
            send(node.writer, Farewell(reason, failed))
            node.writer.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                closed = [node.writer.wait_closed() for node in self._nodes.values()]
                await asyncio.gather(*closed, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop_connections()
        self._listener.close()

    # New connections --------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:  # there are too many open files, for example
                logger.warning("node 0 cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(1)
                continue
            self._run(self._greet(connection, str(address[0])))

    async def _greet(self, connection: socket.socket, host: str) -> None:
        connection.setblocking(False)
        try:
            notice_silence(connection)
            async with asyncio.timeout(HELLO_SECONDS):
                message = await receive_first(connection)
        except (OSError, TimeoutError, *MALFORMED) as error:
            logger.warning("a connection from %s to node 0 is not one of a node: %s", host, error or "it is silent")
            connection.close()
            return
        match message:
            case Hello():
                await self._admit(connection, host, message)
            case RankHello():
                self._take_rank(connection, host, message)
            case None:
                connection.close()

    async def _admit(self, connection: socket.socket, host: str, hello: Hello) -> None:
        """Lets a node join, or refuses it. Then reads its messages until it leaves."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            if refused := self._refusal(hello):
                logger.warning("node %d at %s is refused: %s", hello.node, host, refused.reason)
                send(writer, refused)
                await writer.drain()
                return
            node = self._nodes[hello.node] = Node(hello.node, host, writer)
            send(writer, Welcome())
            logger.info("node %d has joined from %s%s", node.rank, host, self._still_awaited())
            self._changed.set()
            try:
                while (message := await receive(reader, CannotStart)) is not None:
                    if message.incarnation == self._incarnation:
                        self._obstacle = f"node {node.rank} cannot start its ranks: {message.reason}"
                        self._changed.set()
            except MALFORMED as error:
                logger.warning("node %d has sent a message that cannot be read: %s", node.rank, error)
            finally:
                self._leave(node)
        except OSError:
            pass  # the node is gone
        finally:
            writer.close()

    def _refusal(self, hello: Hello) -> Refused | None:
        """Returns why a node may not join, or None."""
        if not 1 <= hello.node < self._options.count:
            limit = self._options.count - 1
            return Refused(f"node_rank is {hello.node}; node 0 expects other nodes from 1 to {limit}.", final=True)
        if reason := difference(self._terms, hello.terms, hello.node):
            return Refused(reason, final=True)
        if (present := self._nodes.get(hello.node)) is not None:
            # The joined node may be a machine that was lost, whose connection the system still takes for open. So this
            # refusal is not final: the new node tries again, and joins when the system has noticed the loss.
            return Refused(f"node {hello.node} has joined already, from {present.host}.", final=False)
        return None

    def _leave(self, node: Node) -> None:
        del self._nodes[node.rank]
        self._changed.set()
        if not self._closing:
            logger.warning("node %d at %s has left", node.rank, node.host)
            if self._child is not None:
                asyncio.get_running_loop().call_later(NOTICE_SECONDS, self._child.kill)

    def _take_rank(self, connection: socket.socket, host: str, hello: RankHello) -> None:
        """Keeps the connection of a rank for the engine process that is about to start."""
        known = secrets.compare_digest(hello.token.encode(), self._token.encode())
        expected = self._token and known and hello.incarnation == self._incarnation
        if not expected or hello.rank not in self._remote_ranks or hello.rank in self._connected:
            logger.warning(
                "rank %d of incarnation %d at %s is refused: this is incarnation %d, which does not expect it",
                hello.rank, hello.incarnation, host, self._incarnation,
            )  # fmt: skip
            connection.close()
            return
        connection.setblocking(True)  # as the engine process expects it
        self._connected[hello.rank] = connection
        self._changed.set()

    # An incarnation ---------------------------------------------------------------------------------------------

    async def _gather(self) -> list[socket.socket]:
        """Waits for all nodes, starts a new incarnation, and returns the connections of its remote ranks in their
        order."""
        while True:
            await self._all_joined()
            self._incarnation, self._token, self._obstacle = self._incarnation + 1, secrets.token_hex(16), None
            nodes = [*self._nodes.values()]
            for node in nodes:
                send(node.writer, Start(self._incarnation, self._token))
            if await self._all_connected(nodes):
                logger.info("all nodes have joined; incarnation %d of the engine starts", self._incarnation)
                self._token = ""  # no further rank may connect
                return [self._connected[rank] for rank in self._remote_ranks]
            self._stop_ranks(self._incarnation)
            self._drop_connections()
            if self._obstacle is not None:
                raise OSError(self._obstacle)

    async def _all_joined(self) -> None:
        """Waits until all nodes have joined. Raises NodesMissing, or OSError if the server is shutting down."""
        try:
            async with asyncio.timeout(self._options.timeout):
                while awaited := self.awaited:
                    logger.info("%s must still join, at %s", awaited, self._address)
                    await self._change(REMINDER_SECONDS)
        except TimeoutError:
            raise NodesMissing(
                f"{self.awaited} did not join node 0 at {self._address} within {self._options.timeout:g} s "
                "(--node-timeout)"
            ) from None
        self._check_open()

    async def _all_connected(self, nodes: list[Node]) -> bool:
        """Waits until all ranks of the other nodes are connected. Returns false if one of the nodes leaves meanwhile,
        cannot start its ranks, or takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while len(self._connected) < len(self._remote_ranks):
                    if self._obstacle is not None or [*self._nodes.values()] != nodes:
                        return False
                    await self._change(START_SECONDS)
            return [*self._nodes.values()] == nodes
        missing = sorted({*self._remote_ranks} - {*self._connected})
        self._obstacle = f"ranks {missing} of other nodes were not connected within {START_SECONDS:g} s"
        return False

    async def _change(self, seconds: float) -> None:
        """Waits until something has changed, for at most `seconds` seconds. Raises OSError if the server is shutting
        down."""
        self._check_open()
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._closing:
            raise OSError("the server is shutting down")

    async def _stop_after(self, child: Child, incarnation: int) -> None:
        """Makes the nodes end their ranks when the engine process has ended."""
        await child.wait()
        self._child = None if self._child is child else self._child
        self._stop_ranks(incarnation)

    def _stop_ranks(self, incarnation: int) -> None:
        for node in self._nodes.values():
            send(node.writer, Stop(incarnation))

    def _drop_connections(self) -> None:
        for connection in self._connected.values():
            connection.close()
        self._connected = {}

    def _still_awaited(self) -> str:
        return f"; {self.awaited} must still join" if self.awaited else ""

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at this address only. Raises ConfigError if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"--master-addr {host} with --master-port {port} cannot be used: {error.strerror}. It must be an address "
            "of node 0 that the other nodes can reach."
        ) from error
    listener.setblocking(False)
    return listener

"""The agent of a node other than node 0: joins node 0, and runs the node's ranks in each incarnation of the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from typing import Final

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError, EngineDead
from jamba_server.engine.nodes.messages import (
    MALFORMED,
    CannotStart,
    Farewell,
    Hello,
    RankHello,
    Refused,
    Start,
    Stop,
    ToNode,
    Welcome,
    notice_silence,
    receive,
    send,
)
from jamba_server.engine.nodes.options import NodeOptions
from jamba_server.engine.nodes.terms import own_options, terms_of
from jamba_server.engine.process.child import process_environment
from jamba_server.engine.process.ranks import RANK_COMMAND, Ended
from jamba_server.engine.process.wire import pack
from jamba_server.engine.start.rank_options import ranks_of_node

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1.0  # between two attempts to join
CONNECT_SECONDS: Final = 5.0


class RankProcess:
    """The process of a rank, and its connection to node 0. The process has a copy of the connection; this one is used
    only to tell node 0 how the process has ended."""

    def __init__(self, rank: int, process: asyncio.subprocess.Process, connection: socket.socket) -> None:
        self._process, self._connection, self._stopped = process, connection, False
        self._end = asyncio.create_task(self._report_end(rank), name=f"rank {rank}")

    async def stop(self) -> None:
        """Kills the process, and returns when it has ended."""
        self._stopped = True
        if self._process.returncode is None:
            self._process.kill()
        await self._end

    async def _report_end(self, rank: int) -> None:
        status = await self._process.wait()
        if not self._stopped:
            logger.info("rank %d has ended with %s", rank, f"signal {-status}" if status < 0 else f"status {status}")
        with self._connection:
            try:
                self._connection.send(pack(Ended(status)), socket.MSG_DONTWAIT)
            except OSError:
                return  # node 0 has ended first


class Agent:
    """Runs the ranks of a node. Node 0 decides when they start. They are killed when the engine has died, or when the
    connection to node 0 is lost. The agent then joins again, and node 0 starts the next incarnation."""

    def __init__(self, config: EngineConfig, options: NodeOptions) -> None:
        self._config, self._options = config, options
        self._own_ranks = ranks_of_node(config, options.rank)
        self._ranks: list[RankProcess] = []
        self._incarnation = 0  # the one whose ranks are running, or ran last
        self._name = f"node 0 at {options.address}:{options.port}"

    async def run(self) -> None:
        """Runs until node 0 says farewell or this process gets SIGTERM or SIGINT. Raises ConfigError if node 0 refuses
        this node or cannot be reached, and EngineDead if the engine is gone for good."""
        loop, work = asyncio.get_running_loop(), asyncio.ensure_future(self._run())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number, work)
        try:
            await work
        except asyncio.CancelledError:
            pass
        finally:
            await self._stop_ranks()

    def _on_signal(self, number: signal.Signals, work: asyncio.Future[None]) -> None:
        logger.info("%s: node %d leaves", number.name, self._options.rank)
        work.cancel()

    async def _run(self) -> None:
        terms = await asyncio.to_thread(terms_of, self._config)
        hello = Hello(self._options.rank, terms)
        ranks = f"{'rank' if len(self._own_ranks) == 1 else 'ranks'} {', '.join(map(str, self._own_ranks))}"
        logger.info("node      %d of %d, %s; joining %s", self._options.rank, self._options.count, ranks, self._name)
        farewell = None
        while farewell is None:
            reader, writer = await self._join(hello)
            try:
                farewell = await self._follow(reader, writer)
            finally:
                writer.close()
                await self._stop_ranks()
            if farewell is None:
                logger.warning("the connection to %s is lost; trying again", self._name)
        if farewell.failed:
            raise EngineDead(f"node 0 has ended: {farewell.reason}")
        logger.info("node 0 has ended: %s", farewell.reason)

    async def _join(self, hello: Hello) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Tries to join until node 0 lets this node in, for at most `timeout` seconds."""
        obstacle = "it has not answered"
        try:
            async with asyncio.timeout(self._options.timeout):
                while True:
                    try:
                        return await self._try_to_join(hello)
                    except (OSError, *MALFORMED) as error:
                        found = _words(error)
                    if found != obstacle:
                        logger.info("%s cannot be joined yet: %s", self._name, found)
                        obstacle = found
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            raise ConfigError(
                f"{self._name} could not be joined within {self._options.timeout:g} s (--node-timeout): {obstacle}."
            ) from None

    async def _try_to_join(self, hello: Hello) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Joins node 0. Raises OSError if that may be possible later, and ConfigError if it is not."""
        reader, writer = await asyncio.open_connection(sock=await self._connect())
        try:
            send(writer, hello)
            match await receive(reader, ToNode):
                case Welcome():
                    logger.info("node %d has joined %s", self._options.rank, self._name)
                    return reader, writer
                case Refused(reason, final=True):
                    raise ConfigError(f"node 0 refuses this node: {reason}")
                case Refused(reason):
                    raise OSError(reason)
                case Farewell(reason):
                    raise OSError(f"it is ending: {reason}")
                case _:
                    raise OSError("it has closed the connection")
        except BaseException:
            writer.close()
            raise

    async def _connect(self) -> socket.socket:
        """Returns a new connection to node 0, which is not blocking. Raises OSError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                found = await loop.getaddrinfo(self._options.address, self._options.port, type=socket.SOCK_STREAM)
                family, kind, protocol, _, address = found[0]
                connection = socket.socket(family, kind, protocol)
                try:
                    connection.setblocking(False)
                    notice_silence(connection)
                    await loop.sock_connect(connection, address)
                except BaseException:
                    connection.close()
                    raise
                return connection
        except TimeoutError:
            raise OSError(f"it does not answer within {CONNECT_SECONDS:g} s") from None

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Farewell | None:
        """Does what node 0 says. Returns its farewell, or None if the connection is lost."""
        try:
            while (message := await receive(reader, ToNode)) is not None:
                match message:
                    case Start(incarnation):
                        await self._stop_ranks()
                        self._incarnation = incarnation
                        if obstacle := await self._start_ranks(message):
                            logger.error("the ranks cannot be started: %s", obstacle)
                            send(writer, CannotStart(incarnation, obstacle))
                    case Stop(incarnation):
                        if incarnation == self._incarnation:
                            await self._stop_ranks()
                    case Farewell():
                        return message
                    case _:
                        pass  # the other messages answer `Hello` only
        except MALFORMED as error:
            logger.warning("%s has sent a message that cannot be read: %s", self._name, error)
        return None

    async def _start_ranks(self, start: Start) -> str | None:
        """Starts all ranks of this node. Returns why that is not possible, or None."""
        own = msgspec.json.encode(own_options(self._config)).decode()
        logger.info("incarnation %d of the engine starts", start.incarnation)
        try:
            for rank in self._own_ranks:
                connection = await self._connect()
                hello = RankHello(start.incarnation, start.token, rank)
                await asyncio.get_running_loop().sock_sendall(connection, pack(hello))
                connection.setblocking(True)  # as the rank expects it
                try:
                    process = await asyncio.create_subprocess_exec(
                        *RANK_COMMAND,
                        str(connection.fileno()),
                        own,
                        stdin=asyncio.subprocess.DEVNULL,
                        pass_fds=[connection.fileno()],
                        env=process_environment(),
                    )
                except OSError:
                    connection.close()
                    raise
                self._ranks.append(RankProcess(rank, process, connection))
        except OSError as error:
            return _words(error)
        return None

    async def _stop_ranks(self) -> None:
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            await rank.stop()


def _words(error: Exception) -> str:
    """Returns what an error says. The texts of asyncio name its own calls instead of the system's reason."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__

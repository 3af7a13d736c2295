"""The supervisor keeps an engine process running: it starts the process, kills a process that hangs, and starts the
next process when one has died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from jamba_server.engine.process.child import Child
from jamba_server.engine.process.deaths import Death, RestartReason, death_by_status
from jamba_server.engine.types import FromEngine

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0  # the engine process is checked at least once in this number of seconds


class Owner(Protocol):
    """The interface of the object that receives the engine's messages from a supervisor and decides about restarts."""

    @property
    def is_loading(self) -> bool:
        """Returns whether the present engine process has not become ready yet."""
        ...

    @property
    def is_busy(self) -> bool:
        """Returns whether the present engine process has requests, so that it must report steps."""
        ...

    def receive(self, message: FromEngine) -> None:
        """Handles a message of the engine process."""
        ...

    def after_death(self, death: Death) -> float | None:
        """Handles the end of the engine process. Returns after how many seconds the next process must be started, or
        None if no process must be started."""
        ...

    def after_failed_spawn(self, error: OSError) -> float | None:
        """Handles the failure to start an engine process. Returns the number of seconds until the next attempt, or None
        if there must be no further attempt."""
        ...

    def give_up(self, reason: str) -> None:
        """Handles an unexpected error in the supervisor. After this call no engine process is started any more."""
        ...


class Watchdog:
    """Kills an engine process that hangs.

    While an engine process loads, it is killed if it sends no message for `load_timeout` seconds. While it has
    requests, it is killed if it sends no message for `engine_timeout` seconds. The watchdog does not compare clock
    times but adds up the lengths of its own sleeps. So if this process stands still for a while, for example because
    the machine was suspended, a healthy engine is not killed afterwards.
    """

    def __init__(self, owner: Owner, *, engine_timeout: float, load_timeout: float) -> None:
        self._owner, self._engine_timeout, self._load_timeout = owner, engine_timeout, load_timeout

    async def watch(self, child: Child) -> tuple[RestartReason, str]:
        """Waits until the child hangs, and kills it. Then returns the reason as a short name and as a sentence. Does
        not return while the child is healthy."""
        interval = min(WATCH_SECONDS, self._engine_timeout / 4, self._load_timeout / 4)
        silent, num_messages = 0.0, -1
        while True:
            await asyncio.sleep(interval)
            if child.num_messages != num_messages or not (self._owner.is_loading or self._owner.is_busy):
                silent, num_messages = 0.0, child.num_messages
                continue
            silent += interval
            if self._owner.is_loading and silent > self._load_timeout:
                child.kill()
                return "load_timeout", f"made no progress for {self._load_timeout:g} s (--load-timeout)"
            if not self._owner.is_loading and silent > self._engine_timeout:
                child.kill()
                return "step_timeout", f"reported no step for {self._engine_timeout:g} s (--engine-timeout)"


class Supervisor:
    """Runs an engine process, and starts the next one whenever a process has ended. The function `spawn` starts a
    process. It raises OSError if the operating system cannot start one."""

    def __init__(
        self, owner: Owner, spawn: Callable[[], Awaitable[Child]], *, engine_timeout: float, load_timeout: float
    ) -> None:
        self.child: Child | None = None  # this is None while no engine process runs
        self._owner, self._spawn = owner, spawn
        self._watchdog = Watchdog(owner, engine_timeout=engine_timeout, load_timeout=load_timeout)
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keeps an engine process running until `stop` is called or the owner wants no further engine process."""
        try:
            await self._run()
        except Exception as error:
            logger.exception("the supervision of the engine failed")
            self._owner.give_up(f"the supervision of the engine failed: {error!r}")
            if self.child:
                self.child.kill()

    def stop(self) -> None:
        """Ends the engine process and the method `run`. A process that is still loading is killed, because it has
        nothing to finish."""
        self._stopping.set()
        if self.child is None:
            return
        if self._owner.is_loading:
            self.child.kill()
        else:
            self.child.shut_down()

    async def _run(self) -> None:
        delay: float | None = 0.0
        while delay is not None and not await self._stopped_within(delay):
            try:
                self.child = await self._spawn()
            except OSError as error:
                delay = self._owner.after_failed_spawn(error)
                continue
            if self._stopping.is_set():
                self.child.kill()  # `stop` was called while the process was being started
            delay = self._owner.after_death(await self._until_death(self.child))

    async def _stopped_within(self, seconds: float) -> bool:
        """Waits for `seconds` seconds and returns false. If `stop` is called before or during this time, returns true
        at once."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return self._stopping.is_set()
        return True

    async def _until_death(self, child: Child) -> Death:
        """Passes the messages of the child process to the owner until the child has ended. If a message cannot be read
        or handled, the child is regarded as faulty and killed."""
        watchdog = asyncio.create_task(self._watchdog.watch(child), name="engine watchdog")
        killed: tuple[RestartReason, str] | None = None
        try:
            await child.deliver(FromEngine, self._owner.receive)
        except Exception as error:
            logger.exception("a message of the engine process cannot be handled; the process is killed")
            child.kill()
            killed = "message", f"sent a message that cannot be handled ({type(error).__name__})"
        finally:
            if watchdog.done() and not watchdog.cancelled():
                killed = watchdog.result()
            watchdog.cancel()
        status = await child.close()
        if killed is not None:
            reason, did = killed
            return Death(reason, f"the engine process {did} and was killed", self._owner.is_loading)
        return death_by_status(status, loading=self._owner.is_loading, oom_kills_before=child.oom_kills_before)

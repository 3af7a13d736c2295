"""Counts the hops of a chat request. Run this module with `python -m tools.hops`. A hop is a step from a function of
one module to a function of another module.

The program serves one streamed chat request with the demonstration checkpoint. The real application runs in this
process, and the real engine runs in a process of its own. Both record the stack of calls at these moments:

    down    the frame with the request is written to the engine's socket ‖ the request arrives in the engine's inbox,
            and the first kernel is called for it
    back    the step's tokens are read in the runner, and the frame with them is sent ‖ the frame is read, its update
            goes through the request's queue, and the event with its text is handed to the HTTP server

A hop is a call from a function in one module of this project to a function in another module. It counts if the call is
still open at such a moment, because then the message passes through it. Calls of other packages do not count. Nor do
functions that return before the message moves on, such as the chat template, the scheduler and the JSON encoder. The
socket and the engine's inbox are no hops either.

Stacks are joined in two cases. The stack of a task continues the stack that created the task. A method that another
package calls, as Starlette calls a response, continues the stack that created the method's object.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile, groupby, takewhile
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PACKAGE = "jamba_server."
PATH = "/v1/chat/completions"
# The id of a chat request begins with these bytes. A message that contains these bytes therefore carries the traced
# request or the reply to this request.
MARK = b"chatcmpl-"
STDLIB = sysconfig.get_path("stdlib")
BODY = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "max_tokens": 8}


class Call(NamedTuple):
    """A call of a function of this project, as found on a stack. The field `module` is the name of the function's
    module without the package's name."""

    module: str
    function: str


Stack = tuple[Call, ...]  # the first call of a stack is the outermost call, and the final call is the innermost call


class Ways(NamedTuple):
    """The function calls on two paths: the path of the request down to the kernels, and the path of the generated
    tokens back to the client.

    Each path has several parts, which are separated by a queue or a socket.
    """

    down: tuple[Stack, ...]
    back: tuple[Stack, ...]


class Stacks:
    """Finds the stacks of calls in one process. For a call in an asyncio task or a method of an object, the stack
    begins with the calls that created this task or object."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, Stack]] = {}
        self._tasks: dict[asyncio.Task[Any], Stack] = {}

    def of(self, frame: FrameType | None) -> Stack:
        calls: list[Call] = []
        while frame is not None:
            if (call := called(frame)) is not None:
                calls.append(call)
                if is_foreign(frame.f_back) and (made := self._made.get(id(frame.f_locals.get("self")))):
                    return (*made[1], *reversed(calls))
            frame = frame.f_back
        task = current_task()
        return (*(self._tasks.get(task, ()) if task else ()), *reversed(calls))

    def here(self) -> Stack:
        return self.of(inspect.currentframe())

    def make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
        """Creates an asyncio task and records the stack of the calls that create it. The event loop calls this method
        to create every task."""
        task = asyncio.Task(work, loop=loop, **options)
        self._tasks[task] = self.here()
        return task

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        """Records, for each object of this project, the stack of the calls that create the object. Python calls this
        method at every function call, because sys.setprofile has set this method as the profile function."""
        if event == "call" and frame.f_code.co_name == "__init__" and called(frame) is not None:
            made = frame.f_locals["self"]
            self._made[id(made)] = made, self.of(frame)


def called(frame: FrameType) -> Call | None:
    """Returns the call whose frame is `frame`, or None if the called function is not part of this project."""
    module: str = frame.f_globals.get("__name__", "")
    return Call(module.removeprefix(PACKAGE), frame.f_code.co_qualname) if module.startswith(PACKAGE) else None


def is_tensor(method: object) -> bool:
    """Returns whether a built-in method is bound to one of torch's tensors."""
    return type(getattr(method, "__self__", None)).__name__ == "Tensor"


def is_foreign(frame: FrameType | None) -> bool:
    """Returns whether the code of a frame is part of neither this project nor Python's standard library."""
    name = "" if frame is None or called(frame) else frame.f_code.co_filename
    return bool(name) and (not name.startswith(STDLIB) or "site-packages" in name)


def current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None  # this thread has no running event loop, so it has no task


def before(owner: Any, name: str, look: Callable[..., None]) -> None:
    """Replaces the method `name` of the object `owner`, so that each call first calls the function `look` with the same
    arguments."""
    method = getattr(owner, name)

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        look(*args)
        return method(*args, **kwargs)

    setattr(owner, name, looked_at)


def after(owner: Any, name: str, look: Callable[[Any], None]) -> None:
    """Replaces the coroutine method `name` of the object `owner`, so that the function `look` is called with each
    result of the method."""
    method = getattr(owner, name)

    async def looked_at(*args: Any) -> Any:
        result = await method(*args)
        look(result)
        return result

    setattr(owner, name, looked_at)


# The following code runs in the process of the engine.


class EngineTrace:
    """Records stacks of calls in the engine's process. Writes the stacks to a file when the first tokens of the reply
    are sent."""

    def __init__(self, path: Path) -> None:
        self._path, self._stacks = path, Stacks()
        self._inbox: Stack = ()
        self._kernel: Stack = ()
        self._results: Stack = ()

    def reader(self, frame: FrameType, event: str, argument: object) -> None:
        """Records the stack of the innermost call that has the request as an argument. Python calls this method at
        every function call in the thread that reads the socket."""
        if event != "call" or called(frame) is None:
            return
        for value in frame.f_locals.values():
            if isinstance(value, list) and value and str(getattr(value[0], "id", "")).startswith(MARK.decode()):
                self._inbox = self._stacks.of(frame)

    def loop(self, frame: FrameType, event: str, argument: object) -> None:
        """Records two stacks: the stack of the first kernel call, and the stack of the most recent call that copies
        results from the device.

        It is the profile function of the thread that runs the engine's steps.
        """
        if not self._inbox:
            return
        if event == "call" and not self._kernel:
            call = called(frame)
            if call is not None and call.module.startswith("kernels"):
                self._kernel = self._stacks.of(frame)
        elif event == "c_call" and getattr(argument, "__name__", "") == "tolist" and is_tensor(argument):
            self._results = self._stacks.of(frame)

    def send(self, connection: object, data: bytes) -> None:
        if MARK not in data or b"token_ids" not in data or self._path.exists():
            return
        modules = {call.module for call in self._kernel}
        # The tokens' way back begins in the model runner. Calls of functions that only copy tensors inside the model
        # runner are left out.
        runner = tuple(takewhile(lambda call: call.module in modules, self._results))
        ways = Ways((self._inbox, self._kernel), (walk(runner, self._stacks.here()),))
        self._path.write_text(json.dumps(ways))


def run_engine(path: Path) -> None:
    """Runs the engine's process as `python -m jamba_server.engine.process` does, and writes the recorded stacks to the
    file `path`."""
    import socket

    from jamba_server.engine.process.__main__ import main

    trace = EngineTrace(path)
    before(socket.socket, "sendall", trace.send)
    threading.setprofile(trace.reader)
    sys.setprofile(trace.loop)
    main()


# The following code runs in the process of the HTTP server.


class ServerTrace:
    """Records stacks of calls in the server's process, from the arrival of the request to the first event of the reply
    that has text."""

    def __init__(self) -> None:
        self.stacks = Stacks()
        self.down: Stack = ()
        self.back: Stack = ()
        self._received: Stack = ()
        self._put: Stack = ()
        self._got: Stack = ()

    def write(self, writer: object, data: bytes) -> None:
        if MARK in data and not self.down:
            self.down = since_route(self.stacks.here())

    def read(self, data: bytes) -> None:
        if MARK in data and b"token_ids" in data:
            self._received = self.stacks.here()

    def put(self, queue: object, item: object) -> None:
        if self._is_update(item):
            self._put = self.stacks.here()

    def got(self, item: object) -> None:
        if self._is_update(item):
            self._got = since_route(self.stacks.here())

    async def send(self, message: Any) -> None:
        """Receives the messages of the application's reply. The application calls this method as ASGI's callable
        `send`, which an HTTP server would otherwise provide."""
        body: bytes = message.get("body", b"")
        if not self.back and b'"content":' in body and b'"content":""' not in body:
            sent = since_route(self.stacks.here())
            self.back = (*walk(self._received, self._put), *walk(self._got, sent))

    def _is_update(self, item: object) -> bool:
        return str(getattr(item, "request_id", "")).startswith(MARK.decode())


async def serve(engine_trace: Path) -> ServerTrace:
    """Starts the application and the engine, and sends one request to the application.

    Returns the stacks of this process. The engine writes its own stacks to the file `engine_trace`.
    """
    from jamba_server.engine.process.client import EngineClient
    from jamba_server.server.config import ServerConfig
    from jamba_server.server.demo import demo_folder
    from jamba_server.server.generation_defaults import GenerationDefaults
    from jamba_server.server.http.app import create_app
    from jamba_server.server.text.chat_template import ChatTemplate
    from jamba_server.server.text.tokenizer import Tokenizer

    folder = demo_folder()
    config = ServerConfig(
        served_model_name=("demo",), device="cpu", max_num_seqs=2, kv_cache_memory_bytes=1 << 24, threads=1
    )
    command = (sys.executable, "-P", __file__, str(engine_trace))
    engine = EngineClient(config.engine(folder), command=command)
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer)
    app = create_app(config, engine, tokenizer, template, GenerationDefaults(), demo=True)
    await engine.start()
    trace = ServerTrace()
    before(asyncio.StreamWriter, "write", trace.write)
    before(asyncio.Queue, "put_nowait", trace.put)
    after(asyncio.StreamReader, "readexactly", trace.read)
    after(asyncio.Queue, "get", trace.got)
    asyncio.get_running_loop().set_task_factory(trace.stacks.make_task)
    sys.setprofile(trace.stacks.profile)
    try:
        await request(app, trace)
    finally:
        sys.setprofile(None)
        await engine.close()
    return trace


async def request(app: Any, trace: ServerTrace) -> None:
    """Calls the application with one request, as an ASGI server would do."""
    body = iter([{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}])

    async def receive() -> Any:
        # waits forever, because the client never disconnects
        return next(body, None) or await asyncio.get_running_loop().create_future()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "scheme": "http", "path": PATH, "query_string": b"", "headers": headers}
    await app(scope | {"asgi": {"version": "3.0"}, "root_path": ""}, receive, trace.send)


# The following code counts hops in the recorded stacks.


def walk(start: Stack, end: Stack) -> Stack:
    """Returns the calls that lead from one recorded stack of calls to another, from the innermost call of `start` to
    the innermost call of `end`.

    The way leads outwards to the last call that both stacks share, and from there inwards.
    """
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, end, strict=False)))
    return (*reversed(start[max(common - 1, 0) :]), *end[common:])


def since_route(stack: Stack) -> Stack:
    """Returns the part of a stack that begins with the function of the HTTP route. The earlier calls, of the web
    framework and the middleware, are left out."""
    return tuple(dropwhile(lambda call: ".routes." not in call.module, stack))


def rooms(part: Stack) -> Iterator[tuple[str, list[str]]]:
    """Groups consecutive calls in `part` that have the same module. Yields (module, names of the called functions) for
    each group."""
    for module, calls in groupby(part, key=lambda call: call.module):
        yield module, list(dict.fromkeys(call.function for call in calls))


def hops(parts: Sequence[Stack]) -> int:
    return sum(len(list(rooms(part))) - 1 for part in parts)


def show(title: str, parts: Sequence[Stack]) -> None:
    print(f"{title}: {hops(parts)} hops")
    for part in parts:
        for n, (module, functions) in enumerate(rooms(part)):
            print(f"  {'->' if n else '||'} {module:<28} {', '.join(functions)}")


def count() -> Ways:
    """Serves one request. Returns the calls in the server's process and the calls in the engine's process, on the way
    down to the kernels and on the way back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.json"
        server = asyncio.run(serve(path))
        down, back = (
            tuple(tuple(Call(*call) for call in part) for part in way) for way in json.loads(path.read_text())
        )
    return Ways((server.down, *down), (*back, server.back))


def main() -> None:
    # if there are command-line arguments, this is the engine's process; the arguments are the file for the stacks and
    # the socket
    if len(sys.argv) > 1:
        path = Path(sys.argv.pop(1))
        run_engine(path)
        return
    ways = count()
    show("down", ways.down)
    show("back", ways.back)


if __name__ == "__main__":
    main()

"""A process that renders chat templates: `python -m jamba_server.server.text.rendering FD SECONDS`. FD is the file
descriptor of the process's socket. SECONDS is the time after which the process ends itself if one rendering is not
finished.

The class `process.TemplateProcesses` starts this process. The process answers one message after the other until its
parent closes the socket. It holds no secrets and may use little memory, because the authors of templates are not
trusted.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import sys

from jamba_server.server.text.rendering.local import LocalRenderer
from jamba_server.server.text.rendering.wire import Done, Ready, Work, pack, receive

# The maximum address space of the process. Python with Jinja takes 0.1 GB. Rendering the longest allowed prompt three
# times takes 0.4 GB.
MAX_MEMORY_BYTES = 1 << 30


def limit_resources() -> None:
    """Limits the memory of this process, and forbids it to write a core dump."""
    for kind, limit in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))


def serve(connection: socket.socket, seconds: float) -> None:
    """Answers messages from the socket until the end of the stream. If a message takes more than `seconds` seconds, the
    signal SIGALRM ends this process. Usually the parent process kills it sooner; SIGALRM is needed in case the parent
    has died."""
    renderer = LocalRenderer()
    connection.sendall(pack(Ready()))
    while (work := receive(connection, Work)) is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        if work.contexts is None:
            done = Done(compiled=renderer.compile(work.source))
        else:
            done = Done(renderings=renderer.render(work.source, work.contexts))
        connection.sendall(pack(done))
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    # This process ignores SIGINT (Ctrl-C) and SIGTERM. The parent process gets them, too, and then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    limit_resources()
    with socket.socket(fileno=int(sys.argv[1])) as connection, contextlib.suppress(ConnectionError):
        serve(connection, float(sys.argv[2]))


if __name__ == "__main__":
    main()

"""Runs a command in a pseudo-terminal and writes the resulting screen as an SVG picture.

    python tools/record_terminal.py --out docs/serve.svg --until "curl" -- jamba serve --port 8000

The picture is taken when the text of `--until` has appeared, or when the command has ended. Then the command gets
SIGINT. The output is not edited, except that of a progress bar only the last state is shown.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 120
FONT_FACE = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # rich names fonts that lie on another host
POLL_SECONDS = 0.2
# Recording continues for this many seconds after the text of the option --until has appeared, so that output after this
# text is recorded, too.
SETTLE_SECONDS = 1.0
_CURSOR = re.compile(r"\x1b\[\?25[lh]|\x1b\[[0-9]*[ABCDGHJ]|\x1b\]8;[^\x1b]*\x1b\\")


def record(command: list[str], until: str, timeout: float) -> str:
    """Runs `command` in a pseudo-terminal and returns the command's output.

    Recording ends when the text `until` has appeared, the command has ended, or `timeout` seconds have passed.
    """
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        written, deadline = b"", time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([master], [], [], POLL_SECONDS)[0]:
                try:
                    written += os.read(master, 65536)
                except OSError:  # the command has closed its terminal, so nothing more can be read
                    break
            elif process.poll() is not None:
                break
            if until.encode() in written:
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        process.send_signal(signal.SIGINT)
    os.close(master)
    return written.decode(errors="replace")


def screen(written: str) -> str:
    """Returns the lines that a terminal shows after the output `written`. Overwritten states of a progress bar are left
    out."""
    lines: list[str] = []
    for line in written.replace("\r\n", "\n").split("\n"):
        erased = line.split("\x1b[2K")[-1]
        lines.append(_CURSOR.sub("", erased.split("\r")[-1]).rstrip())
    return "\n".join(lines).strip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    parser.add_argument("--until", default="\0", help="text after which the picture is taken")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for that text")
    parser.add_argument("command", nargs="+", help="the command to run, after --")
    arguments = parser.parse_args()
    shown = screen(record(arguments.command, arguments.until, arguments.timeout))
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115 - the file is closed when the process ends
    console.print(Text.from_ansi("$ " + " ".join(arguments.command) + "\n" + shown))
    svg = FONT_FACE.sub("", console.export_svg(title="jamba-server"))  # viewers use a monospaced font of their own
    arguments.out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()

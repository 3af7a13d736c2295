"""Tries client libraries on a server with the demonstration model. Each library is installed in a virtual environment
of its own.

    python -m benchmarks.http.try_clients [--only NAME ...]

For each library, this program makes a virtual environment in a temporary folder, installs the library from the package
index, runs the script benchmarks/http/clients/use_NAME.py in it and removes the environment. The results are written to
benchmarks/results/clients.md, and the full output of the scripts to the terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from benchmarks.http.serving import RESULTS, describe_commit, running_server
from jamba_server.server.demo import demo_folder

SCRIPTS = Path(__file__).parent / "clients"
START_SECONDS = 120.0
SCRIPT_SECONDS = 300.0
COLUMNS = ("chat", "stream", "tool call", "schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A library to try. `packages` are installed, and the table names the version of the first of them.

    If `shares_torch` is true, the environment can also import the packages of the environment that runs this program.
    This is used for libraries that need torch, because installing torch with its GPU packages takes several gigabytes.
    """

    title: str
    packages: tuple[str, ...]
    script: str
    arguments: tuple[str, ...] = ()
    shares_torch: bool = False


CLIENTS = (
    Client(title="openai", packages=("openai",), script="use_openai.py"),
    Client(title="anthropic", packages=("anthropic",), script="use_anthropic.py"),
    Client(
        title="LangChain (OpenAI)", packages=("langchain-openai",), script="use_langchain.py", arguments=("openai",)
    ),
    Client(
        title="LangChain (Anthropic)",
        packages=("langchain-anthropic",),
        script="use_langchain.py",
        arguments=("anthropic",),
    ),
    Client(title="LlamaIndex", packages=("llama-index-llms-openai-like",), script="use_llamaindex.py"),
    Client(title="LiteLLM (OpenAI)", packages=("litellm",), script="use_litellm.py", arguments=("openai",)),
    Client(title="LiteLLM (Anthropic)", packages=("litellm",), script="use_litellm.py", arguments=("anthropic",)),
    Client(title="pydantic-ai", packages=("pydantic-ai-slim[openai]",), script="use_pydantic_ai.py"),
    Client(title="instructor", packages=("instructor",), script="use_instructor.py"),
    Client(title="lm-eval", packages=("lm-eval[api]",), script="use_lm_eval.py"),
    Client(title="guidellm", packages=("guidellm",), script="use_guidellm.py", shares_torch=True),
    Client(title="Aider", packages=("aider-chat",), script="use_aider.py"),
)


class Line(TypedDict):
    """The line of JSON that a script prints for one check. `error` is empty if the check passed."""

    check: str
    error: str


@dataclass(frozen=True, slots=True)
class Result:
    """The result for one library. `checks` maps the name of each check to its error text, or to "" if the check
    passed."""

    client: Client
    version: str
    checks: Mapping[str, str] = field(default_factory=dict[str, str])
    problem: str = ""


def try_client(client: Client, url: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="jamba-client-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if client.shares_torch:
            [packages] = folder.glob("lib/python*/site-packages")
            (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        python = folder / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        if subprocess.run([*install, *client.packages]).returncode:
            return Result(client, "", problem="its packages could not be installed")
        package = client.packages[0].partition("[")[0]
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        try:
            done = subprocess.run(
                [python, SCRIPTS / client.script, *client.arguments],
                env=_environment(url, folder),
                stdout=subprocess.PIPE,
                text=True,
                timeout=SCRIPT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Result(client, version, problem=f"the script did not end within {SCRIPT_SECONDS:.0f} s")
    print(done.stdout)
    lines: list[Line] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    checks = {line["check"]: line["error"] for line in lines}
    return Result(client, version, checks, problem="" if checks else "the script failed before its first check")


def _environment(url: str, home: Path) -> dict[str, str]:
    """Returns the environment variables for a script. They make the libraries keep their files in the temporary folder
    and send no usage reports."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "URL": url,
        "TOKENIZER": str(demo_folder()),
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "ANTHROPIC_API_KEY": "none",
        "LANGSMITH_TRACING": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
    }


def table(results: Sequence[Result]) -> str:
    lines = [f"| client | version | {' | '.join(COLUMNS)} | others |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for result in results:
        cells = [_cell(result, name) for name in COLUMNS]
        others = [
            name if not error else f"{name}: failed" for name, error in result.checks.items() if name not in COLUMNS
        ]
        cells.append(result.problem or ", ".join(others) or "–")
        lines.append(f"| {result.client.title} | {result.version or '–'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(result: Result, name: str) -> str:
    if name not in result.checks:
        return "–"
    return "failed" if result.checks[name] else "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="try only clients whose title begins with this")
    only: list[str] = parser.parse_args().only
    clients = [client for client in CLIENTS if not only or client.title.lower().startswith(tuple(map(str.lower, only)))]
    with running_server(["--dtype", "float32", "--threads", "1"], START_SECONDS) as (url, _):
        results = [try_client(client, url) for client in clients]
    print(table(results))
    for result in results:
        for name, error in result.checks.items():
            if error:
                print(f"{result.client.title}, {name}: {error}")
    if not only:
        head = (
            f"# Client libraries\n\n{time.strftime('%Y-%m-%d')}, commit {describe_commit()}, demonstration model.\n\n"
        )
        (RESULTS / "clients.md").write_text(head + table(results) + "\n", encoding="utf-8")
    sys.exit(any(result.problem or any(result.checks.values()) for result in results))


if __name__ == "__main__":
    main()

"""`jamba sessions` at a server with an engine that repeats what it is asked."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jamba_server.engine.errors import ConfigError, JambaError
from jamba_server.server.cli.application import app
from tests.server.conftest import Bench, MakeBench
from tests.server.edge_server import edge_server

KEY = "a-key"


async def jamba(port: int, *arguments: object, answer: str | None = None) -> str:
    """Runs the command and returns what it prints. Raises the command's own error."""
    command = ["sessions", *map(str, arguments), "--url", f"http://127.0.0.1:{port}", "--api-key", KEY]
    result = await asyncio.to_thread(lambda: CliRunner().invoke(app, command, input=answer))
    if isinstance(result.exception, JambaError):
        raise result.exception
    assert result.exit_code == (0 if answer in (None, "y\n") else 1), result.output
    return result.output


async def talk(bench: Bench, *texts: str) -> None:
    async with bench.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        for text in texts:
            reply = await http.post("/v1/responses", json={"input": text, "session": "talk"})
            assert reply.status_code == 200, reply.text


async def test_a_session_moves_to_another_server(
    make_bench: MakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = make_bench(api_key=(KEY,)), make_bench(api_key=(KEY,))
    await talk(one, "a", "b")
    async with edge_server(one) as (_, port):
        assert "talk  2 responses, since " in await jamba(port, "list")
        assert "warning: the prefix cache's segments are left out" in await jamba(port, "export", "talk")
        exported = tmp_path / "talk.jamba-session"
        assert os.listdir(tmp_path) == [exported.name]
        assert stat.S_IMODE(exported.stat().st_mode) == 0o600
        assert "warning" not in await jamba(port, "export", "talk", "-o", tmp_path / "two", "--no-segments")
        with pytest.raises(ConfigError, match=r"talk\.jamba-session exists already"):
            await jamba(port, "export", "talk")
        await talk(one, "c")
        expected = one.engine.requests[-1].prompt
    async with edge_server(other) as (_, port):
        assert "session talk: 2 responses\n" in await jamba(port, "import", exported)
        assert "session copy: 2 responses\n" in await jamba(port, "import", tmp_path / "two", "--id", "copy")
        assert [line.split()[0] for line in (await jamba(port, "list")).splitlines()] == ["copy", "talk"]
        await talk(other, "c")
        assert other.engine.requests[-1].prompt == expected


async def test_rm(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=(KEY,))
    await talk(bench, "a")
    async with edge_server(bench) as (_, port):
        await jamba(port, "rm", "talk", answer="n\n")
        assert "talk" in await jamba(port, "list")
        assert "deleted the session talk" in await jamba(port, "rm", "talk", answer="y\n")
        assert await jamba(port, "list") == ""
        with pytest.raises(JambaError, match=r"404.*'talk'"):
            await jamba(port, "rm", "talk", "--yes")


async def test_what_cannot_be_done(make_bench: MakeBench, tmp_path: Path) -> None:
    """Nothing is left of an export that failed, and the server's words are shown."""
    bench = make_bench(api_key=(KEY,))
    await talk(bench, "a")
    async with edge_server(bench) as (_, port):
        with pytest.raises(ConfigError, match="folder/file cannot be written: No such file"):
            await jamba(port, "export", "talk", "-o", tmp_path / "folder" / "file")
        with pytest.raises(JambaError, match=r"404.*There is no session 'walk'"):
            await jamba(port, "export", "walk", "-o", tmp_path / "file")
        assert os.listdir(tmp_path) == []
        (tmp_path / "file").write_bytes(b"no session")
        with pytest.raises(JambaError, match="answers 400"):
            await jamba(port, "import", tmp_path / "file")
        with pytest.raises(ConfigError, match="missing cannot be read: No such file"):
            await jamba(port, "import", tmp_path / "missing")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export",), "needs the name of a session"),
        (("import",), "needs a file"),
        (("list", "talk"), "takes no argument, but 'talk' is given"),
        (("rm", "talk", "--id", "x"), "has no flag --id"),
        (("export", "a/b"), "'a/b' is no name of a session; it must have 1 to 64 letters"),
        (("import", "file", "--id", "a b"), "'a b' is no name of a session"),
        (("rm", ".."), "may not begin with a dot"),
        (("list", "--url", "my-model"), "--url is 'my-model'; it must be the URL of a server"),
    ],
)
def test_arguments_that_make_no_sense(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["sessions", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_no_server() -> None:
    result = CliRunner().invoke(app, ["sessions", "list", "--url", "http://127.0.0.1:1"])
    assert "No server answers at http://127.0.0.1:1" in str(result.exception)

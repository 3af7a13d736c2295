"""`jamba cache` on a folder with segments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.application import app
from tests.engine.tiers.files import conversation, open_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for model in (0, 1):
        for part in conversation(model, 3):
            open_folder(tmp_path, model=model).write(part)
    return tmp_path


def jamba(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def spoil(folder: Path) -> Path:
    path = sorted(folder.glob("*/*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return path


def test_ls(folder: Path) -> None:
    lines = jamba("ls", folder).splitlines()
    assert [line.split()[0] for line in lines].count("model") == 2
    entries = sorted((part.entry for part in conversation(0, 3)), key=lambda entry: entry.end)
    shown = [line for line in lines if entries[1].key.hex()[:12] == line.split()[0]]
    assert f"tokens {entries[1].start} to {entries[1].end}, after {entries[0].key.hex()[:12]}" in shown[0]


def test_stat(folder: Path) -> None:
    (folder / "unrelated").mkdir()
    (folder / "unrelated" / "notes.txt").write_text("hello")
    size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    output = jamba("stat", folder)
    assert output.count("3 segments, 1 ends of conversations") == 2
    assert f"in all: 6 segments, {size / 1024:.1f} KiB" in output


def test_verify(folder: Path) -> None:
    assert jamba("verify", folder) == "6 segments are whole, 0 files cannot be used\n"
    path = spoil(folder)
    assert f"{path}: edited" in jamba("verify", folder, status=1)


def test_gc(folder: Path) -> None:
    spoil(folder)  # the headers say nothing about the tensors
    header = sorted(folder.glob("*/*.safetensors"))[1]
    header.write_bytes(header.read_bytes()[:20])
    assert jamba("gc", folder).startswith("1 files deleted; 5 are left")
    jamba("gc", folder, "--max-bytes", "3000")
    assert 0 < sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) <= 3000
    assert " 0 are left" in jamba("gc", folder, "--all")
    assert list(folder.glob("*/*.safetensors")) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        jamba("ls", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="belong to `jamba cache gc`"):
        jamba("ls", "--all", tmp_path)
    with pytest.raises(ConfigError, match="a size such as 4GiB"):
        jamba("gc", "--max-bytes", "much", tmp_path)


def test_the_command_does_without_torch() -> None:
    program = "import sys, jamba_server.server.cli.cache; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

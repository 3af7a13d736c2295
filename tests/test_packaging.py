"""The wheel: what is in it, and that it works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "engine", "kernels")
METADATA_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")


def run(command: Sequence[str | Path], *, cwd: Path, path: Path | None = None) -> str:
    """Runs a command without a network and without this checkout in sight; returns its standard output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        list(command), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for setuptools leaves its work beside the sources. Most of the time is the C++ compiler's."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*PACKAGES, "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored, symlinks=True)
    for name in METADATA_FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", output, source], cwd=source)
    (path,) = output.glob("jamba_server-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", target, wheel], cwd=target)
    return target


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_has_one_package_and_nothing_else(wheel: Path) -> None:
    names = {Path(name) for name in ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")} == {"jamba_server"}
    sources = {file.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("*.py")}
    sources |= {
        "jamba_server" / file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    }
    assert {name for name in names if name.suffix == ".py"} == sources


def test_the_wheel_has_the_demonstration_checkpoint(wheel: Path) -> None:
    packed = {Path(name).name: info.file_size for name, info in ZipFile(wheel).NameToInfo.items() if "/demo/" in name}
    expected = {file.name: file.stat().st_size for file in (ROOT / "server" / "demo").iterdir() if file.is_file()}
    assert packed == expected
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(packed)


def test_the_product_does_not_depend_on_its_oracles(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(required) == len(project()["dependencies"])  # type: ignore[arg-type]
    assert not [line for line in required if line.startswith(("transformers", "openai", "pytest"))]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_command_says_its_version_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    for command in ([sys.executable, "-m", "jamba_server"], [installed / "bin" / "jamba"]):
        assert str(project()["version"]) in run([*command, "--version"], cwd=tmp_path, path=installed)


def test_the_demonstration_checkpoint_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(
        [sys.executable, "-c", "import jamba_server; print(jamba_server.__file__)"], cwd=tmp_path, path=installed
    )
    assert Path(where.strip()).is_relative_to(installed)
    command = [sys.executable, "-m", "jamba_server", "run", "--prompt", "Hello", "--max-tokens", "4"]
    assert run(command, cwd=tmp_path, path=installed).strip()

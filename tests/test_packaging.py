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
    """Built from a copy, because setuptools leaves its work beside the sources. The compiled kernels are copied too, so
    that they are not compiled again."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*PACKAGES, "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored, symlinks=True)
    for name in METADATA_FILES:
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, source)
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


def test_the_wheel_has_the_chat_page(wheel: Path) -> None:
    """The image installs the wheel, so it has the page, too."""
    folder = Path("server/http/page/static")
    names = {Path(name) for name in ZipFile(wheel).namelist()}
    expected = {"jamba_server" / file.relative_to(ROOT) for file in (ROOT / folder).iterdir()}
    assert {name for name in names if name.parent == "jamba_server" / folder} == expected
    assert "jamba_server" / folder / "index.html" in expected


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


def test_no_module_of_ours_has_a_name_outside_our_package(installed: Path, tmp_path: Path) -> None:
    """Others have packages of these names: `kernels` is Hugging Face's."""
    program = (
        "import importlib, jamba_server\n"
        f"for name in {PACKAGES}:\n"
        "    try:\n"
        "        print(name, list(importlib.import_module(name).__path__))\n"
        "    except ImportError:\n"
        "        print(name, 'cannot be imported')\n"
    )
    for path in (installed, ROOT / "src"):
        found = run([sys.executable, "-c", program], cwd=tmp_path, path=path)
        assert [line.split()[0] for line in found.splitlines()] == list(PACKAGES)
        assert str(installed) not in found and str(ROOT) not in found


def write_foreign_wheel(folder: Path) -> Path:
    """A distribution `kernels`, as Hugging Face's is, with a package of that name."""
    path, info = folder / "kernels-1.0-py3-none-any.whl", "kernels-1.0.dist-info"
    files = {
        "kernels/__init__.py": "def get_kernel() -> str:\n    return 'theirs'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_it_lives_beside_another_package_called_kernels(wheel: Path, tmp_path: Path) -> None:
    """The order of the two installations does not matter, and each package stays when the other one is removed."""
    foreign, environment = write_foreign_wheel(tmp_path), tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", environment], cwd=tmp_path)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python]

    def install(what: Path) -> None:
        run([*pip, "install", "--no-deps", "--no-index", "--no-compile", what], cwd=tmp_path)

    def uninstall(name: str) -> None:
        run([*pip, "uninstall", "--yes", name], cwd=tmp_path)

    def check_ours() -> None:
        where = "import jamba_server; print(jamba_server.__path__[0])"
        packages = Path(run([python, "-c", where], cwd=tmp_path).strip()).parent
        names = [name for name in ZipFile(wheel).namelist() if name.startswith("jamba_server/")]
        assert [name for name in names if not (packages / name).is_file()] == []

    def check_theirs() -> None:
        assert run([python, "-c", "from kernels import get_kernel; print(get_kernel())"], cwd=tmp_path) == "theirs\n"

    install(foreign)
    install(wheel)
    check_ours()
    check_theirs()
    uninstall("kernels")
    check_ours()
    install(foreign)
    uninstall("jamba-server")
    check_theirs()

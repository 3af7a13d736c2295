"""Gathers, for a machine that has a GPU but no network, the packages that such a machine usually lacks.

    python -m benchmarks.gpu.wheels FOLDER [--python 3.12]

FOLDER gets one wheel for each name in MISSING, for Linux on x86-64 and the given version of Python. Each wheel has the
version that is installed here, so that the GPU check runs with the versions that the tests have run with. On the
machine with the GPU, the wheels are installed into a folder of their own, and the checkout is found beside them:

    python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
    PYTHONPATH=src:.:SITE python3 -m benchmarks.gpu.probe

The program `benchmarks.gpu.probe` says which packages are still missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

# The packages to gather, with the parts of the GPU check that need them. "all" means that no part runs without the
# package; other parts are named in `benchmarks.gpu.check`.
MISSING: Final[Mapping[str, str]] = {
    "msgspec": "all",
    "llguidance": "parity, 3b, mini, transformers, http",
    "fastapi": "parity, http",
    "starlette": "parity, http",
    "pydantic": "parity, http",
    "pydantic-core": "parity, http",
    "annotated-types": "parity, http",
    "typing-inspection": "parity, http",
    "typing-extensions": "parity, http",  # pydantic-core needs a newer version than many machines have
    "opentelemetry-api": "parity, http",
    "python-multipart": "http",
    "fastapi-offline": "http",
    "uvicorn": "http",
    "gguf": "kernels",
}
# Packages that the GPU check needs too, and that a machine with torch and transformers usually has. They are not
# gathered, because several of them must fit the installed torch. Each name is that of an import.
EXPECTED: Final = (
    *("torch", "triton", "numpy", "safetensors", "tokenizers", "transformers", "huggingface_hub", "jinja2", "yaml"),
    *("httpx", "h11", "uvloop", "anyio", "prometheus_client", "typer", "rich", "xxhash", "pytest"),
)
# pip matches each of these tags exactly. The oldest one that a package offers is enough.
_GLIBC: Final = (5, 12, 17, 24, 26, 27, 28, 31, 34)
_OLD_TAGS: Final = ("manylinux1", "manylinux2010", "manylinux2014")


def requirement(name: str) -> str:
    """Returns the requirement of the version that is installed here, or just the name if the package is not installed
    here."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


def command(folder: Path, python: str) -> list[str]:
    """Returns the pip command that downloads the wheels into `folder`."""
    platforms = [*_OLD_TAGS, *(f"manylinux_2_{minor}" for minor in _GLIBC)]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    options += [option for tag in platforms for option in ("--platform", f"{tag}_x86_64")]
    wanted = [requirement(name) for name in MISSING]
    return [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *options, *wanted]


def table(folder: Path) -> str:
    """Returns a table of the wheels in `folder` with their sizes in kB, and their sum. Exits with a message if a wheel
    is missing, or if there are two versions of a package, which pip would refuse to install."""
    # The machine with the GPU may lack this package, and imports this module without calling this function.
    from packaging.utils import canonicalize_name, parse_wheel_filename

    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.whl")):
        found.setdefault(parse_wheel_filename(path.name)[0], []).append(path)
    if absent := [name for name in MISSING if canonicalize_name(name) not in found]:
        raise SystemExit(f"{folder} has no wheel of {', '.join(absent)}.")
    if twice := [path.name for paths in found.values() if len(paths) > 1 for path in paths]:
        raise SystemExit(f"{folder} has several versions of a package, of which one must go: {', '.join(twice)}.")
    paths = [path for [path] in found.values()]
    lines = [f"{path.stat().st_size / 1000:8,.0f} kB  {path.name}" for path in paths]
    total = sum(path.stat().st_size for path in paths)
    return "\n".join([*lines, f"{total / 1000:8,.0f} kB  {len(paths)} wheels"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the wheels")
    parser.add_argument("--python", default="3.12", help="version of Python on the machine with the GPU")
    parsed = parser.parse_args(arguments)
    parsed.folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(command(parsed.folder, parsed.python), check=False).returncode:
        raise SystemExit("pip could not download all wheels: its message is above.")
    print(table(parsed.folder))


if __name__ == "__main__":
    main()

"""Which version runs."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    try:
        return metadata.version("jamba-server")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed

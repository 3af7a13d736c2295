"""The version of the installed package."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    try:
        return metadata.version("jamba-server")
    except metadata.PackageNotFoundError:
        return "unknown"  # the server runs from a source folder that is not installed

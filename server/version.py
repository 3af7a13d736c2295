"""Finds the version of the installed package."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    try:
        return metadata.version("jamba-server")
    except metadata.PackageNotFoundError:
        return "unknown"  # no package is installed, since the server runs from a source folder

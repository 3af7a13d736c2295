"""The console command `jamba`. It makes sure that our packages are imported before it imports any of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

PACKAGES = ("server", "engine", "kernels")  # short names, which other distributions have too


def foreign_package(home: Path = Path(__file__).parent.parent) -> str | None:
    """What to do about one of our packages that Python would take from elsewhere than `home`, or that another
    distribution has been installed over; None if all are ours. Imports nothing."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = None if spec is None or spec.origin is None else Path(spec.origin).parent
        if found != home / name:
            return (
                f"`import {name}` finds {found or 'nothing'}, but jamba-server's is {home / name}: "
                f"uninstall the other distribution, or use an environment of its own."
            )
        try:
            other = importlib.metadata.distribution(name).locate_file(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Path(str(other)) == found:
            return (
                f"the distribution {name!r} is installed in {found}, in the middle of jamba-server's own package: "
                f"uninstall both and install jamba-server again, or use an environment of its own."
            )
    return None


def main() -> None:
    if problem := foreign_package():
        sys.exit(f"jamba: {problem}")
    from server.commands import application  # not before the packages are known to be ours

    application.run()


if __name__ == "__main__":
    main()

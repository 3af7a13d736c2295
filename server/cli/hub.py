"""The process that downloads from the hub: `python -m jamba_server.server.cli.hub`.

`download.download` starts it, writes one `Download` to its standard input and reads one message a line from its standard
output: Plan and Progress if something has to come, then Done or Failed. The hub's client keeps its threads, log lines
and progress bars to itself that way, and a download ends at once when its process does. That is when its standard input
ends: nobody waits for it any more. The next download takes the files that have come as a whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the HTTP library that the hub's client is built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from jamba_server.server.cli.download import Done, Failed, FromHub, Plan, Progress, Download

# Gigabytes that nobody would use: their names are of this process alone.
PARTIAL = re.compile(r"\.[0-9a-f]{8}\.incomplete$")


class Bar(tqdm):
    """A progress bar of the hub's client that writes messages in place of itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": False})
        self._counts_bytes = kwargs.get("unit") == "B"  # another one counts files

    def display(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self._counts_bytes:
            tell(Progress(int(self.n)))
        return shown


def tell(message: FromHub) -> None:
    """One write a line: several threads download."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(message) + b"\n")


def end_with_parent() -> None:
    sys.stdin.buffer.read()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            path = descriptor.readlink()
            if PARTIAL.search(path.name):
                path.unlink()
    os._exit(1)


def fetch(wanted: Download) -> Path:
    """Downloads what is missing; the folder."""
    options: dict[str, Any] = {
        "revision": wanted.revision,
        "allow_patterns": wanted.patterns,
        "ignore_patterns": ["*/*"],
    }
    try:
        files = snapshot_download(wanted.name, dry_run=True, **options)
    except DryRunError as error:
        # What is here already may do. Only a hub that has answered is asked again, for its reason to refuse
        answered = isinstance(error.__cause__, HfHubHTTPError)
        return Path(str(snapshot_download(wanted.name, local_files_only=not answered, **options)))
    if missing := [file for file in files if file.will_download]:
        tell(Plan(len(missing), sum(file.file_size or 0 for file in missing)))
    return Path(str(snapshot_download(wanted.name, tqdm_class=Bar, **options)))


def describe(error: Exception, wanted: Download) -> str:
    """One sentence that says what to do."""
    name, hub = wanted.name, constants.ENDPOINT
    shown = name if wanted.revision is None else f"{name} at revision {wanted.revision}"
    text = " ".join(str(error).split())
    match error:
        case HFValidationError():
            return f"{name!r} is neither a folder nor a hub id: {text}"
        case GatedRepoError():
            return f"{shown} is gated: accept its licence on {hub}/{name} and set HF_TOKEN to a token of yours."
        case RevisionNotFoundError():
            return f"{hub} has {name}, but not its revision {wanted.revision}."
        case RepositoryNotFoundError():
            return f"There is no folder {name}, and {hub} has no such model (or it is private: set HF_TOKEN)."
        case LocalEntryNotFoundError() if isinstance(error.__cause__, HfHubHTTPError):
            return refused(shown, error.__cause__)
        case LocalEntryNotFoundError():
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
            return f"There is no folder {name}, the hub cache {constants.HF_HUB_CACHE} has no {shown}, and {reason}."
        case HfHubHTTPError():
            return refused(shown, error)
        case HTTPError() | OSError():
            return f"The download of {shown} from {hub} failed: {text}"
        case _:
            return f"{hub} answers in a way that the hub's client cannot read ({type(error).__name__}: {text})."


def refused(shown: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    hint = ": set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    return f"{constants.ENDPOINT} answers {status} {error.response.reason_phrase} when asked for {shown}{hint}."


def main() -> None:
    wanted = msgspec.json.decode(sys.stdin.buffer.readline(), type=Download)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        tell(Done(str(fetch(wanted))))
    except Exception as error:  # noqa: BLE001 - whatever a strange answer makes of the hub's client is one sentence
        tell(Failed(describe(error, wanted)))
    os._exit(0)  # threads of the hub's client may still wait for an answer


if __name__ == "__main__":
    main()

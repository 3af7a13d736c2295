"""The process that downloads a model from the hub: `python -m jamba_server.server.cli.hub`.

`download.download` starts this process, writes one `Download` to its standard input and reads its standard output, one
message per line: Plan and Progress if files are missing, then Done or Failed.

A separate process keeps the threads, log lines and progress bars of the hub's client away from the command, and can be
ended at once. It ends when its standard input is closed. The next download keeps the files that are complete.
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
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # this is the error of the HTTP library below the hub's client
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from jamba_server.server.cli.download import Done, Download, Failed, FromHub, Plan, Progress
from jamba_server.server.cli.gguf_choice import NoSuchFile, choose

# Matches the end of the name of a partly downloaded file. A later download cannot continue such a file, since the
# file's name contains a random number.
PARTIAL = re.compile(r"\.[0-9a-f]{8}\.incomplete$")


class Bar(tqdm):
    """A progress bar for the hub's client. Nothing is drawn: the number of received bytes is sent to the parent process
    instead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": False})
        self._counts_bytes = kwargs.get("unit") == "B"  # a second bar of the hub's client counts files instead of bytes

    def display(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self._counts_bytes:
            tell(Progress(int(self.n)))
        return shown


def tell(message: FromHub) -> None:
    """Writes a message to standard output in one system call, so that messages of several threads do not mix."""
    os.write(sys.stdout.fileno(), msgspec.json.encode(message) + b"\n")


def end_with_parent() -> None:
    """Waits until the parent process closes standard input, then removes partly downloaded files and ends this
    process."""
    sys.stdin.buffer.read()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the file may have been closed after /proc/self/fd was listed
            path = descriptor.readlink()
            if PARTIAL.search(path.name):
                path.unlink()
    os._exit(1)


def fetch_gguf(wanted: Download, quantization: str) -> Done:
    """Downloads the GGUF file with the given quantisation, or all its pieces, if they are not in the local cache.
    Raises NoSuchFile if there is none."""
    listed = snapshot_files(wanted.name, wanted.revision)
    chosen, found = choose(listed, quantization)
    folder = fetch(msgspec.structs.replace(wanted, patterns=chosen))
    return Done(str(folder), chosen[0], found)


def snapshot_files(name: str, revision: str | None) -> list[str]:
    """Returns the names of the GGUF files of a model: those on the hub, or those in the local cache if the hub does not
    answer."""
    options: dict[str, Any] = {"revision": revision, "allow_patterns": ["*.gguf"], "ignore_patterns": ["*/*"]}
    try:
        return [file.filename for file in snapshot_download(name, dry_run=True, **options)]
    except DryRunError as error:
        answered = isinstance(error.__cause__, HfHubHTTPError)
        folder = Path(str(snapshot_download(name, local_files_only=not answered, **options)))
        return [path.name for path in folder.glob("*.gguf")]


def fetch(wanted: Download) -> Path:
    """Downloads the files that `wanted` names, if they are not in the local cache. Returns the folder that holds the
    files."""
    options: dict[str, Any] = {
        "revision": wanted.revision,
        "allow_patterns": wanted.patterns,
        "ignore_patterns": ["*/*"],
    }
    try:
        files = snapshot_download(wanted.name, dry_run=True, **options)
    except DryRunError as error:
        # If the hub did not answer, only the local cache is searched, since it might hold all files. If the hub
        # answered with an error, the hub is asked again, so that its error is raised.
        answered = isinstance(error.__cause__, HfHubHTTPError)
        return Path(str(snapshot_download(wanted.name, local_files_only=not answered, **options)))
    if missing := [file for file in files if file.will_download]:
        tell(Plan(len(missing), sum(file.file_size or 0 for file in missing)))
    return Path(str(snapshot_download(wanted.name, tqdm_class=Bar, **options)))


def describe(error: Exception, wanted: Download) -> str:
    """Returns one sentence on why the download failed. Where possible, the sentence says what to do."""
    name, hub = wanted.name, constants.ENDPOINT
    shown = name if wanted.revision is None else f"{name} at revision {wanted.revision}"
    text = " ".join(str(error).split())
    match error:
        case NoSuchFile():
            return f"{shown} cannot be used: {text}."
        case HFValidationError():
            return f"{name!r} is neither a folder nor a hub id: {text}"
        case GatedRepoError():
            return f"{shown} is gated: accept its licence on {hub}/{name} and set HF_TOKEN to your token."
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
    """Returns a sentence on the HTTP status with which the hub has answered the request for the model `shown`."""
    status = error.response.status_code
    hint = ": set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    return f"{constants.ENDPOINT} answers {status} {error.response.reason_phrase} when asked for {shown}{hint}."


def main() -> None:
    """Reads from standard input which files to download, downloads them, and writes Done or Failed as the final
    message."""
    wanted = msgspec.json.decode(sys.stdin.buffer.readline(), type=Download)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        quantization = wanted.quantization
        tell(Done(str(fetch(wanted))) if quantization is None else fetch_gguf(wanted, quantization))
    except Exception as error:  # noqa: BLE001 - the hub's client raises many errors for malformed answers
        tell(Failed(describe(error, wanted)))
    os._exit(0)  # sys.exit would wait for the threads of the hub's client to end


if __name__ == "__main__":
    main()

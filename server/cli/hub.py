"""The process that downloads a model from the hub: `python -m jamba_server.server.cli.hub`.

`download.download` starts this process, writes one `Download` to its standard input and reads its standard output, one
message per line: Plan and Progress if files are missing or checked, then Done, Listed or Failed.

A separate process keeps the threads, log lines and progress bars of the hub's client away from the command, and can be
ended at once. It ends when its standard input is closed. The next download keeps the files that are complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import DryRunFileInfo, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # this is the error of the HTTP library below the hub's client
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm
from rich import filesize

from jamba_server.server.cli.download import Done, Download, Failed, FromHub, HubFile, Listed, Plan, Progress
from jamba_server.server.cli.gguf_choice import NoSuchFile, choose

# Matches the end of the name of a partly downloaded file. A later download cannot continue such a file, since the
# file's name contains a random number.
PARTIAL = re.compile(r"\.[0-9a-f]{8}\.incomplete$")
# Matches the name under which the cache stores a large file: its SHA-256 checksum, which the hub has sent as its ETag.
SHA256 = re.compile(r"[0-9a-f]{64}")
CHECKED_AT_ONCE = 16 * 1024**2  # bytes of a file that are read and checked at once


class NoRoom(Exception):
    """The disk has not enough space for the missing files. The message is a whole sentence."""


class Damaged(Exception):
    """A file in the cache does not have the hub's checksum, and was deleted. The message is a whole sentence."""


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
    missing = [file for file in files if file.will_download]
    if missing:
        num_bytes = sum(file.file_size or 0 for file in missing)
        check_room(wanted.name, num_bytes)
        tell(Plan(len(missing), num_bytes))
    folder = Path(str(snapshot_download(wanted.name, tqdm_class=Bar, **options)))
    check(wanted.name, files if wanted.check_all else missing)
    return folder


def check_room(name: str, num_bytes: int) -> None:
    """Raises NoRoom if the disk of the hub cache has less than `num_bytes` bytes free."""
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():  # the first download makes the folder
        place = place.parent
    if (free := shutil.disk_usage(place).free) < num_bytes:
        raise NoRoom(
            f"The missing files of {name} have {filesize.decimal(num_bytes)}, but the disk of the hub cache "
            f"{constants.HF_HUB_CACHE} has only {filesize.decimal(free)} free: free some, or set HF_HUB_CACHE to a "
            "folder on another disk."
        )


def check(name: str, files: list[DryRunFileInfo]) -> None:
    """Compares files in the cache with the hub's SHA-256 checksums. Small files are left out, because the hub has no
    such checksum of them. A file that differs is deleted, so that the next download fetches it again. Raises
    Damaged."""
    blobs = {file.filename: blob for file in files if (blob := blob_of(Path(file.local_path))) is not None}
    if not blobs:
        return
    tell(Plan(len(blobs), sum(blob.stat().st_size for blob in blobs.values()), "checking"))
    num_bytes = 0
    for filename, blob in blobs.items():
        digest = hashlib.sha256()
        with blob.open("rb") as stream:
            while data := stream.read(CHECKED_AT_ONCE):
                digest.update(data)
                num_bytes += len(data)
                tell(Progress(num_bytes))
        if digest.hexdigest() != blob.name:
            blob.resolve().unlink()  # where models share files, the blob is a link itself
            blob.unlink(missing_ok=True)
            raise Damaged(
                f"{filename} of {name} has the SHA-256 checksum {digest.hexdigest()}, but {constants.ENDPOINT} says "
                f"{blob.name}: the file is damaged and was deleted; run the command again to download it again."
            )


def blob_of(path: Path) -> Path | None:
    """Returns the file in the cache that the link `path` of a snapshot leads to, if it is named by its checksum."""
    if not path.is_symlink():  # file systems without links hold the file itself, whose name says nothing
        return None
    blob = path.parent / path.readlink()
    return blob if SHA256.fullmatch(blob.name) else None


def list_files(wanted: Download) -> Listed:
    """Asks for the names and sizes of all files of a model on the hub, then downloads those that `wanted` names."""
    hub = HfApi()
    commit = hub.model_info(wanted.name, revision=wanted.revision).sha
    tree = hub.list_repo_tree(wanted.name, recursive=True, revision=commit)
    files = [HubFile(entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile)]
    return Listed(files, str(fetch(wanted)))


def describe(error: Exception, wanted: Download) -> str:
    """Returns one sentence on why the download failed. Where possible, the sentence says what to do."""
    name, hub = wanted.name, constants.ENDPOINT
    shown = name if wanted.revision is None else f"{name} at revision {wanted.revision}"
    text = " ".join(str(error).split())
    match error:
        case NoRoom() | Damaged():
            return text
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
        case OfflineModeIsEnabled():
            return f"{hub} is not asked for {shown}, because HF_HUB_OFFLINE is set."
        case _ if is_disk_full(error):
            return (
                f"The disk of the hub cache {constants.HF_HUB_CACHE} is full, so {shown} is not complete: free some "
                "space and run the command again; complete files are not downloaded again."
            )
        case HTTPError() if wanted.with_list:
            return f"{hub} cannot be asked for the files of {shown}: {text.rstrip('.')}."
        case HTTPError() | OSError():
            return (
                f"The download of {shown} from {hub} failed: {text.rstrip('.')}; run the command again, which does not "
                "download complete files again."
            )
        case _:
            return f"{hub} answers in a way that the hub's client cannot read ({type(error).__name__}: {text})."


def is_disk_full(error: Exception) -> bool:
    """Returns whether a file could not be written because the disk, or the user's part of it, is full. The library that
    downloads large files for the hub's client says so in its text only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return f"os error {errno.ENOSPC}" in str(error)


def refused(shown: str, error: HfHubHTTPError) -> str:
    """Returns a sentence on the HTTP status with which the hub has answered the request for the model `shown`."""
    status = error.response.status_code
    hint = ": set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    return f"{constants.ENDPOINT} answers {status} {error.response.reason_phrase} when asked for {shown}{hint}."


def answer(wanted: Download) -> Done | Listed:
    """Carries out an order and returns the final message."""
    if wanted.with_list:
        return list_files(wanted)
    if wanted.quantization is not None:
        return fetch_gguf(wanted, wanted.quantization)
    return Done(str(fetch(wanted)))


def main() -> None:
    """Reads from standard input which files to download, downloads them, and writes Done or Failed as the final
    message."""
    wanted = msgspec.json.decode(sys.stdin.buffer.readline(), type=Download)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        tell(answer(wanted))
    except Exception as error:  # noqa: BLE001 - the hub's client raises many errors for malformed answers
        tell(Failed(describe(error, wanted)))
    os._exit(0)  # sys.exit would wait for the threads of the hub's client to end


if __name__ == "__main__":
    main()

"""Implements `jamba rm`, which deletes a model from the hub cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo, constants
from rich import filesize

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli.checkpoint import refuse_local
from jamba_server.server.cli.gguf_choice import NoSuchFile, choose, split_name
from jamba_server.server.cli.models.cached import gguf_files, model_repositories, scan

MIN_HASH = 6  # the smallest number of characters of a commit's hash that may name a revision


@dataclass(frozen=True, slots=True)
class Removal:
    """What is deleted: whole revisions, or single `files` (links in snapshots) of a repository."""

    repository: CachedRepoInfo
    revisions: Sequence[CachedRevisionInfo]
    files: Sequence[Path] = ()

    @property
    def blobs(self) -> dict[Path, int]:
        """The files that no other model needs afterwards, with their sizes in bytes."""
        removed, kept = dict[Path, int](), set[Path]()
        for revision in self.repository.revisions:
            for file in revision.files:
                if file.file_path in self.files or (revision in self.revisions and not self.files):
                    removed[file.blob_path] = file.size_on_disk
                else:
                    kept.add(file.blob_path)
        return {path: size for path, size in removed.items() if path not in kept}


def remove(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id as `jamba list` shows it, such as ORGANISATION/NAME"),
    ],
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit to delete  [default: all]", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking")] = False,
) -> None:
    """Delete a model from the hub cache, after a question. Says how many bytes were freed."""
    refuse_local(model, "; `jamba rm` deletes only models of the hub cache.")
    cache = scan()
    removal = plan_removal(cache, model, revision)
    assert cache is not None, "the model was found in it"
    expected = filesize.decimal(sum(removal.blobs.values()))
    if not yes:
        what = f"{len(removal.files)} files of {model}" if removal.files else _named(model, removal.revisions)
        typer.confirm(f"Delete {what} from {constants.HF_HUB_CACHE} ({expected})?", abort=True)
    freed = execute(cache, removal)
    typer.echo(f"deleted {model}: {freed:,} bytes ({filesize.decimal(freed)}) were freed")


def _named(model: str, revisions: Sequence[CachedRevisionInfo]) -> str:
    names = ", ".join("/".join(sorted(revision.refs)) or revision.commit_hash[:8] for revision in revisions)
    return f"{len(revisions)} revision{'' if len(revisions) == 1 else 's'} of {model} ({names})"


def plan_removal(cache: HFCacheInfo | None, model: str, revision: str | None) -> Removal:
    """Returns what is deleted for the hub id `model`, of one revision or of all. Raises CheckpointError if the cache
    has no such model."""
    hub_id, quantization = split_name(model)
    repository = next((repo for repo in model_repositories(cache) if repo.repo_id == hub_id), None)
    if repository is None:
        raise CheckpointError(
            f"The hub cache {constants.HF_HUB_CACHE} has no model {hub_id}; `jamba list` shows what it has."
        )
    revisions = [r for r in repository.revisions if revision is None or _is_named(r, revision)]
    if not revisions:
        found = ", ".join(sorted(name for r in repository.revisions for name in (*r.refs, r.commit_hash[:8])))
        raise CheckpointError(f"The hub cache has {hub_id}, but not its revision {revision}; it has {found}.")
    if not quantization:
        return Removal(repository, revisions)
    files = list(_gguf_links(hub_id, revisions, quantization))
    emptied = [r for r in revisions if all(file.file_path in files for file in r.files)]
    if len(emptied) == len(revisions):  # nothing but these files is there
        return Removal(repository, revisions)
    return Removal(repository, revisions, files)


def _is_named(revision: CachedRevisionInfo, name: str) -> bool:
    return name in revision.refs or (len(name) >= MIN_HASH and revision.commit_hash.startswith(name))


def _gguf_links(hub_id: str, revisions: Iterable[CachedRevisionInfo], quantization: str) -> Iterable[Path]:
    """Returns the links in snapshots to the GGUF files with this quantisation. Raises CheckpointError if there are
    none."""
    links, problem = list[Path](), ""
    for revision in revisions:
        names = [name for names in gguf_files(revision).values() for name in names]
        try:
            links += [revision.snapshot_path / name for name in choose(names, quantization)[0]]
        except NoSuchFile as error:
            problem = str(error)
    if not links:
        raise CheckpointError(f"{hub_id} in the hub cache cannot be deleted in part: {problem}.")
    return links


def execute(cache: HFCacheInfo, removal: Removal) -> int:
    """Deletes files and returns the number of bytes that they had. Raises CheckpointError if one of them cannot be
    deleted."""
    blobs = removal.blobs
    try:
        if removal.files:
            for path in (*removal.files, *blobs):  # links before what they lead to
                path.unlink(missing_ok=True)
        else:
            # Copies of a repository have the same commits, so the hub's client must see no other repository.
            alone = replace(cache, repos=frozenset((removal.repository,)))
            alone.delete_revisions(*(revision.commit_hash for revision in removal.revisions)).execute()
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be deleted: {error.strerror}.") from None
    if left := [path for path in blobs if path.exists()]:  # the hub's client writes warnings instead of errors
        raise CheckpointError(f"{left[0]} cannot be deleted; is the folder yours?")
    return sum(blobs.values())

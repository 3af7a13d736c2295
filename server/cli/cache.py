"""`jamba cache`: shows, checks and clears the folder of the prefix cache's disk tier (`--state-cache-disk-path`).

The commands read headers only, except `verify`, and never import torch. They may be used while servers use the folder.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jamba_server.engine.disk_tier.folder import UNFINISHED, Stored, collect, files_in, key_of, opened
from jamba_server.engine.disk_tier.format import BadSegment, Header, read_header, read_tensors
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.start.machine import format_bytes
from jamba_server.server.options import parse_size


class Action(StrEnum):
    ls = "ls"
    stat = "stat"
    verify = "verify"
    gc = "gc"


def cache(
    action: Annotated[Action, typer.Argument(help="What to do", show_default=False)],
    path: Annotated[Path, typer.Argument(help="Folder of the disk tier", metavar="PATH", show_default=False)],
    all_: Annotated[bool, typer.Option("--all", help="With gc: delete all segments of all models")] = False,
    max_bytes: Annotated[
        str | None,
        typer.Option("--max-bytes", metavar="BYTES", help="With gc: delete until so much is left, such as 4GiB"),
    ] = None,
) -> None:
    """List (ls), sum up (stat), check (verify) or clear (gc) the prefixes that servers keep on a disk."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder.")
    if (all_ or max_bytes is not None) and action is not Action.gc:
        raise ConfigError(f"--all and --max-bytes belong to `jamba cache gc`, not to `jamba cache {action}`.")
    try:
        match action:
            case Action.ls:
                _list(path)
            case Action.stat:
                _sum_up(path)
            case Action.verify:
                _verify(path)
            case Action.gc:
                _clear(path, 0 if all_ else _limit(max_bytes))
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}.") from None


def _limit(max_bytes: str | None) -> int | None:
    if max_bytes is None:
        return None
    try:
        return parse_size(max_bytes)
    except ValueError:
        raise ConfigError(f"--max-bytes is {max_bytes!r}; it must be a size such as 4GiB.") from None


def _headers(path: Path) -> Iterator[tuple[Stored, Header | BadSegment]]:
    """Yields the finished files below `path` with their headers, the most recently used one first. Files that are
    deleted meanwhile are left out."""
    for stored in sorted(files_in(path), key=lambda stored: (str(stored.path.parent), -stored.used_ns)):
        if stored.path.suffix == UNFINISHED:
            continue
        try:
            with opened(stored.path) as file:
                header = read_header(file)
            if header.entry.key != key_of(stored.path.name):
                raise BadSegment("foreign", "its name is not that of its contents")
            yield stored, header
        except BadSegment as error:
            if error.reason != "missing":
                yield stored, error


def _list(path: Path) -> None:
    model = ""
    for stored, header in _headers(path):
        if stored.path.parent.name != model:
            model = stored.path.parent.name
            typer.echo(f"model {model}")
        if isinstance(header, BadSegment):
            typer.echo(f"  {stored.path.name}  cannot be used ({header.reason}): {header}")
            continue
        entry = header.entry
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stored.used_ns / 1e9))
        after = f"after {entry.parent.hex()[:12]}" if entry.start else "from the beginning"
        typer.echo(
            f"  {entry.key.hex()[:12]}  tokens {entry.start} to {entry.end}, {after}, "
            f"{format_bytes(stored.num_bytes)}, used {used}"
        )


def _sum_up(path: Path) -> None:
    sizes, numbers, ends = Counter[str](), Counter[str](), Counter[str]()
    parents: set[bytes] = set()
    found: list[tuple[str, Header]] = []
    bad = Counter[str]()
    for stored, header in _headers(path):
        model = stored.path.parent.name
        if isinstance(header, BadSegment):
            bad[header.reason] += 1
            continue
        sizes[model] += stored.num_bytes
        numbers[model] += 1
        parents.add(header.entry.parent)
        found.append((model, header))
    ends.update(model for model, header in found if header.entry.key not in parents)
    for model, size in sizes.most_common():
        typer.echo(
            f"model {model}: {numbers[model]} segments, {ends[model]} ends of conversations, {format_bytes(size)}"
        )
    unfinished = [stored for stored in files_in(path) if stored.path.suffix == UNFINISHED]
    typer.echo(f"in all: {sum(numbers.values())} segments, {format_bytes(sum(sizes.values()))}")
    if unfinished:
        typer.echo(f"unfinished files: {len(unfinished)}, {format_bytes(sum(u.num_bytes for u in unfinished))}")
    if bad:
        typer.echo("files that cannot be used: " + ", ".join(f"{count} {reason}" for reason, count in bad.items()))


def _verify(path: Path) -> None:
    """Reads all files whole. Ends with status 1 if one of them cannot be used."""
    good, bad = 0, 0
    for stored, header in _headers(path):
        try:
            if isinstance(header, BadSegment):
                raise header
            with opened(stored.path) as file:
                read_tensors(file, header)
            good += 1
        except BadSegment as error:
            if error.reason != "missing":
                bad += 1
                typer.echo(f"{stored.path}: {error.reason}: {error}")
    typer.echo(f"{good} segments are whole, {bad} files cannot be used")
    if bad:
        raise typer.Exit(1)


def _clear(path: Path, limit: int | None) -> None:
    """Deletes unfinished files that nobody writes any more and files that cannot be used, then the least recently used
    segments beyond `limit` bytes."""
    number = 0
    for stored, header in _headers(path):
        if isinstance(header, BadSegment):
            stored.path.unlink(missing_ok=True)
            number += 1
    everything = sum(stored.num_bytes for stored in files_in(path))
    usage, deleted = collect(path, everything if limit is None else limit)
    typer.echo(f"{number + len(deleted)} files deleted; {usage.num_files} are left, {format_bytes(usage.num_bytes)}")

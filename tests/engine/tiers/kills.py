"""Kills processes that write segments, at random moments, and looks what is left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

from jamba_server.engine.disk_tier.format import BadSegment
from tests.engine.tiers.files import open_folder


def kill_writers(root: Path, number: int, seed: int) -> Counter[str]:
    """Two processes write to one folder; one of them is killed and replaced, `number` times. Returns what was seen."""
    random = Random(seed)
    counts: Counter[str] = Counter()
    writers = [_start(root, seed + i) for i in range(2)]
    try:
        for i in range(number):
            time.sleep(random.uniform(0.0, 0.05))
            _kill(writers[i % 2])
            counts += check(root)
            writers[i % 2] = _start(root, seed + 2 + i)
            counts["kills"] += 1
    finally:
        for writer in writers:
            _kill(writer)
    return counts + check(root)


def _start(root: Path, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.engine.tiers.writer", str(root), str(1000 * seed)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    return writer


def _kill(writer: subprocess.Popen[bytes]) -> None:
    writer.kill()
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


def check(root: Path) -> Counter[str]:
    """Every segment under its final name is whole; what a killed process has left has another name."""
    folder = open_folder(root)
    bad: list[str] = []
    found, _ = folder.scan(lambda path, error: bad.append(f"{path}: {error}"))
    assert not bad, bad
    for entry in found:
        try:
            folder.read(entry)
        except BadSegment as error:
            if error.reason != "missing":  # the other process may have deleted it
                raise
    return Counter(whole=len(found), unfinished=len(list(root.glob("*/*.part"))))

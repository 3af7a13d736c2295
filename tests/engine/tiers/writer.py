"""A process that writes segments until it is killed: `python -m tests.engine.tiers.writer ROOT SEED`."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from tests.engine.tiers.files import conversation, open_folder


def main(root: str, seed: str) -> None:
    folder = open_folder(Path(root), max_bytes=200_000)
    print("ready", flush=True)
    for number in count(int(seed)):
        for segment in conversation(number, 5):
            folder.reserve(segment.entry)
            folder.write(segment)
            folder.touch([segment.key])


if __name__ == "__main__":
    main(*sys.argv[1:])

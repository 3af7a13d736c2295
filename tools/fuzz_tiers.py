"""Long runs of the tests of the prefix cache's tiers: `python -m tools.fuzz_tiers conversations 300`.

    conversations N   N random conversations with the real engine, each tier in turn; every token and log-probability
                      must equal those of an engine that caches nothing
    simulated N       the simulator's fuzz with N seeds
    kills N           N times a process is killed while it writes to the disk; whatever is left must be whole
    servers SECONDS   two engines on one folder, both with random conversations

Each run ends with the counts of what was seen, or with an error. The same --seed gives the same requests.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.engine.tiers.conversations import TIERS, Cold, Player, make_model
from tests.engine.tiers.fuzz import run
from tests.engine.tiers.kills import kill_writers

PER_PLAYER = 15  # conversations


def conversations(number: int, seed: int, folder: Path) -> Counter[str]:
    model, total = make_model(folder / "model"), Counter[str]()
    cold = Cold(model)
    for i, first in enumerate(range(0, number, PER_PLAYER)):
        kind = TIERS[i % len(TIERS)]
        player = Player(model, kind, folder / f"disk-{i}", seed * 1000 + i)
        player.play(min(PER_PLAYER, number - first), cold)
        total += player.counts
        print(f"{first + PER_PLAYER} of {number}, {kind}: {dict(player.counts)}", flush=True)
    return total


def simulated(number: int, seed: int, folder: Path) -> Counter[str]:
    os.fsync = lambda fd: None  # it would take most of the time
    total: Counter[str] = Counter()
    for i in range(seed, seed + number):
        for ahead in (False, True):
            total += run(i, folder / f"{i}-{ahead}", ahead=ahead)
    return total


def kills(number: int, seed: int, folder: Path) -> Counter[str]:
    return kill_writers(folder / "cache", number, seed)


def servers(seconds: int, seed: int, folder: Path) -> Counter[str]:
    """Two processes, each with an engine, on one folder. Both play the same conversations."""
    make_model(folder / "model")
    command = [sys.executable, "-m", "tools.fuzz_tiers", "server", str(seconds), "--folder", str(folder)]
    both = [subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    total: Counter[str] = Counter()
    for output in outputs:
        for name, count in (line.split() for line in output.splitlines()):
            total[name] += int(count)
    return total


def server(seconds: int, seed: int, folder: Path) -> Counter[str]:
    """One of the processes of `servers`."""
    model, total, end = folder / "model", Counter[str](), time.monotonic() + seconds
    cold = Cold(model)
    while time.monotonic() < end:
        player = Player(model, "both" if seed % 3 == 0 else "disk", folder / "disk", seed)
        player.play(3, cold)
        total += player.counts
        seed += 1
    return total


COMMANDS: dict[str, Callable[[int, int, Path], Counter[str]]] = {
    "conversations": conversations,
    "simulated": simulated,
    "kills": kills,
    "servers": servers,
    "server": server,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the files that are damaged on purpose
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for name, count in COMMANDS[arguments.command](arguments.number, arguments.seed, folder).items():
            print(name, count)


if __name__ == "__main__":
    main()

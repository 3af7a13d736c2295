"""Random work for caches with tiers: conversations with edits and forks, aborts, preemption, failed steps, restarts,
damaged files. The simulator checks every page and state that is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from jamba_server.engine.types import Request
from tests.engine.simulator import Simulator, random_request
from tests.engine.tiers.simulated import Life

EVENTS = (
    "host",
    "disk",
    "preemptions",
    "aborted",
    "failed",
    "saved",
    "ignored",
    "lives",
    "written",
    "waited",
    "dropped",
)


def sizes(random: Random, *, ahead: bool) -> dict[str, Any]:
    block_size = random.choice((1, 2, 4, 8))
    num_pages = random.randint(24 // block_size + 8, 120 // block_size + 30)
    max_num_seqs = random.randint(1, 5)
    return {
        "ahead": ahead,
        "block_size": block_size,
        "num_pages": num_pages,
        "max_model_len": min((num_pages - 2) * block_size, 60),
        "max_num_seqs": max_num_seqs,
        "num_slots": 1 + max_num_seqs + random.randint(1, 5),
        "interval": block_size * random.choice((1, 2, 4, 16)),
        "max_num_batched_tokens": random.randint(1, 30),
        "host_bytes": random.choice((0, 0, 500, 2000, 10**6)),
        "disk_bytes": random.choice((12_000, 40_000, 10**7)),
    }


def damage(random: Random, root: Path) -> None:
    """Changes, cuts or deletes a random file of the disk tier."""
    files = sorted(root.glob("*/*.safetensors"))
    if not files:
        return
    path = random.choice(files)
    data = bytearray(path.read_bytes())
    match random.randrange(8):
        case 0:
            path.unlink()
            return
        case 1:
            data = data[: random.randrange(len(data))]
        case 2:
            data += b"\0"
        case 3:  # another segment's contents under this name
            data = bytearray(random.choice(files).read_bytes())
        case 4:  # the segment of the same text that another model has computed
            if twins := [file for file in files if len([f for f in files if f.name == file.name]) > 1]:
                path = random.choice(twins)
                data = bytearray(next(f for f in twins if f.name == path.name and f != path).read_bytes())
        case 5 | 6:  # a wrong bit in the pages or the state
            data[random.randrange(len(data) * 4 // 5, len(data))] ^= 1 << random.randrange(8)
        case _:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def run(seed: int, root: Path, *, ahead: bool, num_lives: int = 3, num_requests: int = 12) -> Counter[str]:
    random = Random(seed)
    kept = sizes(random, ahead=ahead)
    on_disk = random.random() < 0.85
    kept["host_bytes"] = kept["host_bytes"] if on_disk else max(kept["host_bytes"], 1000)
    harmful = random.random() < 0.5
    stems = [[random.randrange(5) for _ in range(random.randint(1, kept["max_model_len"]))] for _ in range(3)]
    total: Counter[str] = Counter()
    for number in range(num_lives):
        life = Life(random, root if on_disk else None, model=random.choice((0, 0, 0, 1)), **kept)
        total += live(life, stems, number, num_requests, root if harmful else None)
    return total


def live(life: Life, stems: list[list[int]], number: int, num_requests: int, harmed: Path | None) -> Counter[str]:
    random, scheduler, simulator = life.random, life.scheduler, life.simulator
    max_len = scheduler.max_model_len
    fresh = [random_request(random, number * 1000 + i, stems, max_len) for i in range(num_requests)]
    fresh = [msgspec.structs.replace(r, tenant=random.choice(("", "", "a"))) for r in fresh]
    left: dict[str, Request] = {r.id: r for r in fresh}
    replies = {r.id: list[int]() for r in fresh}
    requests = list(fresh)
    counts: Counter[str] = Counter(lives=1)
    killed = random.random() < 0.3
    while left or simulator.under_way:
        assert simulator.time < 5000, "livelock"
        life.deliver()
        if harmed is not None and random.random() < 0.03:
            damage(random, harmed)
        if fresh and (random.random() < 0.5 or not scheduler.has_work):
            scheduler.add([fresh.pop() for _ in range(min(len(fresh), random.randint(1, 4)))], now=simulator.time)
        if life.worker is not None and life.worker.is_idle:
            assert not any(seq.restoring for seq in scheduler.waiting), "a sequence waits for nothing"
        counts["waited"] += any(seq.restoring for seq in scheduler.waiting)
        if random.random() < 0.02:
            victim = random.choice(requests)
            scheduler.abort([victim.id])
            if victim not in fresh:
                counts["aborted"] += left.pop(victim.id, None) is not None
        if random.random() < 0.01:
            fail(life, left, fresh)
            counts["failed"] += 1
            continue
        for update in simulator.step(lambda _: random.randrange(5)):
            replies[update.request_id] += update.token_ids
            if update.finish_reason:
                request = left.pop(update.request_id)
                # The next turns of this conversation are requests of the same and of later lives.
                stems[random.randrange(3)] = [*request.prompt, *replies[request.id]][:max_len]
        if killed and not fresh and random.random() < 0.05:
            break
    finish(life, simulator, killed)
    stats = scheduler.stats
    assert stats.tiers is not None
    counts["preemptions"] += stats.num_preemptions_total
    counts["host"] += stats.tiers.hits_total["host"]
    counts["disk"] += stats.tiers.hits_total["disk"]
    counts["written"] += stats.tiers.written_segments_total
    counts["dropped"] += stats.tiers.dropped_segments_total
    counts["ignored"] += sum(stats.tiers.ignored_files_total.values())
    counts["saved"] += simulator.num_saved
    return counts


def fail(life: Life, left: dict[str, Request], fresh: list[Request]) -> None:
    """A step fails, which ends the requests that had begun."""
    life.simulator.fail(lambda _: 0, advances=life.random.random() < 0.5)
    still = {seq.request.id for seq in life.scheduler.waiting} | {request.id for request in fresh}
    for request_id in list(left):
        if request_id not in still:
            del left[request_id]


def finish(life: Life, simulator: Simulator, killed: bool) -> None:
    if not killed:
        assert not life.scheduler.has_work
        assert not life.cache.is_restoring
        simulator.finish()
        check_memory(life)
    life.end(killed=killed)


def check_memory(life: Life) -> None:
    """Nothing is counted that is not there, and no budget is exceeded."""
    tiers = life.tiers
    assert tiers.host.num_bytes <= tiers.host.capacity
    host = [tiers.host.get(key) for key in tiers.index]
    assert tiers.host.num_bytes == sum(segment.entry.num_bytes for segment in host if segment is not None)
    assert tiers.num_unconfirmed == 0

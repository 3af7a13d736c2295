"""Random conversations for the real engine: its tokens and log-probabilities must equal those of an engine that caches
nothing, whatever the tiers, restarts, aborts and evictions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from jamba_server.engine.cache.tiers.cache import TieredCache
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import EngineCore
from jamba_server.engine.disk_tier.worker import Worker
from jamba_server.engine.start.build import build_engine
from jamba_server.engine.types import Request, SamplingParams, TokenLogprob

CONFIG = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAX_LEN = 320
TIERS = ("device", "host", "disk", "both")
Result = tuple[list[int], list[TokenLogprob]]


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def engine(model: Path, **settings: Any) -> EngineCore:
    defaults: dict[str, Any] = {"load_format": "dummy", "max_model_len": MAX_LEN, "threads": 1, "max_num_seqs": 3}
    return build_engine(EngineConfig(model=str(model), **defaults | settings))


def tier_settings(kind: str, root: Path, random: Random) -> dict[str, Any]:
    """Options of an engine whose device has room for a few conversations only, and whose tiers may be small too."""
    settings: dict[str, Any] = {
        "kv_cache_memory_bytes": random.choice((40, 60)) * 1024,
        "state_cache_memory_bytes": random.choice((50, 100)) * 1024,
        "max_num_batched_tokens": random.choice((16, 64, 256)),
        "async_scheduling": random.random() < 0.3,
    }
    if kind in ("host", "both"):
        settings["state_cache_host_bytes"] = random.choice((100, 400, 20_000)) * 1024
    if kind in ("disk", "both"):
        settings |= {
            "state_cache_disk_path": str(root),
            "state_cache_disk_bytes": random.choice((300, 3_000, 100_000)) * 1024,
        }
    return settings


class Player:
    """Plays conversations with one kind of engine, several at a time, and restarts the engine now and then."""

    def __init__(self, model: Path, kind: str, root: Path, seed: int) -> None:
        self.random = Random(seed)
        self._model, self._kind, self._root = model, kind, root
        self.counts: Counter[str] = Counter()
        self._number = 0
        self.core = self._start()

    def _start(self) -> EngineCore:
        core = engine(self._model, **tier_settings(self._kind, self._root, self.random))
        cache = core.scheduler.cache
        # Without this wait, the first requests may come before the tier is open, which happens to them in real life.
        if isinstance(cache, TieredCache) and isinstance(cache.tiers.disk, Worker) and self.random.random() < 0.8:
            assert cache.tiers.disk.wait_until_open(30)
        return core

    def restart(self, *, killed: bool) -> None:
        self._count()
        if not killed:
            self.core.close(20.0)
        self.core = self._start()
        self.counts["restarts"] += 1

    def _count(self) -> None:
        stats = self.core.scheduler.stats
        self.counts["preemptions"] += stats.num_preemptions_total
        if stats.tiers is not None:
            self.counts["host"] += stats.tiers.hits_total["host"]
            self.counts["disk"] += stats.tiers.hits_total["disk"]
            self.counts["ignored"] += sum(stats.tiers.ignored_files_total.values())

    def play(self, number: int, cold: Callable[[Request], Result]) -> None:
        """Plays `number` conversations."""
        random = self.random
        stems = [_tokens(random, random.randint(5, 120)) for _ in range(3)]
        histories = [random.choice(stems) + _tokens(random, 3) for _ in range(number)]
        turns = [random.randint(2, 4) for _ in range(number)]
        while any(turns):
            if random.random() < 0.15:
                self.restart(killed=random.random() < 0.3)
            chosen = random.sample([i for i, left in enumerate(turns) if left], min(3, sum(map(bool, turns))))
            requests = {i: self._request(histories, i) for i in chosen}
            aborted = {i for i in chosen if random.random() < 0.1}
            results = self._run(list(requests.values()), {requests[i].id for i in aborted})
            for i in chosen:
                turns[i] -= 1
                request = requests[i]
                if request.id in results:
                    assert results[request.id] == cold(request), f"{self._kind}: {request}"
                    histories[i] = [*request.prompt, *results[request.id][0]]
                    self.counts["turns"] += 1
        self.counts["conversations"] += number
        self._count()
        self.core.close(20.0)

    def _request(self, histories: list[list[int]], i: int) -> Request:
        """The next turn of conversation `i`: it goes on, is edited in the middle, or goes on with another one."""
        random, self._number = self.random, self._number + 1
        history = histories[i]
        match random.randrange(6):
            case 0:
                history = history[: random.randint(1, len(history))]
            case 1:
                history = random.choice(histories)
            case _:
                pass
        prompt = [*history, *_tokens(random, random.randint(1, 30))][: MAX_LEN - 70]
        saves = tuple(sorted({random.randint(1, len(prompt)) for _ in range(2)}))
        params = SamplingParams(
            max_tokens=random.choice((random.randint(1, 12), random.randint(1, 12), 60)),
            temperature=random.choice((0.0, 0.9)),
            seed=random.randrange(3),
            logprobs=2,
            ignore_eos=True,
        )
        return Request(id=f"r{self._number}", prompt=prompt, params=params, save_positions=saves)

    def _run(self, requests: list[Request], aborted: set[str]) -> dict[str, Result]:
        found: dict[str, Result] = {request.id: ([], []) for request in requests}
        left, core = set(found), self.core
        core.inbox.submit(requests)
        while left:
            for update in core.step().updates:
                tokens, logprobs = found[update.request_id]
                tokens += update.token_ids
                logprobs += update.logprobs
                if update.finish_reason:
                    left.discard(update.request_id)
            for request_id in [r for r in aborted & left if self.random.random() < 0.3]:
                core.inbox.abort([request_id])
                left.discard(request_id)
                del found[request_id]
                self.counts["aborted"] += 1
        core.step()
        return found


class Cold:
    """An engine that caches nothing."""

    def __init__(self, model: Path) -> None:
        self._core = engine(model, enable_prefix_caching=False, max_num_batched_tokens=256)

    def __call__(self, request: Request) -> Result:
        self._core.inbox.submit([request])
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        while True:
            for update in self._core.step().updates:
                tokens += update.token_ids
                logprobs += update.logprobs
                if update.finish_reason:
                    return tokens, logprobs


def _tokens(random: Random, count: int) -> list[int]:
    return [random.randrange(3, 300) for _ in range(count)]

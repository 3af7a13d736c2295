"""Feeds a model by hand: the test decides which tokens of which sequences go into a batch, not a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from jamba_server.engine.batch import Decodes, ForwardBatch, PageTables, Prefills
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.models import Model
from jamba_server.kernels.ops import Segments, StateSaves

BLOCK_SIZE = 4
GARBAGE = 7.0  # the number that fills all pages and slots before a sequence writes to them


@dataclass
class Fed:
    """A sequence in the cache: its pages and state slot, and how many tokens it has there."""

    slot: int
    pages: list[int]
    length: int = 0


@dataclass
class Feed:
    """The next tokens of a sequence. `saves` has pairs (n, slot): the state after the first n of these tokens is saved
    in this slot."""

    to: Fed
    ids: Sequence[int]
    saves: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    @property
    def is_decode(self) -> bool:
        return len(self.ids) == 1 and self.to.length > 0 and not self.saves


class Feeder:
    """A model with a cache of scattered pages and slots that hold garbage."""

    def __init__(self, model: Model, *, dtype: torch.dtype = torch.float32, num_pages: int = 64) -> None:
        self.model = model
        self.storage = CacheStorage(
            cache_layout(
                model.config, block_size=BLOCK_SIZE, dtype=str(dtype).removeprefix("torch."), parts=model.parts
            ),
            num_pages=num_pages,
            num_slots=12,
            device=torch.device("cpu"),
        )
        for tensor in (self.storage.kv, self.storage.conv, self.storage.ssm):
            tensor.fill_(GARBAGE)
        self._free_pages = Random(0).sample(range(1, num_pages), num_pages - 1)
        self._free_slots = [5, 2, 9, 1, 7, 4]

    def new_sequence(self) -> Fed:
        return Fed(slot=self._free_slots.pop(), pages=[])

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Runs one forward pass and returns the logits [tokens, V] of each feed."""
        ordered = sorted(feeds, key=lambda feed: not feed.is_decode)
        batch = self._batch(ordered)
        logits = self.model.logits(self.model.forward(batch, self.storage))
        for feed in ordered:
            feed.to.length += len(feed.ids)
        parts = dict(zip(map(id, ordered), logits.split([len(feed.ids) for feed in ordered]), strict=True))
        return [parts[id(feed)] for feed in feeds]

    def _batch(self, feeds: Sequence[Feed]) -> ForwardBatch:
        decodes = [feed for feed in feeds if feed.is_decode]
        prefills = [feed for feed in feeds if not feed.is_decode]
        for feed in feeds:
            while len(feed.to.pages) * BLOCK_SIZE < feed.to.length + len(feed.ids):
                feed.to.pages.append(self._free_pages.pop())
        positions = [(f.to, p) for f in feeds for p in range(f.to.length, f.to.length + len(f.ids))]
        return ForwardBatch(
            token_ids=torch.tensor([token for feed in feeds for token in feed.ids]),
            kv_slots=torch.tensor([fed.pages[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for fed, p in positions]),
            logit_rows=torch.tensor([end - 1 for end in accumulate(len(feed.ids) for feed in feeds)]),
            num_decodes=len(decodes),
            decodes=Decodes(_int32([feed.to.slot for feed in decodes]), _tables(decodes)) if decodes else None,
            prefills=Prefills(_segments(prefills), _tables(prefills)) if prefills else None,
        )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _tables(feeds: list[Feed]) -> PageTables:
    lens = [feed.to.length + len(feed.ids) for feed in feeds]
    width = max(len(feed.to.pages) for feed in feeds)
    rows = [feed.to.pages + [0] * (width - len(feed.to.pages)) for feed in feeds]
    return PageTables(torch.tensor(rows, dtype=torch.int32), _int32(lens), max(lens))


def _segments(feeds: list[Feed]) -> Segments:
    starts = [0, *accumulate(len(feed.ids) for feed in feeds)]
    saves = [(start + done - 1, slot) for start, feed in zip(starts, feeds, strict=False) for done, slot in feed.saves]
    return Segments(
        query_start=_int32(starts),
        max_query_len=max(len(feed.ids) for feed in feeds),
        state_ids=_int32([feed.to.slot for feed in feeds]),
        has_state=torch.tensor([feed.to.length > 0 for feed in feeds]),
        saves=StateSaves(
            start=_int32([0, *accumulate(len(feed.saves) for feed in feeds)]),
            rows=_int32([row for row, _ in saves]),
            slots=_int32([slot for _, slot in saves]),
        ),
    )

"""CacheSpec: what a page, a slot and a saved state weigh. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.engine.cache.layout import CacheLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """Bytes per unit of all layers together."""

    block_size: int
    kv_bytes_per_token: int
    bytes_per_page: int
    bytes_per_slot: int
    bytes_per_saved_state: int

    @classmethod
    def of(cls, layout: CacheLayout) -> CacheSpec:
        page = layout.num_bytes("page")
        return cls(
            block_size=layout.block_size,
            kv_bytes_per_token=page // layout.block_size,
            bytes_per_page=page,
            bytes_per_slot=layout.num_bytes("slot"),
            bytes_per_saved_state=layout.num_bytes("saved"),
        )

    def pages(self, num_tokens: int) -> int:
        """Pages that one sequence of `num_tokens` takes at most: one extra for a partly filled page that is copied."""
        return -(-num_tokens // self.block_size) + 1

    def sequence_bytes(self, num_tokens: int) -> int:
        """Pages and slot of one sequence of `num_tokens`."""
        return self.pages(num_tokens) * self.bytes_per_page + self.bytes_per_slot

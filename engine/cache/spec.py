"""CacheSpec: the sizes in bytes of a page, a slot and a saved state. Works without torch."""

from __future__ import annotations

from dataclasses import dataclass

from jamba_server.engine.cache.layout import CacheLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """The sizes in bytes of a page, a slot and a saved state, summed over all layers. `block_size` is the number of
    tokens in a page."""

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
        """Returns how many pages a sequence of `num_tokens` tokens needs at most. The result includes one extra page:
        after a prefix hit on a partly filled page, the original page stays referenced until it has been copied."""
        return -(-num_tokens // self.block_size) + 1

    def sequence_bytes(self, num_tokens: int) -> int:
        """Returns the size in bytes of the pages and the state slot of a sequence of `num_tokens` tokens."""
        return self.pages(num_tokens) * self.bytes_per_page + self.bytes_per_slot

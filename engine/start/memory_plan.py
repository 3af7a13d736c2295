"""MemoryPlan: divides the memory of the device among weights, forward passes, KV pages and Mamba states. Works without
torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from jamba_server.engine.cache.graph_sizes import GraphSizes, table_bytes
from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.config import PROMPT_LOGITS_ROWS, EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.start.machine import format_bytes
from jamba_server.engine.start.tier_sizes import check_tiers

# The default of max_num_batched_tokens, the largest number of tokens in a step. On a CPU, `step_size` replaces it for
# models that are large enough. On a CPU the number is small, because all sequences that decode wait while a step
# computes a chunk of a new prompt.
DEFAULT_BATCHED_TOKENS = {"cpu": 128, "cuda": 8192}
# The caches get this fraction of the memory that weights and activations do not use. A CPU shares its memory with all
# other programs of the machine. On a GPU, gpu_memory_utilization already leaves room for fragmentation and for
# libraries.
CACHE_SHARE = {"cpu": 0.25, "cuda": 1.0}
# Saved states get this fraction of the cache memory that the slots of running sequences do not use.
SAVED_STATES_SHARE = 0.25
# The least number of saved states with prefix caching: one state after the system prompt, and one state after a reply.
MIN_SAVED_STATES = 2
# The number of extra state slots that hold states until these states are compressed. A prompt saves up to four states
# in a step.
STAGING_SLOTS = 4
# The upper limit of max_num_seqs. GPU kernels use the second or third grid axis for sequences, and CUDA limits these
# axes to this size.
MAX_NUM_SEQS = 65_535
MIN_PAGES = 3  # the dummy page 0, one page for a sequence, and one page as the source of a copy
# Unless memory is short, there are pages for PREFIX_CACHE_FACTOR times as many tokens as the running sequences can
# have, so that the prefix cache can hold as many tokens as the running sequences. On a CPU the caches are smaller,
# because other programs need memory, too. There, each running sequence is counted with CPU_TOKENS_PER_SEQUENCE tokens,
# an average context length, instead of the longest context length. Each running sequence is also counted with one saved
# state for each point where conversations branch or end: after the system prompt, before the last user message, at the
# end of the prompt, and at the end of the answer. A server that runs few sequences at a time may still have many
# conversations in turn, so at least CPU_CONVERSATIONS sequences are counted.
PREFIX_CACHE_FACTOR = 2
CPU_CONVERSATIONS = 16
CPU_TOKENS_PER_SEQUENCE = 1024
CPU_SAVED_STATES_PER_SEQUENCE = 4
# Activations may use this fraction of the memory that the weights do not use. If the activations need more,
# max_num_batched_tokens and max_num_seqs are reduced.
ACTIVATION_SHARE = 0.25
# A stage of a pipeline without attention layers has pages without content, and one without Mamba layers has states
# without content. Its memory does not limit their number. All stages have the smallest number that one of them has.
UNLIMITED = 1 << 20
LOGITS_COPIES = 3  # arrays of the sampler: logits, their log-softmax, and a sorted or masked copy of the logits


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The sizes that the engine allocates. Each of the numbers `num_pages`, `num_slots` and `num_compressed` includes a
    dummy unit with id 0. There are enough pages for one sequence of `max_model_len` tokens, plus one page.
    `table_bytes` is the size of the page tables that stay on a GPU. `num_compressed` is the number of compressed saved
    states; if it is 0, saved states are kept uncompressed in slots.
    `warnings` has a text for each size that is smaller than requested."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int
    num_pages: int
    num_slots: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    state_bytes: int
    num_compressed: int = 0
    graph_bytes: int = 0
    table_bytes: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def num_saved(self) -> int:
        """Returns how many states can be saved while `max_num_seqs` sequences run."""
        return self.num_compressed - 1 if self.num_compressed else self.num_slots - 1 - self.max_num_seqs

    @property
    def total_bytes(self) -> int:
        temporary = self.activation_bytes + self.graph_bytes + self.table_bytes
        return self.weight_bytes + temporary + self.kv_bytes + self.state_bytes


class Measured(NamedTuple):
    """The result of a measurement: dummy steps of up to `max_num_batched_tokens` tokens and up to `max_num_seqs`
    sequences used at most `activation_bytes` bytes of memory in addition to the weights."""

    max_num_batched_tokens: int
    max_num_seqs: int
    activation_bytes: int


def usable_bytes(free: int, total: int, utilization: float) -> int:
    """Returns how many bytes may still be allocated on a GPU until the fraction `utilization` of its memory is in use.
    The GPU has `total` bytes of memory, of which `free` bytes are free now. Memory that other processes use counts as
    used."""
    return max(0, free - (total - int(total * utilization)))


def plan_memory(
    config: JambaConfig,
    engine: EngineConfig,
    layout: CacheLayout,
    *,
    weight_bytes: int,
    available_bytes: int,
    device: str,
    measured: Measured | None = None,
) -> MemoryPlan:
    """Fits the sizes that `engine` requests into `available_bytes` of memory on `device` ("cpu" or "cuda"). The size of
    the memory for activations is taken from `measured`, or estimated if `measured` is None. `layout` gives the sizes of
    KV pages and states.

    Raises ConfigError if the weights do not fit, or if the remaining memory is too small for a sequence of one page and
    its state.
    """
    check_sizes(engine)
    if (free := available_bytes - weight_bytes) <= 0:
        raise ConfigError(
            f"The weights need {format_bytes(weight_bytes)} ({weight_bytes} bytes), but this {device} device has "
            f"{format_bytes(available_bytes)} ({available_bytes} bytes) available"
            + (f" within gpu_memory_utilization {engine.gpu_memory_utilization}." if device == "cuda" else ".")
        )
    return _Planner(config, engine, CacheSpec.of(layout), device, measured).plan(weight_bytes, free)


def check_sizes(engine: EngineConfig) -> None:
    """Raises ConfigError if a size is out of its range, or if compressed saved states are combined with an option that
    they do not support."""
    tokens = ("max_num_batched_tokens", "max_num_mixed_tokens")
    names = ("max_model_len", "max_num_seqs", *tokens, "max_step_ms", "block_size", "threads")
    for name, least in (*((name, 1) for name in names), ("state_cache_memory_bytes", 0)):
        value = getattr(engine, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}.")
    most, mixed = engine.max_num_batched_tokens, engine.max_num_mixed_tokens
    if most is not None and mixed is not None and mixed > most:
        raise ConfigError(f"max_num_mixed_tokens is {mixed}; it must be at most max_num_batched_tokens, {most}.")
    if engine.max_num_seqs > MAX_NUM_SEQS:
        raise ConfigError(f"max_num_seqs is {engine.max_num_seqs}; it must be at most {MAX_NUM_SEQS}.")
    if not 0 < engine.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"gpu_memory_utilization is {engine.gpu_memory_utilization}; it must be more than 0 and at most 1."
        )
    if engine.state_cache_dtype == "int8" and engine.batch_invariant:
        raise ConfigError(
            "batch_invariant and state_cache_dtype 'int8' exclude each other: a prefix hit would continue from a "
            "rounded state, which is not exact."
        )
    if engine.state_cache_dtype == "int8" and not engine.enable_prefix_caching:
        raise ConfigError("state_cache_dtype 'int8' compresses the prefix cache, so it needs enable_prefix_caching.")
    check_tiers(engine)


def activation_bytes(config: JambaConfig, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Returns an estimate, in bytes, of the largest amount of memory that a forward pass and the sampler use at one
    time. Every number is counted as four bytes, whatever its dtype."""
    per_token, fixed = _activation_terms(config, max_num_seqs)
    return fixed + per_token * (max_num_batched_tokens + max_num_seqs)


def bytes_per_row(config: JambaConfig) -> int:
    """Returns an estimate of the bytes that a forward pass needs for each token."""
    return _activation_terms(config, 0)[0]


def _activation_terms(config: JambaConfig, max_num_seqs: int) -> tuple[int, int]:
    """Returns (bytes for each token of the batch, bytes for each forward pass). The first number is the size of the
    residual stream plus the size of the activations of one layer, of the kind whose activations are largest. The second
    number is the size of the logits and of their copies."""
    h, d, f = config.hidden_size, config.d_inner, config.intermediate_size
    k = config.num_experts_per_tok if config.num_experts > 1 else 1
    mamba = 6 * d  # counts in_proj's output (2 * d), the convolution's output, dt, y, and y times its gate
    feed_forward = k * (3 * f + h)  # counts gate, up, gate * up and the output, for each of the k experts of a token
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    rows = max(max_num_seqs, PROMPT_LOGITS_ROWS)
    return 4 * (4 * h + max(mamba, feed_forward, attention)), 4 * LOGITS_COPIES * rows * config.vocab_size


class _Planner:
    """Makes one memory plan. Decides the sizes in this order: the batch, the slots of running sequences, the saved
    states, the KV pages, and the longest context."""

    def __init__(
        self, config: JambaConfig, engine: EngineConfig, spec: CacheSpec, device: str, measured: Measured | None
    ) -> None:
        self.config, self.engine, self.spec, self.device, self.measured = config, engine, spec, device, measured
        self.compresses = engine.state_cache_dtype != "auto"
        # Slot 0 is a dummy, and staging slots hold states that wait to be compressed. No sequence runs in these slots.
        self.fixed_slots = 1 + (STAGING_SLOTS if self.compresses else 0)
        self.warnings: list[str] = []

    def plan(self, weight_bytes: int, free: int) -> MemoryPlan:
        """Returns the plan. `free` is the number of bytes that are available in addition to the weights."""
        max_model_len = self._requested_model_len()
        batched, max_num_seqs = self._batch(free)
        activations = activation_bytes(self.config, max_num_batched_tokens=batched, max_num_seqs=max_num_seqs)
        activations = activations if self.measured is None else self.measured.activation_bytes
        graphs = self._graph_bytes(max_num_seqs, max_model_len)
        tables = table_bytes(max_num_seqs, max_model_len, self.spec.block_size) if self.device == "cuda" else 0
        limit = max(free - activations - graphs - tables, 0)
        explicit = self.engine.kv_cache_memory_bytes
        budget = limit if explicit is not None else int(limit * CACHE_SHARE[self.device])
        self._check_minimum(budget, weight_bytes, activations + graphs + tables, limit)
        max_num_seqs = self._running_slots(max_num_seqs, budget)
        num_slots = self.fixed_slots + max_num_seqs
        rest = budget - num_slots * self.spec.bytes_per_slot - self.compresses * self.spec.bytes_per_saved_state
        saved = self._saved_states(max_num_seqs, rest, self.spec.pages(max_model_len) + 1)
        num_slots, num_compressed = (num_slots, saved + 1) if self.compresses else (num_slots + saved, 0)
        state_bytes = num_slots * self.spec.bytes_per_slot + num_compressed * self.spec.bytes_per_saved_state
        num_pages = self._pages(budget - state_bytes, max_num_seqs, max_model_len)
        fits = (num_pages - 2) * self.spec.block_size
        return MemoryPlan(
            max_model_len=self._at_most("max_model_len", max_model_len, fits, "the KV pages hold no more"),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=batched,
            max_num_mixed_tokens=min(self.engine.max_num_mixed_tokens or batched, batched),
            num_pages=num_pages,
            num_slots=num_slots,
            num_compressed=num_compressed,
            weight_bytes=weight_bytes,
            activation_bytes=activations,
            kv_bytes=num_pages * self.spec.bytes_per_page,
            state_bytes=state_bytes,
            graph_bytes=graphs,
            table_bytes=tables,
            warnings=tuple(self.warnings),
        )

    def _at_most(self, name: str, requested: int, limit: int, reason: str) -> int:
        """Returns the smaller of `requested` and `limit`. Adds a warning if `limit` is smaller than `requested`."""
        if requested <= limit:
            return requested
        self.warnings.append(f"{name} {requested} is reduced to {limit}: {reason}")
        return limit

    def _requested_model_len(self) -> int:
        trained = self.config.max_position_embeddings
        requested = trained if self.engine.max_model_len is None else self.engine.max_model_len
        return self._at_most("max_model_len", requested, trained, "the model's max_position_embeddings is the limit")

    def _batch(self, free: int) -> tuple[int, int]:
        """Returns max_num_batched_tokens and max_num_seqs: the requested numbers, or smaller ones if the activations
        would not fit into memory."""
        requested, reason = self.engine.max_num_batched_tokens, "the memory for activations is limited"
        requested = DEFAULT_BATCHED_TOKENS[self.device] if requested is None else requested
        if self.measured is None:
            per_token, fixed = _activation_terms(self.config, self.engine.max_num_seqs)
            room = max(int(free * ACTIVATION_SHARE) - fixed, 0) // per_token
            # A batch of fewer than `block_size` tokens would save hardly any memory. If a batch of `block_size` tokens
            # does not fit either, the method `_check_minimum` raises ConfigError.
            most = max(room // 2, self.spec.block_size)
            seqs = self._at_most("max_num_seqs", self.engine.max_num_seqs, most, reason)
            tokens = max(room - seqs, self.spec.block_size)
        else:
            tokens, most, _ = self.measured
            seqs = self._at_most("max_num_seqs", self.engine.max_num_seqs, most, reason)
        return self._at_most("max_num_batched_tokens", requested, tokens, reason), seqs

    def _graph_bytes(self, max_num_seqs: int, max_model_len: int) -> int:
        """Returns how many bytes all CUDA graphs together may need."""
        if self.device == "cpu" or self.engine.enforce_eager:
            return 0
        per_row, _ = _activation_terms(self.config, max_num_seqs)
        return GraphSizes(max_num_seqs, max_model_len, self.device).graph_bytes(per_row)

    def _check_minimum(self, budget: int, weight_bytes: int, activations: int, limit: int) -> None:
        saved = MIN_SAVED_STATES if self.engine.enable_prefix_caching else 0
        saved += self.compresses  # adds the dummy 0 of the pool of compressed saved states
        pages = MIN_PAGES * self.spec.bytes_per_page
        explicit = self.engine.kv_cache_memory_bytes
        if explicit is not None and explicit < pages:
            raise ConfigError(
                f"kv_cache_memory_bytes is {explicit}; it must be at least {pages}, the bytes of {MIN_PAGES} pages."
            )
        # The slots of running sequences are allowed to use one half of the cache memory; saved states and KV pages use
        # the other half of the cache memory.
        slots = (self.fixed_slots + 1) * self.spec.bytes_per_slot
        needed = 2 * max(slots, saved * self.spec.bytes_per_saved_state + pages)
        if budget < needed:
            raise ConfigError(
                f"No room for a cache on this {self.device} device: beside {format_bytes(weight_bytes)} of weights and "
                f"{format_bytes(activations)} of activations {format_bytes(limit)} are left, of which caches may take "
                f"{format_bytes(budget)}; the smallest cache takes {format_bytes(needed)} ({needed} bytes)."
            )

    def _running_slots(self, requested: int, budget: int) -> int:
        size = self.spec.bytes_per_slot
        half = _units(budget // 2, size) - self.fixed_slots
        reason = f"a sequence's state needs {format_bytes(size)}, and states may use half of the cache memory"
        return self._at_most("max_num_seqs", requested, half, reason)

    def _saved_states(self, max_num_seqs: int, rest: int, longest: int) -> int:
        """Returns how many saved states to allocate. `rest` is the cache memory, in bytes, that remains after the slots
        of running sequences. `longest` is the number of KV pages of the longest context: if the user requests more
        memory for saved states than the default share, that many pages must still fit."""
        if not self.engine.enable_prefix_caching:
            return 0
        size, page = self.spec.bytes_per_saved_state, self.spec.bytes_per_page
        requested, explicit_kv = self.engine.state_cache_memory_bytes, self.engine.kv_cache_memory_bytes
        share = min(int(rest * SAVED_STATES_SHARE), rest - MIN_PAGES * page)
        if requested is not None:
            most = max(share, rest - min(longest * page, explicit_kv or rest))
            fits = self._at_most("state_cache_memory_bytes", requested, most, "the cache memory is limited")
            return max(_units(fits, size), MIN_SAVED_STATES)
        # If the user sets the size of the memory for KV pages, saved states get at most a third of this size. This is a
        # quarter of the memory of saved states and KV pages together.
        if explicit_kv is not None:
            share = min(share, explicit_kv // 3)
        count = _units(share, size)
        if self.device == "cpu":
            count = min(count, CPU_SAVED_STATES_PER_SEQUENCE * max(max_num_seqs, CPU_CONVERSATIONS))
        return max(count, MIN_SAVED_STATES)

    def _pages(self, room: int, max_num_seqs: int, max_model_len: int) -> int:
        """Returns the number of KV pages, including the dummy page 0. `room` is the cache memory, in bytes, that
        remains after slots and saved states."""
        spec, explicit = self.spec, self.engine.kv_cache_memory_bytes
        if explicit is not None:
            fits = self._at_most("kv_cache_memory_bytes", explicit, room, "the available memory is limited")
            return _units(fits, spec.bytes_per_page)
        running = max_num_seqs * spec.pages(max_model_len)
        if self.device == "cpu":
            average, longest = spec.pages(CPU_TOKENS_PER_SEQUENCE), spec.pages(max_model_len)
            conversations = max(max_num_seqs, CPU_CONVERSATIONS)
            running = min(conversations * longest, max(conversations * average, longest))
        return min(_units(room, spec.bytes_per_page), 1 + PREFIX_CACHE_FACTOR * running)


def smallest_plan(plan: MemoryPlan, smallest: Callable[[list[int]], list[int]]) -> MemoryPlan:
    """Returns the plan of a rank with the sizes that all ranks can have. `smallest` takes the sizes of this rank, and
    returns the smallest of all ranks. The memory that the result counts is that of this rank."""
    names = (
        *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_mixed_tokens"),
        *("num_pages", "num_slots", "num_compressed"),
    )
    sizes = dict(zip(names, smallest([getattr(plan, name) for name in names]), strict=True))
    state_bytes = plan.state_bytes * (sizes["num_slots"] + sizes["num_compressed"])
    return replace(
        plan,
        **sizes,
        kv_bytes=plan.kv_bytes // plan.num_pages * sizes["num_pages"],
        state_bytes=state_bytes // (plan.num_slots + plan.num_compressed),
    )


def _units(room: int, size: int) -> int:
    """Returns how many units of `size` bytes fit into `room` bytes."""
    return room // size if size else UNLIMITED

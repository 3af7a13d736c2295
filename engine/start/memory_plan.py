"""MemoryPlan: divides the memory of the device among weights, forward passes, KV pages and states. Works without
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jamba_server.engine.cache.graph_sizes import GraphSizes
from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.config import PROMPT_LOGITS_ROWS, EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.start.machine import format_bytes

# The default number of prompt tokens in a step. On a CPU it is small: running replies wait while a step computes a
# chunk of a new prompt, and the first of several prompts waits for the others in its step. Steps of 512 tokens would
# prefill 5 % faster for 3 billion parameters, 13 % faster with 16 experts, and 30 % faster for 0.1 billion parameters.
DEFAULT_BATCHED_TOKENS = {"cpu": 128, "cuda": 8192}
# The share of the caches in the memory that weights and activations leave. A CPU shares its memory with all other
# programs of the machine. On a GPU gpu_memory_utilization already leaves room for fragmentation and for libraries.
CACHE_SHARE = {"cpu": 0.25, "cuda": 1.0}
SAVED_STATES_SHARE = 0.25  # saved states get this share of the cache memory that remains after the running slots
MIN_SAVED_STATES = 2  # prefix caching needs at least one for the end of a system prompt and one for that of a reply
STAGING_SLOTS = 4  # so many extra slots hold states until they are compressed; a prompt saves as many in a step
MAX_NUM_SEQS = 65_535  # GPU kernels count sequences on the second or third axis of their grid, and CUDA limits these
MIN_PAGES = 3  # these are the dummy page 0, one page for a sequence, and one page as the source of a copy
# Pages are allocated for twice as many tokens as can run at once, so that the prefix cache holds as many again. On a
# CPU prefill is slow and other programs need memory, too, so each running sequence counts with an average context, and
# with one saved state for each point where conversations branch or end: after the system prompt, before the last user
# message, at the end of the prompt, and at the end of the answer.
PREFIX_CACHE_FACTOR = 2
CPU_TOKENS_PER_SEQUENCE = 1024
CPU_SAVED_STATES_PER_SEQUENCE = 4
ACTIVATION_SHARE = 0.25  # activations may use this share of the memory beside the weights, or batches become smaller
LOGITS_COPIES = 3  # the sampler holds the logits, their log-softmax, and one sorted or masked copy


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The sizes that the engine allocates. `num_pages`, `num_slots` and `num_compressed` include the dummy unit 0. The
    pages hold one sequence of `max_model_len` tokens and one page more. `num_compressed` is the number of compressed
    saved states; if it is 0, saved states lie in slots. `warnings` has a text for each size that is smaller than
    requested."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    num_slots: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    state_bytes: int
    num_compressed: int = 0
    graph_bytes: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def num_saved(self) -> int:
        """Returns how many states can be saved while `max_num_seqs` sequences run."""
        return self.num_compressed - 1 if self.num_compressed else self.num_slots - 1 - self.max_num_seqs

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.graph_bytes + self.kv_bytes + self.state_bytes


class Measured(NamedTuple):
    """A measurement: steps of these sizes used at most `activation_bytes` of memory beside the weights."""

    max_num_batched_tokens: int
    max_num_seqs: int
    activation_bytes: int


def usable_bytes(free: int, total: int, utilization: float) -> int:
    """Returns how many bytes may still be allocated on a GPU with `total` bytes, of which `free` are free now, until
    the fraction `utilization` of the GPU is in use. Memory that other processes use counts as used."""
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
    """Fits the requested sizes in `engine` into `available_bytes` of `device` ("cpu" or "cuda"). The memory for
    activations is `measured`, or estimated if there is no measurement yet. `layout` has the sizes of the caches.

    Raises ConfigError if the weights do not fit, or nothing remains for a sequence of one page and its state.
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
    """Raises ConfigError for a size out of its range, and for compressed saved states together with an option that
    excludes them."""
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "threads")
    for name, least in (*((name, 1) for name in names), ("state_cache_memory_bytes", 0)):
        value = getattr(engine, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}.")
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


def activation_bytes(config: JambaConfig, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Returns an estimate of the most memory that a forward pass and the sampler use at one time. It counts four bytes
    for every number."""
    per_token, fixed = _activation_terms(config, max_num_seqs)
    return fixed + per_token * (max_num_batched_tokens + max_num_seqs)


def _activation_terms(config: JambaConfig, max_num_seqs: int) -> tuple[int, int]:
    """Returns (bytes per token of the batch, bytes per forward pass). The first are for the residual stream and the
    kind of layer with the largest activations, the second for the logits."""
    h, d, f = config.hidden_size, config.d_inner, config.intermediate_size
    k = config.num_experts_per_tok if config.num_experts > 1 else 1
    mamba = 6 * d  # counts both halves of in_proj's output, the convolution's output, dt, y, and y times its gate
    feed_forward = k * (3 * f + h)  # counts gate, up, their product and the output, for each of a token's k experts
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    rows = max(max_num_seqs, PROMPT_LOGITS_ROWS)
    return 4 * (4 * h + max(mamba, feed_forward, attention)), 4 * LOGITS_COPIES * rows * config.vocab_size


class _Planner:
    """Makes one plan. It decides the sizes in this order: batch, slots of running sequences, saved states, pages, and
    the longest context."""

    def __init__(
        self, config: JambaConfig, engine: EngineConfig, spec: CacheSpec, device: str, measured: Measured | None
    ) -> None:
        self.config, self.engine, self.spec, self.device, self.measured = config, engine, spec, device, measured
        self.compresses = engine.state_cache_dtype != "auto"
        # No sequence runs in the dummy slot 0 and in the staging slots.
        self.fixed_slots = 1 + (STAGING_SLOTS if self.compresses else 0)
        self.warnings: list[str] = []

    def plan(self, weight_bytes: int, free: int) -> MemoryPlan:
        """Returns the plan. `free` is the available memory beside the weights in bytes."""
        max_model_len = self._requested_model_len()
        batched, max_num_seqs = self._batch(free)
        activations = activation_bytes(self.config, max_num_batched_tokens=batched, max_num_seqs=max_num_seqs)
        activations = activations if self.measured is None else self.measured.activation_bytes
        graphs = self._graph_bytes(max_num_seqs, max_model_len)
        limit = max(free - activations - graphs, 0)
        explicit = self.engine.kv_cache_memory_bytes
        budget = limit if explicit is not None else int(limit * CACHE_SHARE[self.device])
        self._check_minimum(budget, weight_bytes, activations + graphs, limit)
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
            num_pages=num_pages,
            num_slots=num_slots,
            num_compressed=num_compressed,
            weight_bytes=weight_bytes,
            activation_bytes=activations,
            kv_bytes=num_pages * self.spec.bytes_per_page,
            state_bytes=state_bytes,
            graph_bytes=graphs,
            warnings=tuple(self.warnings),
        )

    def _at_most(self, name: str, requested: int, limit: int, reason: str) -> int:
        """Returns the smaller of `requested` and `limit`. Adds a warning if that is less than requested."""
        if requested <= limit:
            return requested
        self.warnings.append(f"{name} {requested} is reduced to {limit}: {reason}")
        return limit

    def _requested_model_len(self) -> int:
        trained = self.config.max_position_embeddings
        requested = trained if self.engine.max_model_len is None else self.engine.max_model_len
        return self._at_most("max_model_len", requested, trained, "the model's max_position_embeddings is the limit")

    def _batch(self, free: int) -> tuple[int, int]:
        """Returns max_num_batched_tokens and max_num_seqs: the requested sizes, or less if activations do not fit."""
        requested, reason = self.engine.max_num_batched_tokens, "the memory for activations is limited"
        requested = DEFAULT_BATCHED_TOKENS[self.device] if requested is None else requested
        if self.measured is None:
            per_token, fixed = _activation_terms(self.config, self.engine.max_num_seqs)
            room = max(int(free * ACTIVATION_SHARE) - fixed, 0) // per_token
            # A batch of less than `block_size` tokens saves hardly any memory. If that does not fit either,
            # `_check_minimum` raises the error.
            most = max(room // 2, self.spec.block_size)
            seqs = self._at_most("max_num_seqs", self.engine.max_num_seqs, most, reason)
            tokens = max(room - seqs, self.spec.block_size)
        else:
            tokens, most, _ = self.measured
            seqs = self._at_most("max_num_seqs", self.engine.max_num_seqs, most, reason)
        return self._at_most("max_num_batched_tokens", requested, tokens, reason), seqs

    def _graph_bytes(self, max_num_seqs: int, max_model_len: int) -> int:
        """Returns the bytes that all CUDA graphs may need."""
        if self.device == "cpu" or self.engine.enforce_eager:
            return 0
        per_row, _ = _activation_terms(self.config, max_num_seqs)
        return GraphSizes(max_num_seqs, max_model_len, self.device).graph_bytes(per_row)

    def _check_minimum(self, budget: int, weight_bytes: int, activations: int, limit: int) -> None:
        saved = MIN_SAVED_STATES if self.engine.enable_prefix_caching else 0
        saved += self.compresses  # adds the dummy 0 of the pool of compressed states
        pages = MIN_PAGES * self.spec.bytes_per_page
        explicit = self.engine.kv_cache_memory_bytes
        if explicit is not None and explicit < pages:
            raise ConfigError(
                f"kv_cache_memory_bytes is {explicit}; it must be at least {pages}, the bytes of {MIN_PAGES} pages."
            )
        # Slots may use one half of the cache memory; saved states and pages have the other half.
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
        half = budget // 2 // size - self.fixed_slots
        reason = f"a sequence's state needs {format_bytes(size)}, and states may use half of the cache memory"
        return self._at_most("max_num_seqs", requested, half, reason)

    def _saved_states(self, max_num_seqs: int, rest: int, longest: int) -> int:
        """Returns how many states can be saved. `rest` is the cache memory that remains after the running slots, in
        bytes. `longest` is the number of pages of the longest context: a request for more than the usual share of saved
        states must leave room for them."""
        if not self.engine.enable_prefix_caching:
            return 0
        size, page = self.spec.bytes_per_saved_state, self.spec.bytes_per_page
        requested, explicit_kv = self.engine.state_cache_memory_bytes, self.engine.kv_cache_memory_bytes
        share = min(int(rest * SAVED_STATES_SHARE), rest - MIN_PAGES * page)
        if requested is not None:
            most = max(share, rest - min(longest * page, explicit_kv or rest))
            fits = self._at_most("state_cache_memory_bytes", requested, most, "the cache memory is limited")
            return max(fits // size, MIN_SAVED_STATES)
        if explicit_kv is not None:  # saved states get a quarter of the memory that they and the pages use together
            share = min(share, explicit_kv // 3)
        count = share // size
        if self.device == "cpu":
            count = min(count, CPU_SAVED_STATES_PER_SEQUENCE * max_num_seqs)
        return max(count, MIN_SAVED_STATES)

    def _pages(self, room: int, max_num_seqs: int, max_model_len: int) -> int:
        """Returns the number of pages, the dummy included. `room` is the cache memory that remains after slots and
        saved states, in bytes."""
        spec, explicit = self.spec, self.engine.kv_cache_memory_bytes
        if explicit is not None:
            fits = self._at_most("kv_cache_memory_bytes", explicit, room, "the available memory is limited")
            return fits // spec.bytes_per_page
        running = max_num_seqs * spec.pages(max_model_len)
        if self.device == "cpu":
            average = spec.pages(CPU_TOKENS_PER_SEQUENCE)
            running = min(running, max(max_num_seqs * average, spec.pages(max_model_len)))
        return min(room // spec.bytes_per_page, 1 + PREFIX_CACHE_FACTOR * running)

"""MemoryPlan: how the memory of the device is shared out among weights, forward passes, pages and states. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jamba_server.engine.cache.graph_sizes import GraphSizes
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.config import PROMPT_LOGITS_ROWS, EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.start.machine import format_bytes

# On a CPU what is running waits for every step of a new prompt, and the first of a burst of prompts for the others in
# its step. Steps of 512 prefill 5 % faster for 3 billion parameters, 13 % with 16 experts, 30 % with 0.1 billion.
DEFAULT_BATCHED_TOKENS = {"cpu": 128, "cuda": 8192}
# Of the memory that weights and activations leave. A CPU shares its memory with everybody else on the machine; of a
# GPU's, gpu_memory_utilization has left out a part for fragmentation and the workspaces of libraries.
CACHE_SHARE = {"cpu": 0.25, "cuda": 1.0}
SAVED_STATES_SHARE = 0.25  # of the cache memory that running slots leave
MIN_SAVED_STATES = 2  # with prefix caching on: a system prompt's end and a conversation's end
STAGING_SLOTS = 4  # through which states are compressed while all sequences run: what a prompt saves in one step
MAX_NUM_SEQS = 65_535  # GPU kernels have sequences on their grid's second and third axis, which goes no further
MIN_PAGES = 3  # the dummy, one block, and one to spare
# Pages are kept for as many tokens again as can run at once. On a CPU, where prefill is slow and memory is others' too,
# an average context is assumed for each running sequence, and a state for each of the places where conversations branch
# or end: after the system prompt, before the last user message, at the prompt's end, at the answer's end.
PREFIX_CACHE_FACTOR = 2
CPU_TOKENS_PER_SEQUENCE = 1024
CPU_SAVED_STATES_PER_SEQUENCE = 4
ACTIVATION_SHARE = 0.25  # at most, of the memory that weights leave; else batches become smaller
LOGITS_COPIES = 3  # logits, their log-softmax, and one sorted or masked copy


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the engine allocates. `num_pages`, `num_slots` and `num_compressed` include the dummy unit 0; one sequence
    of `max_model_len` fits into the pages with one to spare. `num_compressed` are compressed; 0: saved states lie in
    slots. `warnings`: one for each size that became smaller than its wish."""

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
        """States that can be saved while all sequences run."""
        return self.num_compressed - 1 if self.num_compressed else self.num_slots - 1 - self.max_num_seqs

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.graph_bytes + self.kv_bytes + self.state_bytes


class Measured(NamedTuple):
    """What steps of so many prompt tokens and sequences took at their peak beside the weights."""

    max_num_batched_tokens: int
    max_num_seqs: int
    activation_bytes: int


def usable_bytes(free: int, total: int, utilization: float) -> int:
    """Of a GPU with `total` bytes, `free` of them now: what is left to take until `utilization` of it is in use,
    whoever uses it."""
    return max(0, free - (total - int(total * utilization)))


def plan_memory(
    config: JambaConfig,
    engine: EngineConfig,
    *,
    dtype_bytes: int,
    weight_bytes: int,
    available_bytes: int,
    device: str,
    measured: Measured | None = None,
) -> MemoryPlan:
    """Fits the sizes of `engine` into `available_bytes` of `device` ("cpu" or "cuda"), by what steps have taken there
    or, before that is measured, by an estimate.

    Raises ConfigError where even the weights, or a context of one block with its state, do not fit.
    """
    check_sizes(engine)
    if (free := available_bytes - weight_bytes) <= 0:
        raise ConfigError(
            f"The weights need {format_bytes(weight_bytes)} ({weight_bytes} bytes), but this {device} device has "
            f"{format_bytes(available_bytes)} ({available_bytes} bytes) available"
            + (f" within gpu_memory_utilization {engine.gpu_memory_utilization}." if device == "cuda" else ".")
        )
    spec = CacheSpec.wanted(config, engine, dtype_bytes=dtype_bytes)
    return _Planner(config, engine, spec, device, measured).plan(weight_bytes, free)


def check_sizes(engine: EngineConfig) -> None:
    """Raises ConfigError for a size that means nothing, and for a kind of saved state that others rule out."""
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
            "batch_invariant and state_cache_dtype 'int8' exclude each other: hits on rounded states are not exact."
        )
    if engine.state_cache_dtype == "int8" and not engine.enable_prefix_caching:
        raise ConfigError("state_cache_dtype 'int8' is of the prefix cache: it needs enable_prefix_caching.")


def activation_bytes(config: JambaConfig, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """An estimate of what a forward pass and the sampler hold at their peak, every number in float32."""
    per_token, fixed = _activation_terms(config, max_num_seqs)
    return fixed + per_token * (max_num_batched_tokens + max_num_seqs)


def _activation_terms(config: JambaConfig, max_num_seqs: int) -> tuple[int, int]:
    """(bytes per batched token, bytes per pass): the widest of the three kinds of layer beside the residual stream, and
    the logits."""
    h, d, f = config.hidden_size, config.d_inner, config.intermediate_size
    k = config.num_experts_per_tok if config.num_experts > 1 else 1
    mamba = 6 * d  # both halves of in_proj, the convolution's output, dt, y, and y gated
    feed_forward = k * (3 * f + h)  # gate, up, their product, and the output, for each of k experts
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    rows = max(max_num_seqs, PROMPT_LOGITS_ROWS)
    return 4 * (4 * h + max(mamba, feed_forward, attention)), 4 * LOGITS_COPIES * rows * config.vocab_size


class _Planner:
    """One plan in the making: batch first, then running slots, then checkpoints, then pages, then the context."""

    def __init__(
        self, config: JambaConfig, engine: EngineConfig, spec: CacheSpec, device: str, measured: Measured | None
    ) -> None:
        self.config, self.engine, self.spec, self.device, self.measured = config, engine, spec, device, measured
        self.compresses = engine.state_cache_dtype != "auto"
        self.fixed_slots = 1 + (STAGING_SLOTS if self.compresses else 0)  # the dummy, and those of no sequence
        self.warnings: list[str] = []

    def plan(self, weight_bytes: int, free: int) -> MemoryPlan:
        """`free`: bytes that the weights leave."""
        max_model_len = self._wished_model_len()
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
            max_model_len=self._at_most("max_model_len", max_model_len, fits, "what the KV pages hold"),
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

    def _at_most(self, name: str, wish: int, limit: int, reason: str) -> int:
        """The smaller of `wish` and `limit`, with a warning where that is not the wish."""
        if wish <= limit:
            return wish
        self.warnings.append(f"{name} {wish} is reduced to {limit}: {reason}")
        return limit

    def _wished_model_len(self) -> int:
        trained = self.config.max_position_embeddings
        wish = trained if self.engine.max_model_len is None else self.engine.max_model_len
        return self._at_most("max_model_len", wish, trained, "the model's max_position_embeddings")

    def _batch(self, free: int) -> tuple[int, int]:
        """max_num_batched_tokens and max_num_seqs, as the memory for activations allows."""
        wish, reason = self.engine.max_num_batched_tokens, "the memory for activations"
        wish = DEFAULT_BATCHED_TOKENS[self.device] if wish is None else wish
        if self.measured is None:
            per_token, fixed = _activation_terms(self.config, self.engine.max_num_seqs)
            room = max(int(free * ACTIVATION_SHARE) - fixed, 0) // per_token
            # below a block a batch hardly gets cheaper; what does not fit then is found by `_check_minimum`
            most = max(room // 2, self.spec.block_size)
            seqs = self._at_most("max_num_seqs", self.engine.max_num_seqs, most, reason)
            tokens = max(room - seqs, self.spec.block_size)
        else:
            tokens, most, _ = self.measured
            seqs = self._at_most("max_num_seqs", self.engine.max_num_seqs, most, reason)
        return self._at_most("max_num_batched_tokens", wish, tokens, reason), seqs

    def _graph_bytes(self, max_num_seqs: int, max_model_len: int) -> int:
        """What CUDA graphs may take."""
        if self.device == "cpu" or self.engine.enforce_eager:
            return 0
        per_row, _ = _activation_terms(self.config, max_num_seqs)
        return GraphSizes(max_num_seqs, max_model_len, self.device).graph_bytes(per_row)

    def _check_minimum(self, budget: int, weight_bytes: int, activations: int, limit: int) -> None:
        saved = (MIN_SAVED_STATES if self.engine.enable_prefix_caching else 0) + self.compresses  # and their dummy
        pages = MIN_PAGES * self.spec.bytes_per_page
        explicit = self.engine.kv_cache_memory_bytes
        if explicit is not None and explicit < pages:
            raise ConfigError(f"kv_cache_memory_bytes is {explicit}; {MIN_PAGES} pages, the least, take {pages} bytes.")
        # one half for the slots, of one sequence and of none; the other half for everything else
        slots = (self.fixed_slots + 1) * self.spec.bytes_per_slot
        needed = 2 * max(slots, saved * self.spec.bytes_per_saved_state + pages)
        if budget < needed:
            raise ConfigError(
                f"No room for a cache on this {self.device} device: beside {format_bytes(weight_bytes)} of weights and "
                f"{format_bytes(activations)} of activations {format_bytes(limit)} are left, of which caches may take "
                f"{format_bytes(budget)}; the smallest cache takes {format_bytes(needed)} ({needed} bytes)."
            )

    def _running_slots(self, wish: int, budget: int) -> int:
        size = self.spec.bytes_per_slot
        half = budget // 2 // size - self.fixed_slots
        return self._at_most(
            "max_num_seqs", wish, half, f"a state takes {format_bytes(size)}, and half of the cache memory"
        )

    def _saved_states(self, max_num_seqs: int, rest: int, longest: int) -> int:
        """How many states can be saved. `rest`: bytes that other slots leave. `longest`: pages of the longest context,
        which goes before a wish for more than the usual share."""
        if not self.engine.enable_prefix_caching:
            return 0
        size, page = self.spec.bytes_per_saved_state, self.spec.bytes_per_page
        wish, explicit_kv = self.engine.state_cache_memory_bytes, self.engine.kv_cache_memory_bytes
        share = min(int(rest * SAVED_STATES_SHARE), rest - MIN_PAGES * page)
        if wish is not None:
            most = max(share, rest - min(longest * page, explicit_kv or rest))
            return max(
                self._at_most("state_cache_memory_bytes", wish, most, "the cache memory") // size, MIN_SAVED_STATES
            )
        if explicit_kv is not None:  # a quarter of what checkpoints and pages take together
            share = min(share, explicit_kv // 3)
        count = share // size
        if self.device == "cpu":
            count = min(count, CPU_SAVED_STATES_PER_SEQUENCE * max_num_seqs)
        return max(count, MIN_SAVED_STATES)

    def _pages(self, room: int, max_num_seqs: int, max_model_len: int) -> int:
        """Pages with the dummy. `room`: bytes that the slots leave."""
        spec, explicit = self.spec, self.engine.kv_cache_memory_bytes
        if explicit is not None:
            return self._at_most("kv_cache_memory_bytes", explicit, room, "memory") // spec.bytes_per_page
        running = max_num_seqs * spec.pages(max_model_len)
        if self.device == "cpu":
            average = spec.pages(CPU_TOKENS_PER_SEQUENCE)
            running = min(running, max(max_num_seqs * average, spec.pages(max_model_len)))
        return min(room // spec.bytes_per_page, 1 + PREFIX_CACHE_FACTOR * running)

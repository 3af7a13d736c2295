"""Messages between the HTTP process and the engine: token ids and numbers, no text, no tensors.

All of them are msgspec structs that travel as msgpack. The engine answers with one `StepResult` a step for all
sequences together (design section 3).
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
RequestKind = Literal["generate", "classify", "embed"]
MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one choice is sampled. Ranges are checked where requests enter (`validate`).

    `logprobs` None: none are returned; 0: those of the chosen tokens; k: also of the k most likely ones.
    `prompt_logprobs` likewise for the prompt. Log-probabilities are of the raw distribution, before penalties,
    bias, temperature and masks. `top_k` 0 means all. `seed` None: whoever accepts the request draws one; for the engine
    itself it is 0.
    `bad_words` are sequences of token ids: the last token of one is not chosen where the reply ends with all the tokens
    before it. Where `allowed_token_ids` has any, no other token is chosen, not even one that ends the reply.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a token at its position, with the `top` most likely (id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of one prompt. `kind`: tokens are wanted, or a classifier's scores, or an embedding.

    `index` is the choice's number within its prompt (0..n-1); requests of one prompt share `group`, so that its
    prefix is computed once. `parent` is the client's request, of which this is one choice (empty: it is alone), and
    `tenant` stands for its API key: both take turns. `generated` and `num_prompt_logprobs` say what an earlier engine
    has delivered already (replay after a restart). `save_positions` are token offsets into the prompt where a state is
    worth keeping. Requests find in the prefix cache only what requests with the same `cache_salt`
    computed.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    kind: RequestKind = "generate"
    index: int = 0
    group: str = ""
    parent: str = ""
    tenant: str = ""
    priority: int = 0
    save_positions: tuple[int, ...] = ()
    cache_salt: str = ""
    generated: list[int] = msgspec.field(default_factory=list[int])
    num_prompt_logprobs: int = 0


class TokenUpdate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step brought one request.

    `token_ids` are new tokens with their `logprobs` (parallel, empty if not asked for). `prompt_logprobs` continues
    where the last update stopped; its very first entry is None. `num_cached` (prompt tokens read from the prefix
    cache) and `queue_seconds` come with the request's first update. `finish_reason` closes the request;
    `stop_token_id` names the token that did, which is also the last of `token_ids`. `error` goes with "error".
    `vector`: a classifier's scores, or an embedding.
    """

    request_id: str
    token_ids: list[int] = msgspec.field(default_factory=list[int])
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list[TokenLogprob])
    prompt_logprobs: list[TokenLogprob | None] = msgspec.field(default_factory=list["TokenLogprob | None"])
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached: int | None = None
    queue_seconds: float | None = None
    error: str | None = None
    vector: tuple[float, ...] | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine after a step. Counters (`*_total`) count since this engine process began."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_capacity: int = 1
    state_slots_used: int = 0
    state_slots_capacity: int = 1
    saved_states: int = 0
    num_preemptions_total: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    missed_no_state_total: int = 0
    missed_evicted_total: int = 0
    num_steps_total: int = 0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine became: sent once, when it is ready. Sizes are results, not wishes.

    `batch_dependent_ops`: ops whose last bits may depend on the batch. `num_state_slots` have states of running
    sequences and, unless these are compressed (`state_cache_dtype`), saved ones, of which there may be
    `num_saved_states` while all sequences run.
    """

    architecture: str
    num_parameters: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_kv_blocks: int
    num_state_slots: int
    num_saved_states: int
    weight_bytes: int
    kv_bytes: int
    state_bytes: int
    kernels: dict[str, str]
    load_seconds: float
    quantization: str | None = None
    quantize_mamba: bool = False
    state_cache_dtype: str = "auto"
    batch_dependent_ops: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


# Client to engine -------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


ToEngine = Submit | Abort | Shutdown

# Engine to client -------------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up progress: `fraction` of `phase` is done."""

    phase: str
    fraction: float


class LogLine(msgspec.Struct, frozen=True, tag=True):
    """A record of the engine's log, for the log of the process that started it."""

    level: int
    name: str
    text: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start; `message` is for the user."""

    message: str


class StepResult(msgspec.Struct, frozen=True, tag=True):
    """`started`: requests that ran for the first time in this step."""

    updates: list[TokenUpdate]
    started: list[str]
    stats: EngineStats


FromEngine = Progress | LogLine | Ready | Failed | StepResult

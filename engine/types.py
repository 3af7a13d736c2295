"""The messages between the HTTP process and the engine. In these messages, prompts and replies are token ids, not text.

All of them are msgspec structs and are sent as msgpack. The engine sends one `StepResult` for each step, with the
results of all sequences.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
RequestKind = Literal["generate", "classify", "embed", "score"]
Pooling = Literal["last", "mean"]
MAX_LOGPROBS = 20
# Requests with this priority or a less urgent one (a larger number) run in the background: in slots and steps that no
# other request needs. The priorities that clients can choose have 32 bits, so all of them are more urgent.
BACKGROUND_PRIORITY = 2**40


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The parameters that say how one reply is sampled. The function `validation.validate` checks the ranges of these
    parameters when a request is accepted.

    `logprobs` None returns no log-probabilities, 0 those of the chosen tokens, and k also those of the k most likely
    tokens. `prompt_logprobs` does the same for the tokens of the prompt. Log-probabilities are of the raw distribution,
    before penalties, bias, temperature and masks. `top_k` 0 means all tokens. If `seed` is None, the caller that
    accepts the request draws a random one; the engine itself treats None as 0. `bad_words` are sequences of token ids:
    the last token of a sequence is forbidden when the reply so far ends with the tokens before it. If
    `allowed_token_ids` is not empty, all other tokens are forbidden, even end tokens.

    `grammar` is a grammar in the form that llguidance's `LLMatcher` takes, or "" for none. The whole reply, reasoning
    included, follows the grammar from its first generated token on. An end token may come only where the grammar may
    end. While the grammar allows another token, `min_tokens` and `ignore_eos` forbid the end tokens; where the grammar
    allows nothing but an end token, the reply ends all the same. Where the grammar allows only one continuation of the
    text, the reply continues with the tokens that the tokenizer makes of that text, whatever the penalties and the bias
    are. If `bad_words` or `allowed_token_ids` forbid every token that the grammar allows, the request ends with an
    error.

    `thinking_end` has the token ids of the tag that ends the model's reasoning, such as `</think>`. If the reply has
    `thinking_token_budget` tokens and this tag has not appeared among them, the tokens of the tag are forced next. The
    limit has no effect at a position where the grammar does not allow the tag.
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
    grammar: str = ""
    thinking_token_budget: int | None = None
    thinking_end: tuple[int, ...] = ()


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of a token. `top` has (id, logprob) for each of the most likely tokens at the position of
    this token, the most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class CacheUse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request uses the prefix cache. It never changes the reply.

    With `read` false, the whole prompt is computed. With `write` false, no page and no state of the request can be
    found by later requests. The engine protects the pages and states of the request from eviction for `pin_seconds`
    seconds after its end, as far as the share of memory for this purpose allows. With `explain`, the first update has a
    `CacheReport`.
    """

    read: bool = True
    write: bool = True
    pin_seconds: float = 0.0
    explain: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request for one reply to one prompt.

    `kind` says what the reply is: tokens ("generate"), or one vector of float32 numbers. "embed" asks for the model's
    hidden state after the final norm, `pooling` for that of the last token or for the mean over all tokens. "classify"
    asks for the output of a classifier's head at the last token. "score" asks for log-probabilities of the raw
    distribution: `targets` has one tuple of token ids for each of the last `len(targets)` positions of the prompt, and
    the reply has the log-probability of each of these ids as the next token, in the order of `targets`. A request for a
    vector has max_tokens 0.

    `index` (0 to n-1) is the number of the reply among the n replies to the same prompt. The requests for these share
    `group`, so that the prompt is computed once. `parent` is the id of the client's request that this is a part of
    (empty: of its own), and `tenant` identifies the client's API key; both take turns when the engine is full. After a
    restart of the engine, `generated` and `num_prompt_logprobs` tell what the client has received already.
    `save_positions` are token positions in the prompt where a state should be saved. A request reuses only cached
    prefixes of requests with the same `cache_salt`, and `cache` says whether it reads, writes and pins prefixes.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    kind: RequestKind = "generate"
    index: int = 0
    pooling: Pooling = "last"
    targets: tuple[tuple[int, ...], ...] = ()
    group: str = ""
    parent: str = ""
    tenant: str = ""
    priority: int = 0
    save_positions: tuple[int, ...] = ()
    cache_salt: str = ""
    cache: CacheUse = CacheUse()
    generated: list[int] = msgspec.field(default_factory=list[int])
    num_prompt_logprobs: int = 0

    @property
    def is_background(self) -> bool:
        return self.priority >= BACKGROUND_PRIORITY


# Where the saved state of a prefix hit was stored, before it was brought to the device.
CacheTier = Literal["device", "host", "disk"]
# Why no more of a prompt was taken from the prefix cache. `engine.cache.explain` describes the reasons.
MissReason = Literal[
    "complete", "no_state", "evicted", "salt", "not_seen", "too_short", "read_disabled", "prompt_logprobs", "disabled"
]


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the prefix cache had for a prompt when the prompt was started. All numbers are numbers of prompt tokens.

    The cache had keys and values of the first `kv_tokens` tokens. `differs` says whether the cached tokens go on
    differently there; otherwise the prompt continues them, or is a part of them. The last state of the prefix was saved
    after `state_tokens` tokens, whether or not the keys and values before it were still there. The first `used_tokens`
    tokens were not computed again. Their state was stored in `tier` (None if no token was used). `restore_seconds` is
    the time of bringing the prefix from another tier to the device, and of copying the state together with the other
    states of the same step. `reason` says why no more tokens were used.
    `missed` has the numbers of tokens that were computed again although the cache had, or once had, their keys and
    values: the reasons are `no_state`, `evicted` and `salt`. `waited` says whether the request has waited until another
    one had computed the prefix.
    """

    kv_tokens: int = 0
    differs: bool = False
    state_tokens: int = 0
    used_tokens: int = 0
    tier: CacheTier | None = None
    restore_seconds: float = 0.0
    reason: MissReason = "complete"
    missed: dict[MissReason, int] = msgspec.field(default_factory=dict[MissReason, int])
    waited: bool = False


class TokenUpdate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The results of one step for one request.

    `token_ids` are the new tokens, and `logprobs` has one entry for each of them, or is empty if the request did not
    ask for them. `prompt_logprobs` continue where the last update ended; the entry of the first prompt token is None. A
    request's first update has `num_cached`, the number of prompt tokens read from the prefix cache, and
    `queue_seconds`, and also `cache` if the request asks for an explanation. An update with `finish_reason` is the last
    one of its request; if the request pins its prefix, this update has `num_pinned`, the number of tokens that are now
    protected from eviction. `stop_token_id` is the token that
    ended the reply, and also the last of `token_ids`. If `finish_reason` is "error", `error` is the error message.
    `contradictory` says that the client is at fault, because the parameters of the request contradict each other.
    `vector` is the reply to a request for a vector: float32 numbers, little-endian. It has NaN if the model computed
    numbers that are not finite.
    """

    request_id: str
    token_ids: list[int] = msgspec.field(default_factory=list[int])
    logprobs: list[TokenLogprob] = msgspec.field(default_factory=list[TokenLogprob])
    prompt_logprobs: list[TokenLogprob | None] = msgspec.field(default_factory=list["TokenLogprob | None"])
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached: int | None = None
    queue_seconds: float | None = None
    cache: CacheReport | None = None
    num_pinned: int | None = None
    error: str | None = None
    contradictory: bool = False
    vector: bytes | None = None


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """Statistics of the prefix cache's tiers. The dicts have one number for each tier, "host" and "disk";
    `ignored_files_total` has one for each reason.

    `hits_total` counts prefixes that came from a tier, and `hit_tokens_total` their tokens that the device
    did not have.
    `dropped_segments_total` are segments that were not kept because too many waited for the disk, and
    `failed_writes_total` those that the disk did not take. `staged_bytes` wait for the disk now. `num_bytes` and
    `segments` are what a tier has now; on the disk they count the files of all models and servers in the folder.
    `found_segments_total` are files that were there at the start or that others have written. `fingerprint` is that of
    the model in the open folder of the disk tier, or empty.
    """

    hits_total: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    hit_tokens_total: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    restored_bytes_total: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    restore_seconds_total: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    ignored_files_total: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    written_bytes_total: int = 0
    written_segments_total: int = 0
    failed_writes_total: int = 0
    dropped_segments_total: int = 0
    staged_bytes: int = 0
    num_bytes: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    segments: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    found_segments_total: int = 0
    fingerprint: str = ""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the engine after a step. Counters (`*_total`) count from the start of this engine process. The
    numbers `missed_*_total` and `hits_*_total` count prompt tokens. `num_joined_total` counts requests that waited
    until another request had computed the prefix that both have.

    `num_running` counts all running sequences, those in the background included. `num_waiting` leaves those in the
    background out. `tiers` is None if the prefix cache has no tiers.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_background_running: int = 0
    num_background_waiting: int = 0
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
    missed_not_seen_total: int = 0
    missed_read_disabled_total: int = 0
    hits_device_total: int = 0
    hits_host_total: int = 0
    hits_disk_total: int = 0
    num_joined_total: int = 0
    pinned_blocks: int = 0
    pinned_states: int = 0
    num_steps_total: int = 0
    tiers: TierStats | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The properties of a loaded engine, sent once when the engine is ready. Each size is the size that the engine
    chose. This size may be smaller than the size in the engine's options.

    `batch_dependent_ops` are operations whose last bits may depend on the batch. The `num_state_slots` hold the states
    of running sequences and, unless `state_cache_dtype` compresses them, the saved states. `num_saved_states` is the
    number of states that can be saved while `max_num_seqs` sequences run. A step has at most `max_num_mixed_tokens`
    prompt tokens beside replies. `step_size` gives the reason for the numbers of prompt tokens if the time of a step
    decided them. `threads` says how many threads the CPU kernels use and
    why; it is empty on a GPU. `labels` are the names of a classifier's labels, and empty for a language model.
    `tensor_parallel_size` ranks run the model; the sizes in bytes are those of one rank, the first.
    `tensor_parallel_exact` says whether sums have the order that does not depend on the number of ranks. There are
    `pipeline_parallel_size` stages, each with `tensor_parallel_size` ranks.
    `problem_type` is that of transformers' classifiers, or "". With a disk tier,
    `segment_page` and `segment_state` have the shape and the dtype of each tensor of a page, and of a state.
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
    max_num_mixed_tokens: int
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
    activation_quantization: str = "none"
    state_cache_dtype: str = "auto"
    batch_dependent_ops: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    step_size: str = ""
    threads: str = ""
    hidden_size: int = 0
    labels: tuple[str, ...] = ()
    problem_type: str = ""
    pad_token_id: int | None = None
    tensor_parallel_size: int = 1
    tensor_parallel_exact: bool = False
    pipeline_parallel_size: int = 1
    segment_page: dict[str, tuple[tuple[int, ...], str]] = msgspec.field(
        default_factory=dict[str, tuple[tuple[int, ...], str]]
    )
    segment_state: dict[str, tuple[tuple[int, ...], str]] = msgspec.field(
        default_factory=dict[str, tuple[tuple[int, ...], str]]
    )


# Messages from the client to the engine ---------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class StoredSegment(msgspec.Struct, frozen=True, array_like=True):
    """A segment in the folder of the disk tier. The fields are those of `cache.tiers.segment.Entry`."""

    key: bytes
    parent: bytes
    base: bytes
    last: bytes
    start: int
    end: int
    num_bytes: int


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """This message to the engine names segments that the HTTP process has put into the folder of the disk tier. A
    request that is submitted later finds them at once, without a search of the folder."""

    segments: list[StoredSegment]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


ToEngine = Submit | Abort | Arrived | Shutdown

# Messages from the engine to the client ---------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Reports the progress of the engine's start: `phase` is the name of the current phase, and `fraction` (0 to 1) is
    the part of this phase that is done."""

    phase: str
    fraction: float


class LogLine(msgspec.Struct, frozen=True, tag=True):
    """A log record of the engine. The process that started the engine writes this record to its own log."""

    level: int
    name: str
    text: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Tells that the engine cannot start. `message` is the error text for the user."""

    message: str


class Working(msgspec.Struct, frozen=True, tag=True):
    """This message tells, during a long phase of the engine's start, that the engine process has used processor time
    and so does not hang."""


class Adding(msgspec.Struct, frozen=True, tag=True):
    """This message of the engine has the ids of requests that the engine is about to put into its queue. If the engine
    dies before it sends the next `StepResult`, the messages `Adding` and `Starting` tell which requests it was
    handling."""

    request_ids: list[str]


class Starting(msgspec.Struct, frozen=True, tag=True):
    """This message of the engine has the ids of requests that run for the first time in the step that the engine is
    about to run."""

    request_ids: list[str]


# What a step computed: only prompt tokens, only one token for each running reply, or both.
StepKind = Literal["prefill", "decode", "mixed"]


class StepTime(msgspec.Struct, frozen=True, array_like=True):
    """The time that one step took, in seconds, and what it computed."""

    kind: StepKind
    seconds: float


class StepResult(msgspec.Struct, frozen=True, tag=True):
    """This message of the engine has the results of one step: the new tokens of the requests, and statistics. `time` is
    None if no sequence ran in the step."""

    updates: list[TokenUpdate]
    stats: EngineStats
    time: StepTime | None = None


FromEngine = Progress | Working | LogLine | Ready | Failed | Adding | Starting | StepResult

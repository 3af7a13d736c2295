"""The kernel contract: one protocol per op, with shapes and dtypes. Implementations are listed in `table.py`.

Letters: T rows (tokens) of a ragged batch, N sequences in it, H hidden size, D = expand * H channels of a Mamba layer,
S state size of a channel, W width of the convolution, R = dt rank, Q query heads, G KV heads, Z head size, E experts,
K experts per token, F intermediate size, V vocabulary. `dtype` is the model's (bfloat16, float16 or float32).

Rules that every implementation keeps (they make results independent of batch and chunking):
* A row's result depends on that row, its own sequence's history, and nothing else.
* Tokens of all sequences lie in one ragged row; nothing is padded.
* States and pages are read and written in place; a sequence without `has_state` starts from zeros, whatever its slot
  holds. States cross a chunk border in the dtype they are stored in: the convolution's and the pages' is `dtype`, the
  SSM state's float32.
* One token through a prefill op gives the bits that the decode op gives.
* Rows may be strided (they are slices of wider ones); their last dimension is contiguous.
* `pack` leaves its argument as it is: a tied embedding is read from it still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class KernelUnavailable(Exception):
    """An implementation cannot run on this machine; the message says why."""


class StateSaves(NamedTuple):
    """States to write out at interior positions of chunks, beside the final one, as rows of a ragged batch.

    Sequence i saves `rows[start[i]:start[i+1]]`, ascending: the state just after row r (counted from the first row of
    the batch that the op receives) goes to slot `slots[j]` as well. Slots are distinct and belong to no sequence of
    the batch. All int32; `start` [N+1], `rows` and `slots` [number of saves].
    """

    start: Tensor
    rows: Tensor
    slots: Tensor


class Segments(NamedTuple):
    """How the rows of a ragged batch fall into sequences, and where their states live.

    Sequence i owns rows `query_start[i]:query_start[i+1]` (int32 [N+1], at least one row each; the last entry is T);
    `max_query_len` is the longest such run. Its state is slot `state_ids[i]` (int32 [N]); where not `has_state[i]`
    (bool [N]) it starts from zeros. The final state goes back to the same slot.
    """

    query_start: Tensor
    max_query_len: int
    state_ids: Tensor
    has_state: Tensor
    saves: StateSaves


class Pages(NamedTuple):
    """One attention layer's paged KV and the tables of N sequences.

    `k`, `v`: dtype [pages, block_size, G, Z], any stride over pages; the implementations "triton" and "reference" take
    float8_e4m3fn too, numbers without a scale. `block_tables`: int32 [N, max_blocks], entries beyond a sequence's own
    pages are 0 (a page that no sequence owns). `context_lens`: int32 [N], tokens in the cache including those of this
    step. None of them exceeds `max_context_len`, which may be larger than all.
    """

    k: Tensor
    v: Tensor
    block_tables: Tensor
    context_lens: Tensor
    max_context_len: int


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (norm(s) * weight, s) with s = x + residual, or x without one.

        x, residual: dtype [T, H]; weight: dtype [H]. s is rounded to dtype, the variance is in float32, x / rms is
        rounded to dtype before the weight multiplies it (transformers' JambaRMSNorm).
        """
        ...


class CausalConv1d(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: Segments
    ) -> Tensor:
        """silu(depthwise causal convolution + bias) of every sequence, continuing from its state.

        x: dtype [T, D]; weight: dtype [W, D], tap W-1 multiplies the current token; bias: dtype [D];
        conv_state: dtype [slots, W-1, D], oldest first, any stride over slots: inputs before the convolution.
        Sums in float32. Returns dtype [T, D].
        """
        ...


class CausalConv1dUpdate(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor) -> Tensor:
        """`CausalConv1d` for one token each of N sequences that have a state. x: [N, D]; state_ids: int32 [N]."""
        ...


class ScanWeights(NamedTuple):
    """The recurrence's own parameters, all float32: a = -exp(A_log) [D, S], d [D], dt_bias [D]."""

    a: Tensor
    d: Tensor
    dt_bias: Tensor


class ScanInputs(NamedTuple):
    """Per token: u [T, D] (after the convolution), dt [T, D] (before bias and softplus), b, c [T, S], z [T, D] (the
    gate before silu). All dtype."""

    u: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    z: Tensor


class SelectiveScan(Protocol):
    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
        """Mamba-1 recurrence (Gu & Dao 2023, Algorithm 2), token by token in float32:

        dt = softplus(dt + dt_bias); h = exp(dt * a) * h + (dt * u) * b; y = (h @ c + d * u) * silu(z).
        ssm_state: float32 [slots, D, S], any stride over slots. Returns dtype [T, D].
        """
        ...


class SelectiveStateUpdate(Protocol):
    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """`SelectiveScan` for one token each of N sequences that have a state. state_ids: int32 [N]."""
        ...


class MambaWeights(NamedTuple):
    """A Mamba layer between its in_proj and its out_proj. conv_weight [W, D], conv_bias [D], the norms' weights dt_norm
    [R], b_norm and c_norm [S], all dtype; x_proj [R + 2S, D] and dt_proj [D, R] as `Linear.pack` of the same kernels
    returned them."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Any
    dt_norm: Tensor
    b_norm: Tensor
    c_norm: Tensor
    eps: float
    dt_proj: Any
    scan: ScanWeights


class MambaDecode(Protocol):
    """What lies between in_proj and out_proj, for one token each of N sequences that have a state: with the bits that
    `CausalConv1dUpdate`, `Linear` (x_proj), `RmsNorm` of dt, B and C, `Linear` (dt_proj) and `SelectiveStateUpdate` of
    the same kernels give one after the other."""

    def pack(self, weights: MambaWeights) -> Any:
        """What `__call__` takes; it refers to the tensors of `weights`, which must stay where they are."""
        ...

    def __call__(self, xz: Tensor, weights: Any, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """xz: dtype [N, 2D], the convolution's inputs, then the gate; the states as the parts take them; state_ids:
        int32 [N]. Returns dtype [N, D]."""
        ...


class WriteKv(Protocol):
    def __call__(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
        """Puts row t's k, v (dtype [T, G, Z]) at token slot kv_slots[t] = page * block_size + offset (int64 [T]).
        Numbers beyond the largest of float8_e4m3fn, 448, are stored there as that."""
        ...


class AttentionPrefill(Protocol):
    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """Causal attention of each sequence's last rows over its pages, which hold this step's K and V already.

        q: dtype [T, Q, Z]; query head h reads KV head h // (Q // G). The last row of sequence i sees
        context_lens[i] keys, the row before one fewer. Softmax in float32. Returns dtype [T, Q, Z].
        """
        ...


class AttentionDecode(Protocol):
    def __call__(self, q: Tensor, pages: Pages, scale: float) -> Tensor:
        """`AttentionPrefill` for one row each of N sequences. q: dtype [N, Q, Z]."""
        ...


class CopySlots(Protocol):
    def __call__(self, tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
        """For every tensor (units on dim 0) and pair i: tensor[destinations[i]] = tensor[sources[i]].

        int64 [pairs]. Destinations are distinct and none is a source, so the pairs may run in any order.
        """
        ...


class CompressedStates(NamedTuple):
    """SSM states in a byte a number: values * scales. values: int8 [slots, M, D, S] within -127..127 of M layers;
    scales: float32 [slots, M, D]."""

    values: Tensor
    scales: Tensor


class CompressStates(Protocol):
    def __call__(self, states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
        """For every pair i, slot sources[i] of `states` (float32 [slots, M, D, S]) to slot destinations[i].

        A channel's scale is its largest magnitude times 1/127; a value is x times (127 over that magnitude) to the
        nearest number, ties to even, all in float32. A channel within 2**-100 counts as zeros. The states are
        finite: of NaN and infinity nothing is said. int64 [pairs]; destinations are distinct.
        """
        ...


class RestoreStates(Protocol):
    def __call__(self, compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """For every pair i: states[destinations[i]] = values[sources[i]] * scales[sources[i]], as in
        `CompressStates`."""
        ...


class SiluAndMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. gate_up: dtype [T, 2F], gate first. silu in float32, rounded before the product. [T, F]."""
        ...


class RouteExperts(Protocol):
    def __call__(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Softmax over all experts in float32, then the top k, weights not renormalised; ties to the lower index.

        logits: dtype [T, E]. Returns (weights float32 [T, K], ids int32 [T, K]), best first.
        """
        ...


class QuantizedWeight(NamedTuple):
    """A weight [..., N, K] in small numbers: values * scales, a scale for each row and each `group_size` inputs.

    values: [..., N, K], int8 within -127..127 (int8) or -7..7 (int4, not packed yet), or float8_e4m3fn, finite (fp8);
    scales: float32 [..., N, ceil(K / group_size)]; the last group of a row may be short. `bits` is 8 or 4.
    The product is sum over groups, upwards, of scale * (sum of value * x in float32).
    """

    values: Tensor
    scales: Tensor
    group_size: int
    bits: int


Weight = Tensor | QuantizedWeight
"""What `pack` takes."""


class RunExperts(Protocol):
    def pack(self, gate_up: Weight, down: Weight) -> Any:
        """Brings [E, 2F, H] (gate rows first) and [E, H, F] into this implementation's own layout, once, at load."""
        ...

    def __call__(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor) -> Tensor:
        """Sum over a token's experts, in rank order, of weight * down(silu(gate(x)) * up(x)). x: dtype [T, H]."""
        ...


class Linear(Protocol):
    def pack(self, weight: Weight) -> Any:
        """Brings a [N, K] weight into this implementation's own layout, once, at load."""
        ...

    def rows(self, weight: Any, ids: Tensor) -> Tensor:
        """Rows of a weight [N, K] that is not quantised, packed or as it is. ids: int64 [T]. Returns dtype [T, K]."""
        ...

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, K] times the packed weight [N, K] transposed, plus bias [N]. Returns dtype [T, N]."""
        ...


class SampleInputs(NamedTuple):
    """Per row: temperature (0 is greedy), top_p, min_p float32 [N]; top_k int32 [N], 0 for all; keys int64 [N]: a hash
    of (seed, choice, position) that alone decides the row's noise."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    keys: Tensor


class Sample(Protocol):
    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """Picks one token id a row: argmax of logits / temperature + Gumbel noise over the tokens that top-k, then
        top-p, then min-p leave (all on the tempered distribution). The noise of (row key, vocabulary id) is a hash, so
        batch mates cannot shift it. logits: float32 [N, V], may be overwritten. Returns int64 [N]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The implementations a model runs with; `names` says which (op -> implementation), `batch_dependent_ops` those
    under which a row's last bits may depend on its batch mates or on how its sequence was cut."""

    rms_norm: RmsNorm
    causal_conv1d: CausalConv1d
    causal_conv1d_update: CausalConv1dUpdate
    selective_scan: SelectiveScan
    selective_state_update: SelectiveStateUpdate
    write_kv: WriteKv
    attention_prefill: AttentionPrefill
    attention_decode: AttentionDecode
    copy_slots: CopySlots
    compress_states: CompressStates
    restore_states: RestoreStates
    silu_and_mul: SiluAndMul
    route_experts: RouteExperts
    run_experts: RunExperts
    linear: Linear
    sample: Sample
    mamba_decode: MambaDecode
    names: dict[str, str]
    batch_dependent_ops: tuple[str, ...] = ()

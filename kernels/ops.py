"""This module describes each kernel op as a protocol, with shapes and dtypes. `table.py` lists the implementations.

Letters: T rows (tokens) of a ragged batch, N sequences in it, H hidden size, D = expand * H channels of a Mamba layer,
S state size of a channel, W width of the convolution, R = dt rank, Q query heads, G KV heads, Z head size, E experts,
K experts per token, F intermediate size, V vocabulary. `dtype` is the model's (bfloat16, float16 or float32).

Every implementation keeps these rules, which make results independent of the batch and of chunked prefill:
* A row's result depends only on that row and on the history of its own sequence.
* The tokens of all sequences are concatenated into one ragged batch without padding.
* States and pages are read and written in place. A sequence without `has_state` starts from zeros, whatever its slot
  holds. Between two chunks of a prompt a state keeps the dtype in which it is stored: `dtype` for the convolution's
  state and the KV pages, float32 for the SSM state.
* A prefill op gives one token the same bits as the decode op.
* Rows may be strided, because they can be slices of wider rows. The last dimension is contiguous.
* `pack` does not change its argument, because a tied embedding still reads its rows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class KernelUnavailable(Exception):
    """Is raised where an implementation cannot run on this machine. The message gives the reason."""


class StateSaves(NamedTuple):
    """Lists the rows inside prefill chunks after which a sequence's state is saved. Final states are not listed.

    Sequence i saves its state after each of the rows `rows[start[i]:start[i+1]]`, in ascending order. The state just
    after row `rows[j]` is also written to slot `slots[j]`; rows count from the first row of the batch that the op
    receives. The slots are distinct and belong to no sequence of the batch. All tensors are int32: `start` [N+1],
    `rows` and `slots` [number of saves].
    """

    start: Tensor
    rows: Tensor
    slots: Tensor


class Segments(NamedTuple):
    """Describes which rows of a ragged batch belong to which sequence, and which slot holds each sequence's state.

    Sequence i owns rows `query_start[i]:query_start[i+1]` (int32 [N+1], at least one row each; the last entry is T).
    `max_query_len` is the largest number of rows of a sequence. The state of sequence i is in slot `state_ids[i]`
    (int32 [N]). Where `has_state[i]` (bool [N]) is false, the sequence starts from zeros. The final state is written
    to the same slot.
    """

    query_start: Tensor
    max_query_len: int
    state_ids: Tensor
    has_state: Tensor
    saves: StateSaves


class Pages(NamedTuple):
    """Holds the paged keys and values of one attention layer and the block tables of N sequences.

    `k`, `v`: dtype [pages, block_size, G, Z], with any stride over pages. The implementations "triton" and "reference"
    also accept float8_e4m3fn, whose numbers have no scale. `block_tables`: int32 [N, max_blocks]; entries beyond a
    sequence's own pages are 0, a page that no sequence owns. `context_lens`: int32 [N], the tokens in the cache,
    including those of this step. `max_context_len` is at least as large as each of them.
    """

    k: Tensor
    v: Tensor
    block_tables: Tensor
    context_lens: Tensor
    max_context_len: int


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (norm(s) * weight, s), where s is x + residual, or x if there is no residual.

        x, residual: dtype [T, H]; weight: dtype [H]. s is rounded to dtype and its variance is computed in float32.
        s / rms is rounded to dtype before it is multiplied by the weight, as in transformers' JambaRMSNorm.
        """
        ...


class CausalConv1d(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: Segments
    ) -> Tensor:
        """Returns silu(depthwise causal convolution of x + bias). Each sequence continues from its stored inputs.

        x: dtype [T, D]; weight: dtype [W, D], where tap W-1 multiplies the current token; bias: dtype [D].
        conv_state: dtype [slots, W-1, D], with any stride over slots. A slot holds the last W-1 inputs of the
        convolution, the oldest first. Sums are in float32. Returns dtype [T, D].
        """
        ...


class CausalConv1dUpdate(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor) -> Tensor:
        """Does what `CausalConv1d` does, for one token of each of N sequences that all have a state.

        x: dtype [N, D]; state_ids: int32 [N].
        """
        ...


class ScanWeights(NamedTuple):
    """Holds the parameters of the Mamba recurrence, all float32: a = -exp(A_log) [D, S], d [D], dt_bias [D]."""

    a: Tensor
    d: Tensor
    dt_bias: Tensor


class ScanInputs(NamedTuple):
    """Holds the inputs of the Mamba recurrence for T tokens, all of the model's dtype.

    u [T, D] is the output of the convolution, dt [T, D] the step size before bias and softplus, b and c [T, S] are the
    input and output projections, and z [T, D] is the gate before silu.
    """

    u: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    z: Tensor


class SelectiveScan(Protocol):
    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, segments: Segments) -> Tensor:
        """Computes the Mamba-1 recurrence (Gu & Dao 2023, Algorithm 2) in float32 and returns y: dtype [T, D].

        dt = softplus(dt + dt_bias); h = exp(dt * a) * h + (dt * u) * b; y = (h @ c + d * u) * silu(z).
        ssm_state: float32 [slots, D, S], with any stride over slots.
        """
        ...


class SelectiveStateUpdate(Protocol):
    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """Does what `SelectiveScan` does, for one token of each of N sequences that all have a state.

        state_ids: int32 [N].
        """
        ...


class MambaWeights(NamedTuple):
    """Holds the weights of a Mamba layer between its in_proj and its out_proj.

    conv_weight [W, D], conv_bias [D] and the norms' weights dt_norm [R], b_norm [S] and c_norm [S] are all of the
    model's dtype. x_proj [R + 2S, D] and dt_proj [D, R] are packed by `Linear.pack` of the same kernels.
    """

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
    """Computes a Mamba layer between in_proj and out_proj, for one token of each of N sequences that all have a state.

    The result has the bits of these ops of the same kernels, called one after the other: `CausalConv1dUpdate`,
    `Linear` with x_proj, `RmsNorm` of dt, B and C, `Linear` with dt_proj, `SelectiveStateUpdate`.
    """

    def pack(self, weights: MambaWeights) -> Any:
        """Returns the weights in the form that `__call__` accepts.

        The packed form may point to the tensors of `weights`, which must therefore keep their addresses.
        """
        ...

    def __call__(self, xz: Tensor, weights: Any, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """Returns the tensor that out_proj multiplies: dtype [N, D].

        xz: dtype [N, 2D], the inputs of the convolution followed by the gate. conv_state and ssm_state are those of
        `CausalConv1d` and `SelectiveScan`. state_ids: int32 [N].
        """
        ...


class WriteKv(Protocol):
    def __call__(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
        """Writes row t of k and v (dtype [T, G, Z]) to token slot kv_slots[t] = page * block_size + offset (int64 [T]).

        Pages of float8_e4m3fn clamp numbers to the range of that format, from -448 to 448.
        """
        ...


class AttentionPrefill(Protocol):
    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """Returns the causal attention of each sequence's newest rows over its pages: dtype [T, Q, Z].

        The pages already hold the keys and values of this step. q: dtype [T, Q, Z]; query head h reads KV head
        h // (Q // G). The last row of sequence i sees context_lens[i] keys, and each row before it sees one key fewer
        than the next row. The softmax is in float32.
        """
        ...


class AttentionDecode(Protocol):
    def __call__(self, q: Tensor, pages: Pages, scale: float) -> Tensor:
        """Does what `AttentionPrefill` does, for one row of each of N sequences. q: dtype [N, Q, Z]."""
        ...


class CopySlots(Protocol):
    def __call__(self, tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
        """Copies tensor[sources[i]] to tensor[destinations[i]], for every tensor and every index i.

        sources, destinations: int64 [number of copies], indices into the first dimension of each tensor. The
        destinations are distinct and none is a source, so the order of the copies does not matter.
        """
        ...


class CompressedStates(NamedTuple):
    """Holds the SSM states of M layers, compressed to one byte per number. A number is its byte times a scale.

    values: int8 [slots, M, D, S], from -127 to 127; scales: float32 [slots, M, D], one for each channel.
    """

    values: Tensor
    scales: Tensor


class CompressStates(Protocol):
    def __call__(self, states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
        """Compresses slot sources[i] of `states` into slot destinations[i] of `compressed`, for every index i.

        states: float32 [slots, M, D, S]; sources, destinations: int64 [number of slots]; the destinations are distinct.
        A channel's scale is its largest magnitude times 1/127. A value is x * (127 / largest magnitude), rounded to the
        nearest integer with ties to even. All arithmetic is in float32. A channel whose magnitudes are all below
        2**-100 is stored as zeros. The states must be finite: the result for NaN and infinity is undefined.
        """
        ...


class RestoreStates(Protocol):
    def __call__(self, compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Sets states[destinations[i]] to values[sources[i]] * scales[sources[i]], for every index i.

        Shapes and dtypes are those of `CompressStates`.
        """
        ...


class SiluAndMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, the activation of a gated MLP: dtype [T, F].

        gate_up: dtype [T, 2F], the gate first. silu is computed in float32 and rounded to dtype before the product.
        """
        ...


class RouteExperts(Protocol):
    def __call__(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Returns the `top_k` most probable experts of each token: (weights float32 [T, K], ids int32 [T, K]).

        logits: dtype [T, E]. The weights are the probabilities of a float32 softmax over all experts and are not
        renormalised. The most probable expert comes first; of equally probable experts, the lower id.
        """
        ...


class QuantizedWeight(NamedTuple):
    """Holds a quantised weight [..., N, K]: values * scales. Neighbouring elements of a row form groups with one scale.

    A group has `group_size` elements; a row's last group may be shorter. `bits` is 8 or 4. values: [..., N, K]; the
    format int8 has int8 values from -127 to 127, int4 has int8 values from -7 to 7 (two numbers are not yet packed
    into a byte), fp8 has finite float8_e4m3fn values. scales: float32 [..., N, ceil(K / group_size)].
    A product is the sum over groups, in ascending order, of scale * (float32 sum of value * x).
    """

    values: Tensor
    scales: Tensor
    group_size: int
    bits: int


Weight = Tensor | QuantizedWeight
"""The types of weights that the `pack` methods accept."""


class RunExperts(Protocol):
    def pack(self, gate_up: Weight, down: Weight) -> Any:
        """Returns the experts' weights in this implementation's layout. `pack` is called once, when a model is loaded.

        gate_up: [E, 2F, H], the gate's rows first; down: [E, H, F].
        """
        ...

    def __call__(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor) -> Tensor:
        """Returns the sum over a token's experts of weight * down(silu(gate(x)) * up(x)): dtype [T, H].

        x: dtype [T, H]; weights, ids: the results of `RouteExperts`. Outputs are added in the order of the ids.
        """
        ...


class Linear(Protocol):
    def pack(self, weight: Weight) -> Any:
        """Returns a weight [N, K] in this implementation's layout. `pack` is called once, when a model is loaded."""
        ...

    def rows(self, weight: Any, ids: Tensor) -> Tensor:
        """Returns rows `ids` (int64 [T]) of a weight [N, K], as an embedding does: dtype [T, K].

        The weight may be packed or a plain tensor, but not quantised.
        """
        ...

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Returns x [T, K] times the transpose of the packed weight [N, K], plus bias [N]: dtype [T, N]."""
        ...


class SampleInputs(NamedTuple):
    """Holds the sampling parameters of N rows of logits.

    temperature (0 means greedy), top_p and min_p: float32 [N]; top_k: int32 [N], 0 for the whole vocabulary. keys:
    int64 [N], a hash of (seed, choice, position). A row's noise depends on its key alone.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    keys: Tensor


class Sample(Protocol):
    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """Samples one token id for each row: int64 [N].

        The token is the argmax of logits / temperature + Gumbel noise, over the tokens that top-k, then top-p, then
        min-p leave. All three filters use the distribution after the temperature is applied. The noise is a hash of
        the row's key and the token id, so it does not depend on the batch. logits: float32 [N, V], may be overwritten.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Holds the implementation of each op that a model runs with.

    `names` maps each op to the name of its implementation. `batch_dependent_ops` lists the ops that are not
    batch-invariant: the last bits of a row may depend on the other rows of the batch or on chunked prefill.
    """

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

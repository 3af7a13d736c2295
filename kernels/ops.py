"""This module defines each op as a Python protocol. The docstring of an op gives the shapes and dtypes of its tensors.

The module `table` lists the implementations of each op.

Letters: T rows (tokens) of a ragged batch, N sequences in it, H hidden size, D = expand * H channels of a Mamba layer,
S state size of a channel, W width of the convolution, R = dt rank, Q query heads, G KV heads, Z head size, E experts,
K experts per token, F intermediate size, V vocabulary. `dtype` is the model's dtype (bfloat16,
float16 or float32).

Every implementation keeps these rules, which make results independent of the batch and of chunked prefill:
* A row's result depends only on that row and on the history of its own sequence.
* The tokens of all sequences are concatenated into one ragged batch without padding.
* States and pages are read and written in place. A sequence without `has_state` starts from zeros, whatever its slot
  holds. Between two chunks of a prompt a state keeps the dtype in which it is stored: `dtype` for the convolution's
  state and the KV pages, float32 for the SSM state.
* For the same token, the prefill op and the decode op return the same bits.
* Rows may be strided, because they can be slices of wider rows. The last dimension is contiguous.
* The method `pack` does not change its argument, because the embedding may read its rows from the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class KernelUnavailable(Exception):
    """This error says that an implementation cannot run on this machine. The message gives the reason."""


class StateSaves(NamedTuple):
    """Lists the rows inside prefill chunks after which a sequence's state is copied to an additional slot.

    For sequence i these are the rows `rows[start[i]:start[i+1]]`, in ascending order. The state just after row
    `rows[j]` is written to slot `slots[j]`. Rows are counted from the first row of the batch that the op receives. The
    slots are distinct, and none is the slot of a sequence of the batch. Entries from start[N] on are padding: their
    slots are 0, the slot that belongs to no sequence, which may be written in any order. The state after a sequence's
    last row is not listed here, because the op always writes that state to the sequence's own slot. All tensors are
    int32: `start` [N+1], `rows` and `slots` [number of saves].
    """

    start: Tensor
    rows: Tensor
    slots: Tensor


class Segments(NamedTuple):
    """Says which rows of a ragged batch each sequence owns, and which slot holds each sequence's state.

    Sequence i owns rows `query_start[i]:query_start[i+1]` (int32 [N+1], at least one row each; the last entry is T).
    No sequence has more than `max_query_len` rows. The state of sequence i is in slot `state_ids[i]` (int32 [N]). Where
    `has_state[i]` (bool [N]) is false, the sequence starts from zeros. The state after the sequence's last row is
    written to the same slot, `state_ids[i]`.
    """

    query_start: Tensor
    max_query_len: int
    state_ids: Tensor
    has_state: Tensor
    saves: StateSaves


class Pages(NamedTuple):
    """Holds the paged keys and values of one attention layer and the block tables of N sequences.

    `k`, `v`: dtype [pages, block_size, G, Z]; the stride between pages is arbitrary. The implementations "triton" and
    "reference" also accept keys and values in float8_e4m3fn, without scales. `block_tables`: int32 [N, max_blocks], the
    page numbers of each sequence; entries after a sequence's last page are 0, the number of a page that no sequence
    owns. `context_lens`: int32 [N], each sequence's number of cached tokens, including the tokens of this step.
    `max_context_len` is an upper bound of the elements of `context_lens`.
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
        """Returns silu((depthwise causal convolution of x) + bias).

        The inputs that precede a sequence's first row are read from the sequence's slot of conv_state.

        x: dtype [T, D]; weight: dtype [W, D], where tap W-1 multiplies the current token; bias: dtype [D]. conv_state:
        dtype [slots, W-1, D]; the stride between slots is arbitrary. A slot holds the last W-1 inputs of the
        convolution, the oldest first. Sums are in float32. Returns dtype [T, D].
        """
        ...


class CausalConv1dUpdate(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor) -> Tensor:
        """Computes the same as the op `CausalConv1d`, for N sequences with one token and a stored state each.

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
        ssm_state: float32 [slots, D, S]; the stride between slots is arbitrary.
        """
        ...


class SelectiveStateUpdate(Protocol):
    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """Computes the same as the op `SelectiveScan`, for N sequences with one token and a stored state each.

        state_ids: int32 [N].
        """
        ...


class MambaWeights(NamedTuple):
    """Contains all weights of a Mamba layer except the weights of in_proj and out_proj.

    conv_weight [W, D], conv_bias [D] and the norms' weights dt_norm [R], b_norm [S] and c_norm [S] are all of the
    model's dtype. x_proj [R + 2S, D] and dt_proj [D, R] are packed by the method `Linear.pack` of the same `Kernels`
    object.
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
    """Computes the part of a Mamba layer between in_proj and out_proj, for N sequences with one token each.

    All N sequences have a state. The result has the same bits as calling these ops of the same `Kernels` object in
    turn: `CausalConv1dUpdate`, `Linear` with x_proj, `RmsNorm` of dt, B and C, `Linear` with dt_proj,
    `SelectiveStateUpdate`.
    """

    def pack(self, weights: MambaWeights) -> Any:
        """Returns the weights in the form that the method `__call__` accepts.

        The packed form may contain addresses of the tensors in `weights`, so these tensors must stay where they are.
        """
        ...

    def __call__(self, xz: Tensor, weights: Any, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """Returns the input of out_proj: dtype [N, D].

        xz: dtype [N, 2D]; each row has the D inputs of the convolution, then the D elements of the gate. conv_state: as
        in the op `CausalConv1d`. ssm_state: as in the op `SelectiveScan`. state_ids: int32 [N].
        """
        ...


class WriteKv(Protocol):
    def __call__(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
        """Writes row t of k and row t of v to the place number kv_slots[t] of the pages, for every row t.

        k, v: dtype [T, G, Z]. kv_slots: int64 [T]; place number = page number * block_size + place in that page. If the
        pages have the dtype float8_e4m3fn, numbers are clamped to the range of that dtype, from -448 to 448.
        """
        ...


class AttentionPrefill(Protocol):
    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """Returns the causal attention of each sequence's new tokens over the sequence's pages: dtype [T, Q, Z].

        The pages already hold the keys and values of this step. q: dtype [T, Q, Z]; query head h reads KV head
        h // (Q // G). The last row of sequence i sees context_lens[i] keys, and each row before it sees one key fewer
        than the next row. The softmax is in float32.
        """
        ...


class AttentionDecode(Protocol):
    def __call__(self, q: Tensor, pages: Pages, scale: float) -> Tensor:
        """Computes the same as the op `AttentionPrefill`, for N sequences with one row each. q: dtype [N, Q, Z]."""
        ...


class CopySlots(Protocol):
    def __call__(self, tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
        """Copies tensor[sources[i]] to tensor[destinations[i]], for every tensor and every index i.

        sources, destinations: int64 [number of copies], indices into the first dimension of each tensor. The
        destinations are distinct and no destination is a source, so the order of the copies does not matter.
        """
        ...


class CompressedStates(NamedTuple):
    """Contains the SSM states of M layers, compressed to int8 values. The restored state is value * scale, per element.

    values: int8 [slots, M, D, S], from -127 to 127; scales: float32 [slots, M, D], one scale for each channel.
    """

    values: Tensor
    scales: Tensor


class CompressStates(Protocol):
    def __call__(self, states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
        """Compresses slot sources[i] of `states` into slot destinations[i] of `compressed`, for every index i.

        states: float32 [slots, M, D, S]; sources, destinations: int64 [number of slots]; the destinations are distinct.
        A channel's scale is (1/127) * m, where m is the largest magnitude of the channel's S numbers. A number x is
        stored as x * (127 / m), rounded to the nearest integer with ties to even. All arithmetic is in float32. A
        channel whose magnitudes are all below 2**-100 is stored as zeros. The states must be finite: the result for NaN
        and infinity is undefined.
        """
        ...


class RestoreStates(Protocol):
    def __call__(self, compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Sets states[destinations[i]] to values[sources[i]] * scales[sources[i]], for every index i.

        The arguments have the same shapes and dtypes as those of the op `CompressStates`.
        """
        ...


class SiluAndMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """Returns silu(gate) * up, the activation of a gated MLP: dtype [T, F].

        gate_up: dtype [T, 2F]; each row has the F elements of the gate, then the F elements of up. silu is computed in
        float32 and rounded to dtype before the product.
        """
        ...


class RouteExperts(Protocol):
    def __call__(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Returns the `top_k` most probable experts of each token: (weights float32 [T, K], ids int32 [T, K]).

        logits: dtype [T, E]. The weights are the probabilities of a float32 softmax over all experts and are not
        renormalised. The most probable expert comes first; of equally probable experts, the lower id.
        """
        ...


SUPER_GROUP = 256
"""The number of neighbouring elements of a row that share a factor of the second level."""


class QuantizedWeight(NamedTuple):
    """Contains a quantised weight [..., N, K]. An element of the weight is scale * (number - zero) + offset.

    Each group of neighbouring elements of a row shares one scale, one zero and one offset. A group has `group_size`
    elements; a row's last group may be shorter. A row has G = ceil(K / group_size) groups. `bits` is 8 or 4.

    `values` [..., N, K] has one value per byte:

    * int8: the number is the value; with 4 bits, it lies from -8 to 7.
    * uint8: the number is the value, from 0 to 255, or with 4 bits from 0 to 15. With a `table`, the number is the
      entry of the table of 16 numbers that the value selects.
    * float8_e4m3fn: the number is the value, which is finite. `bits` is 8, and there are no zeros, offsets or tables.

    `scales` [..., N, G] is float32 or float16. If `super_scales` is given, `scales` is int8 or uint8, and the scale of
    a group is super_scales * scales, where super_scales, float16 [..., N, ceil(K / 256)], has one number for 256
    elements of a row. `group_size` then divides 256. Such a product of two numbers is exact in float32.

    `offsets` is None, which means 0, or has the shape and dtype of `scales`. If `super_offsets` is given, the offset of
    a group is super_offsets * offsets, as with `super_scales`.

    `zeros`, uint8 [..., N, G] or None, has the integers that are subtracted from the values. A weight has zeros or
    offsets, not both.

    The sum over a group of number * x is computed in float32, and so is the sum of x over the group. A product is the
    sum over groups, in ascending order, of scale * (sum of number * x - zero * sum of x) + offset * sum of x.
    """

    values: Tensor
    scales: Tensor
    group_size: int
    bits: int
    offsets: Tensor | None = None
    zeros: Tensor | None = None
    super_scales: Tensor | None = None
    super_offsets: Tensor | None = None
    table: tuple[float, ...] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """Returns a copy in which each tensor is the result of the function `change` for that tensor."""
        fields = zip(self._fields, self, strict=True)
        return self._replace(**{name: change(field) for name, field in fields if isinstance(field, Tensor)})

    def numbers(self) -> Tensor:
        """Returns the numbers minus the zeros: float32 [..., N, K]."""
        if self.table is not None:
            return torch.tensor(self.table, device=self.values.device)[self.values.int()]
        numbers = self.values.float()
        return numbers if self.zeros is None else numbers - self._spread(self.zeros.float())

    def factors(self) -> Tensor:
        """Returns the scale of each group: float32 [..., N, G]."""
        return self._joined(self.scales, self.super_scales)

    def shifts(self) -> Tensor | None:
        """Returns the offset of each group, float32 [..., N, G], or None if all offsets are 0."""
        return None if self.offsets is None else self._joined(self.offsets, self.super_offsets)

    def dequantized(self, index: Tensor | None = None) -> Tensor:
        """Returns the elements of the weight, or of the rows `index` [T] of a weight [N, K]: float32 [..., N, K]. Each
        element is rounded after the product with the scale, and after the addition of the offset."""
        weight = self if index is None else self.each(lambda tensor: tensor[index])
        elements, shifts = weight._spread(weight.factors()) * weight.numbers(), weight.shifts()
        return elements if shifts is None else elements + weight._spread(shifts)

    def _joined(self, numbers: Tensor, supers: Tensor | None) -> Tensor:
        if supers is None:
            return numbers.float()
        repeated = supers.float().repeat_interleave(SUPER_GROUP // self.group_size, -1)[..., : numbers.shape[-1]]
        return repeated * numbers.float()

    def _spread(self, groups: Tensor) -> Tensor:
        """Returns for each element the number of its group: [..., N, G] becomes [..., N, K]."""
        return groups.repeat_interleave(self.group_size, -1)[..., : self.values.shape[-1]]


class StackedWeight(NamedTuple):
    """Contains matrices [N1, K], [N2, K] ... that multiply the same input. The matrices may have different formats. The
    result of a product has the outputs of all matrices, one after the other."""

    parts: tuple[Tensor | QuantizedWeight, ...]


Weight = Tensor | QuantizedWeight | StackedWeight
"""The type of a weight that the method `Linear.pack` accepts."""


class RunExperts(Protocol):
    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Any:
        """Returns the experts' weights in this implementation's layout. `pack` is called once, when a model is loaded.

        gate_up: [E, 2F, H]; each expert has the F rows of the gate, then the F rows of up. down: [E, H, F]. Both
        weights are quantised or none, and each may have a format of its own.
        """
        ...

    def __call__(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor) -> Tensor:
        """Returns a weighted sum of expert outputs for each token: dtype [T, H].

        The sum of weight * down(silu(gate(x)) * up(x)) runs over the token's experts, in the order of the token's row
        of `ids`. x: dtype [T, H]; weights, ids: the results of `RouteExperts`.
        """
        ...

    def sums(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """Writes the same weighted sum to `out`, float32 [T, H] and contiguous, for experts that are sections.

        The intermediate size of such experts is a section of that of the model, and the results of all sections are
        added. The experts' outputs, their products with the weights, and the result are not rounded to dtype.
        """
        ...


class Linear(Protocol):
    def pack(self, weight: Weight) -> Any:
        """Returns a weight [N, K] in this implementation's layout. `pack` is called once, when a model is loaded."""
        ...

    def rows(self, weight: Any, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Looks up embeddings: returns row ids[t] of a weight [N, K] for each index t: dtype [T, K].

        ids: int64 [T]. The weight is a plain tensor or the result of the method `pack`. dtype is the weight's, or the
        argument `dtype` if the weight is quantised. The elements of a quantised weight are computed in float32, as in
        `QuantizedWeight.dequantized`, and rounded to `dtype`.
        """
        ...

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Returns x [T, K] times the transpose of the packed weight [N, K], plus bias [N]: dtype [T, N]."""
        ...

    def sums(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """Writes x [T, K] times the transpose of the packed weight [N, K] to `out`, float32 [T, N] and contiguous.

        The weight is a section along K of a matrix, and no `StackedWeight`. The product is not rounded to dtype.
        """
        ...


class SampleInputs(NamedTuple):
    """Contains the sampling parameters for N rows of logits, one element of each tensor for each row.

    temperature (0 means greedy), top_p and min_p: float32 [N]; top_k: int32 [N], where 0 keeps the whole vocabulary.
    keys: int64 [N], each a hash of (the request's seed, the number of the choice, the token's position). The random
    noise in a row of logits depends only on the row's key.
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
        the row's key and the token id, so the noise does not depend on the batch. logits: float32 [N, V]; the op
        is allowed to overwrite them.
        """
        ...


class ApplyBitmask(Protocol):
    def __call__(self, logits: Tensor, masks: Tensor, rows: Tensor) -> None:
        """Sets the logits of forbidden tokens to minus infinity, in place: in row rows[i] of `logits`, those of the
        tokens that mask i does not allow.

        logits: float32 [N, V]; rows: int64 [M], distinct; masks: int32 [M, ceil(V / 32)]. Bit v % 32 of
        masks[i, v // 32], counted from the least significant bit, is 1 if token v is allowed. Bits of tokens from V on
        are ignored.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Contains, for each op, the implementation that a model uses.

    `names` maps each op to the name of its implementation. `batch_dependent_ops` lists the ops that are not
    batch-invariant: for these ops, the last bits of a row might depend on the other rows of the batch or on chunked
    prefill.
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
    apply_bitmask: ApplyBitmask
    mamba_decode: MambaDecode
    names: dict[str, str]
    batch_dependent_ops: tuple[str, ...] = ()

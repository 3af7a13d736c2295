"""This module implements ops with the packages causal-conv1d, mamba-ssm and flash-attn.

An op uses a package only if the user requests the package, with the option `--kernels op=name`. A package is imported
only when its entry in the table of `table.py` is loaded. None of the packages promises batch-invariant results.

The packages have these limits. The scan of mamba-ssm and the packed convolution of causal-conv1d start every sequence
from zeros, although the second chunk of a prompt must continue from a state. Neither function can save states inside a
chunk. flash-attn needs pages whose size is a multiple of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import KernelUnavailable, Pages, ScanInputs, ScanWeights, Segments
from jamba_server.kernels.reference.exact import silu
from jamba_server.kernels.reference.ragged import initial_states, state_writes

FLASH_PAGE = 256  # flash-attn accepts only pages whose number of tokens is a multiple of 256.


def _function(package: str, module: str, name: str, *parameters: str) -> Callable[..., Any]:
    """Returns the function `name` of an optional package.

    Raises KernelUnavailable if the package is missing or if the function does not have all of the named `parameters`.
    Raises ImportError if the package's compiled part is missing.
    """
    if find_spec(module.partition(".")[0]) is None:
        raise KernelUnavailable(f"the package {package} is not installed")
    function = getattr(import_module(module), name)
    if missing := set(parameters) - set(signature(function).parameters):
        raise KernelUnavailable(f"this version of {package} has a {name} without {', '.join(sorted(missing))}")
    return function


class CausalConv1dUpdate:
    """Implements the protocol `kernels.ops.CausalConv1dUpdate` with causal-conv1d, for filters of 2 to 4 taps."""

    def __init__(self) -> None:
        self._update = _function("causal-conv1d", "causal_conv1d", "causal_conv1d_update", "conv_state_indices")

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.CausalConv1dUpdate` for the arguments and the result."""
        _check_index(conv_state)
        return self._update(
            x, conv_state.transpose(1, 2), weight.t(), bias, activation="silu", conv_state_indices=state_ids
        )


def _check_index(conv_state: Tensor) -> None:
    elements = conv_state.shape[0] * conv_state.stride(0)
    if elements > 2**32:
        raise ValueError(f"causal-conv1d counts elements in 32 bits, but the conv states of all layers have {elements}")


class CausalConv1d:
    """Implements the protocol `kernels.ops.CausalConv1d` with the package causal-conv1d.

    The filter must have 2 to 4 taps, and the number of channels D must be a multiple of 8.

    The package starts packed sequences from zeros and does not return their states. This class therefore computes the
    new states itself, and computes the first W - 1 rows of each sequence again, from the sequence's old state.
    """

    def __init__(self) -> None:
        self._convolve = _function("causal-conv1d", "causal_conv1d", "causal_conv1d_fn", "seq_idx", "activation")

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, segments: Segments
    ) -> Tensor:
        """See the protocol `kernels.ops.CausalConv1d` for the arguments and the result."""
        starts, lengths = segments.query_start.long(), segments.query_start.diff()
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=x.device)
        sequence = torch.repeat_interleave(numbers, lengths, output_size=len(x))
        # The package expects x as [1, D, T] and the weight as [D, W]. Transposing x and the weight copies no data.
        out = self._convolve(x.t()[None], weight.t(), bias, seq_idx=sequence[None], activation="silu")[0].t()
        states = initial_states(conv_state, segments)
        history = torch.arange(len(weight) - 1, device=x.device)
        # The first W - 1 rows of each sequence are computed again, from the sequence's old state. If a sequence has
        # fewer than W - 1 rows, the sequence's last row is computed several times.
        first = torch.minimum(history, lengths[:, None] - 1)
        line = torch.cat([states, x[starts[:-1, None] + first]], dim=1)
        taps = first[:, :, None] + torch.arange(len(weight), device=x.device)
        out[starts[:-1, None] + first] = _filter(line[numbers[:, None, None], taps], weight, bias)
        rows, slots = state_writes(segments)
        owner = sequence[rows]
        taken = rows[:, None] - (len(weight) - 2) + history
        t = taken - starts[owner][:, None]  # If t is negative, the input is in the sequence's old state.
        old = states[owner[:, None], (t + len(history)).clamp(max=len(history) - 1)]
        conv_state[slots] = torch.where((t >= 0)[:, :, None], x[taken.clamp(min=0)], old)
        return out


def _filter(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns silu((sum of inputs * weight over the W taps) + bias). inputs: [..., W, D]; weight: [W, D]."""
    total = (inputs.float() * weight.float()).sum(-2)
    return silu(total if bias is None else total + bias.float()).to(inputs.dtype)


class SelectiveStateUpdate:
    """Implements the protocol `kernels.ops.SelectiveStateUpdate` with mamba-ssm."""

    def __init__(self) -> None:
        self._update = _function(
            "mamba-ssm", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update", "state_batch_indices"
        )

    def __call__(self, inputs: ScanInputs, weights: ScanWeights, ssm_state: Tensor, state_ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.SelectiveStateUpdate` for the arguments and the result."""
        return self._update(
            ssm_state,
            inputs.u,
            inputs.dt,
            weights.a,
            inputs.b,
            inputs.c,
            D=weights.d,
            z=inputs.z,
            dt_bias=weights.dt_bias,
            dt_softplus=True,
            # mamba-ssm multiplies each slot index by the stride between slots. The product has the dtype of the index.
            # An int32 product would overflow for a large model with a few hundred slots.
            state_batch_indices=state_ids.long(),
        )


def selective_scan() -> NoReturn:
    """Raises KernelUnavailable, because the scan of mamba-ssm cannot continue a sequence from a stored state."""
    raise KernelUnavailable(
        "selective_scan_fn of mamba-ssm takes neither an initial state nor packed sequences, and a chunk needs both"
    )


class AttentionPrefill:
    """Implements the protocol `kernels.ops.AttentionPrefill` with flash-attn, for bfloat16 and float16."""

    def __init__(self) -> None:
        self._attend = _function("flash-attn", "flash_attn", "flash_attn_varlen_func", "block_table")

    def __call__(self, q: Tensor, pages: Pages, query_start: Tensor, max_query_len: int, scale: float) -> Tensor:
        """See the protocol `kernels.ops.AttentionPrefill` for the arguments and the result."""
        require(pages.k.shape[1] % FLASH_PAGE == 0, "pages.k", pages.k, "have pages of a multiple of 256 tokens")
        key_start = torch.nn.functional.pad(pages.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        return self._attend(
            q,
            pages.k,
            pages.v,
            query_start,
            key_start,
            max_query_len,
            pages.max_context_len,
            softmax_scale=scale,
            causal=True,
            block_table=pages.block_tables,
        )


class AttentionDecode:
    """Implements the protocol `kernels.ops.AttentionDecode` with flash-attn, for bfloat16 and float16."""

    def __init__(self) -> None:
        self._attend = _function("flash-attn", "flash_attn", "flash_attn_with_kvcache", "cache_seqlens", "block_table")

    def __call__(self, q: Tensor, pages: Pages, scale: float) -> Tensor:
        """See the protocol `kernels.ops.AttentionDecode` for the arguments and the result."""
        require(pages.k.shape[1] % FLASH_PAGE == 0, "pages.k", pages.k, "have pages of a multiple of 256 tokens")
        return self._attend(
            q[:, None],
            pages.k,
            pages.v,
            cache_seqlens=pages.context_lens,
            block_table=pages.block_tables,
            softmax_scale=scale,
            causal=True,
        )[:, 0]

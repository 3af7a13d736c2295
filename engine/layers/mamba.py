"""Mamba: the selective state space mixer (Gu & Dao 2023) with Jamba's norms of dt, B and C."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.layers.linear import Linear
from engine.layers.norm import RmsNorm
from engine.layers.parameter import Backend, Destination, Unit, Units
from engine.model_config import JambaConfig
from kernels.ops import ScanInputs, ScanWeights


class Mamba:
    """x [T, H] -> [T, H]; `conv_state` [slots, W-1, D] and `ssm_state` float32 [slots, D, S] are this layer's."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        h, d, s, r = config.hidden_size, config.d_inner, config.mamba_d_state, config.mamba_dt_rank
        eps, bias = config.rms_norm_eps, config.mamba_proj_bias
        self._kernels = backend.kernels
        self._x_parts = (r, s, s)
        self._in = Linear(backend, h, {"in_proj": 2 * d}, role="mamba", bias=bias)
        self._conv_weight = backend.empty(config.mamba_d_conv, d)
        self._conv_bias = backend.empty(d) if config.mamba_conv_bias else None
        self._x = Linear(backend, d, {"x_proj": r + 2 * s}, role="other")
        self._dt_norm, self._b_norm, self._c_norm = (RmsNorm(backend, size, eps) for size in self._x_parts)
        # The bias of dt_proj is added in float32 by the scan.
        self._dt = Linear(backend, r, {"dt_proj": d}, role="other")
        # `a` holds A_log until it is packed.
        self._scan_weights = ScanWeights(
            a=backend.empty(d, s, dtype=torch.float32),
            d=backend.empty(d, dtype=torch.float32),
            dt_bias=backend.empty(d, dtype=torch.float32),
        )
        self._out = Linear(backend, d, {"out_proj": h}, role="mamba", bias=bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        u, z = self._in(x).chunk(2, dim=-1)
        u = self._convolve(u, batch, conv_state)
        dt, b, c = self._x(u).split(self._x_parts, dim=-1)
        inputs = ScanInputs(u, self._dt(self._dt_norm(dt)), self._b_norm(b), self._c_norm(c), z)
        return self._out(self._scan(inputs, batch, ssm_state))

    def _convolve(self, x: Tensor, batch: ForwardBatch, state: Tensor) -> Tensor:
        n, weight, bias = batch.num_decodes, self._conv_weight, self._conv_bias
        parts: list[Tensor] = []
        if n:
            parts.append(self._kernels.causal_conv1d_update(x[:n], weight, bias, state, batch.decode_state_ids))
        if batch.prefill is not None:
            parts.append(self._kernels.causal_conv1d(x[n:], weight, bias, state, batch.prefill))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _scan(self, inputs: ScanInputs, batch: ForwardBatch, state: Tensor) -> Tensor:
        n, weights = batch.num_decodes, self._scan_weights
        parts: list[Tensor] = []
        if n:
            decodes = ScanInputs(*(rows[:n] for rows in inputs))
            parts.append(self._kernels.selective_state_update(decodes, weights, state, batch.decode_state_ids))
        if batch.prefill is not None:
            prefills = ScanInputs(*(rows[n:] for rows in inputs))
            parts.append(self._kernels.selective_scan(prefills, weights, state, batch.prefill))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def units(self, prefix: str) -> Units:
        for linear in (self._in, self._x, self._dt, self._out):
            yield linear.unit(prefix)
        # On disk [D, 1, W]; here [W, D], so that a step reads each tap's channels in one run.
        small = {f"{prefix}conv1d.weight": Destination(self._conv_weight.t().unsqueeze(1), "normed")}
        if self._conv_bias is not None:
            small[f"{prefix}conv1d.bias"] = Destination(self._conv_bias, "normed")
        small[f"{prefix}dt_proj.bias"] = Destination(self._scan_weights.dt_bias, "dt_bias")
        small[f"{prefix}D"] = Destination(self._scan_weights.d, "one")
        yield Unit(small)
        yield Unit({f"{prefix}A_log": Destination(self._scan_weights.a, "a_log")}, self._pack_a)
        for name, norm in (("dt", self._dt_norm), ("b", self._b_norm), ("c", self._c_norm)):
            yield norm.unit(f"{prefix}{name}_layernorm")

    def _pack_a(self) -> None:
        self._scan_weights.a.exp_().neg_()

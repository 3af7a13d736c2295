"""Mamba: the selective state space mixer (Gu & Dao 2023) with Jamba's norms of dt, B and C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.norm import RmsNorm
from jamba_server.engine.layers.parameter import Backend, Destination, Unit, Units
from jamba_server.engine.layers.row_linear import row_linear
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.pieces import Piece
from jamba_server.kernels.ops import MambaWeights, ScanInputs, ScanWeights, Segments


class Mamba:
    """Maps hidden states [T, H] to outputs of the same shape. The arrays `conv_state` [slots, W-1, D] and `ssm_state`
    float32 [slots, D, S] hold this layer's states in all slots, where W stands for d_conv, D for d_inner and S for
    d_state. The slots of the batch's sequences are updated in place. Ranks divide the channels D among each other."""

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        h, s, r = config.hidden_size, config.mamba_d_state, config.mamba_dt_rank
        self._own = own = backend.parts.channels
        d, eps, bias = len(own), config.rms_norm_eps, config.mamba_proj_bias
        self._kernels, self._is_fused = backend.kernels, not backend.divides_sums
        self._x_parts = (r, s, s)
        halves = {"in_proj": Piece.of(own, 0, times=2)}
        self._in = Linear(backend, h, {"in_proj": 2 * d}, role="mamba", bias=bias, pieces=halves)
        self._conv_weight = backend.empty(config.mamba_d_conv, d)
        self._conv_bias = backend.empty(d) if config.mamba_conv_bias else None
        self._x = row_linear(backend, own, "x_proj", r + 2 * s, role="other")
        self._dt_norm, self._b_norm, self._c_norm = (RmsNorm(backend, size, eps) for size in self._x_parts)
        # This matrix product has no bias, because the selective scan adds the bias of dt_proj in float32.
        self._dt = Linear(backend, r, {"dt_proj": d}, role="other", pieces={"dt_proj": Piece.of(own, 0)})
        # The field `a` holds A_log until the method `_pack` replaces A_log by A = -exp(A_log).
        self._scan_weights = ScanWeights(
            a=backend.empty(d, s, dtype=torch.float32),
            d=backend.empty(d, dtype=torch.float32),
            dt_bias=backend.empty(d, dtype=torch.float32),
        )
        self._out = row_linear(backend, own, "out_proj", h, role="mamba", bias=bias)
        self._eps = eps
        self._decode_weights: Any = None  # set by `_pack`

    def __call__(self, x: Tensor, batch: ForwardBatch, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        xz, n = self._in(x), batch.num_decodes
        parts: list[Tensor] = []
        if batch.decodes is not None:
            ids = batch.decodes.state_ids
            parts.append(self._decode(xz[:n], conv_state, ssm_state, ids))
        if batch.prefills is not None:
            parts.append(self._prefill(xz[n:], batch.prefills.segments, conv_state, ssm_state))
        return self._out(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _prefill(self, xz: Tensor, segments: Segments, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        u, z = xz.chunk(2, dim=-1)
        u = self._kernels.causal_conv1d(u, self._conv_weight, self._conv_bias, conv_state, segments)
        return self._kernels.selective_scan(self._scan_inputs(u, z), self._scan_weights, ssm_state, segments)

    def _decode(self, xz: Tensor, conv_state: Tensor, ssm_state: Tensor, ids: Tensor) -> Tensor:
        if self._is_fused:
            return self._kernels.mamba_decode(xz, self._decode_weights, conv_state, ssm_state, ids)
        u, z = xz.chunk(2, dim=-1)
        u = self._kernels.causal_conv1d_update(u, self._conv_weight, self._conv_bias, conv_state, ids)
        return self._kernels.selective_state_update(self._scan_inputs(u, z), self._scan_weights, ssm_state, ids)

    def _scan_inputs(self, u: Tensor, z: Tensor) -> ScanInputs:
        dt, b, c = self._x(u).split(self._x_parts, dim=-1)
        return ScanInputs(u, self._dt(self._dt_norm(dt)), self._b_norm(b), self._c_norm(c), z)

    def units(self, prefix: str) -> Units:
        yield self._in.unit(prefix)
        yield self._out.unit(prefix)
        yield Unit(self._between(prefix), self._pack)

    def _between(self, prefix: str) -> dict[str, Destination]:
        """Returns a map from the names of the weights used between in_proj and out_proj to the memory that the weight
        loader fills with these weights."""
        # The convolution's weight is [D, 1, W] on disk, but [W, D] in memory: for each of the W taps, the weights of
        # all channels are contiguous.
        weight, rows = self._conv_weight.t().unsqueeze(1), Piece.of(self._own, 0)
        destinations = {f"{prefix}conv1d.weight": Destination(weight, "normed", rows)}
        if self._conv_bias is not None:
            destinations[f"{prefix}conv1d.bias"] = Destination(self._conv_bias, "normed", rows)
        for linear in (self._x, self._dt):
            destinations.update(linear.unit(prefix).destinations)
        for name, norm in (("dt", self._dt_norm), ("b", self._b_norm), ("c", self._c_norm)):
            destinations.update(norm.unit(f"{prefix}{name}_layernorm").destinations)
        destinations[f"{prefix}dt_proj.bias"] = Destination(self._scan_weights.dt_bias, "dt_bias", rows)
        destinations[f"{prefix}A_log"] = Destination(self._scan_weights.a, "a_log", rows)
        destinations[f"{prefix}D"] = Destination(self._scan_weights.d, "one", rows)
        return destinations

    def _pack(self) -> None:
        self._scan_weights.a.exp_().neg_()
        for linear in (self._x, self._dt):
            linear.pack()
        if not isinstance(self._x, Linear):
            return
        weights = MambaWeights(
            conv_weight=self._conv_weight,
            conv_bias=self._conv_bias,
            x_proj=self._x.weight,
            dt_norm=self._dt_norm.weight,
            b_norm=self._b_norm.weight,
            c_norm=self._c_norm.weight,
            eps=self._eps,
            dt_proj=self._dt.weight,
            scan=self._scan_weights,
        )
        self._decode_weights = self._kernels.mamba_decode.pack(weights)

"""For decode steps, this module computes the part of a Mamba layer between in_proj and out_proj by calling four ops."""

from __future__ import annotations

from torch import Tensor

from jamba_server.kernels.ops import CausalConv1dUpdate, Linear, MambaWeights, RmsNorm, ScanInputs, SelectiveStateUpdate


class MambaDecode:
    """Implements the protocol `kernels.ops.MambaDecode` by calling the kernels of four other ops."""

    def __init__(
        self,
        causal_conv1d_update: CausalConv1dUpdate,
        linear: Linear,
        rms_norm: RmsNorm,
        selective_state_update: SelectiveStateUpdate,
    ) -> None:
        self._convolve, self._linear = causal_conv1d_update, linear
        self._rms_norm, self._update = rms_norm, selective_state_update

    def pack(self, weights: MambaWeights) -> MambaWeights:
        """See the protocol `kernels.ops.MambaDecode` for the arguments and the result."""
        return weights

    def __call__(
        self, xz: Tensor, weights: MambaWeights, conv_state: Tensor, ssm_state: Tensor, state_ids: Tensor
    ) -> Tensor:
        """See the protocol `kernels.ops.MambaDecode` for the arguments and the result."""
        w = weights
        x, z = xz.chunk(2, dim=-1)
        u = self._convolve(x, w.conv_weight, w.conv_bias, conv_state, state_ids)
        norms = (w.dt_norm, w.b_norm, w.c_norm)
        projected = self._linear(u, w.x_proj).split([len(norm) for norm in norms], dim=-1)
        dt, b, c = (self._rms_norm(y, norm, w.eps)[0] for y, norm in zip(projected, norms, strict=True))
        inputs = ScanInputs(u, self._linear(dt, w.dt_proj), b, c, z)
        return self._update(inputs, w.scan, ssm_state, state_ids)

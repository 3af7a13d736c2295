"""Builds scan.cpp with g++ and wraps its kernels as differentiable torch functions, for training on a CPU.

Activations are contiguous bfloat16 tensors [batch, time, width]. Parameters are float32. Every width must be a multiple
of 16.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("scan.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
CHUNK, LANES, STATES = 32, 16, 16  # the values of the constants CHUNK, W and N in scan.cpp
EPSILON = 1e-6
LOSS_ROWS = 2048  # logits are computed for this number of tokens at a time, to save memory


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the library of compiled kernels.

    The library is built once for each source and set of compiler flags, in the folder for temporary files.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"jamba-demo-{digest}.so"
    if not built.exists():
        partial = built.with_suffix(f".{id(digest)}.partial")
        subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(partial)], check=True)
        partial.replace(built)
    return ctypes.CDLL(str(built))


def call(name: str, *arguments: Tensor | float) -> None:
    """Calls the compiled kernel `name`. A tensor is passed as its address, an int as int64_t and a float as float."""
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            values.append(ctypes.c_int64(argument))
        else:
            values.append(ctypes.c_float(argument))
    getattr(library(), name)(*values)


class Convolution(torch.autograd.Function):
    """Mamba's causal convolution with SiLU.

    The inputs are xz [b, t, 2d], weight [d, 4] and bias [d]. The outputs are silu(convolution of xz's first half) and
    xz's second half, both [b, t, d].
    """

    @staticmethod
    def forward(ctx: Any, xz: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        batch, time, width = xz.shape
        taps = weight.t().contiguous()
        u, z = (xz.new_empty(batch, time, width // 2) for _ in range(2))
        call("conv_forward", xz, taps, bias, u, z, batch, time, width // 2)
        ctx.save_for_backward(xz, taps, bias)
        return u, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        xz, taps, bias = ctx.saved_tensors
        batch, time, width = xz.shape
        gu, gz = (gradient.contiguous() for gradient in gradients)
        gxz, gw, gb = torch.empty_like(xz), torch.zeros_like(taps), torch.zeros_like(bias)
        call("conv_backward", xz, taps, bias, gu, gz, gxz, gw, gb, batch, time, width // 2)
        return gxz, gw.t(), gb


class Scan(torch.autograd.Function):
    """Mamba's selective scan with time step, skip connection and gate.

    The output is y_t = (h_t C_t + skip u_t) silu(z_t), with h_t = exp(s_t A) h_(t-1) + s_t u_t B_t and
    s_t = softplus(dt_t + bias). The shapes are u, dt, z [b, t, d]; B, C [b, t, 16]; A [d, 16]; skip, bias [d].
    All entries of A must be below 0.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        u, dt, z, b, c, a, skip, bias = (tensor.contiguous() for tensor in inputs)
        batch, time, width = u.shape
        a2 = (a * math.log2(math.e)).t().contiguous()
        y = torch.empty_like(u)
        states = a.new_empty(batch, -(-time // CHUNK), width * STATES)
        call("scan_forward", u, dt, z, b, c, a2, skip, bias, y, states, batch, time, width)
        ctx.save_for_backward(u, dt, z, b, c, a2, skip, bias, states)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        u, dt, z, b, c, a2, skip, bias, states = ctx.saved_tensors
        gu, gdt, gz = torch.empty_like(u), torch.empty_like(u), torch.empty_like(u)
        gb, gc = (torch.empty_like(b, dtype=torch.float32) for _ in range(2))
        ga, gskip, gbias = torch.zeros_like(a2), torch.zeros_like(skip), torch.zeros_like(bias)
        results = (gu, gdt, gz, gb, gc, ga, gskip, gbias)
        inputs = (u, dt, z, b, c, a2, skip, bias, states, gradients[0].contiguous())
        call("scan_backward", *inputs, *results, *u.shape)
        return gu, gdt, gz, gb.to(b.dtype), gc.to(c.dtype), ga.t(), gskip, gbias


class Norm(torch.autograd.Function):
    """RMSNorm over the last axis. The rows of the input x may be slices of wider rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        ctx.save_for_backward(x, weight)
        call("norm_forward", x, weight, y, EPSILON, y[..., 0].numel(), y.shape[-1], x.stride(-2))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        gx, gw = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(weight)
        rows = gx[..., 0].numel(), gx.shape[-1], x.stride(-2)
        call("norm_backward", x, weight, gradients[0].contiguous(), gx, gw, EPSILON, *rows)
        return gx, gw


class SwiGLU(torch.autograd.Function):
    """SwiGLU: turns an array [rows, 2f] into an array [rows, f], where each row is silu(first half of the input row) *
    (second half of the input row)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        y = gate_up.new_empty(rows, width // 2)
        call("swiglu_forward", gate_up, y, rows, width // 2)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gx = torch.empty_like(gate_up)
        call("swiglu_backward", gate_up, gradients[0].contiguous(), gx, gate_up.shape[0], gate_up.shape[1] // 2)
        return gx


class Loss(torch.autograd.Function):
    """Computes the mean cross entropy in nats over the rows of x [rows, h]. The logits are the product of x and the
    transpose of the matrix head [vocab, h]. Rows whose target is below 0 are left out of the mean.

    The forward pass also computes the gradients, so that the logits of all rows need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        weight = head.to(x.dtype)
        count = int((targets >= 0).sum())
        losses, gx, gw = torch.empty(len(x)), torch.empty_like(x), torch.zeros_like(head)
        for start in range(0, len(x), LOSS_ROWS):
            part = slice(start, start + LOSS_ROWS)
            logits = x[part] @ weight.t()
            call("cross_entropy", logits, targets[part], losses[part], 1.0 / count, *logits.shape)
            gx[part] = logits @ weight
            gw += logits.t() @ x[part]
        ctx.save_for_backward(gx, gw)
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gx, gw = ctx.saved_tensors
        return gx * gradients[0].to(gx.dtype), gw * gradients[0], None


class Dispatch(torch.autograd.Function):
    """Copies each row of x [rows, h] k times, once for each expert that is chosen for the row. The copies, an array
    [rows * k, h], are sorted by expert.

    `order` is the permutation of the (row, choice) pairs that sorts them by expert.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = choices
        return x[order // choices]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient[inverse].view(-1, ctx.choices, gradient.shape[-1]).sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Undoes the permutation of the class `Dispatch`: puts the experts' outputs into the order of the rows, as an array
    [rows, k, h]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse].view(-1, choices, y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return gradients[0].reshape(len(order), -1)[order], None, None, None

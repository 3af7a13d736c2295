"""Every op straight from its formula: one sequence, float64 numpy, loops. Shares nothing with the product."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        rms = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        for i, value in enumerate(row):
            out[t, i] = weight[i] * (value / rms)
    return out


def causal_conv1d(x: Array, weight: Array, bias: Array | None, history: Array) -> tuple[Array, Array]:
    """x [L, D], weight [W, D], history [W-1, D], oldest first. Returns (output [L, D], the next history)."""
    width = len(weight)
    line = [*history, *x]
    out = np.zeros_like(x)
    for t in range(len(x)):
        for d in range(x.shape[1]):
            total = 0.0 if bias is None else bias[d]
            for tap in range(width):
                total += line[t + tap][d] * weight[tap, d]
            out[t, d] = silu(total)
    return out, np.array(line[len(line) - (width - 1) :])


class Scan(NamedTuple):
    u: Array
    dt: Array
    b: Array
    c: Array
    z: Array


def selective_scan(inputs: Scan, a: Array, d: Array, dt_bias: Array, state: Array) -> tuple[Array, Array]:
    """inputs as in kernels.ops.ScanInputs, a and state [D, S]. Returns (output [L, D], the next state)."""
    h = state.copy()
    out = np.zeros_like(inputs.u)
    for t in range(len(inputs.u)):
        for i in range(inputs.u.shape[1]):
            dt = np.logaddexp(0, inputs.dt[t, i] + dt_bias[i])
            y = d[i] * inputs.u[t, i]
            for s in range(a.shape[1]):
                h[i, s] = math.exp(dt * a[i, s]) * h[i, s] + dt * inputs.u[t, i] * inputs.b[t, s]
                y += h[i, s] * inputs.c[t, s]
            out[t, i] = y * silu(inputs.z[t, i])
    return out, h


def attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """The last len(q) rows of a sequence. q [L, Q, Z], k and v [context, G, Z]. Returns [L, Q, Z]."""
    length, heads, _ = q.shape
    out = np.zeros_like(q)
    for t in range(length):
        visible = len(k) - length + t + 1
        for head in range(heads):
            kv_head = head // (heads // k.shape[1])
            scores = np.array([q[t, head] @ k[j, kv_head] * scale for j in range(visible)])
            weights = np.exp(scores - scores.max())
            out[t, head] = (weights / weights.sum()) @ v[:visible, kv_head]
    return out


def route_experts(logits: Array, top_k: int) -> tuple[Array, Ints]:
    weights = np.zeros((len(logits), top_k))
    ids = np.zeros((len(logits), top_k), dtype=np.int64)
    for t, row in enumerate(logits):
        exponentials = [math.exp(value - max(row)) for value in row]
        ranking = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        for rank, expert in enumerate(ranking):
            weights[t, rank] = exponentials[expert] / sum(exponentials)
            ids[t, rank] = expert
    return weights, ids


def run_experts(x: Array, gate_up: Array, down: Array, weights: Array, ids: Ints) -> Array:
    out = np.zeros_like(x)
    size = gate_up.shape[1] // 2
    for t in range(len(x)):
        for weight, expert in zip(weights[t], ids[t], strict=True):
            gate, up = gate_up[expert, :size] @ x[t], gate_up[expert, size:] @ x[t]
            out[t] += weight * (down[expert] @ (silu(gate) * up))
    return out

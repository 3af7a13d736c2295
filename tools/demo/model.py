"""Implements Jamba as a torch module for training on a CPU, with bfloat16 activations and float32 parameters.

The equations are those of transformers' modeling_jamba.py: router weights are not renormalised, the Mamba mixer has
three norms, and there is no position encoding. Two matrices that multiply the same input are stored as one parameter
[2, out, in]. The method `tensors` gives the parameters in the layout of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cpu_kernels import Combine, Convolution, Dispatch, Loss, Norm, Scan, SwiGLU
from torch import Tensor, nn

# The training loss includes the auxiliary loss multiplied by this factor. The auxiliary loss balances the load of the
# experts.
BALANCE = 0.01


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model. The fields have the same names as the keys in config.json.

    The Mamba state has 16 entries per channel, and the convolution has 4 taps. Both numbers are fixed.
    """

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    mamba_dt_rank: int = 16
    mamba_expand: int = 2

    @property
    def channels(self) -> int:
        return self.mamba_expand * self.hidden_size

    def is_attention(self, layer: int) -> bool:
        return layer % self.attn_layer_period == self.attn_layer_offset

    def is_moe(self, layer: int) -> bool:
        return layer % self.expert_layer_period == self.expert_layer_offset


def matrix(*shape: int) -> nn.Parameter:
    """Returns a matrix of uniform random weights, scaled so that the outputs of the matrix have a third of the variance
    of its inputs."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def ones(size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies x by each of the matrices [out, in] in the array `weight` [..., out, in], and concatenates the
    products along the last axis."""
    return F.linear(x, weight.flatten(0, -2).to(x.dtype))


class Mamba(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, width, self.rank = shape.hidden_size, shape.channels, shape.mamba_dt_rank
        self.in_proj = matrix(2, width, hidden)
        self.conv = nn.Parameter(torch.empty(width, 4).uniform_(-0.5, 0.5))
        self.conv_bias = zeros(width)
        self.x_proj = matrix(self.rank + 32, width)
        self.dt_proj = matrix(width, self.rank)
        step = torch.exp(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(step)))
        self.a_log = nn.Parameter(torch.log(torch.arange(1.0, 17.0)).repeat(width, 1))
        self.d = ones(width)
        self.out_proj = zeros(hidden, width)
        self.dt_norm, self.b_norm, self.c_norm = ones(self.rank), ones(16), ones(16)

    def forward(self, x: Tensor) -> Tensor:
        u, z = Convolution.apply(linear(x, self.in_proj), self.conv, self.conv_bias)
        dt, b, c = linear(u, self.x_proj).split([self.rank, 16, 16], -1)
        dt = linear(Norm.apply(dt, self.dt_norm), self.dt_proj)
        b, c = Norm.apply(b, self.b_norm), Norm.apply(c, self.c_norm)
        return linear(Scan.apply(u, dt, z, b, c, -self.a_log.exp(), self.d, self.dt_bias), self.out_proj)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "in_proj.weight", self.in_proj.flatten(0, 1)
        yield "conv1d.weight", self.conv[:, None]
        yield "conv1d.bias", self.conv_bias
        yield "x_proj.weight", self.x_proj
        yield "dt_proj.weight", self.dt_proj
        yield "dt_proj.bias", self.dt_bias
        yield "A_log", self.a_log
        yield "D", self.d
        yield "out_proj.weight", self.out_proj
        yield "dt_layernorm.weight", self.dt_norm
        yield "b_layernorm.weight", self.b_norm
        yield "c_layernorm.weight", self.c_norm


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.heads, self.groups, self.size = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            hidden // shape.num_attention_heads,
        )
        self.q_proj, self.kv_proj = matrix(hidden, hidden), matrix(2, self.groups * self.size, hidden)
        self.o_proj = zeros(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, hidden = x.shape
        q = linear(x, self.q_proj).view(batch, time, self.heads, self.size).transpose(1, 2)
        kv = linear(x, self.kv_proj).view(batch, time, 2, self.groups, self.size)
        k, v = (part.repeat_interleave(self.heads // self.groups, 2).transpose(1, 2) for part in kv.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(y.transpose(1, 2).reshape(batch, time, hidden), self.o_proj)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "q_proj.weight", self.q_proj
        yield "k_proj.weight", self.kv_proj[0]
        yield "v_proj.weight", self.kv_proj[1]
        yield "o_proj.weight", self.o_proj


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = matrix(2, shape.intermediate_size, shape.hidden_size)
        self.down = zeros(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return linear(SwiGLU.apply(linear(x, self.gate_up)), self.down)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "gate_proj.weight", self.gate_up[0]
        yield "up_proj.weight", self.gate_up[1]
        yield "down_proj.weight", self.down


class MoE(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = matrix(shape.num_experts, shape.hidden_size)
        self.experts = nn.ModuleList(MLP(shape) for _ in range(shape.num_experts))
        self.choices = shape.num_experts_per_tok
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        probabilities = linear(x, self.router).float().softmax(-1)
        weights, chosen = probabilities.topk(self.choices, -1)
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=len(self.experts))
        self.balance = (probabilities.mean(0) * counts / len(x)).sum() * len(self.experts) / self.choices
        order = flat.argsort()
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        parts = Dispatch.apply(x, order, inverse, self.choices).split(counts.tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        combined = Combine.apply(outputs, order, inverse, self.choices)
        return (combined * weights.to(x.dtype)[..., None]).sum(1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "router.weight", self.router
        for number, expert in enumerate(self.experts):
            assert isinstance(expert, MLP)
            for name, tensor in expert.tensors():
                yield f"experts.{number}.{name}", tensor


class Layer(nn.Module):
    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        self.mixer = Attention(shape) if shape.is_attention(number) else Mamba(shape)
        self.feed_forward = MoE(shape) if shape.is_moe(number) else MLP(shape)
        self.input_norm, self.pre_ff_norm = ones(shape.hidden_size), ones(shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(Norm.apply(x, self.input_norm))
        inner = Norm.apply(x, self.pre_ff_norm).flatten(0, 1)
        return x + self.feed_forward(inner).view_as(x)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        mixer = "self_attn" if isinstance(self.mixer, Attention) else "mamba"
        yield "input_layernorm.weight", self.input_norm
        yield "pre_ff_layernorm.weight", self.pre_ff_norm
        for name, tensor in self.mixer.tensors():
            yield f"{mixer}.{name}", tensor
        for name, tensor in self.feed_forward.tensors():
            yield f"feed_forward.{name}", tensor


class Jamba(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.5)
        self.layers = nn.ModuleList(Layer(shape, number) for number in range(shape.num_hidden_layers))
        self.norm = ones(shape.hidden_size)
        self.head = zeros(shape.vocab_size, shape.hidden_size)

    def hidden(self, ids: Tensor) -> Tensor:
        """Returns the hidden states after the model's final norm as a bfloat16 array [batch, time, hidden]. The token
        ids are the array `ids` [batch, time]."""
        x = F.embedding(ids, self.embedding).bfloat16()
        for layer in self.layers:
            x = layer(x)
        return Norm.apply(x, self.norm)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two losses: the mean cross entropy in nats, and the balance loss of the experts. The balance loss is
        1 if all experts have the same load.

        Targets [batch, time] below 0 are left out.
        """
        loss = Loss.apply(self.hidden(ids).flatten(0, 1), self.head, targets.flatten())
        moe = [layer.feed_forward.balance for layer in self.layers if isinstance(layer.feed_forward, MoE)]
        return loss, torch.stack(moe).mean()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters with the names and shapes that they have in a checkpoint of Hugging Face's format."""
        yield "model.embed_tokens.weight", self.embedding
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            for name, tensor in layer.tensors():
                yield f"model.layers.{number}.{name}", tensor
        yield "model.final_layernorm.weight", self.norm
        yield "lm_head.weight", self.head

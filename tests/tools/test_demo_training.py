"""The training kernels of the demonstration model against autograd through plain torch, in float32."""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "demo"
MODULES = ("cpu_kernels", "model", "optimizer", "data", "train_tokenizer")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the training kernels are built by g++")
BATCH, TIME, WIDTH = 2, 70, 32  # three chunks of the scan, the last of them short
ROUNDING = 0.008  # relative, of a bfloat16 result or gradient


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)


def activation(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


def parameter(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def distance(left: Tensor, right: Tensor) -> float:
    return float((left.detach().float() - right.detach().float()).norm() / right.detach().float().norm())


def agree(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Checks that two functions have equal values and, for random gradients of the result, equal gradients."""
    ours, theirs = kernel(*inputs), reference(*(tensor.float() for tensor in inputs))
    assert distance(ours, theirs) < ROUNDING
    weight = torch.randn_like(theirs).bfloat16().float()
    gradients = torch.autograd.grad((ours.float() * weight).sum(), inputs)
    expected = torch.autograd.grad((theirs * weight).sum(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.shape == wanted.shape
        assert distance(gradient, wanted) < ROUNDING


def scan(u: Tensor, dt: Tensor, z: Tensor, b: Tensor, c: Tensor, a: Tensor, skip: Tensor, bias: Tensor) -> Tensor:
    """Computes the recurrence, one token at a time."""
    step = F.softplus(dt + bias)
    state, outputs = torch.zeros(BATCH, WIDTH, 16), list[Tensor]()
    for t in range(TIME):
        state = torch.exp(step[:, t, :, None] * a) * state + (step[:, t] * u[:, t])[..., None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return (torch.stack(outputs, 1) + skip * u) * F.silu(z)


@needs_compiler
def test_scan(load: Callable[[str], ModuleType]) -> None:
    activations = (
        *(activation(BATCH, TIME, WIDTH) for _ in range(3)),
        *(activation(BATCH, TIME, 16) for _ in range(2)),
    )
    a = (-3 * torch.rand(WIDTH, 16)).requires_grad_()
    agree(load("cpu_kernels").Scan.apply, scan, (*activations, a, parameter(WIDTH), parameter(WIDTH)))


@needs_compiler
def test_convolution(load: Callable[[str], ModuleType]) -> None:
    function = load("cpu_kernels").Convolution.apply

    def kernel(*inputs: Tensor) -> Tensor:
        return torch.cat(function(*inputs), -1)

    def reference(xz: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, z = xz.chunk(2, -1)
        mixed = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=WIDTH).mT
        return torch.cat([F.silu(mixed), z], -1)

    agree(kernel, reference, (activation(BATCH, TIME, 2 * WIDTH), parameter(WIDTH, 4), parameter(WIDTH)))


@needs_compiler
def test_norm_of_a_slice(load: Callable[[str], ModuleType]) -> None:
    function = load("cpu_kernels").Norm.apply

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        return function(x[..., 16:32], weight)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x[..., 16:32], (16,), weight, 1e-6)

    agree(kernel, reference, (activation(BATCH, TIME, 48), parameter(16)))


@needs_compiler
def test_swiglu(load: Callable[[str], ModuleType]) -> None:
    def reference(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    agree(load("cpu_kernels").SwiGLU.apply, reference, (activation(50, 64),))


@needs_compiler
def test_loss_leaves_out_negative_targets(load: Callable[[str], ModuleType]) -> None:
    targets = torch.randint(0, 64, (50,))
    targets[3] = -1
    function = load("cpu_kernels").Loss.apply

    def kernel(x: Tensor, head: Tensor) -> Tensor:
        return function(x, head, targets)

    def reference(x: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy(x @ head.t(), targets, ignore_index=-1)

    agree(kernel, reference, (activation(50, 32), (parameter(64, 32).detach() / 6).requires_grad_()))


@needs_compiler
def test_experts_equal_the_sum_over_all_of_them(load: Callable[[str], ModuleType]) -> None:
    module = load("model")
    layer = module.MoE(module.Shape(hidden_size=32, intermediate_size=16, num_experts=4))
    for expert in layer.experts:
        torch.nn.init.normal_(expert.down)
    x = activation(40, 32)
    probabilities = F.linear(x, layer.router.bfloat16()).float().softmax(-1)
    kept = probabilities >= probabilities.topk(2).values[:, 1:]
    dense = sum((probabilities * kept)[:, i, None] * layer.experts[i](x).float() for i in range(4))
    assert isinstance(dense, Tensor)
    output = layer(x)
    assert distance(output, dense) < 2 * ROUNDING
    weight = torch.randn(40, 32)
    inputs = (x, layer.router, layer.experts[2].gate_up, layer.experts[0].down)
    ours = torch.autograd.grad((output.float() * weight).sum(), inputs)
    theirs = torch.autograd.grad((dense * weight).sum(), inputs)
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert distance(gradient, wanted) < 2 * ROUNDING


def test_muon_makes_singular_values_even(load: Callable[[str], ModuleType]) -> None:
    gradient = torch.randn(3, 24, 40) * torch.logspace(0, -1, 24)[:, None]
    values = torch.linalg.svdvals(load("optimizer").orthogonalised(gradient).float())
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.4


def test_requests_are_made_of_words_of_the_story(load: Callable[[str], ModuleType]) -> None:
    module = load("data")
    story = "Once there was a dog. The dog had a ball. The ball was red. The dog ran after the ball."
    requests = {module.request(story, random.Random(seed)) for seed in range(60)}
    assert "Tell me a story about a dog and a ball." in requests
    allowed = {"a dog", "a ball", "a dog and a ball", "a ball and a dog"}
    shapes = {text.format(subject) for text in module.REQUESTS for subject in allowed}
    assert requests <= shapes | set(module.OPEN_REQUESTS)

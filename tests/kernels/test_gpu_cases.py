"""What `benchmarks.gpu_check` runs on a GPU, at a tiny shape: the reference against itself, and triton interpreted."""

from __future__ import annotations

import itertools

import torch

from benchmarks.gpu_cases import Maker, Shape, check
from benchmarks.gpu_check import TOLERANCE, loaded
from kernels.table import OPS, implementations
from kernels.triton import interpreted

TINY = Shape(name="tiny", h=24, f=20, d=40, heads=4, kv_heads=2, z=16, experts=5, v=300, s=8)


def test_triton_and_the_reference_agree_on_every_case() -> None:
    maker = Maker(TINY, torch.device("cpu"))
    groups = [maker.rows(5), maker.recurrence(3, 1), maker.recurrence(2, 7), maker.storage(32, 2), maker.sampling(3)]
    cases = [*itertools.chain(*groups), *maker.attention(2, 1, 40), *maker.attention(2, 5, 40)]
    assert {case.op for case in cases} == set(OPS) - {"mamba_decode"}, "that one is made of others"
    for case in cases:
        reference = implementations(case.op, "cpu")[-1].load()
        ours = loaded(case.op)[0] if interpreted() else reference
        assert check(case, ours, reference) <= TOLERANCE, case.label
        assert case.bytes_moved(ours(*case.prepare(ours))) > 0


def test_an_error_is_found() -> None:
    case = next(Maker(TINY, torch.device("cpu")).rows(5))
    norm = implementations(case.op, "cpu")[-1].load()
    assert check(case, lambda *args: tuple(part * 1.05 for part in norm(*args)), norm) > TOLERANCE
    assert not check(case, lambda *args: tuple(part * torch.nan for part in norm(*args)), norm) <= TOLERANCE

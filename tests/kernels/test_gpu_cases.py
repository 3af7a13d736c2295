"""What `benchmarks.gpu_check` runs on a GPU, at a tiny shape: the reference against itself, and triton interpreted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu_cases import Case, Maker, Shape, check
from kernels.table import OPS, select
from kernels.triton import interpreted

TINY = Shape(name="tiny", h=24, f=20, d=40, heads=4, kv_heads=2, z=16, experts=5, r=6, v=300, s=8)
REFERENCE = select("cpu", {"all": "reference"})


def cases() -> list[Case]:
    maker = Maker(TINY, torch.device("cpu"))
    groups = [maker.rows(5), maker.experts(5), maker.recurrence(3, 1), maker.recurrence(2, 7), maker.storage(32, 2)]
    return [*itertools.chain(*groups), *maker.sampling(3), *maker.attention(2, 1, 40), *maker.attention(2, 5, 40)]


def test_there_are_cases_of_every_op_and_they_agree_with_the_reference() -> None:
    found = cases()
    assert {case.op for case in found} == set(OPS)
    ours = select("cuda", {"all": "triton"}) if interpreted() else REFERENCE
    for case in found:
        assert check(case, ours, REFERENCE) <= case.tolerance, case.label
        assert case.bytes_moved(getattr(ours, case.op)(*case.prepare(ours))) > 0


@pytest.mark.parametrize("factor", [1.05, torch.nan])
def test_an_error_is_found(factor: float) -> None:
    [case] = [case for case in cases() if case.op == "rms_norm"]
    norm: Any = REFERENCE.rms_norm
    wrong = replace(REFERENCE, rms_norm=lambda *args: tuple(part * factor for part in norm(*args)))
    assert not check(case, wrong, REFERENCE) <= case.tolerance

"""Kernels in float32, compiled without a GPU: the results in `benchmarks` are of bfloat16 alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.triton import interpreted

if interpreted():
    pytest.skip("it is for triton's compiler", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks.gpu import codegen
from benchmarks.gpu.codegen import MAX_SPILLED, Resources, attention_calls, compile_for, problems, product_calls, record


def of_float32(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def compiled(monkeypatch: pytest.MonkeyPatch, target: int) -> list[Resources]:
    monkeypatch.setattr(codegen, "empty", of_float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(target, 10))
    codegen.capability.cache_clear()
    try:
        calls = [call for call in attention_calls(20, 1, 256) if call[0] != "write_kv"]
        calls += [call for call in product_calls("int4") if call[0] == "linear, int4, 1"]
        launches = [launch for op, call in calls for launch in record(op, call)]
    finally:
        codegen.capability.cache_clear()
    return [compile_for(launch, target) for launch in launches]


def test_float32_fits_into_the_least_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may spill, but heads of 256 and int4 weights can be launched; decode adds as prefill does."""
    found = compiled(monkeypatch, 86)
    assert {r.kernel for r in found} == {"prefill_kernel", "decode_kernel", "merge_kernel", "linear_kernel"}
    monkeypatch.setattr(codegen, "TWINS", {})  # of other ops
    assert problems([replace(r, spilled=0) for r in found]) == []


def test_what_does_not_fit_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "TWINS", {})
    fits = Resources("some op", "some_kernel", "sm_100", 255, 0, 227 << 10, 4, "", (), 512)
    assert problems([fits]) == []
    for wrong in (
        replace(fits, spilled=MAX_SPILLED + 1),
        replace(fits, shared=fits.shared + 1),
        replace(fits, tensor_columns=513),
    ):
        assert len(problems([wrong])) == 1

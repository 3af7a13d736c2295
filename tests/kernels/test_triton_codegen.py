"""Kernels in float32, compiled without a GPU: the results in `benchmarks` are of bfloat16 alone."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.triton import interpreted

if interpreted():
    pytest.skip("it is for triton's compiler", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from triton.runtime import driver

from benchmarks.gpu import calls, codegen
from benchmarks.gpu.calls import attention_calls, product_calls, row_calls
from benchmarks.gpu.codegen import MAX_SPILLED, Compiling, Resources, compile_for, problems, record, waits_first
from jamba_server.kernels.triton import launch


def of_float32(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def compiled(monkeypatch: pytest.MonkeyPatch, target: int) -> list[Resources]:
    monkeypatch.setattr(calls, "empty", of_float32)
    monkeypatch.setattr(driver, "_active", Compiling())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(target, 10))
    codegen.capability.cache_clear()
    try:
        chosen = [call for call in attention_calls(20, 1, 256) if call[0] != "write_kv"]
        chosen += [call for call in product_calls("int4") if call[0] == "linear, int4, 1"]
        launches = [launch for op, call in chosen for launch in record(op, call)]
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
        replace(fits, waits=False),
    ):
        assert len(problems([wrong])) == 1


@pytest.mark.parametrize("target", [80, 90])
def test_a_kernel_waits_before_it_reads_where_it_may_start_early(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launch is that of a dependent where DEPENDENT is set, and on no GPU that cannot do it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: divmod(target, 10))
    monkeypatch.setattr(driver, "_active", Compiling())
    codegen.capability.cache_clear()
    try:
        [(op, call)] = [found for found in row_calls() if found[0] == "silu_and_mul"]
        [plain] = record(op, call)
        monkeypatch.setattr(launch, "DEPENDENT", True)
        [dependent] = record(op, call)
    finally:
        codegen.capability.cache_clear()
    assert "launch_pdl" not in plain.options
    assert dependent.options.get("launch_pdl", False) == (target >= 90)
    assert compile_for(dependent, target).waits


def test_a_wait_after_an_access_is_found() -> None:
    wait, load = "griddepcontrol.wait;", "@%p1 ld.global.v4.b32 {%r1}, [%rd1];"
    assert waits_first(f"{wait}\n{load}")
    assert not waits_first(f"{load}\n{wait}")
    assert not waits_first(load)


def test_every_kernel_follows_the_one_before_it() -> None:
    """The first statement of each is the call of `follow`, also in kernels that no call above compiles."""
    found: list[str] = []
    for path in Path(launch.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                [_, first, *_] = node.body  # after the docstring
                assert ast.unparse(first) == "follow()", node.name
                found.append(node.name)
    assert len(found) > 25

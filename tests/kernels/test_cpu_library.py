"""Finding the compiled library, and what happens where there is none."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from jamba_server.kernels import table
from jamba_server.kernels.cpu import library as library_module
from jamba_server.kernels.cpu.library import ARM_LEVELS, X86_LEVELS, compiled_levels, library, open_library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.ops import KernelUnavailable
from tests.kernels.cases import LEVELS, assert_same, random


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:  # pyright: ignore[reportUnusedFunction]
    if "tmp_path" not in request.fixturenames:
        try:
            library()
        except KernelUnavailable as error:
            pytest.skip(str(error))


def test_without_a_library_the_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailable, match=r"without a C\+\+ compiler"):
        open_library(tmp_path)


def test_a_library_for_another_machine_is_told(tmp_path: Path) -> None:
    (tmp_path / "_native.abi3.so").write_bytes(b"not a library")
    with pytest.raises(KernelUnavailable, match=r"_native.abi3.so cannot be loaded: .*"):
        open_library(tmp_path)


def test_without_a_library_the_reference_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library_module, "__file__", str(tmp_path / "library.py"))
    with caplog.at_level(logging.WARNING):
        names = table.select("cpu", {}).names
    assert set(names.values()) == {"reference"}
    (message,) = caplog.messages
    assert "implementation cpu of" in message and "linear" in message and "compiler" in message


def test_a_library_that_is_older_than_its_sources_is_told() -> None:
    with pytest.raises(KernelUnavailable, match=r"older than its sources: .*no_such_kernel"):
        library().function("no_such_kernel")


def test_a_level_that_the_machine_lacks_is_refused() -> None:
    native = library()
    machine = native.level()
    assert machine in LEVELS
    for level in LEVELS[LEVELS.index(machine) + 1 :]:
        with pytest.raises(ValueError, match=level):
            native.set_level(level)
    assert native.level() == machine


def test_each_kind_of_processor_has_levels_of_its_own() -> None:
    assert compiled_levels("x86_64") == X86_LEVELS
    assert compiled_levels("aarch64") == compiled_levels("arm64") == ARM_LEVELS
    assert compiled_levels("riscv64") == ("portable",)
    native = library()
    assert native.levels() == LEVELS[: LEVELS.index(native.level()) + 1]


def test_callers_on_several_threads_do_not_disturb_one_another() -> None:
    linear = Linear()
    library().set_threads(3)
    packed = linear.pack(random(600, 300, seed=1))
    inputs = [random(rows, 300, seed=rows) for rows in (1, 5, 40)]
    expected = [linear(x, packed) for x in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        results[i] += [linear(inputs[i], packed) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library()  # as many threads as torch has, as before
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 100
        for y in found:
            assert_same(y, wanted)

"""The compiled kernels for ARM on an emulated processor. `make test-arm` sets TEST_ARM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jamba_server.kernels.cpu.library import library
from tests.kernels.arm import emulator

PROCESSORS = {"neon": "cortex-a72", "neon_dot": "neoverse-n1", "neon_bf16": "max"}
"""Maps each level to the processor of qemu that is emulated. It has no instructions of later levels."""


@pytest.fixture(scope="session")
def program() -> Path:
    """The kernels for ARM with the program that runs them."""
    if not os.environ.get("TEST_ARM"):
        pytest.skip("`make test-arm` runs the kernels for ARM on an emulated processor")
    for tool in (emulator.COMPILER, emulator.EMULATOR, emulator.DISASSEMBLER):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt-get install g++-aarch64-linux-gnu qemu-user")
    return emulator.build()


@pytest.fixture(params=PROCESSORS)
def native(
    request: pytest.FixtureRequest, program: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[emulator.EmulatedLibrary]:
    """The library on an emulated processor, with two threads. All kernels of the test run there."""
    found = emulator.EmulatedLibrary(program, PROCESSORS[request.param])
    with found.watching(monkeypatch):
        library()
        yield found
    found.close()

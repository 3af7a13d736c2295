"""The compiled library for the tests of what only it has: levels and threads. In triton's interpreter every kernel runs
guarded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jamba_server.kernels.cpu.library import Library, library
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.kernels.triton import interpreted
from tests.kernels.cases import ALL_LEVELS
from tests.kernels.interpreter_guard import guard


@pytest.fixture(autouse=interpreted())
def guarded() -> Iterator[None]:
    """See `interpreter_guard`."""
    with guard():
        yield


@pytest.fixture(params=ALL_LEVELS)
def native(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library, held to one level, with two threads (it takes as many as torch has)."""
    threads = torch.get_num_threads()
    try:
        found = library()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    machine = found.level()
    try:
        found.set_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    torch.set_num_threads(2)
    yield found
    found.set_level(machine)
    torch.set_num_threads(threads)
    library()

"""Exact on many threads, and on several memory nodes: the same tokens and log-probabilities, bit for bit, as on one
thread. Every thread takes a part of every kernel that has enough work, or the threads take turns, although there are
fewer processors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.start import build
from jamba_server.engine.start.processors import Processors
from jamba_server.engine.types import SamplingParams
from jamba_server.kernels.cpu.library import Library, library
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, FORMATS, OTHERS, SUBJECT, load, result
from tests.nightly import nightly

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=5)
# Wide enough that a product has a strip of 32 columns for each of 192 threads.
WIDE = CONFIG | {"hidden_size": 96, "intermediate_size": 3072, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide")
    (path / "config.json").write_text(json.dumps(WIDE))
    return path


@pytest.fixture
def native() -> Iterator[Library]:
    try:
        found = library()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    yield found
    found.set_nodes([sorted(os.sched_getaffinity(0))])
    library()  # as many threads as torch has, as before


@pytest.fixture
def together(native: Library) -> Iterator[Library]:
    native.set_together(True)
    yield native
    native.set_together(False)


def replies(llm: LLM) -> list[Any]:
    return [result(llm.generate([SUBJECT], GREEDY)[0]), result(llm.generate([*OTHERS[:3], SUBJECT], GREEDY)[3])]


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[Any]]:
    """A format, and the subject's reply on one thread, alone and in a batch."""
    return request.param, replies(load(folder, request.param))


@pytest.mark.parametrize("threads", [3, 192, *nightly([2, 64])])
def test_threads(folder: Path, case: tuple[str, list[Any]], together: Library, threads: int) -> None:
    """torch keeps one thread: its own operations are not tested here, and are slow on threads without a processor."""
    form, alone = case
    llm = load(folder, form)
    together.set_threads(threads)
    assert replies(llm) == alone
    assert min(together.pieces_taken(threads)) > 0


def test_threads_in_turns(folder: Path, case: tuple[str, list[Any]], native: Library) -> None:
    """In the usual mode few of 64 threads work at a time, and each of them does after enough replies."""
    threads, generated = 64, 0
    if len(os.sched_getaffinity(0)) >= threads:
        pytest.skip("64 threads must be more than the processors")
    form, alone = case
    llm = load(folder, form)
    native.set_threads(threads)
    while generated == 0 or min(native.pieces_taken(threads)) == 0:
        assert generated < 1000, native.pieces_taken(threads)
        assert replies(llm) == alone
        generated += 1


def test_two_nodes(
    folder: Path, case: tuple[str, list[Any]], together: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads are bound to one processor each, and packed weights of 2 MiB are placed on both nodes. The caller of
    the kernels runs on either node."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("two nodes need two processors")
    form, alone = case
    nodes = (tuple(processors[:1]), tuple(processors[1:]))
    monkeypatch.setattr(build, "find_processors", lambda: Processors(nodes))
    llm = load(folder, form, threads=5, numa="split")
    assert together.nodes == 2
    assert llm.core.info.threads.endswith("divided among 2 memory nodes, each with its share of the weights")
    try:
        for processor in processors[:2]:
            os.sched_setaffinity(0, {processor})
            assert replies(llm) == alone
    finally:
        os.sched_setaffinity(0, processors)
    assert min(together.pieces_taken(5)) > 0

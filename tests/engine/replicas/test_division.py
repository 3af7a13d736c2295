"""What each of several engines gets of a machine, and what they cannot do."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.replicas.division import divide
from jamba_server.engine.start.processors import Processors

CONFIG = EngineConfig(model="any", cpu_memory_bytes=1001)


@pytest.mark.parametrize(
    ("nodes", "number", "threads", "shares"),
    [
        (((0, 1, 2, 3),), 2, 2, None),  # one memory node: no process is bound
        (((0, 1, 2, 3),), 3, 1, None),
        (((0, 1),), 4, 1, None),  # more engines than processors
        (((0, 1), (2, 3)), 2, 2, [(0, 1), (2, 3)]),
        (((0, 1), (2, 3), (4, 5), (6, 7)), 2, 4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (((0, 1, 2, 3), (4, 5, 6, 7)), 4, 2, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (((0, 1), (2, 3)), 3, 1, None),  # cannot be divided evenly
        (((0,), (1,)), 4, 1, None),  # a share without a processor
    ],
)
def test_processors(
    nodes: tuple[tuple[int, ...], ...], number: int, threads: int, shares: list[tuple[int, ...]] | None
) -> None:
    division = divide(CONFIG, number, Processors(nodes))
    assert [config.threads for config in division.configs] == [threads] * number
    assert [place.processors for place in division.places] == (shares or [None] * number)


def test_a_limit_of_time_and_given_threads() -> None:
    processors = Processors((tuple(range(64)),), quota=8.5)
    assert divide(CONFIG, 2, processors).configs[0].threads == 4
    assert divide(msgspec.structs.replace(CONFIG, threads=5), 2, processors).configs[0].threads == 5


def test_memory_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    division = divide(CONFIG, 3, Processors(((0,),)))
    assert [config.cpu_memory_bytes for config in division.configs] == [333] * 3
    assert [dict(place.environment) for place in division.places] == [
        {"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    visible = [place.environment["CUDA_VISIBLE_DEVICES"] for place in divide(CONFIG, 3, Processors(((0,),))).places]
    assert visible == ["5", "GPU-7", ""], "the third finds no GPU, which the start refuses"
    assert [place.name for place in division.places] == ["engine 0: ", "engine 1: ", "engine 2: "]


def test_engines_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a thread or more, and a GPU of its own; the memory is that of an engine, whose ranks share it."""
    config = msgspec.structs.replace(CONFIG, tensor_parallel_size=2, pipeline_parallel_size=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(f"GPU-{i}" for i in range(7)))
    division = divide(config, 2, Processors((tuple(range(8)), tuple(range(8, 17)))))
    assert [own.threads for own in division.configs] == [2, 2]
    assert [own.cpu_memory_bytes for own in division.configs] == [500, 500]
    assert [place.processors for place in division.places] == [tuple(range(8)), tuple(range(8, 17))]
    visible = [place.environment["CUDA_VISIBLE_DEVICES"] for place in division.places]
    assert visible == ["GPU-0,GPU-1,GPU-2,GPU-3", "GPU-4,GPU-5,GPU-6"], "the second has too few, which it refuses"
    assert "2 with 4 processes each; on a CPU each process with 2 threads, " in division.description


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_cache_host_bytes", 1),
        ("state_cache_disk_path", "/nowhere"),
    ],
)
def test_what_does_not_work_together_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} {value!r} does not work with data_parallel_size 2"):
        divide(msgspec.structs.replace(CONFIG, **{name: value}), 2)

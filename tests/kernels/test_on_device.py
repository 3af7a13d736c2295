from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jamba_server.kernels.reference import conv, slots
from jamba_server.kernels.reference.linear import Linear as ReferenceLinear
from tests.kernels.cases import assert_same, layer_storage, random, segments
from tests.kernels.on_device import OnDevice

CPU = torch.device("cpu")


def test_writes_come_back_and_views_share_memory() -> None:
    k, v, kv_slots = random(3, 2, 5), random(3, 2, 5, seed=1), torch.tensor([9, 2, 4])
    storages = [torch.full((3, 2, 4, 2, 5), torch.nan) for _ in range(2)]
    for storage, write in zip(storages, (slots.write_kv, OnDevice(slots.write_kv, CPU)), strict=True):
        write(k, v, storage[:, 0], storage[:, 1], kv_slots)
    assert_same(storages[1], storages[0])
    assert not storages[1].isnan().all()


def test_strides_and_tuples_arrive() -> None:
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor, *args: Any) -> Tensor:
        seen.extend([x.stride(), args[2].stride()])
        return conv.causal_conv1d(x, *args)

    x, weight = random(5, 12)[:, 2:9], random(4, 7, seed=1)
    states = [layer_storage(3, 3, 7, dtype=torch.float32) for _ in range(2)]
    known = segments([3, 2], [2, 1], [False, False])
    expected = conv.causal_conv1d(x, weight, None, states[0], known)
    assert_same(OnDevice(spy, CPU)(x, weight, None, states[1], known), expected)
    assert_same(states[1], states[0])
    assert seen == [x.stride(), states[0].stride()]


def test_packed_weights_stay_there() -> None:
    linear: Any = OnDevice(ReferenceLinear(), CPU)
    x, weight = random(2, 6), random(3, 6, seed=1)
    assert_same(linear(x, linear.pack(weight)), torch.nn.functional.linear(x, weight))

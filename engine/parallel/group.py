"""Group: the ranks that run a model together, and how they add and exchange tensors, over torch.distributed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from jamba_server.engine.parallel.meeting import LOOPBACK
from jamba_server.engine.parallel.shards import SECTIONS, WHOLE, Shard

# The supervision of the engine ends ranks that hang, so the exchanges have no short time limit of their own.
TIMEOUT: Final = timedelta(days=1)
# If the rows of a sum take at most this number of bytes in float32, each rank receives the sections of all rows, which
# takes one exchange. Otherwise each rank adds the sections of some of the rows and then sends the results to the
# others, which takes two exchanges of fewer bytes.
_FEW_BYTES: Final = 1 << 17


@dataclass(slots=True)
class Traffic:
    """What a rank has exchanged: the number of exchanges, the number of bytes that it sent to all other ranks together,
    and the seconds that the exchanges took."""

    exchanges: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


ProcessGroup = Any
"""A process group of torch.distributed, whose classes for gloo and NCCL have no common type for these methods."""


class Group:
    """The ranks of a model. `shard` says which of them this one is. A group of one rank exchanges nothing."""

    def __init__(self, shard: Shard = WHOLE, process_group: ProcessGroup = None) -> None:
        assert (process_group is None) == (shard.size == 1), "one rank needs no process group, and several need one"
        self.shard, self._group, self.traffic = shard, process_group, Traffic()

    @classmethod
    def join(
        cls,
        shard: Shard,
        store: dist.Store,
        device: torch.device,
        timeout: timedelta = TIMEOUT,
        host: str = LOOPBACK,
    ) -> Group:
        """Waits until all ranks have met in `store`, and returns their group. It uses NCCL on GPUs, and gloo otherwise;
        with gloo, this rank listens at the address `host`. An exchange that takes longer than `timeout` fails."""
        if shard.size == 1:
            return cls(shard)
        if device.type == "cuda":
            return cls(shard, nccl(store, shard.rank, shard.size, timeout))
        return cls(shard, gloo(store, shard.rank, shard.size, timeout, host))

    def add_sections(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the sum of the sections of all ranks, added in float32 and in the order of the sections: dtype
        [T, N]. `sums`: float32 [sections of this rank, T, N]. All ranks get the same bits."""
        if self.shard.size == 1:
            return _in_order(sums).to(dtype)
        rows, size = sums.shape[1], self.shard.size
        if rows < size or sums[0].nbytes <= _FEW_BYTES:
            return _in_order(self._gather(sums).view(SECTIONS, rows, -1)).to(dtype)
        padded = torch.nn.functional.pad(sums, (0, 0, 0, -rows % size)).unflatten(1, (size, -1))
        parts = self._scatter(padded.transpose(0, 1).contiguous())  # [ranks, sections of each, own rows, N]
        return self._gather(_in_order(parts.flatten(0, 1)).to(dtype)).flatten(0, 1)[:rows]

    def add(self, x: Tensor) -> Tensor:
        """Returns the sum of x over all ranks, in an order that depends on their number."""
        if self.shard.size == 1:
            return x
        self._exchange(lambda group: group.allreduce([x]), x.nbytes * 2 * (self.shard.size - 1) // self.shard.size)
        return x

    def join_columns(self, x: Tensor) -> Tensor:
        """Returns the columns of all ranks side by side: [T, C] becomes [T, ranks * C]."""
        return x if self.shard.size == 1 else self._gather(x.contiguous()).transpose(0, 1).flatten(1)

    def join_disjoint(self, x: Tensor) -> Tensor:
        """Returns, for each element of x, the value of the one rank in which it is not zero, or zero if it is zero in
        all ranks. An element may be different from zero in one rank only."""
        if self.shard.size > 1:
            bits = x.view(torch.uint8)
            self._exchange(lambda group: group.allreduce([bits]), x.nbytes)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """Returns the largest of all ranks' elements, for each element of x."""
        if self.shard.size > 1:
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX
            self._exchange(lambda group: group.allreduce([x], options), x.nbytes)
        return x

    def smallest(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Returns the smallest of all ranks' numbers, for each of `numbers`. It waits for all ranks."""
        return [-n for n in self.maximum(-torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()]

    def _gather(self, x: Tensor) -> Tensor:
        """Returns x of every rank: [ranks, ...]."""
        out = x.new_empty(self.shard.size, *x.shape)
        received, sent = out.view(torch.uint8).flatten(), x.view(torch.uint8).flatten()
        self._exchange(lambda group: group._allgather_base(received, sent), x.nbytes * (self.shard.size - 1))
        return out

    def _scatter(self, x: Tensor) -> Tensor:
        """Sends x[i] to rank i, and returns what the ranks sent to this one: both are [ranks, ...]."""
        out = torch.empty_like(x)
        sent = x.nbytes // self.shard.size * (self.shard.size - 1)
        self._exchange(lambda group: group.alltoall_base(out, x, [], []), sent)
        return out

    def _exchange(self, begin: Any, num_bytes: int) -> None:
        began = time.perf_counter()
        begin(self._group).wait()
        self.traffic.exchanges += 1
        self.traffic.num_bytes += num_bytes
        self.traffic.seconds += time.perf_counter() - began


def gloo(store: dist.Store, rank: int, size: int, timeout: timedelta, host: str = LOOPBACK) -> ProcessGroup:
    """Returns a group whose ranks exchange tensors in host memory. This rank listens at the address `host`, which the
    others must be able to reach."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportPrivateUsage]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
    """Returns a group whose ranks exchange tensors on GPUs. Each rank has its current GPU to itself."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _in_order(sums: Tensor) -> Tensor:
    """Returns the sum of [S, T, N] over S, added one after the other."""
    total = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    for part in sums[2:]:
        total += part
    return total


ALONE: Final = Group()

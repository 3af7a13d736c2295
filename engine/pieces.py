"""The piece of a checkpoint tensor that a rank loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.ops import SUPER_GROUP, QuantizedWeight

if TYPE_CHECKING:
    from jamba_server.engine.parallel.shards import Own


class Piece(NamedTuple):
    """Those indices of dimension `dim` of a tensor that lie in one of `ranges`, given as (start, stop). In the file,
    this dimension has `size` indices."""

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, own: Own, dim: int, *, times: int = 1) -> Piece | None:
        """Returns the piece of a tensor that belongs to a rank which has `own` of some rows or channels.

        The dimension `dim` of the tensor consists of `times` parts of equal size, each of which is divided among the
        ranks. `in_proj` of a Mamba layer, for example, has two parts: the inputs and the gates of all channels. Returns
        None if the piece is the whole tensor."""
        if own.is_whole:
            return None
        starts = [i * own.total for i in range(times)]
        return cls(dim, times * own.total, tuple((start + own.start, start + own.stop) for start in starts))

    def grouped(self, group_size: int) -> Piece | None:
        """Returns the piece of a quantised matrix's factors that belongs to this piece of its numbers. The factors have
        one element for each group of inputs. Returns None if each row has one group."""
        if self.dim == 0:
            return self
        if group_size >= self.size:
            return None
        assert all(start % group_size == 0 for start, _ in self.ranges), "sections end at the borders of groups"
        ranges = tuple((start // group_size, -(-stop // group_size)) for start, stop in self.ranges)
        return Piece(self.dim, -(-self.size // group_size), ranges)

    def cut_tensor(self, tensor: Tensor) -> Tensor:
        """Returns the piece of a tensor: a view if it has one range."""
        parts = [tensor.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def cut(weight: Tensor | QuantizedWeight, piece: Piece) -> Tensor | QuantizedWeight:
    """Returns a piece of a matrix, or of a stack of matrices, that may be quantised. In a quantised weight the last
    dimension is that of the inputs; `piece.dim` counts from the front."""
    if isinstance(weight, Tensor):
        return piece.cut_tensor(weight)
    if piece.dim != weight.values.dim() - 1:
        return weight.each(piece.cut_tensor)
    of_groups = piece._replace(dim=1).grouped(weight.group_size)
    of_supers = piece._replace(dim=1).grouped(SUPER_GROUP) if weight.super_scales is not None else None

    def factors(tensor: Tensor | None, own: Piece | None) -> Tensor | None:
        return tensor if tensor is None or own is None else own._replace(dim=piece.dim).cut_tensor(tensor)

    values = piece.cut_tensor(weight.values)
    scales = factors(weight.scales, of_groups)
    assert scales is not None, "a quantised weight has scales"
    return weight._replace(
        values=values,
        scales=scales,
        group_size=min(weight.group_size, values.shape[-1]) if of_groups is None else weight.group_size,
        offsets=factors(weight.offsets, of_groups),
        zeros=factors(weight.zeros, of_groups),
        super_scales=factors(weight.super_scales, of_supers),
        super_offsets=factors(weight.super_offsets, of_supers),
    )


def section(weight: Tensor | QuantizedWeight, start: int, stop: int) -> Tensor | QuantizedWeight:
    """Returns the inputs from `start` to `stop` - 1 of a matrix, or of a stack of matrices."""
    values = weight if isinstance(weight, Tensor) else weight.values
    return cut(weight, Piece(values.dim() - 1, values.shape[-1], ((start, stop),)))

"""Moe: a mixture-of-experts feed-forward layer, which is a router and its experts (Lieber et al. 2024, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Fused, Raw, Unit, Units, part
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.pieces import Piece, cut, section
from jamba_server.engine.quantization.blocks import expert_names


class Moe:
    """Computes, for each token of x [T, H], the weighted sum of the outputs of its top-k experts. The weights of this
    sum are the router's softmax over all experts. The weights of the top k experts are not normalised again to the sum
    1.

    Ranks divide the intermediate activations of all experts among each other. In exact mode, the experts of each
    section of these activations run by themselves. The weighted sum over a token's experts is then computed within a
    section, in float32, and the sections are added.
    """

    def __init__(self, backend: Backend, config: JambaConfig) -> None:
        self._own = backend.parts.experts
        h, f, e = config.hidden_size, len(self._own), config.num_experts
        self._backend = backend
        self._route, self._run = backend.kernels.route_experts, backend.kernels.run_experts
        self._top_k, self._num_experts, self._rows = config.num_experts_per_tok, e, f
        self._router = Linear(backend, h, {"router": e}, role="other")
        # The raw weights of the gate and up projections, and of the down projection. The method `_pack` converts these
        # raw weights to the kernel's layout and stores the result in the field `_experts`.
        shapes = (e, 2 * f, h), (e, h, f)
        self._raw = [
            self._empty(names, *shape) for names, shape in zip(expert_names("experts.", e), shapes, strict=True)
        ]
        self._experts: list[Any] = []  # the experts, or one such object for each section of their intermediate size

    def _empty(self, names: Sequence[str], *shape: int) -> Raw:
        """Returns uninitialised memory for the weights `names`, all of which stay in the same format."""
        formats = {self._backend.format(name) for name in names}
        assert len(formats) == 1, "the weights of all experts have one format in memory"
        return self._backend.raw("experts", *shape, stored=formats.pop())

    def __call__(self, x: Tensor) -> Tensor:
        weights, ids = self._route(self._router(x), self._top_k)
        group = self._backend.group
        if not self._backend.parts.shard.exact:
            return group.add(self._run(x, self._experts[0], weights, ids))
        sums = torch.empty(len(self._experts), *x.shape, dtype=torch.float32, device=x.device)
        for experts, out in zip(self._experts, sums, strict=True):
            if experts is None:
                out.zero_()
            else:
                self._run.sums(x, experts, weights, ids, out)
        return group.add_sections(sums, x.dtype)

    def units(self, prefix: str) -> Units:
        yield self._router.unit(prefix)
        yield Unit(self._destinations(f"{prefix}experts."), self._pack, self._fused(f"{prefix}experts."))

    def _destinations(self, prefix: str) -> dict[str, Destination]:
        """Returns the memory to fill from a checkpoint that has one tensor for each expert and projection, as all
        published Jamba checkpoints have."""
        destinations: dict[str, Destination] = {}
        rows, inputs = Piece.of(self._own, 0), Piece.of(self._own, 1)
        for e in range(self._num_experts):
            gate_up, down = (part(raw, e) for raw in self._raw)
            destinations |= self._backend.matrix(f"{prefix}{e}.gate_proj", part(gate_up, slice(None, self._rows)), rows)
            destinations |= self._backend.matrix(f"{prefix}{e}.up_proj", part(gate_up, slice(self._rows, None)), rows)
            destinations |= self._backend.matrix(f"{prefix}{e}.down_proj", down, inputs)
        return destinations

    def _fused(self, prefix: str) -> dict[str, Fused]:
        """Returns the memory to fill from a checkpoint that stores all experts of a layer in two tensors, as
        transformers 5 writes it: gate_up_proj [E, 2F, H], where the rows of the gate projection precede those of the up
        projection, and down_proj [E, H, F]."""
        gate_up, down = self._raw
        if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
            return {}  # a checkpoint that is quantised on disk always has a separate tensor for each expert

        def parts(*projections: str) -> tuple[str, ...]:
            return tuple(f"{prefix}{e}.{p}.weight" for e in range(self._num_experts) for p in projections)

        return {
            f"{prefix}gate_up_proj": Fused(gate_up, parts("gate_proj", "up_proj"), Piece.of(self._own, 1, times=2)),
            f"{prefix}down_proj": Fused(down, parts("down_proj"), Piece.of(self._own, 2)),
        }

    def _pack(self) -> None:
        # The call of `pop` drops the layer's reference to a raw weight, so that this raw weight is freed as soon as it
        # is quantised.
        down = self._backend.quantize("experts", self._raw.pop(), divided=True)
        gate_up = self._backend.quantize("experts", self._raw.pop())
        if not self._backend.parts.shard.exact:
            self._experts = [self._run.pack(gate_up, down)]
            return
        for start, stop in self._own.sections:
            if start == stop:
                self._experts.append(None)
                continue
            halves = Piece(1, 2 * self._rows, ((start, stop), (self._rows + start, self._rows + stop)))
            self._experts.append(self._run.pack(cut(gate_up, halves), section(down, start, stop)))

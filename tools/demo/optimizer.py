"""Implements the optimizer of the demonstration model: Muon for the matrices inside the layers, AdamW for all other
parameters.

Muon (Jordan et al., 2024) updates a matrix by the orthogonal matrix that is nearest to its momentum. Five Newton-Schulz
steps in bfloat16 approximate this orthogonal matrix.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from model import Jamba
from torch import Tensor, nn

MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.05
ADAM_RATES = {"embedding": 1e-2, "head": 3e-3, "other": 3e-3}
ADAM_DECAY = 0.01  # weight decay that AdamW applies to the embedding and the output head


def orthogonalised(gradient: Tensor) -> Tensor:
    """Returns matrices with the same singular vectors as `gradient` [..., rows, columns], and with singular values near
    1."""
    x = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.mT if tall else x


class Muon:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]
        self.parameters = parameters
        # Maps a matrix shape to the indices of the parameters with this shape. These parameters' updates are
        # orthogonalised as one batch.
        self.groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, parameter in enumerate(parameters):
            self.groups[parameter.shape[-2], parameter.shape[-1]].append(index)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        rate = MUON_RATE * factor
        for (rows, columns), members in self.groups.items():
            updates: list[Tensor] = []
            for index in members:
                gradient, momentum = self.parameters[index].grad, self.momenta[index]
                assert gradient is not None
                momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
                updates.append(gradient.lerp(momentum, MUON_MOMENTUM).reshape(-1, rows, columns))
            done = orthogonalised(torch.cat(updates)).float().split([len(update) for update in updates])
            for index, update in zip(members, done, strict=True):
                parameter = self.parameters[index]
                parameter.mul_(1 - rate * MUON_DECAY)
                parameter.add_(update.reshape(parameter.shape), alpha=-rate * max(1.0, rows / columns) ** 0.5)


class Optimizer:
    """Updates each parameter with Muon or AdamW. The argument `factor` of the method `step` scales all learning
    rates."""

    def __init__(self, model: Jamba) -> None:
        matrices: list[nn.Parameter] = []
        adam: dict[str, list[nn.Parameter]] = {"embedding": [model.embedding], "head": [model.head], "other": []}
        for name, parameter in model.named_parameters():
            inside = name.rsplit(".", 1)[-1]
            if inside in {"in_proj", "x_proj", "out_proj", "q_proj", "kv_proj", "o_proj", "gate_up", "down", "dt_proj"}:
                matrices.append(parameter)
            elif name not in {"embedding", "head"}:
                adam["other"].append(parameter)
        self.muon = Muon(matrices)
        groups = [
            {
                "params": parameters,
                "lr": ADAM_RATES[name],
                "rate": ADAM_RATES[name],
                "weight_decay": 0 if name == "other" else ADAM_DECAY,
            }
            for name, parameters in adam.items()
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10)

    def step(self, factor: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        self.adam.step()
        self.muon.step(factor)

    def state(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "momenta": self.muon.momenta}

    def load(self, state: dict[str, object]) -> None:
        self.adam.load_state_dict(state["adam"])  # pyright: ignore[reportArgumentType]
        for mine, saved in zip(self.muon.momenta, state["momenta"], strict=True):  # pyright: ignore[reportArgumentType]
            mine.copy_(saved)

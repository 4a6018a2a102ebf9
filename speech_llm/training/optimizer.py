"""The optimiser of a training run: AdamW over what is trained, each part at its own learning rate."""

from __future__ import annotations

from typing import Any

import torch

from speech_llm.model.trainable import part_of
from speech_llm.training.schedule import learning_rate_at

# What the parts of a model are called in `optimizer.part_lr`.
_RATE_OF = {"connector": "connector", "adapters": "lora", "encoder_adapters": "encoder", "llm": "llm"}


def make_optimizer(
    model: Any, settings: Any, one_by_one: bool = False
) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW (1711.05101) and the names of its parameters in its order.

    Matrices decay by `settings.weight_decay`, vectors (biases, norms) do not. A group's `peak_lr` is its part's rate in
    `settings.part_lr`, else `settings.lr`. `one_by_one`: no fused update over many parameters, which shards beside whole ones cannot have.
    """
    groups: list[dict[str, Any]] = []
    names: list[str] = []
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for part, rate in _RATE_OF.items():
        own = [(name, p) for name, p in trained if part_of(name) == part]
        peak = getattr(settings.part_lr, rate) or settings.lr
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0)):
            chosen = [(name, p) for name, p in own if (p.dim() > 1) == matrices]
            if chosen:
                groups.append(
                    {"params": [p for _, p in chosen], "weight_decay": decay, "peak_lr": peak, "part": part}
                )
                names += [name for name, _ in chosen]
    foreach = False if one_by_one else None
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), foreach=foreach), names


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, total: int, warmup_ratio: float
) -> dict[str, float]:
    """Give every group the rate of this step; returns part -> rate."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]] = learning_rate_at(step, total, group["peak_lr"], warmup_ratio)
    return rates

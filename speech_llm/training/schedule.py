"""The learning rate of a step: one formula for everything that is trained."""

from __future__ import annotations

import math


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up, then cosine to zero, for `step` 0 ... total - 1."""
    warm = max(1, round(total * warmup_ratio))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

"""How an answer is learned: pure functions from logits to a loss.

Each returns a *sum* over answer tokens. The loop divides by the number of answer tokens of the whole global batch, so
that neither padding, nor accumulation, nor the number of processes changes the weight of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Sum of $-\log p(\text{target})$ over answer tokens.

    `logits`: (n, vocabulary) at the positions that predict answer tokens; `targets`: (n,) token ids.
    Computed in float32 whatever the model's dtype.
    """
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def alignment_loss(
    vectors: Tensor, candidates: Tensor, labels: Tensor, temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    r"""Mean of $-\log\mathrm{softmax}_m(\cos(v - \bar c, c_m - \bar c)/\tau)[\text{label}]$ plus a pull to the candidate's own place.

    The warm-up of the connector: the vectors of an attribute shall lie where its value lies ("female", "Scottish"), told
    apart from the attribute's other values. What all values have in common ($\bar c$) tells nothing and is taken off.

    `vectors`: (n, slots, width). `candidates`: (m, slots, width). `labels`: (n,) rows of `candidates`.
    Returns the loss and the nearest candidates (n,). The first term is InfoNCE (1807.03748, equation 4) with cosine
    similarity; the second, the squared distance relative to that between candidates, fixes length as well as direction
    (DiVA, 2410.02678, aligns to text embeddings with an L2 loss).
    """
    middle = candidates.mean(0, keepdim=True)
    told, known = (vectors - middle).flatten(1), (candidates - middle).flatten(1)
    similarity = functional.normalize(told, dim=-1) @ functional.normalize(known, dim=-1).T
    contrast = functional.cross_entropy(similarity / temperature, labels)
    place = (told - known[labels]).pow(2).sum(-1).mean() / known.pow(2).sum(-1).mean().clamp(min=1e-12)
    return contrast + place, similarity.argmax(-1)


def all_finite(value: Tensor) -> bool:
    """Whether a loss is neither NaN nor infinite."""
    return bool(torch.isfinite(value).all())

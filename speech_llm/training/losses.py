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
    vectors: Tensor, words: Tensor, targets: Tensor, table: Tensor, temperature: float = 0.07
) -> Tensor:
    r"""Mean over slots of $-\log\mathrm{softmax}_w(\cos(v, e_w)/\tau)[\text{target}]$ plus a pull to the word's own place.

    The warm-up of the connector: vector `v` in a slot shall lie where the frozen LLM keeps the word that describes the
    clip ("female", "Scottish"), told apart from the other words that descriptions use.

    `vectors`: (n, slots, width). `words`: (m,) token ids of the candidate words. `targets`: (n, slots) indices into
    `words`, -100 where a slot has none. `table`: the LLM's embedding matrix (vocabulary, width), frozen.
    The first term is InfoNCE (1807.03748, equation 4) with cosine similarity; the second, the mean squared distance
    relative to the words' mean squared norm, fixes length as well as direction (DiVA, 2410.02678, aligns to text
    embeddings with an L2 loss).
    """
    candidates = table[words].float()
    wanted = targets != -100
    chosen = vectors[wanted].float()
    label = targets[wanted]
    similarity = functional.normalize(chosen, dim=-1) @ functional.normalize(candidates, dim=-1).T
    contrast = functional.cross_entropy(similarity / temperature, label)
    place = (chosen - candidates[label]).pow(2).sum(-1).mean() / candidates.pow(2).sum(-1).mean()
    return contrast + place


def all_finite(value: Tensor) -> bool:
    """Whether a loss is neither NaN nor infinite."""
    return bool(torch.isfinite(value).all())

"""Which positions look at which, and which of them get logits: shared by training on packs and by generation.

In: masks of what may be seen or is wanted. Out: the forms that every attention implementation and every LLM's output
layer of transformers understands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def branch_mask(branch: Tensor, prefix_length: int) -> Tensor:
    """(b, 1, l, prefix + l) bool, True = may look, of rows that hold several branches behind a shared part.

    `branch` (b, l): 0 where a position is shared, 1, 2, ... its branch, -1 padding. A position sees the prefix, the
    shared part and its own branch up to itself. Padding sees itself and the prefix, so that its softmax is defined, and
    nobody sees it.
    """
    rows, length = branch.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    own = branch[:, :, None] == branch[:, None, :]
    shared = (branch == 0)[:, None, :]
    mask = causal & (own | shared) | torch.eye(length, dtype=torch.bool, device=branch.device)
    prefix = torch.ones(rows, length, prefix_length, dtype=torch.bool, device=branch.device)
    return torch.cat([prefix, mask], dim=2)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = may look) as numbers to add to attention scores."""
    numbers = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return numbers.masked_fill_(~mask, torch.finfo(dtype).min)


def attention_window(llm_config: Any) -> int | None:
    """How far back some layers of an LLM look at most; None where every layer sees everything."""
    window = getattr(llm_config, "sliding_window", None)
    kinds = getattr(llm_config, "layer_types", None)  # none named: all alike
    return int(window) if window and (not kinds or "sliding_attention" in kinds) else None


@contextlib.contextmanager
def logits_only_at(llm: Any, wanted: Tensor | None) -> Iterator[None]:
    """Within it the LLM's output layer sees only the positions that `wanted` (b, l) selects, as one row (1, n, width).

    The LLM's own forward stays in charge, with whatever it does to logits afterwards (soft-capping, scaling).
    None: all positions.
    """
    if wanted is None:
        yield
        return

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][wanted][None], *args[1:])

    handle = llm.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def states_at(llm: Any, wanted: Tensor) -> Iterator[list[Tensor]]:
    """Within it the output layer sees one position only; the list gets the states (n, width) of all that `wanted` (b, l) selects."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0][wanted]
        found.append(states)
        return (states[None, :1], *args[1:])

    handle = llm.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()

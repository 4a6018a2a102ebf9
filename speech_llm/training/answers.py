"""Losses at answer positions without all their logits at once: the output layer runs over a few positions at a time.

In: the LLM's hidden states at the positions that predict answer tokens. Out: a sum or values over these tokens. A chunk's logits are made,
used and let go, and made again in the backward pass, so memory does not grow with answer tokens x vocabulary; prompt positions
never get logits at all (`masks.logits_only_at`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits (answer tokens x vocabulary) that may stand side by side: 128 MB in float32, and as much again for their gradient.
MOST_LOGITS = 1 << 25
# What (logits (n, vocabulary), the places of these n among all answer tokens) -> a scalar or (n,) values.
OfLogits = Callable[[Tensor, slice], Tensor]


@dataclass
class Answers:
    """What predicts the answer tokens of a batch: `states` (n, width), or (n, vocabulary) where `project` is None.

    `targets`: (n,) the tokens. `chunk`: positions whose logits are made together.
    """

    states: Tensor
    targets: Tensor
    project: Callable[[Tensor], Tensor] | None = None
    chunk: int = 0

    def logits(self, at: slice) -> Tensor:
        """Logits (len, vocabulary) of some of the tokens."""
        states = self.states[at]
        return states if self.project is None else self.project(states)

    def sum(self, function: OfLogits) -> Tensor:
        """The sum over chunks of `function`, a scalar each."""
        parts = self._each(function)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def values(self, function: OfLogits) -> Tensor:
        """(n,) the values that `function` gives for each token."""
        parts = self._each(function)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _each(self, function: OfLogits) -> list[Tensor]:
        project = self.project
        if project is None:
            return [function(self.states, slice(0, len(self.states)))]

        def run(states: Tensor, start: int) -> Tensor:
            assert project is not None
            return function(project(states), slice(start, start + len(states)))

        return [
            checkpoint(run, part, start, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else run(part, start)
            for start, part in zip(
                range(0, len(self.states), self.chunk), self.states.split(self.chunk), strict=True
            )
        ]


def vocabulary_of(llm: Any) -> int:
    """How many logits the LLM's output layer makes at a position."""
    head = llm.get_output_embeddings()
    return int(
        getattr(head, "out_features", None) or head.weight.shape[0]
    )  # of a weight in parts the shape is no help


def in_chunks(llm: Any, states: Tensor, targets: Tensor, first: Tensor, most_logits: int) -> Answers | None:
    """`Answers` from hidden states (n, width); None where the LLM does to its logits what is not known here.

    `first`: (vocabulary,) what the LLM's own forward makes of the first state. `most_logits`: in a chunk.
    """
    project = projection(llm)
    with torch.no_grad():
        if not torch.allclose(project(states[:1])[0], first, rtol=1e-3, atol=1e-4):
            return None
    return Answers(states, targets, project, max(16, most_logits // vocabulary_of(llm)))


def projection(llm: Any) -> Callable[[Tensor], Tensor]:
    """From hidden states to logits as the LLM's own forward does it: output layer, scale, soft cap."""
    head, config = llm.get_output_embeddings(), llm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / float(
        getattr(config, "logits_scaling", None) or 1
    )
    cap = getattr(config, "final_logit_softcapping", None)

    def project(states: Tensor) -> Tensor:
        logits = head(states)
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return project

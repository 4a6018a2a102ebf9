"""How far the model in training has moved from the base LLM, on the batch that it learns from.

In: packs. Out: KL(base || model) per answer token, the base LLM reading the description where the model hears the sound (adapters off,
weights as loaded: no second model). Rows without a description for their sound are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from speech_llm.data.packing import Pack, Row
from speech_llm.targets.score import row_logits
from speech_llm.training.losses import kl_sum
from speech_llm.training.rows import Unusable, teacher_row
from speech_llm.training.student import Origin, Student

# Answer tokens looked at together: the base LLM's logits for all of them stand side by side.
MOST_TOKENS = 256


class BaseDivergence:
    """Measured every `every` steps (0: never)."""

    def __init__(self, student: Student, data: Any, origin: Origin, every: int) -> None:
        self.student, self.data, self.origin, self.every = student, data, origin, every

    def due(self, number: int) -> bool:
        """Whether the step of this number (from 0) is one that is measured."""
        return bool(self.every) and number % self.every == 0

    @torch.no_grad()
    def __call__(self, packs: Sequence[Pack]) -> tuple[float, float]:
        """The divergence summed over answer tokens of some of the packs, and how many tokens those are."""
        chosen: list[Pack] = []
        told: list[Row] = []
        tokens = 0
        for pack in packs:
            if chosen and tokens + pack.answer_tokens > MOST_TOKENS:
                continue
            rows = [self._told(name) for name in pack.rows]
            known = [row for row in rows if row is not None]
            if len(known) == len(rows):
                chosen.append(pack)
                told += known
                tokens += pack.answer_tokens
        if not chosen:
            return 0.0, 0.0
        model = self.student.model
        model.eval()
        with self.origin.base():
            base = row_logits(model.llm, told)
        answers = self.student.answers(self.student.batch(chosen))
        total = float(answers.sum(lambda logits, at: kl_sum(logits, base[at])))
        model.train()
        return total, float(tokens)

    def _told(self, name: str) -> Row | None:
        """What the base LLM reads in place of a row."""
        if name in self.data.teacher:
            row: Row = self.data.teacher[name]
            return row
        try:
            return teacher_row(self.data.examples[name], self.data.rows[name], self.student.processor)
        except Unusable:
            return None

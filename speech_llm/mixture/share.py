"""How much is mixed in: a share of the audio Examples, by rows or by tokens, exactly.

In: a ratio and what the audio Examples amount to. Out: a `Budget` that rows are put into until it is full.
The ratio is of the audio Examples and not of the sum (LAMOL's convention, 1909.03329: gamma x the size of the new task):
0.05 with 1,000 Examples is 50 rows more, 1,050 in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from speech_llm.examples import Example


def promised(ratio: float, amount: int) -> int:
    """`ratio` x `amount`, rounded up; exact, where floating point would make 0.07 x 100 eight."""
    return math.ceil(Fraction(str(ratio)) * amount)


def learned_tokens(example: Example, tokenizer: Any) -> int:
    """The tokens that the loss counts: every learned assistant turn and the token that ends it."""
    total = 0
    for turn in example.messages:
        if turn["role"] == "assistant" and turn.get("train", True):
            content = turn["content"]
            text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
            total += len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
    return total


@dataclass
class Budget:
    """Rows are put in until `wanted` is reached: exactly, when `size` is one for every row.

    Counted in tokens, the row that reaches the amount is put in whole, so that less than one row is too much.
    """

    wanted: int
    size: Callable[[Example], int] = lambda _: 1
    unit: Literal["rows", "tokens"] = "rows"
    taken: int = 0
    rows: list[Example] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.taken >= self.wanted

    def put(self, example: Example) -> None:
        """Put a row in; does nothing when the budget is full."""
        if not self.full:
            self.rows.append(example)
            self.taken += self.size(example)

    def fill(self, examples: Iterable[Example]) -> Budget:
        """Put rows in until the budget is full or they end; returns itself. Reads none too many."""
        if not self.full:
            for example in examples:
                self.put(example)
                if self.full:
                    break
        return self

    def split(self, parts: int) -> list[Budget]:
        """Budgets of equal size that together want as much; the first ones take what is over."""
        return [self.like(self.wanted // parts + (i < self.wanted % parts)) for i in range(parts)]

    def like(self, wanted: int) -> Budget:
        """An empty budget of another size."""
        return Budget(wanted, self.size, self.unit)

    def __str__(self) -> str:
        return f"{self.wanted:,} {self.unit}"

"""One optimiser step: the batches of the step through the objective, gradients summed, one update, and what there is to tell of it.

In: the step's number and batches. Out: a row of the log. Chance (dropout, sampling) is drawn from (seed, step, batch) alone, so that a step
depends neither on how the run came there nor on how many processes share it.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from speech_llm.errors import UserError
from speech_llm.training.checkpoint import latest_checkpoint
from speech_llm.training.log import memory_mb
from speech_llm.training.losses import all_finite, l2_start
from speech_llm.training.objectives import Objective
from speech_llm.training.optimizer import set_learning_rates
from speech_llm.training.processes import Processes
from speech_llm.training.student import Origin, Student
from speech_llm.training.watch import BaseDivergence

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

Batches = Sequence[list[int]]


def seed_chance(place: str) -> None:
    """Draw everything that follows from a seed that `place` names."""
    torch.manual_seed(random.Random(place).getrandbits(48))


@dataclass
class Step:
    """Makes steps; `data` is a `TrainingSet` or what stands for one. `checkpoints`: their folder, named when the loss breaks."""

    recipe: Recipe
    data: Any
    student: Student
    objective: Objective
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    processes: Processes
    origin: Origin
    divergence: BaseDivergence
    checkpoints: Path

    def __call__(self, number: int, total: int, batches: Batches, coming: Batches = ()) -> dict[str, Any]:
        """Make step `number` (from 0) of `total`; returns its figures. `coming`: the next step's batches, whose clips are read ahead.

        Raises `UserError` naming rows and the last good checkpoint when the loss or its gradient is not finite.
        """
        started = time.perf_counter()
        processes, recipe, feed = self.processes, self.recipe, self.student.feed
        mine = processes.mine(batches)
        # Counted once whatever the process: what fills up a step (factor 0) is not told.
        own = [batch for _, batch, factor in mine if factor]
        if feed is not None:
            feed.wait_s = 0.0
            ahead = [*(b for _, b, _ in mine), *(b for _, b, _ in processes.mine(coming))]
            feed.expect([self._clips(batch) for batch in ahead])
        weight = max(1e-9, sum(self.objective.weight(batch) for batch in batches))
        figures: dict[str, tuple[float, float]] = {}
        if self.divergence.due(number) and not processes.sharded:
            packs = [self.data.packs[i] for i in own[0]] if own else []
            figures["kl_base"] = self.divergence(packs)
        loss, padding, tokens, distance = 0.0, 0.0, 0, 0.0
        broken: list[str] = []
        with processes.accumulating(self.parameters):
            for place, batch, factor in mine:
                where = f"{recipe.seed}-{number}-{place}"
                seed_chance(where)
                done = processes.loss(functools.partial(self.objective.loss, batch, where))
                if not all_finite(done.loss):
                    broken += done.rows
                if done.loss.requires_grad:  # rows that nothing trained takes part in teach nothing
                    processes.backward(done.loss * (factor / weight))
                if factor:
                    loss += float(done.loss.detach())
                    padding += done.padding_share
                    tokens += done.answer_tokens
                    for name, (value, over) in done.figures.items():
                        had = figures.get(name, (0.0, 0.0))
                        figures[name] = (had[0] + value, had[1] + over)
            if recipe.loss.l2_start:
                distance = self._pull_to_start()
        loss, padding, summed_tokens, count = processes.sums([loss, padding, float(tokens), float(len(own))])
        figures = self._summed(figures)
        if recipe.loss.l2_start:
            figures["l2_start"] = (distance, 1.0)
        if not math.isfinite(loss):
            self._stop(number, "the loss", [row for part in processes.gathered(broken) for row in part])
        rows = [row for batch in batches for i in batch for row in self.data.packs[i].rows]
        rates = set_learning_rates(self.optimizer, number, total, recipe.optimizer.warmup_ratio)
        norm = processes.update(self.optimizer, self.parameters, recipe.optimizer.clip)
        if not math.isfinite(norm):
            self._stop(number, "the gradient", rows)
        seconds = time.perf_counter() - started
        different = len(set(rates.values())) > 1
        return {
            "loss": round(loss / weight, 5),
            **{
                name: round(value / max(1e-9, over), 5)
                for name, (value, over) in figures.items()
                if over or name != "kl_base"
            },
            "lr": rates if different else next(iter(rates.values())),
            "grad_norm": round(norm, 4),
            "rows": len(rows),
            "answer_tokens": int(summed_tokens),
            "padding_share": round(padding / max(1.0, count), 4),
            "rows_per_s": round(len(rows) / seconds, 2),
            "answer_tokens_per_s": round(summed_tokens / seconds, 1),
            "wait_s": round(0.0 if feed is None else feed.wait_s, 4),
            "memory_mb": memory_mb(),
            "seconds": round(seconds, 3),
        }

    def _clips(self, batch: list[int]) -> list[str]:
        return [clip for i in batch for clip in self.data.packs[i].clips]

    def _summed(self, figures: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        if self.processes.count == 1:
            return figures
        names = list(dict.fromkeys(name for part in self.processes.gathered(list(figures)) for name in part))
        values = self.processes.sums([v for name in names for v in figures.get(name, (0.0, 0.0))])
        return {name: (values[2 * i], values[2 * i + 1]) for i, name in enumerate(names)}

    def _pull_to_start(self) -> float:
        """Add the gradient of L2-SP, at the main process only as gradients are summed; returns the distance."""
        moved = {n: p for n, p in self.student.model.named_parameters() if p.requires_grad}
        distance = l2_start(moved, self.origin.began)
        if self.processes.main:
            self.processes.backward(self.recipe.loss.l2_start * distance)
        return float(distance.detach())

    def _stop(self, number: int, what: str, rows: list[str]) -> None:
        last = latest_checkpoint(self.checkpoints)
        raise UserError(
            f"step {number + 1}: {what} is not finite on the rows {', '.join(rows)}; "
            f"the last good checkpoint is {last}; try a lower optimizer.lr"
        )

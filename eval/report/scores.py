"""Tasks by dimension, with seen and unseen instructions, each beside chance, majority and what stands beside the model.

In: runs. Out: rows of tables, every score a `Cell` with its interval and n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from eval.report.runs import Run, interval_of, is_number
from speech_llm.summary import score_of

KINDS = {"seen": "trained on", "unseen": "new", "all": "all"}
LESS_IS_BETTER = ("wer", "cer")


@dataclass(frozen=True)
class Cell:
    """One score: share, its 95 % interval where it has one, over how many instances."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Score:
    """A task with one kind of instruction, for one model and those beside it."""

    dimension: str
    task: str
    kind: str
    metric: str
    cell: Cell
    chance: float | None
    majority: float | None
    unparsed: int | None
    missing: int | None
    beside: dict[str, Cell] = field(default_factory=dict)

    @property
    def told_kind(self) -> str:
        return KINDS[self.kind]

    @property
    def of_ceiling(self) -> float | None:
        """The share of the ceiling's score; None for error rates and without a ceiling."""
        best = self.beside.get("ceiling")
        return self.cell.value / best.value if best and best.value and not self.is_error else None

    @property
    def is_error(self) -> bool:
        return self.metric in LESS_IS_BETTER

    @property
    def above_chance(self) -> bool:
        """Whether the whole interval lies above chance."""
        low = self.cell.low
        return not self.is_error and self.chance is not None and low is not None and low > self.chance


def parts_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A task's metrics for seen and unseen instructions; for all where it does not tell them apart."""
    parts = [(kind, result.get(kind)) for kind in ("seen", "unseen")]
    found = [(kind, part) for kind, part in parts if isinstance(part, dict) and score_of(part)]
    return found or [("all", result)]


def cell_of(result: Any) -> Cell | None:
    """A result's score; None where nothing was scored."""
    scored = score_of(result) if isinstance(result, dict) else None
    if scored is None or not is_number(scored[1]):
        return None
    low, high = interval_of(result)
    return Cell(scored[1], low, high, _count(result.get("n")))


def scores(run: Run, model: str | None = None) -> list[Score]:
    """Every task of a model (the run's own by default), dimension by dimension in the order of the results."""
    rows = []
    main = model or run.main
    for task, whole in run.models.get(main, {}).items():
        for kind, result in parts_of(whole):
            cell = cell_of(result)
            if cell is None:
                continue
            metric, _ = score_of(result) or ("", 0.0)
            beside = {}
            for name in run.peers if model is None else ():
                other = run.models[name].get(task) or {}
                found = cell_of(other if kind == "all" else other.get(kind))
                if found:
                    beside[name] = found
            rows.append(
                Score(
                    dimension=str(whole.get("dimension") or "other"),
                    task=task,
                    kind=kind,
                    metric=metric,
                    cell=cell,
                    chance=_share(result, whole, "chance"),
                    majority=_share(result, whole, "majority"),
                    unparsed=_count(result.get("unparsed")),
                    missing=_count(whole.get("missing")),
                    beside=beside,
                )
            )
    order = list(dict.fromkeys(row.dimension for row in rows))
    return sorted(rows, key=lambda row: order.index(row.dimension))


@dataclass(frozen=True)
class SideBySide:
    """A task with one kind of instruction in several runs; `cells[i]` is None where run i has none."""

    first: Score
    cells: list[Cell | None]
    beside: dict[str, Cell]


def side_by_side(runs: Sequence[Run]) -> list[SideBySide]:
    """Every task of any of the runs; peers, chance and majority from the first run that has them."""
    tables = [{(row.task, row.kind): row for row in scores(run)} for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = []
    for key in keys:
        found = [table.get(key) for table in tables]
        known = [row for row in found if row]
        beside: dict[str, Cell] = {}
        for row in known:
            beside = row.beside | beside
        rows.append(SideBySide(known[0], [row.cell if row else None for row in found], beside))
    order = list(dict.fromkeys(row.first.dimension for row in rows))
    return sorted(rows, key=lambda row: order.index(row.first.dimension))


def by_dimension(rows: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Rows of `scores` or `side_by_side` under their dimensions."""
    return [
        (name, list(group))
        for name, group in groupby(rows, lambda row: (row if isinstance(row, Score) else row.first).dimension)
    ]


def over_chance(rows: Sequence[Score]) -> float | None:
    """Mean over tasks of score minus chance, those with a chance only; None without any."""
    gains = [row.cell.value - row.chance for row in rows if row.chance is not None and not row.is_error]
    return sum(gains) / len(gains) if gains else None


def _share(result: dict[str, Any], whole: dict[str, Any], name: str) -> float | None:
    value = result.get(name, whole.get(name))
    return float(value) if is_number(value) else None


def _count(value: Any) -> int | None:
    return int(value) if is_number(value) else None

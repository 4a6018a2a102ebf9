"""Tasks by dimension, with seen and unseen instructions, each beside chance, majority and what stands beside the model.

In: runs, in groups that differ in the seed only. Out: rows of tables, every score a `Cell` with its interval and n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from eval.report.runs import Run, interval_of, is_number
from eval.report.seeds import Group
from speech_llm.summary import score_of

KINDS = {"seen": "trained on", "unseen": "new", "all": "all"}
LESS_IS_BETTER = ("wer", "cer")


@dataclass(frozen=True)
class Cell:
    """One score: share, its 95 % interval where it has one, over how many instances.

    Of several `seeds`: their mean, the least and the greatest of them, and how many instances each had.
    """

    value: float
    low: float | None
    high: float | None
    n: int | None
    seeds: int = 1


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


def scores(run: Run) -> list[Score]:
    """Every task of the run's model, dimension by dimension in the order of the results."""
    rows = []
    for task, whole in run.models.get(run.main, {}).items():
        for kind, result in parts_of(whole):
            cell = cell_of(result)
            if cell is None:
                continue
            metric, _ = score_of(result) or ("", 0.0)
            beside = {}
            for name in run.peers:
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
    """A task with one kind of instruction in several groups of runs; `singles[i][j]`: of run j of group i, None where it has none."""

    singles: list[list[Score | None]]

    @property
    def first(self) -> Score:
        """Of the first run that has it: chance, majority and what else is the same for all."""
        return next(score for group in self.singles for score in group if score)

    @property
    def cells(self) -> list[Cell | None]:
        """One a group."""
        return [over_seeds([score.cell if score else None for score in group]) for group in self.singles]

    @property
    def beside(self) -> dict[str, Cell]:
        """The peers' figures, each of the first group that has it."""
        out: dict[str, Cell] = {}
        for group in self.singles:
            known = [score.beside for score in group if score]
            for name in dict.fromkeys(name for beside in known for name in beside):
                cell = over_seeds([beside.get(name) for beside in known])
                if cell and name not in out:
                    out[name] = cell
        return out


def side_by_side(groups: Sequence[Group]) -> list[SideBySide]:
    """Every task of any of the runs, dimension by dimension."""
    tables = [[{(row.task, row.kind): row for row in scores(run)} for run in group.runs] for group in groups]
    keys = dict.fromkeys(key for group in tables for table in group for key in table)
    rows = [SideBySide([[table.get(key) for table in group] for group in tables]) for key in keys]
    order = list(dict.fromkeys(row.first.dimension for row in rows))
    return sorted(rows, key=lambda row: order.index(row.first.dimension))


@dataclass(frozen=True)
class Dimension:
    """The tasks of a dimension, and their means for each kind of instruction where there are several."""

    name: str
    rows: list[SideBySide]
    means: list[SideBySide]


def dimensions(groups: Sequence[Group]) -> list[Dimension]:
    """`side_by_side` under its dimensions."""
    found = groupby(side_by_side(groups), lambda row: row.first.dimension)
    return [
        Dimension(name, rows, [mean for kind in KINDS for mean in _means(rows, kind)])
        for name, rows in ((name, list(rows)) for name, rows in found)
    ]


def _means(rows: Sequence[SideBySide], kind: str) -> list[SideBySide]:
    """The mean over the tasks that all runs have and that are no error rates; nothing of fewer than two."""
    mine = [
        row
        for row in rows
        if row.first.kind == kind and not row.first.is_error and all(map(all, row.singles))
    ]
    if len(mine) < 2:
        return []
    # A mean for each run, so that the spread over seeds is that of the mean.
    places = [[(i, j) for j in range(len(group))] for i, group in enumerate(mine[0].singles)]
    return [SideBySide([[_mean([row.singles[i][j] for row in mine]) for i, j in group] for group in places])]


def _mean(found: Sequence[Score | None]) -> Score | None:
    """One run's mean over tasks; chance, majority and peers where all of them have one."""
    rows = [row for row in found if row]
    cell = mean_cell([row.cell for row in rows])
    if cell is None:
        return None
    shares = {name: [getattr(row, name) for row in rows] for name in ("chance", "majority")}
    whole = {name: None if None in found else sum(found) / len(rows) for name, found in shares.items()}
    peers = {name: mean_cell([row.beside.get(name) for row in rows]) for name in rows[0].beside}
    beside = {name: cell for name, cell in peers.items() if cell}
    first = rows[0]
    return Score(first.dimension, f"mean of {len(rows)} tasks", first.kind, first.metric, cell, **whole, unparsed=None, missing=None, beside=beside)  # fmt: skip


def over_seeds(cells: Sequence[Cell | None]) -> Cell | None:
    """One cell of several seeds: their mean, with the least and the greatest; of one run its own."""
    known = [cell for cell in cells if cell]
    if len(known) < 2:
        return known[0] if known else None
    values, counts = [cell.value for cell in known], {cell.n for cell in known}
    n = counts.pop() if len(counts) == 1 else None
    return Cell(sum(values) / len(values), min(values), max(values), n, len(values))


def mean_cell(cells: Sequence[Cell | None]) -> Cell | None:
    """The mean of scores; its interval is from the mean of the lower to the mean of the upper bounds, which is at least as wide as
    the true one (as if all erred together). None where one is missing."""
    known = [cell for cell in cells if cell]
    if not known or len(known) < len(cells):
        return None
    lows, highs = [cell.low for cell in known if cell.low is not None], [cell.high for cell in known if cell.high is not None]  # fmt: skip
    whole = len(lows) == len(highs) == len(known)
    low, high = (sum(lows) / len(lows), sum(highs) / len(highs)) if whole else (None, None)
    return Cell(sum(cell.value for cell in known) / len(known), low, high, None)


def over_chance(rows: Sequence[Score]) -> Cell | None:
    """Mean over tasks of score minus chance, those with a chance only; None without any."""
    cells = []
    for row in rows:
        if row.chance is not None and not row.is_error:
            low, high = (
                None if bound is None else bound - row.chance for bound in (row.cell.low, row.cell.high)
            )
            cells.append(Cell(row.cell.value - row.chance, low, high, row.cell.n))
    return mean_cell(cells)


def _share(result: dict[str, Any], whole: dict[str, Any], name: str) -> float | None:
    value = result.get(name, whole.get(name))
    return float(value) if is_number(value) else None


def _count(value: Any) -> int | None:
    return int(value) if is_number(value) else None

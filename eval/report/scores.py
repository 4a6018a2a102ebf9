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


@dataclass(frozen=True)
class Dimension:
    """The tasks of a dimension, and their means for each kind of instruction where there are several."""

    name: str
    rows: list[SideBySide]
    means: list[SideBySide]


def dimensions(runs: Sequence[Run]) -> list[Dimension]:
    """`side_by_side` under its dimensions."""
    groups = groupby(side_by_side(runs), lambda row: row.first.dimension)
    return [
        Dimension(name, rows, [mean for kind in KINDS for mean in _means(rows, kind)])
        for name, rows in ((name, list(group)) for name, group in groups)
    ]


def _means(rows: Sequence[SideBySide], kind: str) -> list[SideBySide]:
    """The mean over the tasks that all runs have and that are no error rates; nothing of fewer than two."""
    mine = [row for row in rows if row.first.kind == kind and not row.first.is_error and all(row.cells)]
    if len(mine) < 2:
        return []
    shares = {
        name: [value for row in mine if (value := getattr(row.first, name)) is not None]
        for name in ("chance", "majority")
    }
    whole = {
        name: sum(found) / len(found) if len(found) == len(mine) else None for name, found in shares.items()
    }
    peers = {name: mean_cell([row.beside.get(name) for row in mine]) for name in mine[0].beside}
    beside = {name: cell for name, cell in peers.items() if cell}
    cells = [mean_cell([row.cells[place] for row in mine]) for place in range(len(mine[0].cells))]
    known = next(cell for cell in cells if cell)
    first = Score(mine[0].first.dimension, f"mean of {len(mine)} tasks", kind, mine[0].first.metric, known, **whole, unparsed=None, missing=None, beside=beside)  # fmt: skip
    return [SideBySide(first, cells, beside)]


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

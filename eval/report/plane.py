"""The plane of learning and forgetting: a point for every run and epoch, of several seeds at their mean.

    x  forgetting: how far the probes of what the base LLM could do have dropped, mean over each probe's series, then over the probes
    y  learning: in training the JSON probe's rate of right answers on sound; at the end the tasks' mean score over chance

A series on sound is held against the base LLM's own figure on the description, one that the base LLM was not asked against the
figure before training. Series that need the sound to be understood ("answer") measure learning and are left out of x, and so are
divergences, which are no shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.curves import points, reference
from eval.report.plots import INK, LINE, PLACES, colour_of, svg
from eval.report.runs import Run, is_number
from eval.report.scores import Cell, mean_cell, over_chance, over_seeds, scores
from eval.report.seeds import Group

ANSWERS = ("json", "audio answer")
_LEARNING = ("answer", "answer only", "format only")


@dataclass(frozen=True)
class Point:
    """A run, or a group of seeds, at an epoch: shares with their intervals where they have one."""

    run: str
    epoch: float
    forgotten: Cell
    learned: Cell


@dataclass(frozen=True)
class Plane:
    """`training`: a point an epoch; `end`: a point a run; `series`: what x is the mean of; `without`: runs with no such series."""

    training: list[Point]
    end: list[Point]
    series: list[tuple[str, str]]
    without: list[str]
    drawing: str | None
    drawing_end: str | None


def retained(run: Run) -> list[tuple[str, str]]:
    """The (probe, series) of a run that tell what it could do before: shares that are held against something."""
    names = dict.fromkeys(
        (probe, series)
        for row in run.probes
        for probe, found in row.items()
        if probe not in ("epoch", "forgetting")
        for series in found
    )
    return [
        (probe, series)
        for probe, series in names
        if not series.endswith(_LEARNING)
        and reference(run, probe, series)
        and all(0 <= rate["value"] <= 1 for _, rate in points(run, probe, series))
    ]


def forgotten(run: Run, epoch: float, names: Sequence[tuple[str, str]]) -> Cell | None:
    """Mean drop at an epoch, over each probe's series and then over the probes; None where one of them was not asked then.

    The interval is that of the figures now; what they are held against is taken as known.
    """
    drops: dict[str, list[Cell]] = {}
    for probe, series in names:
        rate = dict(points(run, probe, series)).get(epoch)
        held = reference(run, probe, series)
        if rate is None or held is None:
            return None
        sign = -1 if rate.get("better") == "lower" else 1
        first, second = (
            sign * (held[0] - rate[name]) if is_number(rate.get(name)) else None for name in ("low", "high")
        )
        low, high = (second, first) if sign > 0 else (first, second)
        drops.setdefault(probe, []).append(Cell(sign * (held[0] - rate["value"]), low, high, None))
    return mean_cell([mean_cell(cells) for cells in drops.values()])


def plane(groups: Sequence[Group]) -> Plane | None:
    """The plane of all groups on the series that all their runs with probes have; None when there is none."""
    runs = [run for group in groups for run in group.runs]
    own = {run.name: retained(run) for run in runs}
    having = [run for run in runs if own[run.name]]
    if not having:
        return None
    names = [pair for pair in own[having[0].name] if all(pair in own[run.name] for run in having)]
    if not names:
        return None
    shared = _shared_tasks(having)
    training, end = [], []
    for group in groups:
        found = [_points_of(run, names, shared) for run in group.runs if run in having]
        training += _over_seeds(group.name, [points for points, _ in found])
        end += _over_seeds(group.name, [last for _, last in found])
    order = [group.name for group in groups]
    return Plane(
        training,
        end,
        names,
        [run.name for run in runs if run not in having],
        _draw(
            training, order, "right answers in JSON on sound, %", "Learning against forgetting in training"
        ),
        _draw(end, order, "score over chance, points", "Learning against forgetting at the end"),
    )


def _points_of(
    run: Run, names: Sequence[tuple[str, str]], shared: set[tuple[str, str]]
) -> tuple[list[Point], list[Point]]:
    """A run's points in training, and its one at the end (none where it was not evaluated)."""
    training, last = [], None
    for epoch in sorted({row["epoch"] for row in run.probes}):
        x = forgotten(run, epoch, names)
        if x is None:
            continue
        last = (epoch, x)
        rate = dict(points(run, *ANSWERS)).get(epoch)
        if rate:
            y = Cell(rate["value"], _bound(rate, "low"), _bound(rate, "high"), rate.get("n"))
            training.append(Point(run.name, epoch, x, y))
    gain = over_chance([row for row in scores(run) if (row.task, row.kind) in shared])
    return training, [Point(run.name, *last, gain)] if last and gain else []


def _over_seeds(name: str, found: Sequence[Sequence[Point]]) -> list[Point]:
    """The points of several seeds' runs at their means, epoch by epoch where all have one."""
    tables = [{point.epoch: point for point in points} for points in found]
    out = []
    for epoch in [epoch for epoch in tables[0] if all(epoch in table for table in tables)] if tables else []:
        here = [table[epoch] for table in tables]
        x, y = over_seeds([point.forgotten for point in here]), over_seeds([point.learned for point in here])
        assert x is not None
        assert y is not None
        out.append(Point(name, epoch, x, y))
    return out


def _shared_tasks(runs: Sequence[Run]) -> set[tuple[str, str]]:
    tables = [{(row.task, row.kind) for row in scores(run)} for run in runs if run.models]
    return set.intersection(*tables) if tables else set()


def _bound(rate: dict[str, Any], name: str) -> float | None:
    return float(rate[name]) if is_number(rate.get(name)) else None


def _draw(found: Sequence[Point], order: Sequence[str], ylabel: str, label: str) -> str | None:
    if not found:
        return None

    def draw(axes: Any) -> None:
        axes.axvline(0, color=LINE, linewidth=1)
        for number, name in enumerate(order):
            mine = [(point, point.forgotten, point.learned) for point in found if point.run == name]
            colour = colour_of(number)
            axes.plot([100 * x.value for _, x, _ in mine], [100 * y.value for *_, y in mine], color=colour, marker="o", markersize=5, linewidth=1.2)  # fmt: skip
            for point, x, y in mine:
                if x.low is not None and x.high is not None:
                    axes.plot(
                        [100 * x.low, 100 * x.high], [100 * y.value] * 2, color=colour, alpha=0.3, linewidth=2
                    )
                if y.low is not None and y.high is not None:
                    axes.plot(
                        [100 * x.value] * 2, [100 * y.low, 100 * y.high], color=colour, alpha=0.3, linewidth=2
                    )
                place = PLACES.get(point.epoch, f"{point.epoch:g}")
                axes.annotate(
                    place,
                    (100 * x.value, 100 * y.value),
                    textcoords="offset points",
                    xytext=(5, 4),
                    fontsize=8,
                    color=INK,
                )
        axes.set(xlabel="forgotten, points (left is better)", ylabel=ylabel)
        axes.margins(0.12)

    return svg(draw, label, 3.2)

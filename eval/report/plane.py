"""The plane of learning and forgetting: a point for every run and epoch.

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
from eval.report.scores import over_chance, scores

ANSWERS = ("json", "audio answer")
_LEARNING = ("answer", "answer only", "format only")


@dataclass(frozen=True)
class Point:
    """A run at an epoch: shares, with the interval of `learned` where it has one."""

    run: str
    epoch: float
    forgotten: float
    learned: float
    low: float | None = None
    high: float | None = None


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


def forgotten(run: Run, epoch: float, names: Sequence[tuple[str, str]]) -> float | None:
    """Mean drop at an epoch, over each probe's series and then over the probes; None where one of them was not asked then."""
    drops: dict[str, list[float]] = {}
    for probe, series in names:
        rates = [rate for at, rate in points(run, probe, series) if at == epoch]
        held = reference(run, probe, series)
        if not rates or held is None:
            return None
        change = held[0] - rates[0]["value"]
        drops.setdefault(probe, []).append(-change if rates[0].get("better") == "lower" else change)
    means = [sum(values) / len(values) for values in drops.values()]
    return sum(means) / len(means) if means else None


def plane(runs: Sequence[Run]) -> Plane | None:
    """The plane of all runs on the series that all runs with probes have; None when there is none."""
    own = {run.name: retained(run) for run in runs}
    having = [run for run in runs if own[run.name]]
    if not having:
        return None
    names = [pair for pair in own[having[0].name] if all(pair in own[run.name] for run in having)]
    if not names:
        return None
    shared = _shared_tasks(having)
    training, end = [], []
    for run in having:
        last = None
        for epoch in sorted({row["epoch"] for row in run.probes}):
            x = forgotten(run, epoch, names)
            if x is None:
                continue
            last = (epoch, x)
            rate = dict(points(run, *ANSWERS)).get(epoch)
            if rate:
                training.append(Point(run.name, epoch, x, rate["value"], _bound(rate, "low"), _bound(rate, "high")))  # fmt: skip
        y = over_chance([row for row in scores(run) if (row.task, row.kind) in shared])
        if last and y is not None:
            end.append(Point(run.name, *last, y))
    order = [run.name for run in runs]
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
            mine = [point for point in found if point.run == name]
            x, y = [100 * point.forgotten for point in mine], [100 * point.learned for point in mine]
            axes.plot(x, y, color=colour_of(number), marker="o", markersize=5, linewidth=1.2)
            for point, px, py in zip(mine, x, y, strict=True):
                if point.low is not None and point.high is not None:
                    axes.plot([px, px], [100 * point.low, 100 * point.high], color=colour_of(number), alpha=0.3, linewidth=2)  # fmt: skip
                place = PLACES.get(point.epoch, f"{point.epoch:g}")
                axes.annotate(
                    place, (px, py), textcoords="offset points", xytext=(5, 4), fontsize=8, color=INK
                )
        axes.set(xlabel="forgotten, points (left is better)", ylabel=ylabel)
        axes.margins(0.12)

    return svg(draw, label, 3.2)

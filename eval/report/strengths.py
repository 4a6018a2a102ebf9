"""The adapters at part of their strength: what is still learned at each, and what is still forgotten.

In: a run with `eval.lora_scales`. Out: a row a strength, the whole one last, and their way through the plane of learning and
forgetting. Learned and forgotten are measured as in `eval.report.plane`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.report.curves import points
from eval.report.plane import forgotten, retained
from eval.report.plots import INK, LINE, colour_of, svg
from eval.report.runs import Run
from eval.report.scores import Cell, cell_of, over_chance, scores

DIVERGENCE = ("forgetting", "text KL")


@dataclass(frozen=True)
class Row:
    """A strength. `cells`: of each task of `Strengths.tasks`; `divergence`: nats a token from the base LLM on text."""

    scale: float
    cells: list[Cell | None]
    learned: Cell | None
    forgotten: Cell | None
    divergence: float | None


@dataclass(frozen=True)
class Strengths:
    """`tasks`: their names. `drawing`: None unless two strengths have both figures."""

    tasks: list[str]
    rows: list[Row]
    drawing: str | None


def strengths(run: Run) -> Strengths | None:
    """The strengths of a run's adapters; None of a run that was evaluated at its whole strength only."""
    if not run.strengths:
        return None
    whole = [{**run.probes[-1], "epoch": 1.0}] if run.probes else []
    asked = replace(run, probes=[*(row for row in run.strengths if row["epoch"] != 1), *whole])
    names = retained(asked)
    tasks = list(run.models.get(run.main, {}))
    rows = []
    for scale in sorted({*(row["epoch"] for row in run.strengths), 1.0}):
        found = run.models.get(run.main if scale == 1 else f"{run.main}@{scale:g}", {})
        gain = over_chance(scores(Run(run.name, run.folder, {run.main: found})))
        rate = dict(points(asked, *DIVERGENCE)).get(scale)
        rows.append(
            Row(
                scale,
                [cell_of(found.get(task)) for task in tasks],
                gain,
                forgotten(asked, scale, names) if names else None,
                rate["value"] if rate else None,
            )
        )
    return Strengths(tasks, rows, _draw(rows))


def _draw(rows: Sequence[Row]) -> str | None:
    places = [
        (row.scale, 100 * row.forgotten.value, 100 * row.learned.value)
        for row in rows
        if row.forgotten and row.learned
    ]
    if len(places) < 2:
        return None

    def draw(axes: Any) -> None:
        axes.axvline(0, color=LINE, linewidth=1)
        axes.plot(
            [x for _, x, _ in places], [y for *_, y in places], color=colour_of(0), marker="o", markersize=5
        )
        for scale, x, y in places:
            axes.annotate(
                f"{scale:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=INK
            )
        axes.set(xlabel="forgotten, points (left is better)", ylabel="score over chance, points")
        axes.margins(0.12)

    return svg(draw, "Learning against forgetting at every strength of the adapters", 3.2)

"""Curves over the training: the loss, and each probe's series with its interval, the base LLM's own figure beside it.

In: runs, in groups that differ in the seed only. Out: drawings, one small one a series, in each a line a group; of several seeds the
mean, with a band from the least to the greatest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.plots import INK, LINE, colour_of, epoch_ticks, svg
from eval.report.runs import Run, is_number
from eval.report.seeds import Group, mean_losses, mean_points

# What is told apart elsewhere (the JSON table), or is not asked in the plain wording, comes after the rest.
_ASIDE = ("answer only", "format only", "other words", "in a chat")


def learning_curve(groups: Sequence[Group]) -> str | None:
    """Loss per step with its running mean, a line a group; of a single run also the steps on soft words before any sound.

    None without training steps.
    """
    logs = [[_losses(run.log, "step") for run in group.runs] for group in groups]
    shown = [(number, mean_losses(found)) for number, found in enumerate(logs) if all(found)]
    if not shown:
        return None
    alone = len(groups) == len(groups[0].runs) == 1

    def draw(axes: Any) -> None:
        for number, steps in shown:
            words = _losses(groups[0].runs[0].log, "soft_step") if alone else []
            if words:
                _loss(axes, words, 1, colour_of(1), alone)
            _loss(axes, steps, len(words) + 1, colour_of(number), alone)
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))

    return svg(draw, "Loss at every training step", 2.8)


def has_soft_words(run: Run) -> bool:
    return bool(_losses(run.log, "soft_step"))


def _losses(log: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [row for row in log if key in row and is_number(row.get("loss"))]


def _loss(axes: Any, rows: Sequence[dict[str, Any]], first: int, colour: str, alone: bool) -> None:
    x, y = range(first, first + len(rows)), [row["loss"] for row in rows]
    if alone:
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
        for place, (before, after) in enumerate(itertools.pairwise(rows), start=first):
            if before.get("epoch") != after.get("epoch"):
                axes.axvline(place, color=LINE, linewidth=0.8, linestyle=":")
    axes.plot(x, _running(y), color=colour, linewidth=1.8)
    if "least" in rows[0]:
        least, greatest = (_running([row[name] for row in rows]) for name in ("least", "greatest"))
        axes.fill_between(x, least, greatest, color=colour, alpha=0.16, linewidth=0)


def _running(values: Sequence[float]) -> list[float]:
    out, mean = [], values[0]
    for value in values:
        mean = 0.93 * mean + 0.07 * value
        out.append(mean)
    return out


@dataclass(frozen=True)
class Panel:
    """One series of a probe. `flat`: no run's figures ever leave the base LLM's. `lower`: less is better."""

    probe: str
    series: str
    drawing: str
    lower: bool
    flat: bool
    n: str


def panels(groups: Sequence[Group]) -> list[tuple[str, list[Panel], list[Panel]]]:
    """Probe by probe: the panels that show a change, and those that are flat or tell the same in other words."""
    names: dict[str, dict[str, None]] = {}
    for run in (run for group in groups for run in group.runs):
        for row in run.probes:
            for probe, series in row.items():
                if probe != "epoch":
                    names.setdefault(probe, {}).update(dict.fromkeys(series))
    out = []
    for probe, series_names in names.items():
        made = [_panel(groups, probe, name) for name in series_names]
        first = [
            panel for panel in made if not panel.flat and not any(part in panel.series for part in _ASIDE)
        ]
        rest = [panel for panel in made if panel not in first]
        out.append((probe, first, rest))
    return out


def points(run: Run, probe: str, series: str) -> list[tuple[float, dict[str, Any]]]:
    """(epoch, figure) wherever a run has that series."""
    found = [(row["epoch"], row.get(probe, {}).get(series)) for row in run.probes]
    return sorted(((epoch, rate) for epoch, rate in found if rate), key=lambda pair: pair[0])


def reference(run: Run, probe: str, series: str) -> tuple[float, str] | None:
    """What a series is held against, and what that is: the base LLM's own figure, for a series on sound that on its
    description; where the base LLM was not asked, the series before training. None without either."""
    base = run.base_probe.get(probe, {})
    for name in (series, _as_text(series)):
        if name in base:
            return base[name]["value"], "the base LLM's own"
    found = points(run, probe, series)
    return (found[0][1]["value"], "before training") if found and found[0][0] == 0 else None


def _as_text(series: str) -> str:
    for sound in ("audio", "spoken"):
        if series.startswith(sound):
            return "text" + series[len(sound) :]
    return series


def _references(group: Group, probe: str, series: str) -> float | None:
    """What a group's series is held against: the mean of its runs' own."""
    held = [found[0] for run in group.runs if (found := reference(run, probe, series))]
    return sum(held) / len(held) if held else None


def _panel(groups: Sequence[Group], probe: str, series: str) -> Panel:
    lines = [
        (number, group, mean_points([points(run, probe, series) for run in group.runs]))
        for number, group in enumerate(groups)
    ]
    lines = [line for line in lines if line[2]]
    rates = [rate for _, _, found in lines for _, rate in found]
    share = probe != "forgetting" and all(-1e-9 <= rate["value"] <= 1 + 1e-9 for rate in rates)
    scale = 100 if share else 1
    flat = all(
        ref is not None and abs(rate["value"] - ref[0]) < 1e-9
        for group in groups
        for run in group.runs
        for ref in [reference(run, probe, series)]
        for _, rate in points(run, probe, series)
    )

    def draw(axes: Any) -> None:
        for number, _, found in lines:
            x = [epoch for epoch, _ in found]
            colour = colour_of(number)
            axes.plot(x, [scale * rate["value"] for _, rate in found], color=colour, marker="o", markersize=3.5, linewidth=1.6)  # fmt: skip
            band = [(e, r["low"], r["high"]) for e, r in found if is_number(r.get("low")) and is_number(r.get("high"))]  # fmt: skip
            if len(band) > 1:
                axes.fill_between([e for e, *_ in band], [scale * low for _, low, _ in band], [scale * high for *_, high in band], color=colour, alpha=0.16, linewidth=0)  # fmt: skip
            elif band:
                epoch, low, high = band[0]
                axes.plot([epoch, epoch], [scale * low, scale * high], color=colour, alpha=0.4, linewidth=3)
        held = {
            number: value
            for number, group, _ in lines
            if (value := _references(group, probe, series)) is not None
        }
        alike = len(set(held.values())) == 1
        for number, value in list(held.items())[: 1 if alike else None]:
            axes.axhline(
                scale * value, color=INK if alike else colour_of(number), linewidth=1, linestyle="--"
            )
        axes.set(xlabel="epoch", ylabel="%" if share else "nats a token")
        if share:
            axes.set_ylim(-4, 104)
        epoch_ticks(axes, [epoch for *_, found in lines for epoch, _ in found])

    counts = sorted({int(rate["n"]) for rate in rates if is_number(rate.get("n"))})
    return Panel(
        probe,
        series,
        svg(draw, f"{probe}: {series} at every epoch", 1.9, 2.9),
        any(rate.get("better") == "lower" for rate in rates),
        flat,
        "" if not counts else f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}",
    )

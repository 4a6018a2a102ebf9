"""Runs of one recipe that differ in the seed only stand together: a row, a curve or a point for all, with its spread.

In: runs. Out: groups of them, most often of one run alone; and of figures of several seeds the mean, with the least and the greatest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.runs import Run, as_dict, is_number
from speech_llm.files import stable_hash


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only, in the order given; `seeds[i]` is None where a run does not tell its own."""

    name: str
    runs: list[Run]
    seeds: list[Any]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs under their recipes, in the order of each one's first; of two with the same seed the second stands alone."""
    found: list[tuple[str | None, list[Run], list[Any]]] = []
    for run in runs:
        recipe, seed = recipe_of(run)
        for own, members, seeds in found:
            if recipe is not None and own == recipe and seed not in seeds:
                members.append(run)
                seeds.append(seed)
                break
        else:
            found.append((recipe, [run], [seed]))
    starts = [_start([run.name for run in members]) for _, members, _ in found]
    groups = []
    for start, (_, members, seeds) in zip(starts, found, strict=True):
        name = start if starts.count(start) == 1 else ", ".join(run.name for run in members)
        groups.append(Group(f"{name} ({len(seeds)} seeds)" if len(seeds) > 1 else name, members, seeds))
    return groups


def recipe_of(run: Run) -> tuple[str | None, Any]:
    """What the manifests of a run say of its recipe but for the seed, as a hash (None where they say nothing), and the seed."""
    parts, seeds = [], []
    for stage, manifest in run.manifests:
        recipe = dict(as_dict(manifest.get("recipe")))
        if not recipe:
            return None, None
        if "seed" in recipe:
            seeds.append(recipe.pop("seed"))
        if isinstance(
            recipe.get("asked"), list
        ):  # of the describe stage: the seed, and how many clips are asked
            recipe["asked"] = recipe["asked"][1:]
        parts.append([stage, manifest.get("version"), recipe])
    return (stable_hash(parts), seeds[0]) if seeds else (None, None)


def mean_rate(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One figure of several seeds: the mean as `value`, the least and the greatest as `low` and `high`; of one run its own."""
    if len(rates) == 1:
        return dict(rates[0])
    values = [rate["value"] for rate in rates]
    counts = {rate.get("n") for rate in rates}
    return {
        **rates[0],
        "value": sum(values) / len(values),
        "low": min(values),
        "high": max(values),
        "n": counts.pop() if len(counts) == 1 else None,
        "seeds": len(values),
    }


def mean_points(
    series: Sequence[Sequence[tuple[float, dict[str, Any]]]],
) -> list[tuple[float, dict[str, Any]]]:
    """(place, figure) of several seeds' series, wherever all have one."""
    tables = [dict(points) for points in series]
    return [
        (place, mean_rate([table[place] for table in tables]))
        for place in (tables[0] if tables else ())
        if all(place in table for table in tables)
    ]


def mean_losses(logs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of training logs step by step as long as all have one: the mean `loss`, with the `least` and the `greatest`.

    Of one run its own rows.
    """
    if len(logs) == 1:
        return list(logs[0])
    rows = []
    for steps in zip(*logs, strict=False):
        losses = [step["loss"] for step in steps if is_number(step.get("loss"))]
        rows.append(
            {**steps[0], "loss": sum(losses) / len(losses), "least": min(losses), "greatest": max(losses)}
        )
    return rows


def _start(names: Sequence[str]) -> str:
    """What the names begin with in common, without what announces the seed; all of them where that is nothing."""
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = re.sub(r"(?:[\W_]+s|[\W_]*seed)?[\W_]*\d*$", "", "".join(letters[0] for letters in alike))
    return start or ", ".join(names)

"""A model's score by dimension, relative to a baseline: Dynamic-SUPERB phase 2 (2411.05361).

In: two folders of `speech-llm eval` or `score`, the baseline first (phase 2's is a cascade, Whisper large-v3 then Llama-3.1-8B). Out: by
dimension (phase 2's domain) the mean over its tasks of the relative improvement,

    (score - baseline) / baseline        where more is better
    (baseline - score) / baseline        where less is better: error rates, absolute errors of numbers

on the instances that both were asked. What could not be read is in the scores: an absolute error is divided by the share that was read.
A task whose baseline is zero has no relative improvement; it is named and left out, as phase 2 does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eval.compare import Pair, pairs, results_of


def relative_scores(baseline: Path, model: Path) -> dict[str, dict[str, Any]]:
    """By dimension `{"relative", "interval", "tasks": {task: relative}, "left_out": {task: reason}}`.

    `relative`: a share (0.1 is 10 % better than the baseline), None where no task of the dimension has one. `interval`: 95 %, instances
    drawn with replacement within each task, the tasks themselves taken as they are. Raises `UserError` when they share no instance.
    """
    dimensions = results_of(model) | results_of(baseline)
    found: dict[str, dict[str, Any]] = {}
    drawn: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(0)
    for task, pair in pairs(baseline, model).items():
        name = str(dimensions.get(task, {}).get("dimension") or "other")
        own = found.setdefault(name, {"relative": None, "interval": None, "tasks": {}, "left_out": {}})
        reason = _without(pair)
        if reason is not None:
            own["left_out"][task] = reason
            continue
        own["tasks"][task] = float(_relative(pair, *map(np.asarray, pair.values)))
        # Tasks of one length are drawn alike; in another order they are independent of each other.
        drawn.setdefault(name, []).append(rng.permutation(_relative(pair, *pair.draws)))
    for name, own in found.items():
        if not own["tasks"]:
            continue
        own["relative"] = round(float(np.mean(list(own["tasks"].values()))), 4)
        means = np.mean(drawn[name], axis=0)
        # A draw may leave a baseline of zero, which nothing is relative to.
        means = means[np.isfinite(means)]
        if len(means):
            own["interval"] = [round(float(value), 4) for value in np.quantile(means, [0.025, 0.975])]
        own["tasks"] = {task: round(value, 4) for task, value in own["tasks"].items()}
    return found


def _without(pair: Pair) -> str | None:
    """Why a task has no relative improvement."""
    base, score = pair.values
    if not np.isfinite(base) or not np.isfinite(score):
        whose = "the baseline's" if not np.isfinite(base) else "the model's"
        return f"none of {whose} answers is a number"
    return "the baseline is zero" if base == 0 else None


def _relative(pair: Pair, base: np.ndarray, score: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((base - score if pair.less_is_better else score - base) / base)


def relative_table(found: dict[str, dict[str, Any]], names: tuple[str, str]) -> str:
    """The figures as plain text, in per cent."""
    from speech_llm.summary import align

    rows = [["dimension", "tasks", f"{names[1]} relative to {names[0]}", "95 % interval", "left out"]]
    for name, own in found.items():
        told = "-" if own["relative"] is None else f"{100 * own['relative']:+.1f}"
        interval = "-"
        if own["interval"] is not None:
            low, high = (100 * value for value in own["interval"])
            interval = f"{low:+.1f} to {high:+.1f}"
        rows.append([name, str(len(own["tasks"])), told, interval, str(len(own["left_out"]))])
    left = [f"{task}: {why}" for own in found.values() for task, why in own["left_out"].items()]
    note = "per cent better than the baseline, mean over a dimension's tasks; of errors less is better"
    return "\n".join([align(rows), note, *(f"left out: {reason}" for reason in left)])

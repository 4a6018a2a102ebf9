"""Two models on the same instances: how much better one is, and whether that can be chance.

In: two folders of `speech-llm eval` or `score` (`predictions.jsonl`), or of a run (its model). Out: for each task both scores and
their difference on the instances that both answered. Where an answer is right or wrong, McNemar's exact test on those that only one
gets right; else a bootstrap over instances. `eval.relative` has the same by dimension, relative to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.speech_ifeval import SPEECH_IFEVAL, forgetting_rate
from eval.stats import mcnemar
from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl

DRAWS = 2000


def predictions_path(folder: Path) -> Path:
    """Where a folder of `eval` or `score`, or a run, has its answers. Raises `UserError` where there are none."""
    places = (folder / "predictions.jsonl", folder / "eval" / "speech_llm" / "predictions.jsonl")
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(f"{places[0]}: no such file; `speech-llm eval` or `speech-llm score` makes it")
    return path


def predictions(folder: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """The scored rows of a folder by task, id, prompt and label.

    Raises `UserError` for a folder without any.
    """
    rows = {}
    path = predictions_path(folder)
    for number, row in read_jsonl(path):
        if "task" not in row or "id" not in row:
            raise UserError(f"{path}: line {number} is no scored answer, it has no 'task' or no 'id'")
        key = (str(row["task"]), str(row["id"]), str(row.get("prompt")), str(row.get("label")))
        rows[key] = row
    return rows


@dataclass(frozen=True)
class Pair:
    """One task of two models on the instances that both were asked.

    `kind`: "accuracy", "mean score", "error rate" or "absolute error" (of the last two less is better). `values`: each one's, NaN
    where no number could be read. `draws`: (2, `DRAWS`), the same with instances drawn with replacement. `unmatched`: instances that
    only one was asked. `scores`: (2, n), where answers are right or wrong.
    """

    kind: str
    n: int
    values: tuple[float, float]
    draws: np.ndarray
    unmatched: int
    scores: np.ndarray | None = None

    @property
    def less_is_better(self) -> bool:
        return self.kind in ("error rate", "absolute error")


def pairs(first: Path, second: Path) -> dict[str, Pair]:
    """The tasks of two folders by name. Raises `UserError` when they share no instance."""
    one, other = predictions(first), predictions(second)
    shared = [key for key in one if key in other]
    if not shared:
        raise UserError(f"{first} and {second} have no instance in common (same task, id, prompt and label)")
    found = {}
    for task in dict.fromkeys(key[0] for key in shared):
        keys = [key for key in shared if key[0] == task]
        unmatched = sum(key[0] == task for key in set(one) ^ set(other))
        found[task] = _pair([one[key] for key in keys], [other[key] for key in keys], unmatched)
    return found


def _pair(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], unmatched: int) -> Pair:
    both, n = (first, second), len(first)
    picks = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    if all("errors" in row for row in (*first, *second)):
        # Words or characters wrong of all: the same units for both.
        units = np.asarray([row["words"] for row in first], float)
        sums = [np.asarray([row["errors"] for row in rows], float) for rows in both]
        kind, below = "error rate", [units, units]
    elif all(row.get("metric") == "number" for row in (*first, *second)):
        # Dynamic-SUPERB phase 2: the mean error of the numbers that were read, divided by the share that was.
        read = [np.asarray([row["score"] is not None for row in rows], float) for rows in both]
        sums = [np.asarray([row["score"] or 0.0 for row in rows], float) for rows in both]
        kind, below = "absolute error", read
    else:
        sums = [np.asarray([_score(row) for row in rows], float) for rows in both]
        right = all(set(np.unique(values)) <= {0.0, 1.0} for values in sums)
        kind, below = "accuracy" if right else "mean score", [np.ones(n), np.ones(n)]
    power = 2 if kind == "absolute error" else 1
    values, draws = [], []
    for over, under in zip(sums, below, strict=True):
        total, drawn = under.sum(), under[picks].sum(1)
        if kind == "error rate":
            total, drawn = max(1e-9, total), np.maximum(1e-9, drawn)
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(float(over.sum() * n ** (power - 1) / np.float64(total) ** power))
            draws.append(over[picks].sum(1) * n ** (power - 1) / drawn**power)
    scores = np.stack(sums) if kind == "accuracy" else None
    return Pair(kind, n, (values[0], values[1]), np.stack(draws), unmatched, scores)


def compare(first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """By task `{"n", "kind", "first", "second", "difference", "interval", "p", "only_first", "only_second", "unmatched"}`.

    `difference`: second - first. `kind` and `unmatched` as of `Pair`. A value is None where no number could be read. Raises
    `UserError` when they share no instance.
    """
    results = {}
    for task, pair in pairs(first, second).items():
        told = {"n": pair.n, "kind": pair.kind, **_told(pair.values, pair.draws[1] - pair.draws[0])}
        if pair.scores is not None:
            one, other = pair.scores == 1
            only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
            told["p"] = float(f"{mcnemar(only_first, only_second):.3g}")
            told |= {"only_first": only_first, "only_second": only_second}
        results[task] = {**told, "unmatched": pair.unmatched}
    return results


def _score(row: dict[str, Any]) -> float:
    """What could not be read counts as nothing."""
    return float(row["score"] or 0.0)


def _told(values: Sequence[float], draws: np.ndarray) -> dict[str, Any]:
    shown: list[float | None] = [round(value, 4) if np.isfinite(value) else None for value in values]
    draws = draws[np.isfinite(draws)]
    if None in shown or not len(draws):
        return {"first": shown[0], "second": shown[1], "difference": None, "interval": None, "p": None}
    low, high = np.quantile(draws, [0.025, 0.975])
    # Two-sided, from how often a draw of the difference has the other sign.
    p = min(1.0, 2 * min(float((draws <= 0).mean()), float((draws >= 0).mean())))
    return {
        "first": shown[0],
        "second": shown[1],
        "difference": round(values[1] - values[0], 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "p": max(round(p, 4), 1 / DRAWS),
    }


def results_of(folder: Path) -> dict[str, Any]:
    """Task -> metrics of a folder of `eval` or `score`, or of a run's model; empty where there are none."""
    path = folder / "results.json"
    results = read_json(path) if path.exists() else {}
    results = (results.get("models") or {}).get("speech_llm", results) if isinstance(results, dict) else {}
    return {task: found for task, found in results.items() if isinstance(found, dict)}


def ifeval_forgetting(first: Path, second: Path) -> str | None:
    """Speech-IFEval's forgetting rate of `second` against `first` (the text LLM fed the sound as text); None without both IFrates.

    With the chain of thought where a judge has seen that of both.
    """
    found, judged = [], []
    for folder in (first, second):
        results = results_of(folder)
        if SPEECH_IFEVAL not in results:
            return None
        found.append(results[SPEECH_IFEVAL])
        verdicts = predictions_path(folder).parent / "judged-reasoning.json"
        judged.append(read_json(verdicts).get("ifrate") if verdicts.exists() else None)
    if all(judged):
        found = judged
    change = forgetting_rate(found[0], found[1])
    if change is None:
        return None
    rates = " -> ".join(f"{100 * result['ifrate']:.2f}" for result in found)
    return f"Speech-IFEval: IFrate {rates}, forgetting rate {100 * change:+.2f} %"


def comparison_table(results: dict[str, dict[str, Any]], names: tuple[str, str]) -> str:
    """The comparison as plain text, in per cent (an absolute error as it is)."""
    from speech_llm.summary import align

    rows = [["task", "n", *names, "difference", "95 % interval", "p"]]
    for task, found in results.items():
        kind = found["kind"]
        name = {"error rate": f"{task} (errors)", "absolute error": f"{task} (absolute error)"}.get(
            kind, task
        )
        form, scale = (".3g", 1) if kind == "absolute error" else (".1f", 100)
        cells = [
            "-" if found[key] is None else format(scale * found[key], form) for key in ("first", "second")
        ]
        change = ["-", "-", "-"]
        if found["difference"] is not None:
            low, high = (format(scale * value, f"+{form}") for value in found["interval"])
            change = [
                format(scale * found["difference"], f"+{form}"),
                f"{low} to {high}",
                f"{found['p']:.3g}",
            ]
        rows.append([name, str(found["n"]), *cells, *change])
    left_out = sum(found["unmatched"] for found in results.values())
    note = "p: McNemar's exact test where answers are right or wrong, else a bootstrap; not corrected for the number of tasks"
    return (
        align(rows)
        + f"\n{note}"
        + (f"\n{left_out:,} instances that only one was asked are left out" if left_out else "")
    )

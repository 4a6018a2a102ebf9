"""Two models on the same instances: how much better one is, and whether that can be chance.

In: two folders of `speech-llm eval` or `score` (`predictions.jsonl`), or of a run (its model). Out: for each task both scores and
their difference on the instances that both answered. Where an answer is right or wrong, McNemar's exact test on those that only one
gets right; else a bootstrap over instances.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    for _, row in read_jsonl(predictions_path(folder)):
        key = (str(row["task"]), str(row["id"]), str(row.get("prompt")), str(row.get("label")))
        rows[key] = row
    return rows


def compare(first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """By task `{"n", "kind", "first", "second", "difference", "interval", "p", "only_first", "only_second", "unmatched"}`.

    `difference`: second - first. `kind`: "accuracy", "error rate" (less is better) or "mean score". `unmatched`: instances that
    only one of them was asked. Raises `UserError` when they share none.
    """
    one, other = predictions(first), predictions(second)
    shared = [key for key in one if key in other]
    if not shared:
        raise UserError(f"{first} and {second} have no instance in common (same task, id, prompt and label)")
    results = {}
    for task in dict.fromkeys(key[0] for key in shared):
        keys = [key for key in shared if key[0] == task]
        unmatched = sum(key[0] == task for key in set(one) ^ set(other))
        results[task] = {
            "n": len(keys),
            **_paired([one[key] for key in keys], [other[key] for key in keys]),
            "unmatched": unmatched,
        }
    return results


def _paired(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if all("errors" in row for row in (*first, *second)):
        words = np.asarray([row["words"] for row in first], float)
        errors = [np.asarray([row["errors"] for row in rows], float) for rows in (first, second)]
        picks = np.random.default_rng(0).integers(0, len(words), (DRAWS, len(words)))
        total = np.maximum(1e-9, words[picks].sum(1))
        draws = (errors[1][picks].sum(1) - errors[0][picks].sum(1)) / total
        values = [float(e.sum() / max(1e-9, words.sum())) for e in errors]
        return {"kind": "error rate", **_told(values, draws)}
    scores = [np.asarray([_score(row) for row in rows], float) for rows in (first, second)]
    means = [float(values.mean()) for values in scores]
    picks = np.random.default_rng(0).integers(0, len(scores[0]), (DRAWS, len(scores[0])))
    draws = (scores[1] - scores[0])[picks].mean(1)
    if not all(set(np.unique(values)) <= {0.0, 1.0} for values in scores):
        return {"kind": "mean score", **_told(means, draws)}
    only_first = int(((scores[0] == 1) & (scores[1] == 0)).sum())
    only_second = int(((scores[0] == 0) & (scores[1] == 1)).sum())
    told = _told(means, draws)
    told["p"] = float(f"{mcnemar(only_first, only_second):.3g}")
    return {"kind": "accuracy", **told, "only_first": only_first, "only_second": only_second}


def _score(row: dict[str, Any]) -> float:
    """What could not be read (a number that is N/A) counts as nothing."""
    return float(row["score"] or 0.0)


def _told(values: Sequence[float], draws: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(draws, [0.025, 0.975])
    # Two-sided, from how often a draw of the difference has the other sign.
    p = min(1.0, 2 * min(float((draws <= 0).mean()), float((draws >= 0).mean())))
    return {
        "first": round(values[0], 4),
        "second": round(values[1], 4),
        "difference": round(values[1] - values[0], 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "p": max(round(p, 4), 1 / DRAWS),
    }


def ifeval_forgetting(first: Path, second: Path) -> str | None:
    """Speech-IFEval's forgetting rate of `second` against `first` (the text LLM fed the sound as text); None without both IFrates.

    With the chain of thought where a judge has seen that of both.
    """
    found, judged = [], []
    for folder in (first, second):
        path = folder / "results.json"
        results = read_json(path) if path.exists() else {}
        results = (results.get("models") or {}).get("speech_llm", results)
        if not isinstance(results, dict) or SPEECH_IFEVAL not in results:
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
    """The comparison as plain text, in per cent."""
    from speech_llm.summary import align

    rows = [["task", "n", *names, "difference", "95 % interval", "p"]]
    for task, found in results.items():
        name = f"{task} (errors)" if found["kind"] == "error rate" else task
        low, high = (100 * value for value in found["interval"])
        p = found["p"]
        cells = [f"{100 * found[key]:.1f}" for key in ("first", "second")]
        rows.append(
            [
                name,
                str(found["n"]),
                *cells,
                f"{100 * found['difference']:+.1f}",
                f"{low:+.1f} to {high:+.1f}",
                f"{p:.3g}",
            ]
        )
    left_out = sum(found["unmatched"] for found in results.values())
    note = "p: McNemar's exact test where answers are right or wrong, else a bootstrap; not corrected for the number of tasks"
    return (
        align(rows)
        + f"\n{note}"
        + (f"\n{left_out:,} instances that only one was asked are left out" if left_out else "")
    )

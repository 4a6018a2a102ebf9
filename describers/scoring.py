"""How good guesses are: labels and guesses in, counts, shares with 95 % intervals, calibration and confusions out.

A guess may be None: the describer kept silent. Silence costs coverage and accuracy, never precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.stats import majority, wilson_interval

LEFT_OUT = "(left out)"
# Fewer clips than this say nothing about a precision: with 10 of 10 right the 95 % interval still begins at 0.72.
LEAST_TOLD = 10
# 90 % of a normal distribution lie below this.
_ONE_SIDED_90 = 1.281552


def score(
    labels: Sequence[str], told: Sequence[str | None], confidence: Sequence[float | None]
) -> dict[str, Any]:
    """Compare what was told of clips with their labels.

    Returns `{"n", "told", "coverage", "accuracy", "accuracy_95", "precision", "precision_95", "majority", "chance", "ece",
    "confusion"}`: accuracy = right / n (silence is not right), precision = right / told (None when nothing was told),
    ece = expected calibration error of what was told, confusion = label -> told (or "(left out)") -> count.
    """
    right = [guess == label for guess, label in zip(told, labels, strict=True)]
    answered = [guess is not None for guess in told]
    n, count, hits = len(labels), sum(answered), sum(right)
    sure = [(p, r) for p, r in zip(confidence, right, strict=True) if p is not None]
    return {
        "n": n,
        "told": count,
        "coverage": count / n if n else 0.0,
        "accuracy": hits / n if n else 0.0,
        "accuracy_95": list(wilson_interval(hits, n)),
        "precision": hits / count if count else None,
        "precision_95": list(wilson_interval(hits, count)) if count else None,
        "majority": majority(labels),
        "chance": 1 / len(set(labels)) if n else None,
        "ece": calibration_error([p for p, _ in sure], [r for _, r in sure]) if sure else None,
        "confusion": confusion(labels, told),
    }


def confusion(labels: Sequence[str], told: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """label -> what was told -> how often; what never occurred is absent."""
    counts = Counter(
        (label, LEFT_OUT if guess is None else guess) for label, guess in zip(labels, told, strict=True)
    )
    out: dict[str, dict[str, int]] = {label: {} for label in sorted(set(labels))}
    for (label, guess), count in sorted(counts.items()):
        out[label][guess] = count
    return out


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): mean |confidence - accuracy| over equal bins."""
    p, r = np.asarray(confidence, float), np.asarray(right, float)
    if not len(p):
        return 0.0
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(float(p[place == b].sum() - r[place == b].sum())) for b in range(bins)]
    return sum(gaps) / len(p)


def choose_threshold(
    confidence: Sequence[float], right: Sequence[bool], precision: float
) -> tuple[float | None, float]:
    """`(threshold, coverage)`: the least confidence from which on guesses are right at least `precision` of the time.

    What must reach `precision` is not the share that was right but its lower bound (Wilson, 90 % one-sided): the threshold
    with the most coverage is the luckiest of many, and elsewhere its share would come out lower. With nothing wrong it
    takes 15 guesses to show 90 %, 32 for 95 %, 81 for 98 %. Guesses of equal confidence stand or fall together. (None, 0.0)
    when no threshold that leaves 10 guesses reaches it.
    """
    p = np.asarray(confidence, float)
    order = np.argsort(-p, kind="stable")
    p, hits = p[order], np.cumsum(np.asarray(right, bool)[order])
    last_of_its_kind = np.append(p[1:] < p[:-1], True) if len(p) else np.zeros(0, bool)
    best = None
    for index in np.flatnonzero(last_of_its_kind).tolist():
        told = index + 1
        lower, _ = wilson_interval(int(hits[index]), told, _ONE_SIDED_90)
        if told >= LEAST_TOLD and lower >= precision - 1e-12:
            best = index
    return (None, 0.0) if best is None else (float(p[best]), (best + 1) / len(p))


def confusion_table(counts: dict[str, dict[str, int]]) -> str:
    """The confusion matrix as text: a row a label, a column a guess."""
    guesses = sorted({guess for row in counts.values() for guess in row} | set(counts))
    guesses.sort(key=lambda guess: guess == LEFT_OUT)
    head = ["is \\ told", *guesses]
    rows = [[label, *(str(row.get(guess, 0) or ".") for guess in guesses)] for label, row in counts.items()]
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *rows]
    )


def percent(share: float | None, interval: Sequence[float] | None = None) -> str:
    """ "97.2 % (95 % interval 94.0 to 98.8)"."""
    if share is None:
        return "none"
    said = f"{100 * share:.1f} %"
    return said if interval is None else f"{said} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def check_text(attribute: str, scores: dict[str, Any]) -> str:
    """What a check against labels found, in lines."""
    if not scores["n"]:
        return f"{attribute}: no clip has a label to compare with"
    lines = [
        f"{attribute} against {scores['n']:,} labels: right {percent(scores['accuracy'], scores['accuracy_95'])}, "
        f"told {percent(scores['coverage'])}, of those right {percent(scores['precision'], scores['precision_95'])}; "
        f"majority {percent(scores['majority'])}, chance {percent(scores['chance'])}"
        + ("" if scores["ece"] is None else f", calibration error {100 * scores['ece']:.1f} points"),
        confusion_table(scores["confusion"]),
    ]
    return "\n".join(lines)

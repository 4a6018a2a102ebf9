"""Uncertainty: intervals, chance, majority, and the paired comparison of two models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np


def wilson_interval(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); (0, 1) where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


class Rate(TypedDict):
    """One figure of a probe: its value, 95 % interval, over how many, and which way is good."""

    value: float
    low: float
    high: float
    n: int
    better: Literal["higher", "lower"]


def rate(hits: int, n: int, better: Literal["higher", "lower"] = "higher") -> Rate:
    """A share with its Wilson interval; of nothing, 0 in (0, 1)."""
    low, high = wilson_interval(hits, n)
    return {
        "value": round(hits / n, 4) if n else 0.0,
        "low": round(low, 4),
        "high": round(high, 4),
        "n": n,
        "better": better,
    }


def mean_rate(
    sums: Sequence[float], counts: Sequence[float], better: Literal["higher", "lower"] = "lower"
) -> Rate:
    """sum(sums) / sum(counts) with its bootstrap interval over rows: a mean per token of rows of unlike length."""
    low, high = bootstrap_ratio(sums, counts)
    total = sum(counts)
    return {
        "value": round(sum(sums) / total, 5) if total else 0.0,
        "low": round(low, 5),
        "high": round(high, 5),
        "n": len(sums),
        "better": better,
    }


def bootstrap_ratio(
    errors: Sequence[float], totals: Sequence[float], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of sum(errors) / sum(totals), rows drawn with replacement: for corpus-level WER."""
    if not errors or not sum(totals):
        return 0.0, 1.0
    rng = np.random.default_rng(seed)
    e, t = np.asarray(errors, float), np.asarray(totals, float)
    picks = rng.integers(0, len(e), (draws, len(e)))
    low, high = np.quantile(e[picks].sum(1) / np.maximum(1.0, t[picks].sum(1)), [0.025, 0.975])
    return float(low), float(high)


def chance(options: Sequence[Sequence[str] | None]) -> float | None:
    """The rate of blind guesses, each among the options of its instance; None where one has no options."""
    rates = [1 / len(own) if own else None for own in options]
    known = [rate for rate in rates if rate is not None]
    return sum(known) / len(known) if known and len(known) == len(rates) else None


def majority(labels: Sequence[str]) -> float | None:
    """The rate of always giving the most frequent label."""
    return Counter(labels).most_common(1)[0][1] / len(labels) if labels else None


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p that two models are equally good, from the instances that only one of them gets right."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def agreement(pairs: Sequence[tuple[bool, bool]], draws: int = 2000) -> dict[str, Any] | None:
    """How far two who say right or wrong of the same answers agree; None where there is no answer.

    `{"n", "raw", "interval", "kappa", "kappa_interval", "both_right", "first_only", "second_only", "both_wrong"}`: the share of equal
    verdicts with its Wilson interval, and Cohen's kappa (1960), the share beyond what their own rates give by chance, with a bootstrap
    interval. Kappa is None where chance alone agrees on everything (both always say the same one thing).
    """
    if not pairs:
        return None
    cells = np.asarray(
        [pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]
    )
    n = len(pairs)
    equal = int(cells[0] + cells[3])
    drawn = _kappa(np.random.default_rng(0).multinomial(n, cells / n, draws))
    drawn = drawn[np.isfinite(drawn)]
    kappa = float(_kappa(cells[None])[0])
    known = math.isfinite(kappa)
    return {
        "n": n,
        "raw": round(equal / n, 4),
        "interval": [round(value, 4) for value in wilson_interval(equal, n)],
        "kappa": round(kappa, 4) if known else None,
        "kappa_interval": [round(float(v), 4) for v in np.quantile(drawn, [0.025, 0.975])] if known else None,
        **dict(zip(("both_right", "first_only", "second_only", "both_wrong"), map(int, cells), strict=True)),
    }


def _kappa(cells: np.ndarray) -> np.ndarray:
    """Cohen's kappa (k,) of tables (k, 4): both, first only, second only, neither. NaN where it is not defined."""
    shares = cells / cells.sum(1, keepdims=True)
    both, first_only, second_only, neither = shares.T
    first, second = both + first_only, both + second_only
    by_chance = first * second + (1 - first) * (1 - second)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Adding 0 makes a -0 plain.
        return np.where(by_chance < 1, (both + neither - by_chance) / (1 - by_chance) + 0.0, np.nan)

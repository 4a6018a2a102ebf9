"""Results as a plain-text table for the terminal.

In: `results.json` of a run, or of one evaluation. Out: lines of text, numbers in per cent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What stands beside the number itself in a task's result.
_ASIDE = {
    "n",
    "unparsed",
    "unanswered",
    "missing",
    "rejected",
    "interval",
    "chance",
    "majority",
    "seen",
    "unseen",
    "metric",
    "options",
    "exact",
    "na_rate",
}
PEERS = ("chance", "majority", "cascade", "ceiling", "teacher")
_SHOWN = {"speech_llm": "model"}


def score_of(result: dict[str, Any]) -> tuple[str, float] | None:
    """Name and value of a result's metric (`accuracy`, `wer`, ...); None when nothing was scored."""
    for name in (result.get("metric"), "accuracy", "wer", *result):
        value = result.get(name) if isinstance(name, str) and name not in _ASIDE else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(name), float(value)
    return None


def results_table(results: dict[str, Any]) -> str:
    """A run's model beside chance, the majority class and its peers: a row for each task and kind of instruction."""
    models: dict[str, Any] = results.get("models") or {}
    # A run may have been asked to evaluate its peers only.
    main = "speech_llm" if "speech_llm" in models else next(iter(models), "speech_llm")
    peers = [name for name in PEERS if name in ("chance", "majority") or name in models]
    peers = [name for name in peers if name != main]
    head = ["task", "prompts", "n", *peers, _SHOWN.get(main, main), "95 % interval"]
    rows = []
    for task, whole in (models.get(main) or {}).items():
        for kind in ("seen", "unseen") if _parts(whole) else ("all",):
            result = whole.get(kind) if kind != "all" else whole
            if not isinstance(result, dict) or score_of(result) is None:
                continue
            metric, value = score_of(result) or ("", 0.0)
            cells = [f"{task} (WER)" if metric == "wer" else task, kind, str(result.get("n", ""))]
            for name in peers:
                if name in ("chance", "majority"):
                    number = result.get(name, whole.get(name))
                    cells.append(_percent(number))
                    continue
                other = models[name].get(task) or {}
                other = other.get(kind, {}) if kind != "all" else other
                found = score_of(other) if isinstance(other, dict) else None
                cells.append(_percent(found[1] if found else None))
            rows.append([*cells, _percent(value), _interval(result)])
    if not rows:
        return "no results yet"
    note = "per cent right; (WER): per cent of words wrong, less is better"
    return f"{align([head, *rows])}\n{note}"


def scores_table(results: dict[str, Any]) -> str:
    """One evaluation's tasks: metric, interval, n, unparsed, chance, majority."""
    rows = [["task", "prompts", "metric", "value", "95 % interval", "n", "unparsed", "chance", "majority"]]
    for task, whole in results.items():
        for kind in ("all", *_parts(whole)) if isinstance(whole, dict) else ():
            result = whole if kind == "all" else whole[kind]
            metric, value = score_of(result) or ("", None)
            counts = [str(result.get("n", "")), str(result.get("unparsed", ""))]
            told = _plain if metric == "mae" else _percent
            beside = [told(result.get(name)) for name in ("chance", "majority")]
            rows.append([task, kind, metric, told(value), _interval(result, told), *counts, *beside])
    return align(rows) if len(rows) > 1 else "nothing was scored"


def _parts(result: Any) -> list[str]:
    """Which of seen and unseen instructions a result is split into."""
    return [
        kind for kind in ("seen", "unseen") if isinstance(result, dict) and isinstance(result.get(kind), dict)
    ]


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else "-"


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else "-"


def _interval(result: dict[str, Any], told: Callable[[Any], str] = _percent) -> str:
    interval = result.get("interval")
    return f"{told(interval[0])} to {told(interval[1])}" if interval and len(interval) == 2 else "-"


def align(rows: list[list[str]]) -> str:
    """Columns side by side: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)

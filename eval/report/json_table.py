"""The JSON probe as tables: the levels of form, and form against answer, before and after every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval.report.plots import PLACES
from eval.report.runs import Run

KINDS = {
    "audio": "about a sound",
    "audio, other words:": "about a sound, in other words, keys and shapes",
    "text": "about the description",
    "text, other words:": "about the description, in other words, keys and shapes",
}
BASE = "base LLM, description"
LEVELS = {
    "strict": "is JSON",
    "repaired": "is JSON once repaired",
    "schema": "has the right keys",
    "answer": "form and answer right",
    "format only": "form only",
    "answer only": "answer only",
    "neither": "neither",
}


@dataclass(frozen=True)
class JsonTable:
    """One way of asking. `rows`: (when, a figure for each of `columns`, None where it was not measured)."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[dict[str, Any] | None]]]
    n: int | None


def json_tables(run: Run) -> list[JsonTable]:
    """A table for each way of asking that was asked; the base LLM's own figures first."""
    places = [(BASE, run.base_probe)]
    places += [(PLACES.get(row["epoch"], f"epoch {row['epoch']:g}"), row) for row in run.probes]
    tables = []
    for kind, title in KINDS.items():
        rows = []
        for when, probes in places:
            found = probes.get("json", {})
            # In place of a sound the base LLM reads the description.
            asked = kind.replace("audio", "text") if probes is run.base_probe else kind
            figures = {level: found.get(f"{asked} {level}") for level in LEVELS}
            figures["neither"] = _neither(figures)
            if any(figures.values()):
                rows.append((when, figures))
        levels = [level for level in LEVELS if any(figures[level] for _, figures in rows)]
        counts = [rate.get("n") for _, figures in rows for rate in figures.values() if rate]
        if rows and any(when != BASE for when, _ in rows):
            told = [(when, [figures[level] for level in levels]) for when, figures in rows]
            tables.append(
                JsonTable(title, [LEVELS[level] for level in levels], told, counts[0] if counts else None)
            )
    return tables


def _neither(figures: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """What is left of the two by two table; its interval is not kept."""
    known = [figures[level] for level in ("answer", "format only", "answer only")]
    values = [rate["value"] for rate in known if rate]
    return {"value": max(0.0, 1 - sum(values))} if len(values) == 3 else None

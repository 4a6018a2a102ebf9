"""The report's numbers as files: everything as JSON, and one long CSV table for a spreadsheet or a data frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.report.changes import Comparison
from eval.report.judged import judged
from eval.report.plane import Plane
from eval.report.runs import Run, interval_of
from eval.report.scores import parts_of
from eval.report.seeds import Group
from speech_llm.errors import UserError
from speech_llm.files import atomic_write, read_json, write_json
from speech_llm.summary import score_of

COLUMNS = (
    "run", "what", "model", "dimension", "name", "instructions", "epoch", "metric", "value", "low", "high", "n",
    "chance", "majority", "unparsed", "better",
)  # fmt: skip
# Tells a results.json that a report wrote from a run's own, which is never written over.
MARK = "report_of"


def csv_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for every score (`what` = task), every figure of a probe (`what` = probe, base for the base LLM's own, or strength for
    adapters at part strength, whose model is named as under task) and what a judge
    says of a task (`what` = judge; its form stands under `metric`)."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        for model, tasks in run.models.items():
            for task, whole in tasks.items():
                for kind, result in [("all", whole), *(part for part in parts_of(whole) if part[0] != "all")]:
                    scored = score_of(result)
                    if scored is None:
                        continue
                    low, high = interval_of(result)
                    row = {
                        "run": run.name,
                        "what": "task",
                        "model": model,
                        "dimension": whole.get("dimension"),
                        "name": task,
                    }
                    row |= {
                        "instructions": kind,
                        "metric": scored[0],
                        "value": scored[1],
                        "low": low,
                        "high": high,
                    }
                    row |= {name: result.get(name) for name in ("n", "chance", "majority", "unparsed")}
                    row["better"] = "lower" if scored[0] in ("wer", "cer") else "higher"
                    rows.append(row)
        places = [
            ("base", run.main, None, run.base_probe),
            *(("probe", run.main, row["epoch"], row) for row in run.probes),
            *(("strength", f"{run.main}@{row['epoch']:g}", None, row) for row in run.strengths),
        ]
        for what, model, epoch, found in places:
            for probe, series in found.items():
                for name, rate in series.items() if isinstance(series, dict) else ():
                    row = {"run": run.name, "what": what, "model": model, "dimension": probe, "name": name}
                    row |= {"epoch": epoch, "metric": "probe"}
                    rows.append(row | {key: rate.get(key) for key in ("value", "low", "high", "n", "better")})
        for verdicts in judged(run):
            row = {"run": run.name, "what": "judge", "model": verdicts.model, "name": verdicts.task}
            row |= {"metric": verdicts.form, "better": "higher", "unparsed": verdicts.unparsed}
            cell = verdicts.by_judge
            rows.append(row | {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n})
    return rows


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Write `csv_rows` with a header; what is not known is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_rows(runs))
    with atomic_write(path) as handle:
        handle.write(buffer.getvalue())


def json_path(page: Path, runs: Sequence[Run]) -> Path:
    """`results.json` beside the page; `PAGE.json` where a run's own results lie, or will lie, under that name."""
    path = page.parent / "results.json"
    if page.parent.resolve() in [run.folder for run in runs]:
        return page.with_suffix(".json")
    try:
        ours = not path.exists() or MARK in read_json(path)
    except (UserError, TypeError):
        ours = False
    return path if ours else page.with_suffix(".json")


def write_results(
    path: Path,
    groups: Sequence[Group],
    aside: Sequence[tuple[Path, str]],
    compared: Sequence[Comparison],
    where: Plane | None,
) -> None:
    """Write all numbers of the page as JSON."""
    runs = [run for group in groups for run in group.runs]
    value: dict[str, Any] = {
        MARK: [run.name for run in runs],
        "runs": {
            run.name: {
                "folder": str(run.folder),
                "models": run.models,
                "probes": run.probes,
                "base_probe": run.base_probe,
                "strengths": run.strengths,
                "training": run.training,
                "phases": run.phases,
                "judged": [asdict(row) for row in judged(run)],
                "notes": run.notes,
            }
            for run in runs
        },
        "seeds": {
            group.name: dict(zip((run.name for run in group.runs), group.seeds, strict=True))
            for group in groups
            if len(group.runs) > 1
        },
        "compared": [
            {"first": pair.first, "second": pair.second, "only_one_answered": pair.only_one}
            | {
                "tasks": [
                    asdict(c) | {"n": c.n, "change": c.change, "p": c.p} for c in (*pair.counts, pair.total)
                ]
            }
            for pair in compared
        ],
        "set_aside": [{"folder": str(folder), "reason": reason} for folder, reason in aside],
    }
    if where:
        value["plane"] = {
            name: [asdict(point) for point in getattr(where, name)] for name in ("training", "end")
        }
        value["plane"]["forgetting_series"] = [": ".join(pair) for pair in where.series]
    write_json(path, value)

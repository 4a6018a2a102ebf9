"""What a folder holds, in one form: a run, the output of one evaluation, or a run that is still training.

In: folders. Out: `Run`s, and the folders that are none, with the reason. Older forms are converted here, so that nothing else
knows of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl
from speech_llm.summary import score_of

PEERS = {
    "cascade": "the text LLM reads the transcript only",
    "ceiling": "the text LLM reads the description",
    "teacher": "the text LLM reads the description, after one worked example",
}
STAGES = ("corpus", "describe", "targets", "mixture", "train", "eval")
MAIN = "speech_llm"
Rows = dict[tuple[str, str], dict[str, Any]]


@dataclass
class Run:
    """One run as the report needs it.

    `models`: model -> task -> metrics. `probes`: `[{"epoch", PROBE: {SERIES: rate}}]`; `base_probe`: the base LLM's own figures.
    `strengths`: the same of the trained model with its adapters at part strength, which stands under "epoch".
    `log`: the rows of the training log. `manifests`: (stage, its manifest). `predictions_in`: model -> folder. `notes`: what was
    passed over in reading, in words.
    """

    name: str
    folder: Path
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    base_probe: dict[str, Any] = field(default_factory=dict)
    strengths: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    manifests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    predictions_in: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> str:
        """The model that the run is about."""
        return MAIN if MAIN in self.models else next(iter(self.models), "")

    @property
    def peers(self) -> list[str]:
        """The models beside it, the known ones first."""
        others = [name for name in self.models if name != self.main]
        return sorted(others, key=lambda name: (name not in PEERS, [*PEERS, name].index(name)))

    @cached_property
    def predictions(self) -> dict[str, Rows]:
        """model -> (task, id) -> row of `predictions.jsonl`."""
        return {name: self._read(folder) for name, folder in self.predictions_in.items()}

    def _read(self, folder: Path) -> Rows:
        path = folder / "predictions.jsonl"
        return read_predictions(path, self.notes) if path.is_file() else {}


def read_predictions(path: Path, notes: list[str]) -> Rows:
    """(task, id) -> row; lines that are no prediction are counted in `notes`."""
    bad = 0

    def passed_over(*_: Any) -> None:
        nonlocal bad
        bad += 1

    rows: Rows = {}
    for _, row in read_jsonl(path, passed_over):
        if "task" in row and "id" in row and is_number(row.get("score")):
            rows[(str(row["task"]), str(row["id"]))] = row
        else:
            bad += 1
    if bad:
        notes.append(f"{path.parent.name}/{path.name}: {bad} lines are no predictions and were passed over")
    return rows


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """The runs, and the folders set aside with the reason. Names are made unlike by as much of the path as that takes."""
    runs: list[Run] = []
    aside: list[tuple[Path, str]] = []
    seen: set[Path] = set()
    for folder in folders:
        whole = folder.resolve()
        if whole in seen:
            aside.append((folder, f"{folder}: given twice"))
            continue
        seen.add(whole)
        try:
            runs.append(read_run(folder))
        except UserError as error:
            aside.append((folder, str(error)))
    depth = 1
    while len({run.name for run in runs}) < len(runs):
        depth += 1
        for run in runs:
            run.name = "/".join(run.folder.parts[-depth:])
    return runs, aside


def read_run(folder: Path) -> Run:
    """Read one folder; raises `UserError` when it holds neither results nor a training log."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; make one with `speech-llm run RECIPE.yaml`")
    path, log = folder / "results.json", folder / "train" / "log.jsonl"
    run = Run(folder.resolve().name, folder.resolve())
    if not path.exists():
        if not log.is_file():
            raise UserError(f"{path}: no such file; `speech-llm run` or `speech-llm eval` makes it")
        run.notes.append("not evaluated yet: there is a training log but no results.json")
    results = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise UserError(f"{path}: expected an object, found {type(results).__name__}")
    if path.exists() and "models" not in results:
        tasks = {name: value for name, value in results.items() if is_result(value)}
        if not tasks:
            raise UserError(
                f"{path}: neither a run's results nor those of an evaluation: no task in it has a score"
            )
        run.models, run.predictions_in = {run.name: tasks}, {run.name: folder}
        return run
    _fill(run, results)
    return run


def _fill(run: Run, results: dict[str, Any]) -> None:
    for model, tasks in as_dict(results.get("models")).items():
        kept = {task: value for task, value in as_dict(tasks).items() if is_result(value)}
        left = sorted(set(as_dict(tasks)) - set(kept))
        if left:
            run.notes.append(f"{model}: no score for {', '.join(left)}")
        run.models[str(model)] = kept
    run.predictions_in = {name: run.folder / "eval" / name for name in run.models}
    run.training = as_dict(results.get("training"))
    run.phases = _phases(results.get("phases"))
    folders = _phase_folders(run) if run.phases else [run.folder]
    for folder in folders:
        _read_log(run, folder / "train" / "log.jsonl")
        for stage in STAGES:
            path = folder / stage / "manifest.json"
            manifest = _read_or_note(run, path) if path.is_file() else None
            if manifest:
                run.manifests.append((stage, manifest))
    rows = results.get("probes")
    rows = rows if isinstance(rows, list) and rows else _probes_of(run.log)
    run.probes = [new_probe(row) for row in rows if isinstance(row, dict) and is_number(row.get("epoch"))]
    at_part = results.get("lora_scales")
    run.strengths = [
        new_probe({"epoch": row["scale"], **{name: row[name] for name in row if name != "scale"}})
        for row in (at_part if isinstance(at_part, list) else ())
        if isinstance(row, dict) and is_number(row.get("scale"))
    ]
    base = results.get("base_probe")
    if not base:
        path = folders[0] / "train" / "probes" / "base.json"
        base = _read_or_note(run, path) if path.is_file() else {}
    run.base_probe = new_base(as_dict(base))


def _phases(phases: Any) -> dict[str, Any] | None:
    """The matrix of a run in phases; None of another run, or where rows and names do not fit."""
    phases = as_dict(phases)
    names, matrix = phases.get("names"), phases.get("matrix")
    if not isinstance(names, list) or not isinstance(matrix, list) or len(names) != len(matrix):
        return None
    if not all(isinstance(row, list) and len(row) == len(names) for row in matrix):
        return None
    rows = [[value if is_number(value) else None for value in row] for row in matrix]
    return phases | {"names": [str(name) for name in names], "matrix": rows}


def _phase_folders(run: Run) -> list[Path]:
    names = (run.phases or {}).get("names") or []
    found = [run.folder / "phases" / f"{number}-{name}" for number, name in enumerate(names, start=1)]
    return [folder for folder in found if folder.is_dir()] or [run.folder]


def _read_log(run: Run, path: Path) -> None:
    """Add a training log; the epochs of a later phase go on from those before."""
    if not path.is_file():
        return
    before = max((row["epoch"] for row in run.log if is_number(row.get("epoch"))), default=0)
    bad: list[int] = []
    for _, row in read_jsonl(path, lambda number, *_: bad.append(number)):
        if before and is_number(row.get("epoch")):
            if row["epoch"] == 0:  # the model as the phase before left it
                continue
            row = {**row, "epoch": row["epoch"] + before}
        run.log.append(row)
    if bad:
        run.notes.append(f"train/{path.name}: {len(bad)} lines are not JSON and were passed over")


def _read_or_note(run: Run, path: Path) -> dict[str, Any]:
    try:
        return as_dict(read_json(path))
    except UserError as error:
        run.notes.append(str(error))
        return {}


def _probes_of(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"epoch": row.get("epoch"), **row["probe"]} for row in log if as_dict(row.get("probe"))]


def new_probe(row: dict[str, Any]) -> dict[str, Any]:
    """A probe's row in today's form; until 0.1 it was `{"epoch", "audio": rates, "text": rates}` of the JSON probe alone."""
    if "audio" in row or "text" in row:
        series = {k: v for kind in ("audio", "text") for k, v in _old_series(kind, row.get(kind)).items()}
        return {"epoch": row["epoch"], "json": series}
    kept = {probe: _series(series) for probe, series in row.items() if isinstance(series, dict)}
    return {"epoch": row["epoch"], **kept}


def new_base(base: dict[str, Any]) -> dict[str, Any]:
    """The base LLM's figures in today's form; once `{"ceiling": rates}`, the JSON probe on the description."""
    if "ceiling" in base:
        return {"json": _old_series("text", base["ceiling"])}
    return {probe: _series(series) for probe, series in base.items() if isinstance(series, dict)}


def _old_series(kind: str, rates: Any) -> dict[str, dict[str, Any]]:
    """`{"n", "strict": share, ..., "intervals": {"strict": [low, high]}}` as series; `keys` is what `schema` is now."""
    rates = as_dict(rates)
    intervals = as_dict(rates.get("intervals"))
    series = {}
    for level in ("strict", "repaired", "keys", "answer"):
        if is_number(rates.get(level)):
            low, high = interval_of({"interval": intervals.get(level)})
            name = f"{kind} {'schema' if level == 'keys' else level}"
            series[name] = {
                "value": rates[level],
                "low": low,
                "high": high,
                "n": rates.get("n"),
                "better": "higher",
            }
    return series


def _series(series: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of a probe's series that have a value."""
    return {
        name: rate for name, rate in series.items() if isinstance(rate, dict) and is_number(rate.get("value"))
    }


def is_result(value: Any) -> bool:
    """Whether a task's metrics hold a score, for all instances or for the seen or unseen instructions."""
    parts = [value, *(value.get(kind) for kind in ("seen", "unseen"))] if isinstance(value, dict) else []
    return any(isinstance(part, dict) and score_of(part) is not None for part in parts)


def interval_of(result: dict[str, Any]) -> tuple[float | None, float | None]:
    """A result's 95 % interval; (None, None) where it has none."""
    pair = result.get("interval")
    good = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_number, pair))
    return (float(pair[0]), float(pair[1])) if good and pair else (None, None)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_dict(value: Any) -> dict[str, Any]:
    """A value that should be an object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}

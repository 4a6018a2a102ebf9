"""What a judge said of the answers, beside the rules that scored them.

In: a run. Out: a row for every task of every model whose folder holds verdicts (`judged.json`, `judged-reasoning.json`,
`judged-refusal.json` of `speech-llm judge`, and the lines beside them).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judge import FORMS, verdicts_file
from eval.report.runs import Run, as_dict, interval_of, is_number
from eval.report.scores import Cell
from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl

TOLD = {
    "answer": "right",
    "reasoning": "reasons (whatever the answer)",
    "refusal": "right (refuses what it should, and nothing else)",
}


@dataclass(frozen=True)
class Judged:
    """A task as a judge sees it. `by_rule`: the share right by the rules, of the same answers; None where they give no share.

    `agreement`: the share of equal verdicts, of the answers that both have one on; `kappa` is Cohen's.
    """

    model: str
    judge: str
    form: str
    task: str
    by_rule: float | None
    by_judge: Cell
    agreement: Cell | None
    kappa: float | None
    unparsed: int
    unanswered: int

    @property
    def told_form(self) -> str:
        return TOLD[self.form]


def judged(run: Run) -> list[Judged]:
    """All verdicts of a run's models; what cannot be read is told in the run's notes."""
    return [
        row for model, folder in run.predictions_in.items() for form in FORMS for row in _read(run, model, folder, form)
    ]  # fmt: skip


def _read(run: Run, model: str, folder: Path, form: str) -> list[Judged]:
    path = folder / verdicts_file(form)
    if not path.is_file():
        return []
    try:
        found = as_dict(read_json(path))
    except UserError as error:
        _note(run, str(error))
        return []
    by_task = _lines(run, model, path.with_suffix(".jsonl"))
    rows = []
    for task, own in as_dict(found.get("tasks")).items():
        own = as_dict(own)
        if not is_number(own.get("accuracy")):
            _note(run, f"{path.parent.name}/{path.name}: the judge gave no verdict on {task}")
            continue
        agreement = as_dict(own.get("agreement"))
        alike = None
        if is_number(agreement.get("raw")):
            alike = Cell(agreement["raw"], *interval_of(agreement), _count(agreement.get("n")))
        rows.append(
            Judged(
                model,
                str(found.get("judge") or "?"),
                form,
                str(task),
                _by_rule(by_task.get(task, [])),
                Cell(own["accuracy"], *interval_of(own), _count(own.get("n"))),
                alike,
                agreement["kappa"] if is_number(agreement.get("kappa")) else None,
                _count(own.get("unparsed")),
                _count(own.get("unanswered")),
            )
        )
    return rows


def _lines(run: Run, model: str, path: Path) -> dict[str, list[dict[str, Any]]]:
    """The judged answers by task; those that are no longer the model's are told."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        return by_task
    now, other = run.predictions.get(model, {}), 0
    for _, row in read_jsonl(path, lambda *_: None):
        by_task.setdefault(str(row.get("task")), []).append(row)
        same = now.get((str(row.get("task")), str(row.get("id"))))
        other += same is not None and same.get("response") != row.get("response")
    if other:
        _note(
            run,
            f"{model}: {other} verdicts in {path.name} are of answers that have changed since; judge again",
        )
    return by_task


def _by_rule(rows: list[dict[str, Any]]) -> float | None:
    """The share right of what was put to the judge, where every answer is right or wrong by rule."""
    scores = [row.get("score") for row in rows if row.get("verdict") != "unanswered"]
    right = [score for score in scores if score in (0, 1)]
    whole = bool(scores) and len(right) == len(scores)
    wanted = all(row.get("metric") in ("option", "exact", "refusal", None) for row in rows)
    return sum(right) / len(right) if whole and wanted else None


def _note(run: Run, text: str) -> None:
    if text not in run.notes:
        run.notes.append(text)


def _count(value: Any) -> int:
    return int(value) if is_number(value) else 0

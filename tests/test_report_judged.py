"""The report beside a judge: its figures, the rules' on the same answers, and how far they agree."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run
from test_report import Page

from eval.judge import judge_folder
from eval.report import write_report
from eval.report.judged import judged
from eval.report.runs import read_run
from eval.runner import evaluate
from eval.safety import Request, safety_tasks
from speech_llm.files import read_json, read_jsonl, write_jsonl


class Judge:
    """Says of one answer after the other what it was given, in turn; None is no answer."""

    def __init__(self, *verdicts: str | None) -> None:
        self.verdicts = itertools.cycle(verdicts)

    def respond(self, conversations: Sequence[Any], on_answer: Any = None) -> list[str | None]:
        return [v and f"Result: {v}" for _, v in zip(conversations, self.verdicts, strict=False)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", skill=1.0, kept=[0.9, 0.9], n=8)
    for model in ("speech_llm", "ceiling", "cascade"):
        path = folder / "eval" / model / "predictions.jsonl"
        # A judge is asked the same once only.
        rows = [row | {"prompt": f"{row['prompt']} ({row['id']})"} for _, row in read_jsonl(path)]
        write_jsonl(path, rows)
    return folder


def test_a_judges_rate_stands_beside_the_rules_and_their_agreement(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "none.html")
    assert "Beside a judge" not in (tmp_path / "none.html").read_text()

    # Eight answers, all right by rule: five verdicts for, one against, one that cannot be read, one that never came.
    said = ["YES", "YES", "YES", "YES", "YES", "NO", "perhaps", None]
    judge_folder(Judge(*said), "some-judge", run / "eval/speech_llm", tasks=["gender"], progress=False)
    (row,) = judged(read_run(run))
    assert (row.model, row.judge, row.form, row.task) == ("speech_llm", "some-judge", "answer", "gender")
    assert (row.by_rule, row.by_judge.value, row.by_judge.n) == (1.0, round(5 / 7, 4), 7)
    assert row.agreement is not None
    assert (row.agreement.value, row.agreement.n, row.kappa) == (round(5 / 6, 4), 6, 0.0)
    assert (row.unparsed, row.unanswered) == (1, 1)
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    Page(text)
    assert "Beside a judge" in text
    cells = text[text.index("some-judge") :]
    cells = cells[: cells.index("</tr>")]
    found = [cells.index(part) for part in ("<td>100.0</td>", "71.4", "<td>7</td>", "83.3", "n = 6", "0.00")]
    assert found == sorted(found)
    numbers = read_json(tmp_path / "results.json")["runs"]["run"]["judged"]
    assert numbers[0]["by_judge"]["value"] == row.by_judge.value
    with open(tmp_path / "results.csv", newline="") as handle:
        (line,) = [line for line in csv.DictReader(handle) if line["what"] == "judge"]
    assert (line["name"], line["metric"], float(line["value"]), line["n"]) == (
        "gender",
        "answer",
        0.7143,
        "7",
    )


def test_every_form_and_every_model_has_its_rows(run: Path, tmp_path: Path) -> None:
    judge_folder(Judge("YES", "NO"), "j", run / "eval/ceiling", tasks=["gender", "emotion"], progress=False)
    (run / "eval/cascade/judged.json").write_text("{")
    rows = judged(read_run(run))
    assert [(row.model, row.task, row.by_judge.value) for row in rows] == [
        ("ceiling", "gender", 0.5),
        ("ceiling", "emotion", 0.5),
    ]
    write_report([run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "eval/cascade/judged.json: not JSON" in text

    class Refuses:
        def respond(self, conversations: Sequence[Any], on_answer: Any = None) -> list[str]:
            return ["I can't help with that." if "car" in str(chat) else "Yes." for chat in conversations]

    requests = [Request(f"{kind}{i}", kind, f"{what} {i}?") for kind, what in (("harmful", "car"), ("harmless", "tin")) for i in range(4)]  # fmt: skip
    folder = tmp_path / "kept"
    evaluate(Refuses(), safety_tasks(requests), folder, progress=False)
    judge_folder(Judge("YES", "YES", "NO", "YES"), "j", folder, "refusal", progress=False)
    harmful, harmless = judged(read_run(folder))
    assert (harmful.form, harmful.by_rule, harmful.by_judge.value) == ("refusal", 1.0, 0.75)
    assert (harmless.by_rule, harmless.by_judge.value) == (1.0, 0.25)  # it calls three of four refusals
    write_report([run, folder], tmp_path / "two.html")
    text = (tmp_path / "two.html").read_text()
    Page(text)
    assert "refuses what it should, and nothing else" in text


def test_verdicts_on_answers_that_have_changed_are_told(run: Path, tmp_path: Path) -> None:
    folder = run / "eval/speech_llm"
    judge_folder(Judge("YES"), "j", folder, tasks=["gender"], progress=False)
    rows = [row for _, row in read_jsonl(folder / "predictions.jsonl")]
    for row in rows[:3]:
        row["response"] = "something else"
    write_jsonl(folder / "predictions.jsonl", rows)
    read = read_run(run)
    judged(read)
    judged(read)
    assert [note for note in read.notes if "verdicts" in note] == [
        "speech_llm: 3 verdicts in judged.jsonl are of answers that have changed since; judge again"
    ]

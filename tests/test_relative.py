"""Scores by dimension relative to a baseline, against values worked out by hand; and how numbers are compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from eval.compare import compare
from eval.relative import relative_scores
from eval.runner import evaluate
from eval.tasks import Instance, Task
from speech_llm.cli import _exit_code
from speech_llm.files import read_json


class Answers:
    """Answers instance by instance: `said[task][i]`."""

    def __init__(self, said: dict[str, list[str]]) -> None:
        self.said = said

    def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
        places = [chat[0]["content"].rsplit(" ", 1) for chat in conversations]
        return [self.said[task][int(number)] for task, number in places]


def a_task(name: str, dimension: str, metric: str, labels: list[str]) -> Task:
    options = ["yes", "no"] if metric == "option" else None
    instances = [
        Instance(str(i), [{"role": "user", "content": f"{name} {i}"}], label, name, metric, options)
        for i, label in enumerate(labels)
    ]
    return Task(name, dimension, instances, metric, options)


TASKS = [
    a_task("emotion", "Paralinguistics", "option", ["yes"] * 10),
    a_task("accent", "Paralinguistics", "option", ["yes"] * 10),
    a_task("stress", "Paralinguistics", "option", ["yes"] * 10),
    a_task("words", "Speech Recognition", "wer", ["the old man had bread"] * 4),
    a_task("quality", "Enhancement", "number", ["3", "3", "3", "3"]),
    a_task("age", "Enhancement", "number", ["30", "40"]),
]


def choices(right: int) -> list[str]:
    return ["yes"] * right + ["no"] * (10 - right)


BASELINE = {
    "emotion": choices(4),
    "accent": choices(5),
    "stress": choices(0),
    "words": ["the old man had", "the old man had bread", "the old man", "old man had bread"],
    "quality": ["5", "5", "5", "5"],
    "age": ["none", "I cannot say"],
}
MODEL = {
    "emotion": choices(6),
    "accent": choices(4),
    "stress": choices(9),
    "words": ["the old man had bread"] * 3 + ["man had bread"],
    "quality": ["4", "2", "4", "good"],
    "age": ["30", "40"],
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, said in (("cascade", BASELINE), ("model", MODEL)):
        evaluate(Answers(said), TASKS, tmp_path / name, progress=False)
    return tmp_path / "cascade", tmp_path / "model"


def test_a_dimension_is_the_mean_relative_improvement_of_its_tasks(folders: tuple[Path, Path]) -> None:
    found = relative_scores(*folders)
    assert set(found) == {"Paralinguistics", "Speech Recognition", "Enhancement"}
    voice = found["Paralinguistics"]
    assert voice["tasks"] == {"emotion": 0.5, "accent": -0.2}  # (6 - 4) / 4 and (4 - 5) / 5
    assert voice["relative"] == 0.15
    assert voice["left_out"] == {"stress": "the baseline is zero"}
    low, high = voice["interval"]
    assert low < 0.15 < high
    # 4 of 20 words wrong, then 2: half of the errors are gone.
    assert found["Speech Recognition"]["tasks"] == {"words": 0.5}
    assert found["Speech Recognition"]["relative"] == 0.5
    # Errors of 2, then of 1 over the 3 of 4 that were read: 1 / 0.75 = 4/3; (2 - 4/3) / 2.
    assert found["Enhancement"]["tasks"] == {"quality": pytest.approx(1 / 3, abs=1e-4)}
    assert found["Enhancement"]["left_out"] == {"age": "none of the baseline's answers is a number"}


def test_the_direction_turns_with_the_models_changed(folders: tuple[Path, Path]) -> None:
    found = relative_scores(folders[1], folders[0])
    assert found["Speech Recognition"]["relative"] == -1.0  # twice the errors
    assert found["Enhancement"]["tasks"] == {"quality": -0.5}  # (4/3 - 2) / (4/3)
    # No error at all is a baseline of zero.
    assert found["Enhancement"]["left_out"]["age"].startswith("none of the model's answers")
    assert found["Paralinguistics"]["tasks"] == {
        "emotion": pytest.approx(-1 / 3, abs=1e-4), "accent": 0.25, "stress": -1.0,
    }  # fmt: skip


def test_a_baseline_without_errors_is_zero_too(tmp_path: Path) -> None:
    tasks = [TASKS[3]]
    evaluate(Answers({"words": ["the old man had bread"] * 4}), tasks, tmp_path / "a", progress=False)
    evaluate(Answers(BASELINE), tasks, tmp_path / "b", progress=False)
    (own,) = relative_scores(tmp_path / "a", tmp_path / "b").values()
    assert (own["relative"], own["interval"], own["tasks"]) == (None, None, {})
    assert own["left_out"] == {"words": "the baseline is zero"}


def test_numbers_are_compared_by_error_and_what_was_not_read_is_no_hit(folders: tuple[Path, Path]) -> None:
    found = compare(*folders)
    quality, age = found["quality"], found["age"]
    assert (quality["kind"], quality["first"]) == ("absolute error", 2.0)
    assert quality["second"] == pytest.approx(4 / 3, abs=1e-4)
    assert quality["second"] == read_json(folders[1] / "results.json")["quality"]["mae"]
    assert quality["difference"] == pytest.approx(-2 / 3, abs=1e-4)
    assert (age["first"], age["second"], age["difference"], age["p"]) == (None, 0.0, None, None)
    assert (found["emotion"]["only_first"], found["emotion"]["only_second"]) == (0, 2)


def test_it_is_shown_and_written_beside_the_comparison(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*more: str) -> str:
        out = tmp_path / "c.json"
        assert _exit_code(["compare", *map(str, folders), "--out", str(out), *more]) == 0
        return capsys.readouterr().out

    assert "relative" not in shown()
    told = shown("--relative")

    def row(pattern: str) -> bool:
        return re.search(pattern, told) is not None

    assert "model relative to cascade" in told
    assert row(r"Paralinguistics +2 +\+15\.0 +[+-][\d.]+ to \+[\d.]+ +1\n")
    assert row(r"Speech Recognition +1 +\+50\.0 ")
    assert "left out: stress: the baseline is zero" in told
    assert row(r"quality \(absolute error\) +4 +2 +1\.33 +-0\.667 ")
    assert row(r"age \(absolute error\) +2 +- +0 +- +- +-\n")
    assert read_json(tmp_path / "c.json")["relative"]["Speech Recognition"]["relative"] == 0.5

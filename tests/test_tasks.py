"""The multi-task set: labels that are true of how the clip was made, in Dynamic-SUPERB's form."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from speech_llm.synthesis.quickstart import espeak_plan, natural_plan
from speech_llm.synthesis.sentences import DID, WHERE_OR_WHEN, WHO
from speech_llm.synthesis.tasks import (
    _ONE,
    _PLACES,
    _SEVERAL,
    _TIMES,
    _TOPIC_OF,
    TASKS,
    ask_clips,
    listed,
    parts_of,
)

ROWS = list(espeak_plan("train", 1240, 0))


def test_there_are_many_tasks_each_in_several_wordings() -> None:
    assert len(TASKS) >= 23
    assert len({task.name for task in TASKS}) == len(TASKS)
    wordings = [wording for task in TASKS for wording in task.wordings]
    assert len(set(wordings)) == len(wordings)
    for task in TASKS:
        assert re.fullmatch(r"[A-Z]\w+_Quickstart(-[A-Z]\w+)?", task.name)
        assert len(task.wordings) >= 3
    assert listed(("yes", "no")) == "yes or no"
    assert listed(("slow", "normal", "fast")) == "slow, normal, or fast"


def test_words_of_the_grammar_are_all_sorted() -> None:
    assert set(WHERE_OR_WHEN) >= _TIMES
    assert set(WHERE_OR_WHEN) - _TIMES - _PLACES == {"at the party"}
    assert set(WHO) - _ONE - _SEVERAL == {"Everybody"}
    assert set(_TOPIC_OF) <= {action for actions in DID.values() for action in actions}


def test_every_sentence_comes_apart_into_who_did_what_where() -> None:
    for row in ROWS:
        parts = parts_of(row["text"])
        assert parts is not None
        assert " ".join(parts) + "." == row["text"]
        assert parts[1] in DID["train"]
    assert parts_of("The rain in Spain.") is None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_each_task_has_every_answer_often_and_tells_the_possible_ones(task: object) -> None:
    found: Counter[str] = Counter()
    options: set[tuple[str, ...]] = set()
    for row, asked, question, wording in ask_clips(ROWS, 1, 0, [task]):  # type: ignore[list-item]
        instruction = asked.instruction(question, wording)
        assert "{" not in instruction
        assert instruction.endswith(f"The answer could be {listed(question.options)}.")
        assert question.label in question.options
        assert len(set(question.options)) == len(question.options)
        assert row["id"].startswith("train-")
        found[question.label] += 1
        options.add(question.options)
    assert sum(found.values()) >= 100
    if len(options) == 1:  # a closed task
        assert set(found) == set(next(iter(options)))
        assert min(found.values()) >= 0.05 * sum(found.values()), found


def test_labels_say_how_the_clip_was_made() -> None:
    by_name = {task.name: task for task in TASKS}
    row = {
        "id": "x", "text": "My cousin parked the car on Thursday.", "gender": "female", "accent": "Scottish",
        "speed": "fast", "pitch_range": 70, "level_dbfs": -28.0, "noise": "hum", "snr_db": 16.0,
    }  # fmt: skip
    expected = {
        "GenderRecognition_Quickstart": "female", "AccentClassification_Quickstart": "Scottish",
        "SpeakingRateClassification_Quickstart": "fast", "IntonationClassification_Quickstart": "lively",
        "LoudnessClassification_Quickstart": "quiet", "NoiseDetection_Quickstart": "yes",
        "NoiseDetection_Quickstart-White": "no", "NoiseDetection_Quickstart-Hum": "yes",
        "NoiseClassification_Quickstart": "hum", "NoiseSNRLevelPrediction_Quickstart": "low",
        "WordCounting_Quickstart": "7", "FirstWordRecognition_Quickstart": "my", "LastWordRecognition_Quickstart": "thursday",
        "DayNameDetection_Quickstart": "yes", "NumberDetection_Quickstart": "no",
        "IntentClassification_Quickstart-Actor": "my cousin", "IntentClassification_Quickstart-Action": "parked the car",
        "IntentClassification_Quickstart-Time": "on Thursday", "AdverbialClassification_Quickstart": "time",
        "ActorCounting_Quickstart": "one", "TopicClassification_Quickstart": "travel",
    }  # fmt: skip
    for name, label in expected.items():
        # Some tasks ask a part of the clips only, by chance.
        asked = (by_name[name].ask(row, random.Random(seed)) for seed in range(200))
        question = next((question for question in asked if question is not None), None)
        assert question is not None, name
        assert question.label == label, name
    assert by_name["IntentClassification_Quickstart-Location"].ask(row, random.Random(0)) is None
    middle = {**row, "level_dbfs": -22.0, "pitch_range": 55, "noise": "none", "snr_db": None}
    for name in (
        "LoudnessClassification",
        "IntonationClassification",
        "NoiseClassification",
        "NoiseSNRLevelPrediction",
    ):
        assert by_name[f"{name}_Quickstart"].ask(middle, random.Random(0)) is None


def test_a_term_or_text_that_is_asked_for_is_there_exactly_when_the_label_says_so() -> None:
    for task in TASKS:
        if task.name.startswith(("SpokenTerm", "SpeechText")):
            for row, _, question, _ in ask_clips(ROWS, 1, 1, [task]):
                if "term" in question.fields:
                    said = question.fields["term"] in row["text"].lower().rstrip(".").split()
                else:
                    said = question.fields["text"] == row["text"]
                assert said == (question.label == "yes")


def test_clips_are_asked_evenly_and_the_same_for_the_same_seed() -> None:
    def dealt(seed: int) -> list[tuple[str, str, int]]:
        return [(row["id"], task.name, wording) for row, task, _, wording in ask_clips(ROWS[:600], 5, seed)]

    asked = dealt(3)
    assert len(asked) == len(set(asked)) == 3000
    assert asked == dealt(3) != dealt(4)
    counts = Counter(task for _, task, _ in asked)
    assert set(counts) == {task.name for task in TASKS}
    # As often as every other, but for those that few clips can be asked.
    assert max(counts.values()) - sorted(counts.values())[3] <= 5
    assert min(counts.values()) >= 40
    assert len({(task, wording) for _, task, wording in asked}) == sum(len(task.wordings) for task in TASKS)


def test_natural_clips_are_asked_what_is_known_of_them() -> None:
    asked = {task.name for _, task, _, _ in ask_clips(natural_plan(60, 0), 30, 0)}
    assert "AccentClassification_Quickstart" not in asked
    assert "GenderRecognition_Quickstart" in asked

"""Reading answers by rule, scoring, statistics, and the resumable runner: pairs of what was said and what it means."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.json_probe import OTHER_WORDINGS, PLAIN, JsonScore, grid, json_series, score_json
from eval.matching import match_option, spoken_words
from eval.runner import evaluate, score_responses
from eval.scoring import score_answer
from eval.stats import bootstrap_ratio, chance, majority, mcnemar, wilson_interval
from eval.tasks import Instance, Task, load_tasks, write_task
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl, write_jsonl

GENDER = ["female", "male"]
SYNONYMS = {"female": ["woman", "girl"], "male": ["man", "boy"]}


@pytest.mark.parametrize(
    ("answer", "value", "reason"),
    [
        ("The speaker is female.", "female", "ok"),
        ("MALE", "male", "ok"),
        ("It is a woman's voice.", "female", "ok"),
        ("The voice is **male**.", "male", "ok"),
        ("not a female, a male", "male", "ok"),
        ("It isn't really male.", None, "negated"),
        ("male or female", None, "several"),
        ("I cannot hear audio.", None, "refused"),
        ("Hello there", None, "none"),
        ("", None, "none"),
        ("She speaks slowly.", "female", "ok"),
        ('A male voice says: "The woman left."', "male", "ok"),
        ('"female"', "female", "ok"),
        ('{"answer": "male"}', "male", "ok"),
        ("A man says that he lost her keys", "male", "ok"),
    ],
)
def test_an_answer_names_one_option_or_none(answer: str, value: str | None, reason: str) -> None:
    match = match_option(answer, GENDER, SYNONYMS)
    assert (match.value, match.reason) == (value, reason)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("New Zealand English", "New Zealand"),
        ("an American or a British accent", None),
        ("no Scottish accent", None),
    ],
)
def test_a_longer_option_wins_over_one_inside_it(answer: str, value: str | None) -> None:
    assert match_option(answer, ["American", "British", "Scottish", "New Zealand", "Zealand"]).value == value


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('The speaker says: "We read the newspaper."', "We read the newspaper."),
        ("The words are: we lost the keys", "we lost the keys"),
        ('He says "half a sentence', "half a sentence"),
        ("just the words", "just the words"),
    ],
)
def test_spoken_words_are_what_is_quoted_or_follows(answer: str, words: str) -> None:
    assert spoken_words(answer) == words


def an_instance(number: int, label: str = "male", metric: str = "option") -> Instance:
    return Instance(
        f"i{number}",
        [{"role": "user", "content": f"question {number}"}],
        label,
        "gender",
        metric,
        GENDER if metric == "option" else None,
        SYNONYMS if metric == "option" else None,
        seen=number % 2 == 0,
    )


def test_word_errors_are_counted_against_the_label() -> None:
    instance = an_instance(0, "We read the newspaper", "wer")
    assert score_answer(instance, 'They say: "we read a newspaper."')["errors"] == 1
    assert score_answer(instance, "")["errors"] == 4


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval_matches_published_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-4)


def test_small_statistics() -> None:
    assert chance([["a", "b", "c", "d"]]) == 0.25
    assert chance([["a"] * 2, ["a"] * 4]) == 0.375
    assert chance([["a"], None]) is chance([]) is None
    assert majority(["a", "a", "b"]) == pytest.approx(2 / 3)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 1024)
    low, high = bootstrap_ratio([1, 0, 2, 1] * 20, [5, 5, 5, 5] * 20)
    assert low < 0.2 < high
    # Rows drawn that hold no word: errors are counted against one word, as in the rate itself.
    assert bootstrap_ratio([0, 1], [1, 0])[1] <= 2


SCHEMA = {"type": "object", "required": ["answer"], "properties": {"answer": {"type": "string"}}}


@pytest.mark.parametrize(
    ("answer", "levels"),
    [
        ('{"answer": "male"}', (True, True, True, True)),
        ('{"answer": "female"}', (True, True, True, False)),
        ('{"gender": "male"}', (True, True, False, False)),
        ('```json\n{"answer": "male"}\n```', (False, True, True, True)),
        ('{"answer": "male"', (False, True, True, True)),
        ("{'answer': 'male',}", (False, True, True, True)),
        ("The answer is male.", (False, False, False, False)),
        ('["male"]', (False, False, False, False)),
    ],
)
def test_json_answers_fail_at_the_level_where_they_fail(answer: str, levels: tuple[bool, ...]) -> None:
    score = score_json(answer, SCHEMA, label="male", options=GENDER, synonyms=SYNONYMS)
    assert (score.strict, score.repaired, score.schema, score.answer) == levels
    assert json_series([score], "audio")["audio answer"]["value"] == float(levels[3])


# An answer to each wording, about a gender, in the form asked for.
IN_FORM = {
    "plain": '{"answer": "male"}',
    "result": '{"result": "Male"}',
    "value": '{"value": "a male speaker"}',
    "own-key": '{"gender": "male"}',
    "label": '{"label": "male"}',
    "nested": '{"speaker": {"gender": "male"}}',
    "two-keys": '{"answer": "male", "confidence": 0.9}',
    "list": '{"answers": ["male"]}',
}


@pytest.mark.parametrize("wording", [PLAIN, *OTHER_WORDINGS], ids=lambda wording: wording.id)
def test_each_wording_takes_its_own_form_and_no_other(wording: Any) -> None:
    def score(answer: str) -> JsonScore:
        return score_json(
            answer,
            wording.schema("gender"),
            label="male",
            options=GENDER,
            synonyms=SYNONYMS,
            path=wording.keys("gender"),
        )

    assert "gender" in wording.prompt("gender")
    assert set(IN_FORM) == {PLAIN.id, *(other.id for other in OTHER_WORDINGS)}
    for form, answer in IN_FORM.items():
        found = score(answer)
        assert found.strict
        assert found.named
        assert found.schema == found.answer == (form == wording.id), form
    wrong_type = (
        IN_FORM[wording.id].replace('"male"', "1").replace('"Male"', "1").replace('"a male speaker"', "1")
    )
    assert not score(wrong_type).schema


def test_format_and_answer_are_told_apart() -> None:
    answers = {
        '{"answer": "male"}': "both",
        '{"answer": "female"}': "format only",
        "A male speaker.": "answer only",
        '{"answer": "male"': "answer only",
        '{"gender": "male"}': "answer only",
        "I cannot tell.": "neither",
    }
    for answer, cell in answers.items():
        score = score_json(answer, PLAIN.schema("gender"), label="male", options=GENDER, synonyms=SYNONYMS)
        assert grid([score]) == {name: int(name == cell) for name in grid([])}, answer


class Echo:
    """Answers "male" to everything; stops after `limit` answers as a killed process would."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.asked = limit, 0

    def respond(
        self, conversations: Sequence[Any], on_answer: Callable[[int, str], None] | None = None
    ) -> list[str]:
        for place in range(len(conversations)):
            if self.limit is not None and place == self.limit:
                raise KeyboardInterrupt
            self.asked += 1
            if on_answer is not None:
                on_answer(place, "It is a male voice.")
        return ["It is a male voice."] * len(conversations)


def test_an_interrupted_evaluation_asks_only_what_is_left(tmp_path: Path) -> None:
    task = Task("gender", "test", [an_instance(i, GENDER[i % 4 == 0]) for i in range(8)])
    with pytest.raises(KeyboardInterrupt):
        evaluate(Echo(limit=3), [task], tmp_path, progress=False)
    rest = Echo()
    results = evaluate(rest, [task], tmp_path, progress=False)
    assert rest.asked == 5
    assert results["gender"]["n"] == 8
    assert results["gender"]["accuracy"] == 0.25
    assert results["gender"]["seen"]["accuracy"] == 0.5
    assert results["gender"]["unseen"]["accuracy"] == 0.0
    assert results["gender"]["majority"] == 0.75
    rows = [row for _, row in read_jsonl(tmp_path / "predictions.jsonl")]
    assert [row["id"] for row in rows] == [f"i{i}" for i in range(8)]


def test_another_model_in_the_same_folder_is_asked_itself(tmp_path: Path) -> None:
    task = Task("gender", "test", [an_instance(i, "male") for i in range(3)])
    asked: dict[str, list[int]] = {}
    for name in ("a", "b", "a"):
        model = Echo()
        evaluate(model, [task], tmp_path, progress=False, model=name)
        asked.setdefault(name, []).append(model.asked)
    assert asked == {"a": [3, 0], "b": [3]}


def test_saved_outputs_are_scored_by_id_and_missing_ones_are_wrong(tmp_path: Path) -> None:
    task = Task("gender", "test", [an_instance(i) for i in range(4)])
    write_jsonl(
        tmp_path / "said.jsonl",
        [
            {"id": "i2", "response": "male"},
            {"id": "i0", "response": "female"},
            {"id": "i9", "response": "male"},
            {"id": "i1"},
        ],
    )
    result = score_responses([task], tmp_path / "said.jsonl", tmp_path / "out")["gender"]
    assert (result["accuracy"], result["n"], result["missing"]) == (0.25, 4, 2)
    reasons = [row["reason"] for _, row in read_jsonl(tmp_path / "out" / "rejects.jsonl")]
    assert len(reasons) == 2
    assert any("'i9' is not in the task" in reason for reason in reasons)


def test_without_ids_a_broken_line_keeps_its_place(tmp_path: Path) -> None:
    task = Task("gender", "test", [an_instance(i, GENDER[i % 2]) for i in range(6)])
    lines = [json.dumps({"response": GENDER[i % 2]}) for i in range(6)]
    lines[1], lines[3] = json.dumps({"response": None}), "not json"
    (tmp_path / "said.jsonl").write_text("\n".join(lines) + "\n")
    result = score_responses([task], tmp_path / "said.jsonl", tmp_path / "out")["gender"]
    assert (result["accuracy"], result["missing"]) == (round(4 / 6, 4), 2)
    assert [row["line"] for _, row in read_jsonl(tmp_path / "out" / "rejects.jsonl")] == [2, 4]


def test_where_some_answers_have_an_id_those_without_are_nobodys(tmp_path: Path) -> None:
    task = Task("gender", "test", [an_instance(i, GENDER[i % 2]) for i in range(6)])
    rows: list[dict[str, Any]] = [{"id": f"i{i}", "response": GENDER[i % 2]} for i in reversed(range(6))]
    del rows[0]["id"]
    write_jsonl(tmp_path / "said.jsonl", rows)
    result = score_responses([task], tmp_path / "said.jsonl", tmp_path / "out")["gender"]
    assert (result["accuracy"], result["missing"]) == (round(5 / 6, 4), 1)
    ((_, reject),) = read_jsonl(tmp_path / "out" / "rejects.jsonl")
    assert reject == {"line": 1, "reason": "no 'id', which other lines have"}


def test_a_missing_answer_is_wrong_even_where_an_empty_one_would_be_right(tmp_path: Path) -> None:
    said = [an_instance(i, text, metric="wer") for i, text in enumerate(("hello there", ""))]
    for one in said:
        one.options = None
    write_jsonl(tmp_path / "said.jsonl", [{"id": "i0", "response": "hello there"}])
    result = score_responses([Task("words", "test", said)], tmp_path / "said.jsonl", tmp_path / "out")[
        "words"
    ]
    assert result["missing"] == 1
    assert result["wer"] > 0


def test_chance_is_that_of_each_instances_own_options(tmp_path: Path) -> None:
    many = [an_instance(i, "a") for i in range(6)]
    for i, one in enumerate(many):
        one.options = ["a", "b"] if i == 0 else ["a", "b", "c", "d", "e"]
    write_jsonl(tmp_path / "said.jsonl", [{"id": "i0", "response": "a"}])
    result = score_responses([Task("quiz", "test", many)], tmp_path / "said.jsonl", tmp_path / "out")["quiz"]
    assert result["chance"] == pytest.approx(0.25)  # (1/2 + 5/5) / 6
    assert result["majority"] is None


def test_answers_about_a_sound_that_has_changed_since_are_asked_for_again(tmp_path: Path) -> None:
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"one")
    one = an_instance(0, "male")
    one.messages = [
        {"role": "user", "content": [{"type": "audio", "path": str(sound)}, {"type": "text", "text": "?"}]}
    ]
    asked = []
    for content in (b"one", b"one", b"three"):
        if sound.read_bytes() != content:
            sound.write_bytes(content)
        model = Echo()
        evaluate(model, [Task("gender", "test", [one])], tmp_path / "out", progress=False)
        asked.append(model.asked)
    assert asked == [1, 0, 1]


def test_a_sound_that_cannot_be_used_costs_its_own_instance(tmp_path: Path) -> None:
    class Hears(Echo):
        def unusable(self, paths: list[str]) -> dict[str, str]:
            return {path: "the sound is damaged" for path in paths if path.endswith("1.wav")}

    many = [an_instance(i, "male") for i in range(3)]
    for i, one in enumerate(many):
        one.messages = [
            {
                "role": "user",
                "content": [{"type": "audio", "path": f"{i}.wav"}, {"type": "text", "text": "?"}],
            }
        ]
    model = Hears()
    result = evaluate(model, [Task("gender", "test", many)], tmp_path, progress=False)["gender"]
    assert (model.asked, result["n"], result["rejected"], result["accuracy"]) == (2, 2, 1, 1.0)
    ((_, reject),) = read_jsonl(tmp_path / "task_rejects.jsonl")
    assert reject == {"task": "gender", "id": "i1", "reason": "1.wav: the sound is damaged"}
    evaluate(model, [Task("gender", "test", many[:1])], tmp_path, progress=False)
    assert not (tmp_path / "task_rejects.jsonl").exists()
    with pytest.raises(UserError, match=r"no question is left to ask: 1\.wav"):
        evaluate(model, [Task("gender", "test", many[1:2])], tmp_path / "b", progress=False)


def test_tasks_survive_the_file_and_bad_lines_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_task(Task("gender", "test", [an_instance(0), an_instance(1)]), path)
    with path.open("a") as handle:
        handle.write("not json\n")
        handle.write(
            json.dumps({"messages": [{"role": "user", "content": "?"}], "options": GENDER, "label": "x"})
            + "\n"
        )
        asked = {"messages": [{"role": "user", "content": "?"}], "options": GENDER, "label": "male"}
        handle.write(json.dumps(asked | {"synonyms": ["man"]}) + "\n")
        handle.write(
            json.dumps(asked | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}) + "\n"
        )
    (task,) = load_tasks(f"jsonl:{path}")
    assert [item.id for item in task.instances] == ["i0", "i1"]
    assert [row["line"] for row in task.rejects] == [3, 4, 5, 6]
    with pytest.raises(UserError, match=r"unknown task 'json:x'.*jsonl"):
        load_tasks("json:x")

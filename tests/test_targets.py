"""Targets: pools are checked, answers verified, failures asked again, and a killed stage goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from speech_llm.errors import UserError
from speech_llm.files import read_jsonl
from speech_llm.targets.own import own_answer
from speech_llm.targets.prompts import PoolPrompt, load_pool
from speech_llm.targets.questions import Question, Questioner, choose_prompts, context_attributes
from speech_llm.targets.rows import Desk, Row
from speech_llm.targets.run import write_rows
from speech_llm.targets.teacher import Cut, OnAnswer
from speech_llm.targets.verify import breaks_format, closed_options, loses, verdict

OPTIONS = {"gender": ["female", "male"], "accent": ["American", "British"]}
GENDER = PoolPrompt("gender", "Man or woman?", ("gender",), "The speaker is {gender}.")
HEAR = PoolPrompt(
    "hear", "What can you hear?", ("gender", "transcript"), 'A {gender} speaker: "{transcript}"'
)
JSON = PoolPrompt("json", "In JSON?", ("gender",), '{{"answer": "{gender}"}}', {"answer": "gender"})
CLIP = {"gender": "female", "accent": "British", "transcript": "We parked the car."}


@pytest.mark.parametrize(
    ("prompt", "answer", "outcome"),
    [
        (GENDER, "It is a woman.", "ok"),
        (GENDER, "It is a man.", "contradicts gender"),
        (GENDER, "It is a speaker.", "drops gender"),
        (GENDER, "A female or a male.", "drops gender"),
        (GENDER, "A female with an American accent.", "contradicts accent"),
        (GENDER, "A female with a British accent.", "ok"),
        (GENDER, "  ", "empty"),
        (HEAR, 'A female speaker says: "We parked the car"', "ok"),
        (HEAR, "A female speaker parks.", "drops transcript"),
        (JSON, '{"answer": "female"}', "ok"),
        (JSON, '{"answer": "male"}', "contradicts gender"),
        (JSON, '{"response": "female"}', "other JSON keys"),
        (JSON, "female", "not JSON"),
    ],
)
def test_an_answer_must_name_what_was_asked_and_contradict_nothing(
    prompt: PoolPrompt, answer: str, outcome: str
) -> None:
    assert verdict(answer, prompt, CLIP, OPTIONS) == outcome


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ({"words_at_most": 3}, "A female speaker", "It is a female speaker."),
        ({"sentences": 2}, "It is a woman. She is British.", "It is a woman, who is British."),
        ({"bullets": 2}, "- a woman\n- British", "A woman\n- British"),
        ({"lines": 2}, "a woman\n\nBritish", "a woman, British"),
        ({"case": "lower"}, "a woman, 30", "A woman"),
        ({"case": "upper"}, "A WOMAN!", "A woman!"),
        ({"starts_with": "Voice:"}, "Voice: female", "The voice: female"),
        ({"ends_with": "Over."}, "It is a woman. Over.", "It is a woman."),
    ],
)
def test_an_answer_must_have_the_form_that_was_asked_for(
    wanted: dict[str, Any], right: str, wrong: str
) -> None:
    assert breaks_format(right, wanted) is None
    assert str(breaks_format(wrong, wanted)).startswith("breaks the form")
    assert verdict(wrong, PoolPrompt("f", "?", ("gender",), format=wanted), CLIP, OPTIONS).startswith(
        "breaks"
    )


@pytest.mark.parametrize(
    ("human", "answer", "lost"),
    [
        ("a dog", "I hear a dog barking.", False),
        ("a dog", "I hear a cat.", True),
        ("one", "Someone speaks.", True),
        ("The meeting with Anna is at 9 in Leeds today.", "At 9 today Anna is met in Leeds.", False),
        ("The meeting with Anna is at 9 in Leeds today.", "At 10 today Anna is met in Leeds.", True),
        ("The meeting with Anna is at 9 in Leeds today.", "There is a meeting at 9 in Leeds.", True),
    ],
)
def test_what_a_person_answered_must_still_be_said(human: str, answer: str, lost: bool) -> None:
    assert (loses(answer, human) is not None) is lost


def test_of_few_choices_exactly_the_persons_must_be_named() -> None:
    choices = ("left", "right", "up")
    assert loses("It goes to the left.", "left", choices) is None
    assert loses("Left or right.", "left", choices) == "drops the human answer"
    assert loses("It goes up.", "left", choices) == "contradicts the human answer"


def test_free_text_is_no_choice() -> None:
    rows = [{"gender": g, "transcript": t, "duration": 1.0} for g, t in (("female", "a"), ("male", "b"))]
    assert closed_options(rows) == {"gender": ["female", "male"]}


def test_the_teacher_reads_the_words_only_where_they_are_asked_for() -> None:
    assert "transcript" not in context_attributes(CLIP, GENDER)
    assert context_attributes(CLIP, HEAR)["transcript"] == "We parked the car."


def some_clips(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"c{i}",
            "audio": f"/nowhere/c{i}.wav",
            "attributes": {
                **CLIP,
                "gender": ("female", "male")[i % 2],
                "accent": ("American", "British")[i // 2 % 2],
            },
        }
        for i in range(count)
    ]


def test_prompts_are_dealt_evenly_and_only_where_they_can_be_answered() -> None:
    clips = some_clips(30)
    for clip in clips[:10]:
        del clip["attributes"]["transcript"]
    asked = choose_prompts(clips, [GENDER, HEAR, JSON], 2, None, seed=0)
    assert len(asked) == 60
    assert all("transcript" in clip["attributes"] for clip, prompt in asked if prompt.id == "hear")
    assert asked == choose_prompts(clips, [GENDER, HEAR, JSON], 2, None, seed=0)
    assert len({clip["id"] for clip, _ in choose_prompts(clips, [GENDER], 1, 7, seed=0)}) == 7


class Parrot:
    """A teacher that gets every first attempt wrong, and stops after `limit` new answers."""

    name = "parrot"

    def __init__(self, limit: int | None = None) -> None:
        self.new, self.limit = 0, limit

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        for question in questions:
            if self.limit is not None and self.new == self.limit:
                raise KeyboardInterrupt
            self.new += 1
            said = "female" if "woman" in question.context or "female" in question.context else "male"
            first = question.example is not None and question.example[1].endswith(" female.")
            on_answer(question, "Hm." if first else f"The speaker is {said}.", 3)

    def close(self) -> None: ...


def self_targets(
    teacher: Parrot, clips: list[dict[str, Any]], prompt: PoolPrompt, out: Path, attempts: int
) -> dict[str, Any]:
    desk = Desk(
        Questioner(clips, "sentence", True, 0),
        closed_options([clip["attributes"] for clip in clips]),
        attempts,
    )
    rows = [Row(clip, prompt) for clip in clips]
    return write_rows(rows, lambda row: own_answer(row, desk), {"llm": teacher}, out, progress=False)[0]


def test_failed_answers_are_asked_again_with_another_example_and_a_killed_stage_goes_on(
    tmp_path: Path,
) -> None:
    clips = some_clips(12)
    whole, out = Parrot(), tmp_path / "whole"
    counts = self_targets(whole, clips, GENDER, out, attempts=4)
    assert counts["kept"] == 12
    rows = [row for _, row in read_jsonl(out / "examples.jsonl")]
    assert [row["id"] for row in rows] == [f"c{i}/gender" for i in range(12)]
    assert {row["source"]["attempt"] for row in rows} - {0}
    assert all(row["messages"][-1]["content"].endswith(f"{row['attributes']['gender']}.") for row in rows)

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        self_targets(Parrot(2), clips, GENDER, parts, attempts=4)
    rest = Parrot()
    self_targets(rest, clips, GENDER, parts, attempts=4)
    assert rest.new == whole.new - 2
    assert (parts / "examples.jsonl").read_text() == (out / "examples.jsonl").read_text()


def test_what_fails_every_attempt_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    counts = self_targets(Parrot(), some_clips(4), HEAR, tmp_path, attempts=2)
    assert (counts["kept"], counts["rejected"], counts["acceptance"]) == (0, 4, 0.0)
    reasons = {row["reason"] for _, row in read_jsonl(tmp_path / "rejects.jsonl")}
    assert reasons <= {"drops transcript", "drops gender"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompts: [{id: a, text: Hi, asks: [], exmple: x}]", r"unknown key 'exmple'.*example"),
        ("prompts: [{id: a, text: Hi}]", "'asks' must be a list"),
        ("prompts: [{id: a, text: Hi, asks: []}, {id: a, text: Ho, asks: []}]", "'a' is used twice"),
        ("prompts: [{id: a, text: Hi, asks: [], example: '{gender'}]", "malformed field"),
        ("prompts: [{id: a, text: Hi, asks: [], kind: opne}]", r"'kind' is 'opne'.*Did you mean 'open'"),
        ("prompts: [{id: a, text: Hi, asks: [], format: {bulets: 3}}]", r"unknown key 'bulets'.*'bullets'"),
        (
            "prompts: [{id: a, text: Hi, asks: [], format: {case: low}}]",
            "format.case is 'low'; expected lower or upper",
        ),
        (
            "prompts: [{id: a, text: Hi, asks: [], format: {lines: two}}]",
            "format.lines is 'two'; expected a whole number",
        ),
        ("prompts: 3", "expected a list"),
        ("prompts: [", "not YAML"),
    ],
)
def test_a_mistake_in_a_pool_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_pool(path)
    with pytest.raises(UserError, match="no such prompt pool"):
        load_pool(tmp_path / "absent.yaml")


def test_the_pools_of_the_recipes_can_be_read() -> None:
    folder = Path(__file__).parent.parent / "recipes" / "prompts"
    pools = {path.stem: load_pool(path) for path in folder.glob("*.yaml")}
    assert "What can you hear?" in {prompt.text for prompt in pools["quickstart"]}
    for name, pool in pools.items():
        if name.endswith("_eval"):
            trained = {prompt.text for prompt in pools[name.removesuffix("_eval")]}
            assert all((prompt.text in trained) is prompt.seen for prompt in pool), name


def test_a_value_must_be_named_as_a_word_and_numbers_count_in_json() -> None:
    prompt = PoolPrompt("g", "Who?", ("gender",))
    assert verdict("The speaker is female.", prompt, {"gender": "male"}, {}) == "drops gender"
    assert verdict("The speaker is male.", prompt, {"gender": "male"}, {}) == "ok"
    age = PoolPrompt("a", "How old? JSON.", (), json_keys={"age": "age"})
    assert verdict('{"age": 34}', age, {"age": 34}, {}) == "ok"
    assert verdict('{"age": 35}', age, {"age": 34}, {}) != "ok"


def test_for_a_persons_own_question_the_teacher_is_told_all() -> None:
    known = {"gender": "female", "transcript": "to the market", "duration": 2.0, "segments": []}
    asked = PoolPrompt("manifest", "Where does she go?", (), whole=True)
    assert set(context_attributes(known, asked)) == {"gender", "transcript", "duration"}
    assert set(context_attributes(known, PoolPrompt("who", "Who?", ("gender",)))) == {"gender"}


def test_an_answer_that_was_cut_off_is_no_target_also_after_a_kill(tmp_path: Path) -> None:
    class Endless:
        name = "endless"

        def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
            for question in questions:
                on_answer(question, Cut("It is a male voice which is"), 65)

        def close(self) -> None: ...

    row = Row({"id": "c", "audio": "a.wav", "attributes": {"gender": "male"}}, GENDER)
    clips = [row.clip]
    desk = Desk(Questioner(clips, "sentence", False, 0), {"gender": ["female", "male"]}, attempts=1)
    for _ in range(2):  # the second time the journal answers
        _counts, kept = write_rows([row], lambda one: own_answer(one, desk), {"llm": Endless()}, tmp_path)
        assert kept == []
        ((_, reject),) = read_jsonl(tmp_path / "rejects.jsonl")
        assert reject["reason"] == "does not end"
    assert desk.judge("It is a male voice.", row) == "ok"

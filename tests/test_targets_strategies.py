"""Strategies: who writes the answer, when a person's stands in, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from speech_llm.chat_server import NoAnswer
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl, write_jsonl
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.targets.continuation import continuation, goes_on
from speech_llm.targets.given import few_choices, given, human_answer
from speech_llm.targets.minimum_change import changed, minimum_change
from speech_llm.targets.own import own_answer
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Question, Questioner
from speech_llm.targets.rewrite import banned, rewrite
from speech_llm.targets.rows import Desk, Row, Writing
from speech_llm.targets.run import choose_rows, summary, write_rows, write_targets
from speech_llm.targets.self_output import self_output
from speech_llm.targets.teacher import OnAnswer
from speech_llm.targets.verify import closed_options

GENDER = PoolPrompt("gender", "Man or woman?", ("gender",), "The speaker is {gender}.")
VOICE = PoolPrompt("voice", "Whose voice?", ("gender",), "It is the voice of a {gender} speaker.")
JSON = PoolPrompt("json", "In JSON?", ("gender",), '{{"answer": "{gender}"}}', {"answer": "gender"})
GO_ON = PoolPrompt("go-on", "Go on.", ())
POOL = (GENDER, VOICE, JSON)


def some_clips(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"c{i}",
            "audio": f"/nowhere/c{i}.wav",
            "attributes": {
                "gender": ("female", "male")[i % 2],
                "accent": ("American", "British")[i // 2 % 2],
                "transcript": f"We parked car {i}.",
            },
            "how": {"gender": "given in column 'gender'", "accent": "by ear", "transcript": "Whisper"},
        }
        for i in range(count)
    ]


class Script:
    """A teacher that answers by a function; `NoAnswer` where that says so. Remembers what it was asked."""

    name = "script"

    def __init__(self, reply: Callable[[Question], str | NoAnswer]) -> None:
        self.reply = reply
        self.asked: list[Question] = []

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        for question in questions:
            self.asked.append(question)
            on_answer(question, self.reply(question), 5)

    def close(self) -> None: ...


def desk_of(clips: list[dict[str, Any]], **settings: Any) -> Desk:
    questioner = Questioner(clips, "sentence", settings.pop("worked_example", True), 0)
    return Desk(questioner, closed_options([clip["attributes"] for clip in clips]), **settings)


def human_rows(clips: list[dict[str, Any]], prompt: PoolPrompt = GENDER) -> list[Row]:
    return [Row(clip, prompt, human_answer(clip, prompt, "template")) for clip in clips]


def run(
    rows: list[Row], write: Callable[[Row], Writing], teacher: Script, out: Path, editor: Script | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    teachers = {"llm": teacher} if editor is None else {"llm": teacher, "editor": editor}
    counts, _ = write_rows(
        rows, write, teachers, out, source={"strategy": "x", "teacher": "script"}, progress=False
    )
    examples = [row for _, row in read_jsonl(out / "examples.jsonl")]
    rejects = [row for _, row in read_jsonl(out / "rejects.jsonl")]
    assert len(examples) == counts["kept"]
    assert len(rejects) == counts["rejected"]
    assert counts["kept"] + counts["rejected"] == len(rows)
    return counts, examples, rejects


def said(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def gender_in(question: Question) -> str:
    return "female" if "female" in question.context.lower().split("\n")[0] else "male"


# given


def test_given_is_the_persons_answer_and_asks_nobody(tmp_path: Path) -> None:
    clips = some_clips(4)
    desk = desk_of(clips)
    teacher = Script(lambda question: pytest.fail("nobody is asked"))
    counts, examples, _ = run(human_rows(clips), lambda row: given(row, desk), teacher, tmp_path)
    assert said(examples) == [f"The speaker is {clip['attributes']['gender']}." for clip in clips]
    assert counts["generated_tokens"] == 0
    assert "female" in examples[0]["context"]
    assert examples[0]["source"] == {
        "strategy": "x",
        "teacher": "script",
        "prompt": "gender",
        "attempt": 0,
        "verdict": "ok",
    }


def test_a_label_is_worded_bare_or_by_the_template_and_json_stays_json() -> None:
    (clip,) = some_clips(1)
    assert human_answer(clip, GENDER, "template") == "The speaker is female."
    assert human_answer(clip, GENDER, "label") == "female"
    assert human_answer(clip, JSON, "label") == '{"answer": "female"}'
    words = PoolPrompt("words", "What?", ("transcript",), '"{transcript}"')
    assert human_answer(clip, words, "label") == "We parked car 0."


def test_what_a_describer_guessed_is_no_persons_label() -> None:
    (clip,) = some_clips(1)
    assert human_answer(clip, PoolPrompt("accent", "Accent?", ("accent",), "{accent}"), "template") is None
    assert human_answer(clip, PoolPrompt("open", "What?", ()), "template") is None


def recipe_with(tmp_path: Path, **targets: Any) -> Recipe:
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {manifests: [m.jsonl], train: {split: a}, test: {split: b}}\n"
        "describe: {use: [transcript, labels], labels: {gender: gender}}\n"
        "targets: {prompts: pool.yaml, prompts_per_clip: 2}\n"
        "eval: {attributes: [gender], prompts: pool.yaml}\n"
    )
    return load_recipe(path, [f"targets.{key}={value}" for key, value in targets.items()])


def test_a_question_and_answer_of_the_manifest_take_the_place_of_the_pools_prompts(tmp_path: Path) -> None:
    clips = some_clips(3)
    manifest = tmp_path / "train.jsonl"
    write_jsonl(
        manifest,
        [
            {"id": "c0", "question": "What is parked?", "answer": "A car."},
            {"id": "c1", "instruction": "Which number?", "response": 1},
            {"id": "c2", "answer": "without a question"},
            {"id": "c9", "question": "Who?", "answer": "not described"},
        ],
    )
    rows = choose_rows(recipe_with(tmp_path, strategy="given"), clips, POOL, manifest)
    own = {row.clip["id"]: (row.prompt.text, row.human) for row in rows if row.manifest}
    assert own == {"c0": ("What is parked?", "A car."), "c1": ("Which number?", "1")}
    others = [row for row in rows if not row.manifest]
    assert {row.clip["id"] for row in others} == {"c2"}
    assert len(others) == 2
    assert len(choose_rows(recipe_with(tmp_path, strategy="given", clips=1), clips, POOL, manifest)) <= 2


def test_few_answers_that_come_again_are_a_choice() -> None:
    assert few_choices(["left", "right"] * 3) == ("left", "right")
    assert few_choices([f"answer {i}" for i in range(6)]) == ()


# continuation


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("and drove home.", "ok"),
        ("We parked the car and drove home.", "ok"),
        ("We parked the car!", "only repeats the words"),
        ("parked the car", "only repeats the words"),
        (" ", "empty"),
    ],
)
def test_a_continuation_goes_on(answer: str, outcome: str) -> None:
    assert goes_on(answer, "We parked the car.") == outcome


def test_the_continuation_is_told_the_words_alone_and_only_spoken_clips_are_asked(tmp_path: Path) -> None:
    clips = some_clips(3)
    clips[1]["attributes"]["transcript"] = " "
    rows = choose_rows(recipe_with(tmp_path, strategy="continuation"), clips, (GO_ON,), None)
    assert sorted(row.clip["id"] for row in rows) == ["c0", "c2"]
    desk = desk_of(clips)
    teacher = Script(lambda question: question.context if question.example else "Then we left.")
    _, examples, _ = run(rows, lambda row: continuation(row, desk), teacher, tmp_path / "out")
    assert said(examples) == ["Then we left."] * 2
    assert {row["context"] for row in examples} == {"We parked car 0.", "We parked car 2."}
    assert all(row["source"]["attempt"] == 1 for row in examples)


# rewrite


def test_a_paraphrase_that_loses_the_answer_is_replaced_by_the_persons(tmp_path: Path) -> None:
    clips = some_clips(4)

    def reply(question: Question) -> str:
        assert "Reference answer: The speaker is" in question.context
        return "I hear a woman." if gender_in(question) == "female" else "I hear somebody."

    desk = desk_of(clips)
    counts, examples, _ = run(
        human_rows(clips), lambda row: rewrite(row, desk, POOL, "template"), Script(reply), tmp_path
    )
    assert said(examples) == ["I hear a woman.", "The speaker is male."] * 2
    assert [row["source"]["kept"] for row in examples] == ["paraphrase", "human"] * 2
    assert [row["source"]["verdict"] for row in examples] == ["ok", "drops gender"] * 2
    assert (counts["kept"], counts["acceptance"], counts["kept_of"]) == (
        4,
        0.5,
        {"human": 2, "paraphrase": 2},
    )
    assert "acceptance 50.0%; human 2, paraphrase 2" in summary(counts)


def test_the_worked_example_of_a_rewrite_says_the_same_in_other_words(tmp_path: Path) -> None:
    clips = some_clips(6)
    for clip in clips:
        clip["attributes"]["accent"] = f"accent {clip['id']}"  # so that no two look alike
    desk = desk_of(clips)
    teacher = Script(lambda question: "I hear a woman.")
    run(human_rows(clips), lambda row: rewrite(row, desk, POOL, "template"), teacher, tmp_path)
    for question in teacher.asked:
        assert question.example is not None
        assert question.example[0] != question.context
        assert question.example[1].startswith("It is the voice of a")
        assert gender_in(Question(question.example[0], "")) in question.example[1]


@pytest.mark.parametrize(
    ("answer", "is_banned"),
    [
        ("Your turn: a woman speaks.", True),
        ("As the reference answer says, a woman.", True),
        ("Now it’s your turn", True),
        ("In my own words: a woman.", True),
        ("It is your turn to speak, says the woman.", False),
        ("A woman speaks.", False),
    ],
)
def test_an_answer_about_the_task_is_banned(answer: str, is_banned: bool) -> None:
    assert (banned(answer) is not None) is is_banned


def test_the_persons_own_words_are_no_paraphrase(tmp_path: Path) -> None:
    clips = some_clips(2)
    desk = desk_of(clips, attempts=3)
    copies = ["the  speaker is FEMALE.", "The speaker is male."]
    teacher = Script(lambda question: copies[gender_in(question) == "male"])
    counts, examples, _ = run(
        human_rows(clips), lambda row: rewrite(row, desk, POOL, "template"), teacher, tmp_path
    )
    assert {row["source"]["verdict"] for row in examples} == {"only repeats the human answer"}
    assert counts["kept_of"] == {"human": 2}
    assert counts["acceptance"] == 0


# self_output


def test_self_output_keeps_the_first_right_sample_else_the_persons_answer(tmp_path: Path) -> None:
    clips = some_clips(4)

    def reply(question: Question) -> str:
        if gender_in(question) == "male":
            return "No idea."
        return "It is a woman." if question.sample == 2 else "It is a man."

    desk = desk_of(clips, samples=4, sampled=True, worked_example=False)
    teacher = Script(reply)
    counts, examples, _ = run(human_rows(clips), lambda row: self_output(row, desk), teacher, tmp_path)
    assert said(examples) == ["It is a woman.", "The speaker is male."] * 2
    assert [(row["source"]["kept"], row["source"]["attempt"]) for row in examples] == [
        ("own", 2),
        ("human", 3),
    ] * 2
    assert counts["kept_of"] == {"human": 2, "own": 2}
    assert len(set(teacher.asked)) == len(teacher.asked)


# minimum_change


def test_minimum_change_keeps_a_right_answer_and_takes_the_smallest_right_edit_of_a_wrong_one(
    tmp_path: Path,
) -> None:
    clips = some_clips(4)
    wrong = "I hear a man talking about a car."
    edits = ["A woman.", "I hear a woman talking about a car.", "I hear a man talking."]

    def edit(question: Question) -> str:
        assert f"Previous answer: {wrong}" in question.context
        assert question.text.startswith("Correct")
        return edits[question.sample]

    desk = desk_of(clips, attempts=3, sampled=True)
    own, editor = Script(lambda question: wrong), Script(edit)
    counts, examples, _ = run(
        human_rows(clips), lambda row: minimum_change(row, desk), own, tmp_path, editor=editor
    )
    assert said(examples) == [edits[1], wrong] * 2
    assert [row["source"]["kept"] for row in examples] == ["edited", "own"] * 2
    assert examples[0]["source"]["changed"] == pytest.approx(1 / 8)
    assert examples[0]["source"]["own"] == "contradicts gender"
    assert {question.to for question in own.asked} == {"llm"}
    assert {question.to for question in editor.asked} == {"editor"}
    assert counts["acceptance"] == 1.0


def test_an_answer_that_no_edit_puts_right_is_rejected(tmp_path: Path) -> None:
    clips = some_clips(2)
    desk = desk_of(clips)
    teacher = Script(lambda question: "It is a man.")
    _, _, rejects = run(
        human_rows(clips), lambda row: minimum_change(row, desk), teacher, tmp_path, editor=teacher
    )
    assert [(row["clip"], row["reason"]) for row in rejects] == [("c0", "contradicts gender")]


def test_change_is_the_share_of_words() -> None:
    assert changed("a b c d", "a b c d") == 0
    assert changed("a b c d", "a b c x") == 0.25
    assert changed("a b", "c d") == 1


# The driver


def test_a_question_without_an_answer_costs_its_own_rows_only_and_is_asked_again_next_time(
    tmp_path: Path,
) -> None:
    clips = some_clips(4)
    for clip in clips:
        clip["attributes"]["accent"] = f"accent {clip['id']}"  # so that no two share a question
    desk = desk_of(clips)
    right = Script(lambda question: f"A {gender_in(question)} speaker.")
    flaky = Script(
        lambda question: NoAnswer("timed out") if "c1" in question.context else right.reply(question)
    )
    counts, _, rejects = run(human_rows(clips), lambda row: own_answer(row, desk), flaky, tmp_path)
    assert [(row["clip"], row["reason"]) for row in rejects] == [("c1", "no answer: timed out")]
    assert counts["unanswered"] == {"timed out": 1}
    assert "questions that got no answer: timed out 1" in summary(counts)
    counts, _, _ = run(human_rows(clips), lambda row: own_answer(row, desk), right, tmp_path)
    assert counts["kept"] == 4
    assert len(right.asked) == 1


def varied(question: Question) -> str:
    """Right, wrong or empty, by the question alone."""
    rng = random.Random(repr(question))
    return rng.choice(
        [f"It is a {gender_in(question)} speaker.", "It is a man.", "It is a woman.", "Hm.", ""]
    )


STRATEGIES: dict[str, Callable[[Desk], Callable[[Row], Writing]]] = {
    "self": lambda desk: lambda row: own_answer(row, desk),
    "continuation": lambda desk: lambda row: continuation(row, desk),
    "rewrite": lambda desk: lambda row: rewrite(row, desk, POOL, "template"),
    "self_output": lambda desk: lambda row: self_output(row, desk),
    "minimum_change": lambda desk: lambda row: minimum_change(row, desk),
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_killed_at_any_byte_of_the_journal_the_result_is_the_same(strategy: str, tmp_path: Path) -> None:
    clips = some_clips(24)
    for i, clip in enumerate(clips):
        clip["attributes"]["accent"] = f"accent {i}"
    rows = [row for prompt in (GENDER, VOICE) for row in human_rows(clips, prompt)]
    settings = {"attempts": 3, "samples": 3, "sampled": True}
    whole_teacher = Script(varied)

    def resumed(out: Path, teacher: Script) -> None:
        desk = desk_of(clips, **settings)
        run(rows, STRATEGIES[strategy](desk), teacher, out, editor=teacher)

    whole = tmp_path / "whole"
    resumed(whole, whole_teacher)
    journal = (whole / "journal.jsonl").read_bytes()
    assert len(journal.splitlines()) == len(whole_teacher.asked) == len(set(whole_teacher.asked))
    rng = random.Random(0)
    ends = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    cuts = [0, 1, len(journal) - 1, ends[3], ends[3] - 1, *(rng.randrange(len(journal)) for _ in range(12))]
    for number, cut in enumerate(cuts):
        out = tmp_path / f"cut{number}"
        out.mkdir()
        (out / "journal.jsonl").write_bytes(journal[:cut])
        teacher = Script(varied)
        resumed(out, teacher)
        assert len(teacher.asked) == len(journal[cut:].splitlines()) if cut else True
        for name in ("examples.jsonl", "rejects.jsonl"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), (number, name)
        lines = (out / "journal.jsonl").read_bytes().splitlines()
        assert sorted(lines) == sorted(journal.splitlines())


def test_a_killed_process_leaves_a_journal_to_go_on_from(tmp_path: Path) -> None:
    """SIGKILL in the middle of an answer, not a tidy exception."""
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import test_targets_strategies as t

        count = 0
        def reply(question):
            global count
            count += 1
            if count == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return t.varied(question)

        t.small_run(Path(sys.argv[1]), t.Script(reply))
    """)
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "killed")], cwd=Path(__file__).parent, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len((tmp_path / "killed" / "journal.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "killed" / "examples.jsonl").exists()
    for name in ("killed", "whole"):
        small_run(tmp_path / name, Script(varied))
    for name in ("examples.jsonl", "rejects.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def small_run(out: Path, teacher: Script) -> None:
    clips = some_clips(12)
    for i, clip in enumerate(clips):
        clip["attributes"]["accent"] = f"accent {i}"
    desk = desk_of(clips, attempts=3)
    run(human_rows(clips), lambda row: own_answer(row, desk), teacher, out)


# With a real generator and the whole stage


def test_the_whole_stage_writes_examples_with_their_source_and_says_how_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_models import tiny_llm, tiny_tokenizer

    loaded = []

    def load(reference: str, precision: str) -> tuple[Any, Any]:
        loaded.append(reference)
        return tiny_llm(), tiny_tokenizer()

    monkeypatch.setattr("speech_llm.assets.load_answering_llm", load)
    clips = some_clips(6)
    write_jsonl(tmp_path / "describe" / "train.jsonl", clips)
    write_jsonl(tmp_path / "corpus" / "train.jsonl", [{"id": "c0", "question": "Who?", "answer": "Anna"}])
    (tmp_path / "pool.yaml").write_text(
        "prompts: [{id: gender, text: 'Man or woman?', asks: [gender], example: 'The speaker is {gender}.'}]\n"
    )
    settings = {"max_new_tokens": 5, "samples": 3}
    recipe = recipe_with(tmp_path, strategy="self_output", **settings)
    counts = write_targets(
        recipe, tmp_path / "describe" / "train.jsonl", tmp_path / "targets", progress=False
    )
    rows = [row for _, row in read_jsonl(tmp_path / "targets" / "examples.jsonl")]
    assert {row["id"] for row in rows} == {"c0/manifest", *(f"c{i}/gender" for i in range(1, 6))}
    assert {row["source"]["kept"] for row in rows} == {"human"}  # a random LLM is never right
    assert {row["source"]["attempt"] for row in rows} == {2}
    assert said([row for row in rows if row["id"] == "c0/manifest"]) == ["Anna"]
    journal = [row for _, row in read_jsonl(tmp_path / "targets" / "journal.jsonl")]
    assert {row.get("sample", 0) for row in journal} == {0, 1, 2}
    assert counts["perplexity"] > 1
    assert counts["perplexity_rows"] == 6
    assert counts["generated_tokens"] == sum(row["tokens"] for row in journal) > 0
    assert "perplexity" in capsys.readouterr().out
    assert loaded == [recipe.model.llm]

    first = (tmp_path / "targets" / "examples.jsonl").read_bytes()
    half = (tmp_path / "targets" / "journal.jsonl").read_bytes()[: -len(json.dumps(journal[-1])) // 2]
    (tmp_path / "targets" / "journal.jsonl").write_bytes(half)
    write_targets(recipe, tmp_path / "describe" / "train.jsonl", tmp_path / "targets", progress=False)
    assert (tmp_path / "targets" / "examples.jsonl").read_bytes() == first

    recipe = recipe_with(tmp_path, strategy="given", perplexity_rows=0)
    write_targets(recipe, tmp_path / "describe" / "train.jsonl", tmp_path / "given", progress=False)
    assert len(loaded) == 2  # the two runs above: nobody is asked now


def test_the_editor_of_minimum_change_is_another_llm_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import tiny_llm, tiny_tokenizer

    loaded = []

    def load(reference: str, precision: str) -> tuple[Any, Any]:
        loaded.append(reference)
        return tiny_llm(seed=len(loaded)), tiny_tokenizer()

    monkeypatch.setattr("speech_llm.assets.load_answering_llm", load)
    write_jsonl(tmp_path / "describe" / "train.jsonl", some_clips(2))
    (tmp_path / "pool.yaml").write_text(
        "prompts: [{id: gender, text: 'Who?', asks: [gender], example: '{gender}'}]\n"
    )
    recipe = recipe_with(
        tmp_path, strategy="minimum_change", max_new_tokens=4, **{"teacher.model": "big/one"}
    )
    counts = write_targets(
        recipe, tmp_path / "describe" / "train.jsonl", tmp_path / "targets", progress=False
    )
    assert sorted(loaded) == sorted(["big/one", recipe.model.llm])
    assert counts["rejected"] == 2
    journal = [row for _, row in read_jsonl(tmp_path / "targets" / "journal.jsonl")]
    assert {row.get("to") for row in journal} == {None, "editor"}


@pytest.mark.parametrize("strategy", ["given", "rewrite"])
def test_clips_without_a_persons_answer_are_a_sentence(tmp_path: Path, strategy: str) -> None:
    clips = some_clips(2)
    for clip in clips:
        clip["how"]["gender"] = "by ear"
    write_jsonl(tmp_path / "describe" / "train.jsonl", clips)
    (tmp_path / "pool.yaml").write_text(
        "prompts: [{id: gender, text: 'Who?', asks: [gender], example: '{gender}'}]\n"
    )
    with pytest.raises(
        UserError, match=rf"no clip of .* has labels of people .*targets.strategy is '{strategy}'"
    ):
        write_targets(
            recipe_with(tmp_path, strategy=strategy), tmp_path / "describe" / "train.jsonl", tmp_path / "out"
        )

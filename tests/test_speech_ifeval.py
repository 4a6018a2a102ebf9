"""Speech-IFEval: each rule on answers that keep it and that do not, the benchmark's files, IFrate, and our own offline set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answering import Says
from learning import tones
from typer.testing import CliRunner

from eval.compare import ifeval_forgetting
from eval.ifeval_rules import GROUPS, RULES, count_sentences, keeps
from eval.ifeval_set import CLOSED, CREATIVE, build
from eval.runner import evaluate, score_responses
from eval.scoring import score_answer
from eval.speech_ifeval import forgetting_rate, ifrate
from eval.tasks import load_tasks, write_task
from speech_llm.cli.app import app
from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl, write_jsonl
from speech_llm.summary import scores_table

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("json_format", {}, '{"a": 1}', True),
    ("json_format", {}, '```json\n{"a": 1}\n```', True),
    ("json_format", {}, '```JSON\n["a"]```', True),
    ("json_format", {}, "```\n3\n```", True),
    ("json_format", {}, '"only a string"', True),
    ("json_format", {}, '{"a": 1', False),
    ("json_format", {}, 'Here it is: {"a": 1}', False),
    ("json_format", {}, "{'a': 1}", False),
    ("english_capital", {}, "THE SPEAKER IS MALE. 12!", True),
    ("english_capital", {}, "The SPEAKER", False),
    ("english_capital", {}, "12!", False),
    ("english_lowercase", {}, "the speaker is male.", True),
    ("english_lowercase", {}, "The speaker", False),
    ("quotation", {}, ' "The speaker is male." ', True),
    ("quotation", {}, '"', False),
    ("quotation", {}, '"The speaker" is male', False),
    ("quotation", {}, "“The speaker”", False),
    ("title", {}, "<<The Speaker>>\nA man.", True),
    ("title", {}, "A man. <<The Speaker>>", True),
    ("title", {}, "<< >>", False),
    ("title", {}, "<The Speaker>", False),
    ("title", {}, "<<The\nSpeaker>>", False),
    ("repeat_prompt", {"prompt_to_repeat": "Who speaks?"}, "who speaks? A man.", True),
    ("repeat_prompt", {"prompt_to_repeat": "Who speaks?"}, '"Who speaks?" A man.', True),
    ("repeat_prompt", {"prompt_to_repeat": "Who speaks?"}, "A man. Who speaks?", False),
    ("end_checker", {"end_phrase": "That is all."}, "A man. THAT IS ALL.", True),
    ("end_checker", {"end_phrase": "That is all."}, 'A man. "That is all."', True),
    ("end_checker", {"end_phrase": "That is all."}, "A man. That is all. Bye.", False),
    ("number_bullet_lists", {"num_bullets": 2}, "Here:\n* a\n* b", True),
    ("number_bullet_lists", {"num_bullets": 2}, "- a\n• b", True),
    ("number_bullet_lists", {"num_bullets": 2}, "1. a\n2. b", True),
    ("number_bullet_lists", {"num_bullets": 2}, "* a\\n* b", True),
    ("number_bullet_lists", {"num_bullets": 2}, "**Title**\n* a\n* b", True),
    ("number_bullet_lists", {"num_bullets": 2}, "* a\n\t+ b", False),
    ("number_bullet_lists", {"num_bullets": 2}, "* a\n* b\n* c", False),
    ("existence", {"keywords": ["river", "boat"]}, "A River. Boats.", True),
    ("existence", {"keywords": ["river", "boat"]}, "A river.", False),
    ("forbidden_words", {"forbidden_words": ["man"]}, "A woman.", True),
    ("forbidden_words", {"forbidden_words": ["man"]}, "A Man.", False),
    ("number_words", {"num_words": 3, "relation": "less than"}, "two words", True),
    ("number_words", {"num_words": 3, "relation": "less than"}, "these are three", False),
    ("number_words", {"num_words": 3, "relation": "at least"}, "these are three", True),
    ("number_words", {"num_words": 4, "relation": "at least"}, "it's three", False),
    ("number_sentences", {"num_sentences": 2, "relation": "at least"}, "Dr. Smith speaks. He is old.", True),
    (
        "number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Dr. Smith speaks to Mr. Jones.",
        True,
    ),
    ("number_sentences", {"num_sentences": 2, "relation": "less than"}, "One. Two.", False),
    ("number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", True),
    ("number_paragraphs", {"num_paragraphs": 2}, "One.\n\nTwo.", True),
    ("number_paragraphs", {"num_paragraphs": 2}, "One. *** Two.\n", True),
    ("number_paragraphs", {"num_paragraphs": 2}, "One.", False),
    ("number_paragraphs", {"num_paragraphs": 2}, "One.\n***\n***\nTwo.", False),
]


@pytest.mark.parametrize(("constraint", "arguments", "answer", "kept"), CASES)
def test_each_rule(constraint: str, arguments: dict[str, Any], answer: str, kept: bool) -> None:
    assert keeps(f"any:{constraint}", arguments, answer) is kept
    assert not keeps(constraint, arguments, "")
    assert not keeps(constraint, arguments, " \n")


def test_every_rule_has_cases_of_both_kinds_and_a_group() -> None:
    for name in RULES:
        assert {kept for constraint, _, _, kept in CASES if constraint == name} == {True, False}, name
    assert set(GROUPS) == set(RULES)
    assert count_sentences("Mr. Smith paid 3.50 dollars. Then he left.") == 2
    with pytest.raises(ValueError, match="unknown constraint"):
        keeps("odd", {}, "x")
    with pytest.raises(ValueError, match="num_bullets"):
        keeps("number_bullet_lists", {}, "x")
    with pytest.raises(ValueError, match="unknown relation"):
        keeps("number_words", {"num_words": 3, "relation": "about"}, "x")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The benchmark's files as they are: one row a line, sounds under `audios/`."""
    root = tmp_path / "eval_data"
    (path, _), *_ = tones(root / "audios" / "Gender", 1)
    sound = f"Gender/{path.name}"
    row = {
        "audio_filepath": sound,
        "textual_audio": "[0 - 2] Of course.(Gender: Female)",
        "dataset": "Gender",
    }
    closed = [
        {**row, "id": 0, "instruction": "Write it down. In capitals.", "metric": "wer", "label": "OF COURSE", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
        {**row, "id": 1, "instruction": "Male or female? As JSON.", "metric": "accuracy", "label": "female", "instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]},
        {**row, "id": 2, "instruction": "Odd", "instruction_id_list": ["odd:rule"], "kwargs": [{}]},
        {**row, "id": 3, "instruction": "Gone", "audio_filepath": "Gender/absent.wav", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]},
        {**row, "id": 4, "instruction": "Uneven", "instruction_id_list": ["startend:quotation"], "kwargs": [{}, {}]},
    ]  # fmt: skip
    write_jsonl(root / "closed_ended_questions.jsonl", closed)
    with open(root / "closed_ended_questions.jsonl", "a") as handle:
        handle.write("not json\n")
    write_jsonl(
        root / "closed_ended_questions-woprompt.jsonl", [{**closed[1], "instruction": "Male or female?"}]
    )
    bullets = {**row, "id": 5, "instruction": "2 points", "instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": 2}]}  # fmt: skip
    write_jsonl(
        root / "creative_writing.jsonl", [bullets, {**bullets, "id": 6, "kwargs": [{"num_bullets": 1}]}]
    )
    write_jsonl(root / "chain-of-thought.jsonl", [{**row, "id": 7, "instruction": "Think.", "metric": "cot"}])
    return root


def test_the_benchmarks_files(files: Path, tmp_path: Path) -> None:
    tasks = {task.name: task for task in load_tasks(f"speech-ifeval:{files}")}
    assert {name: len(task.instances) for name, task in tasks.items()} == {
        "ifeval-cot": 1, "ifeval-woprompt": 1, "ifeval-closed": 2, "ifeval-creative": 2,
    }  # fmt: skip
    reasons = " | ".join(row["reason"] for row in tasks["ifeval-closed"].rejects)
    for why in ("unknown constraint", "no such audio file", "same length", "JSON"):
        assert why in reasons, reasons
    said = Says('{"gender": "female"}')
    results = evaluate(said, list(tasks.values()), tmp_path / "out", progress=False)
    assert said.asked[0][0] == {"role": "system", "content": "Follow the given instructions."}
    part = said.asked[0][1]["content"][0]
    assert part["description"] == "Speech Input: [0 - 2] Of course.(Gender: Female)\n"
    closed = results["ifeval-closed"]
    assert (closed["accuracy"], closed["rejected"]) == (0.5, 4)
    assert closed["constraints"]["json_format"]["value"] == 1
    assert closed["constraints"]["english_capital"]["value"] == 0
    assert closed["groups"]["JS"]["n"] == 1
    assert closed["answer_accuracy"]["value"] == 1
    assert closed["answer_wer"]["value"] == 1
    assert results["ifeval-woprompt"]["accuracy"] == 1
    assert results["ifeval-cot"]["accuracy"] is None
    assert results["ifeval-cot"]["needs_judge"] == 1
    whole = results["speech-ifeval"]
    # The mean over categories that a rule decides; the chain of thought is named as left out.
    assert whole["categories"] == {"ifeval-closed": 0.5, "ifeval-creative": 0.0}
    assert (whole["ifrate"], whole["needs_judge"]) == (0.25, ["ifeval-cot"])
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "predictions.jsonl")]
    assert [row["kept"] for row in rows if row["task"] == "ifeval-closed"] == [
        {"change_case:english_capital": False}, {"detectable_format:json_format": True},
    ]  # fmt: skip
    assert "ifrate" in scores_table(results)
    with pytest.raises(UserError, match="no such file or folder"):
        load_tasks(f"speech-ifeval:{files / 'absent'}")


def test_the_forgetting_rate_is_relative_to_the_text_llm(files: Path, tmp_path: Path) -> None:
    tasks = load_tasks(f"speech-ifeval:{files}")
    for name, answer in (("text", "* ONE\n* TWO"), ("model", "* one\n* two")):
        evaluate(Says(answer), tasks, tmp_path / name, progress=False)
    text, model = (read_json(tmp_path / name / "results.json") for name in ("text", "model"))
    assert text["speech-ifeval"]["ifrate"] == 0.5
    assert model["speech-ifeval"]["ifrate"] == 0.25
    assert forgetting_rate(text["speech-ifeval"], model["speech-ifeval"]) == -0.5
    assert "forgetting rate -50.00 %" in str(ifeval_forgetting(tmp_path / "text", tmp_path / "model"))
    assert ifrate({"other": {"accuracy": 1.0}}) is None
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "text"), str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert "IFrate 50.00 -> 25.00" in done.output


def described(folder: Path, clips: int = 6) -> Path:
    """A run folder whose test clips are described."""
    rows = []
    for number, (path, gender) in enumerate(tones(folder / "corpus" / "clips", clips)):
        speed = ("slow", "fast")[number // 2 % 2]
        rows.append({"id": path.stem, "audio": f"../corpus/clips/{path.name}", "attributes": {"gender": gender, "speed": speed}, "description": f"A {gender} speaker speaks {speed}."})  # fmt: skip
    write_jsonl(folder / "describe" / "test.jsonl", rows)
    write_jsonl(folder / "corpus" / "test.jsonl", [{"id": row["id"], "text": "we read it"} for row in rows])
    return folder


def test_our_own_set_about_a_runs_clips(tmp_path: Path) -> None:
    run = described(tmp_path / "run")
    tasks = {task.name: task for task in load_tasks(f"ifeval:{run}")}
    assert {name: len(task.instances) for name, task in tasks.items()} == dict.fromkeys(
        ("ifeval-closed", "ifeval-woprompt", "ifeval-creative"), 48
    )
    rules = {item["id"] for i in tasks["ifeval-closed"].instances for item in i.constraints} - {"answer"}
    assert rules == set(CLOSED)
    assert {i.constraints[0]["id"] for i in tasks["ifeval-creative"].instances} == {
        rule for rule, _, _ in CREATIVE
    }
    assert {i.label for i in tasks["ifeval-closed"].instances} == {
        "male",
        "female",
        "slow",
        "fast",
        "we read it",
    }
    assert [i.messages for i in tasks["ifeval-closed"].instances] == [
        i.messages for i in load_tasks(f"ifeval:{run}")[0].instances
    ]
    # What is asked is what is checked: an answer made to the letter keeps every constraint.
    for instance in tasks["ifeval-closed"].instances:
        question = instance.messages[1]["content"][1]["text"].split("\n")[0]
        made = {
            "json_format": json.dumps({"answer": instance.label}),
            "english_capital": instance.label.upper(),
            "english_lowercase": instance.label,
            "quotation": f'"{instance.label}"',
            "title": f"<<Answer>>\n{instance.label}",
            "repeat_prompt": f"{question} {instance.label}",
            "end_checker": f"{instance.label}. That is all I can tell.",
        }[instance.constraints[0]["id"].rpartition(":")[2]]
        assert score_answer(instance, made)["score"] == 1, (instance.constraints, made)
    # Written for a run's eval stage and read back, it is the same.
    write_task(tasks["ifeval-closed"], tmp_path / "tasks" / "closed.jsonl")
    (again,) = load_tasks(f"jsonl:{tmp_path / 'tasks' / 'closed.jsonl'}")
    assert [i.constraints for i in again.instances] == [
        i.constraints for i in tasks["ifeval-closed"].instances
    ]
    assert again.metric == "ifeval"
    with pytest.raises(UserError, match="no such file"):
        load_tasks(f"ifeval:{tmp_path}")
    assert build([]) == []


def test_saved_answers_are_scored_without_a_model(tmp_path: Path) -> None:
    run = described(tmp_path / "run")
    tasks = load_tasks(f"ifeval:{run}")[:1]
    write_jsonl(tmp_path / "answers.jsonl", [{"response": "THE SPEAKER IS FEMALE."}] * 48)
    results = score_responses(tasks, tmp_path / "answers.jsonl", tmp_path / "out")
    assert results["ifeval-closed"]["constraints"]["english_capital"]["value"] == 1
    assert results["speech-ifeval"]["categories"] == {"ifeval-closed": results["ifeval-closed"]["accuracy"]}

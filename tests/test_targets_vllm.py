"""The real engine of vLLM as the teacher; where vLLM is not installed these tests say so and skip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from speech_llm.assets import load_llm
from speech_llm.chat_server import NoAnswer
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import Sampling, TransformersTeacher
from speech_llm.targets.teacher_vllm import VllmTeacher

pytestmark = pytest.mark.assets

QUESTIONS = [
    Question("A female speaker with an Indian accent talks fast.", "What is the gender of the speaker?"),
    Question("A male speaker with a Scottish accent talks slowly.", "What accent do you hear?"),
    Question(
        "A male speaker with a Scottish accent talks slowly.",
        "Describe the speaker.",
        ("A female speaker with an Indian accent talks fast.", "A woman with an Indian accent, in a hurry."),
    ),
]


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path) -> Iterator[VllmTeacher]:
    pytest.importorskip("vllm")
    teacher = VllmTeacher(
        str(smollm2_dir), Sampling(max_new_tokens=12), "float32", {"max_model_len": 256, "max_num_seqs": 8}
    )
    yield teacher
    teacher.close()


def told(
    teacher: VllmTeacher | TransformersTeacher, questions: list[Question]
) -> dict[Question, str | NoAnswer]:
    answers: dict[Question, str | NoAnswer] = {}
    teacher.answer(questions, lambda question, answer, tokens: answers.update({question: answer}))
    return answers


def test_it_answers_as_transformers_does(engine: VllmTeacher, smollm2_dir: Path) -> None:
    llm, tokenizer = load_llm(str(smollm2_dir), torch.float32)
    assert told(engine, QUESTIONS) == told(
        TransformersTeacher(llm, tokenizer, sampling=Sampling(max_new_tokens=12)), QUESTIONS
    )


def test_a_question_that_is_too_long_costs_only_itself(engine: VllmTeacher) -> None:
    long = Question("word " * 400, "What is this?")
    alone = told(engine, QUESTIONS)
    answers = told(engine, [*QUESTIONS[:2], long, QUESTIONS[2]])
    assert isinstance(refused := answers.pop(long), NoAnswer)
    assert "256" in refused.why
    assert answers == alone


def test_a_draw_depends_on_its_own_question_alone(engine: VllmTeacher, smollm2_dir: Path) -> None:
    sampling = engine.sampling
    engine.sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    try:
        together = told(engine, QUESTIONS)
        assert told(engine, QUESTIONS[1:2]) == {QUESTIONS[1]: together[QUESTIONS[1]]}
    finally:
        engine.sampling = sampling

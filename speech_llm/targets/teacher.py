"""The teacher: the base LLM itself, given a text that stands in for the audio.

In: `Question`s (context, question, worked example). Out: its answers.
It is never a second model: the LLM that the speech model is built on, adapters off. The worked example (a description,
the question, a good answer) stands before the real one in the teacher's context only; for a small LLM it changes
everything, and it costs the student nothing, since the student never sees it (context distillation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from speech_llm.generation import answer_chats


@dataclass(frozen=True)
class Question:
    """What the teacher is asked: `context` replaces the audio; `example` is (context, answer) of another clip."""

    context: str
    text: str
    example: tuple[str, str] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The chat that the teacher sees."""
        turns: list[dict[str, Any]] = []
        if self.example is not None:
            turns.append({"role": "user", "content": f"{self.example[0]}\n{self.text}"})
            turns.append({"role": "assistant", "content": self.example[1]})
        turns.append({"role": "user", "content": f"{self.context}\n{self.text}"})
        return turns


class Teacher:
    """Answers questions with a text LLM, in batches; the same question is answered once."""

    def __init__(self, llm: Any, tokenizer: Any, batch_tokens: int = 4096, max_new_tokens: int = 64) -> None:
        self.llm, self.tokenizer = llm, tokenizer
        self.batch_tokens, self.max_new_tokens = batch_tokens, max_new_tokens
        self.answered: dict[Question, str] = {}
        self.tokens = 0

    def answer(
        self, questions: Sequence[Question], on_answer: Callable[[Question, str], None] | None = None
    ) -> list[str]:
        """Greedy answers, in order. `on_answer` is called once per new question, as soon as it is answered."""
        new = [question for question in dict.fromkeys(questions) if question not in self.answered]

        def done(index: int, text: str, tokens: int) -> None:
            self.answered[new[index]] = text
            self.tokens += tokens
            if on_answer is not None:
                on_answer(new[index], text)

        answer_chats(
            self.llm,
            self.tokenizer,
            [question.messages() for question in new],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            on_answer=done,
        )
        return [self.answered[question] for question in questions]

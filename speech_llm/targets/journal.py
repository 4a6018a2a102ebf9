"""The journal: every answer of a teacher, on disk as soon as it comes, so that a kill at any moment loses nothing.

In: questions. Out: their answers, from the journal where they are known, else from the teacher. The strategies are
functions of the answers alone, so a stage that runs again over its journal comes to the same targets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speech_llm.chat_server import NoAnswer
from speech_llm.files import JsonlAppender
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import Cut, Teacher


class Journal:
    """Answers by question, kept in a file of JSON lines; a torn last line is cut off and asked again.

    `tokens`: of all answers, `new_tokens` and `seconds` of this run's alone. `unanswered`: why, and how often.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonlAppender(path)
        self.answers: dict[Question, str] = {}
        self.tokens = self.new_tokens = 0
        self.seconds = 0.0
        self.unanswered: Counter[str] = Counter()
        for row in self._lines.rows:
            self.answers[_question(row)] = Cut(row["answer"]) if row.get("cut") else row["answer"]
            self.tokens += row.get("tokens", 0)

    def ask(
        self, questions: Sequence[Question], teachers: Mapping[str, Teacher], title: str, progress: bool
    ) -> dict[Question, str | NoAnswer]:
        """The answers to `questions`; each new one is asked once, of the teacher that it is addressed `to`."""
        new = [question for question in dict.fromkeys(questions) if question not in self.answers]
        failed: dict[Question, NoAnswer] = {}
        started = time.perf_counter()
        with tqdm(total=len(new), desc=title, unit="answer", disable=not progress) as bar:

            def done(question: Question, answer: str | NoAnswer, tokens: int) -> None:
                if isinstance(answer, NoAnswer):
                    failed[question] = answer
                    self.unanswered[answer.why] += 1
                    bar.set_postfix(failed=len(failed), refresh=False)
                else:
                    self._keep(question, answer, tokens)
                bar.update()

            for to, teacher in teachers.items():
                own = [question for question in new if question.to == to]
                if own:
                    teacher.answer(own, done)
        self.seconds += time.perf_counter() - started
        return {question: failed.get(question) or self.answers[question] for question in questions}

    def _keep(self, question: Question, answer: str, tokens: int) -> None:
        row: dict[str, Any] = {k: v for k, v in asdict(question).items() if k not in ("sample", "to")}
        if question.sample:
            row["sample"] = question.sample
        if question.to != "llm":
            row["to"] = question.to
        cut = {"cut": True} if isinstance(answer, Cut) else {}
        self._lines.append({**row, "answer": answer, "tokens": tokens, **cut})
        self.answers[question] = answer
        self.tokens += tokens
        self.new_tokens += tokens

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()


def _question(row: dict[str, Any]) -> Question:
    example = tuple(row["example"]) if row["example"] else None
    return Question(row["context"], row["text"], example, row.get("sample", 0), row.get("to", "llm"))

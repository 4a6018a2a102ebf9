"""What a strategy writes: one row's target, from the questions that it puts to a teacher on the way.

A strategy is a generator for each row. It yields the questions that it wants answered next, is sent their answers, and
returns a `Target` or a `Reject`. It keeps no state and draws nothing by chance, so that the journal's answers lead it to
the same end again; the driver (`run`) advances all rows side by side, so that their questions are answered in batches.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Question, Questioner
from speech_llm.targets.teacher import Cut
from speech_llm.targets.verify import loses, verdict


@dataclass(frozen=True)
class Row:
    """One clip and what it is asked; `human`: a person's answer; `manifest`: question and answer came with the clip."""

    clip: dict[str, Any]
    prompt: PoolPrompt
    human: str | None = None
    manifest: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = self.clip["attributes"]
        return attributes

    @property
    def key(self) -> tuple[str, str]:
        return self.clip["id"], self.prompt.id


@dataclass(frozen=True)
class Target:
    """An answer to learn. `attempt` counts from 0; `verdict` is "ok", or why a person's answer stands here instead of an
    LLM's; `notes` go into the row's `source`."""

    answer: str
    context: str
    attempt: int = 0
    verdict: str = "ok"
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """Why a row has no target, and the last answer that was not kept."""

    reason: str
    answer: str
    attempts: int


Writing = Generator[list[Question], list[str], "Target | Reject"]


@dataclass(frozen=True)
class Desk:
    """What every strategy works with: how questions are put, how answers are judged, how often it may ask.

    `options`: the values of each closed attribute. `choices`: the answers of people, where they are few. `sampled`: answers
    are drawn, so that asking again gives another one.
    """

    questioner: Questioner
    options: dict[str, list[str]]
    attempts: int = 2
    samples: int = 1
    sampled: bool = False
    choices: tuple[str, ...] = ()

    def ask(self, row: Row, attempt: int) -> Question:
        """The plain question about a row's clip."""
        asked = self.questioner.question(row.attributes, row.prompt, row.clip["id"], attempt)
        return Question(asked.context, asked.text, asked.example, attempt if self.sampled else 0)

    def judge(self, answer: str, row: Row) -> str:
        """`"ok"`, or why an answer is not right."""
        if isinstance(answer, Cut):
            return "does not end"
        outcome = verdict(answer, row.prompt, row.attributes, self.options)
        if outcome == "ok" and row.manifest and row.human is not None:
            return loses(answer, row.human, self.choices) or "ok"
        return outcome

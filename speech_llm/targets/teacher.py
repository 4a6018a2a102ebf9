"""Teachers: who answers the questions of the targets stage.

In: `Question`s (context, question, worked example). Out: answers, each reported as soon as it is there.
By default the teacher is the base LLM itself, the one that the speech model is built on, adapters off, given a text that
stands in for the audio. The worked example (a description, the question, a good answer) stands before the real one in the
teacher's context only; for a small LLM it changes everything, and it costs the student nothing, since the student never
sees it (context distillation).

Three backends have one interface: transformers in this process (here), vLLM (`teacher_vllm`) and any server that speaks
OpenAI's protocol (`teacher_server`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from speech_llm.chat_server import NoAnswer
from speech_llm.errors import UserError
from speech_llm.targets.questions import Question

if TYPE_CHECKING:
    from speech_llm.recipe_targets import TargetsSection


class Cut(str):
    """An answer that did not end within the tokens that it was given; to learn it is to learn to stop in the middle."""

    __slots__ = ()


# (question, answer, tokens of the answer)
OnAnswer = Callable[[Question, "str | NoAnswer", int], None]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily at temperature 0, else by nucleus sampling from a seed of each question's own."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, question: Question) -> int:
        """The seed of one draw: from the question alone, so that no other question can change the answer."""
        text = repr((self.seed, question))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class Teacher(Protocol):
    """Answers questions, in any order; `name` is the model that answers, for the rows' provenance."""

    name: str

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer every question; `on_answer` is called once for each, as soon as it is answered."""

    def close(self) -> None:
        """Let go of what answering held; nothing is asked afterwards."""


class TransformersTeacher:
    """A text LLM in this process, in batches."""

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        name: str = "",
        sampling: Sampling | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        self.llm, self.tokenizer, self.name = llm, tokenizer, name
        self.sampling, self.batch_tokens = sampling or Sampling(), batch_tokens

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        from speech_llm.generation import answer_chats

        chosen = self.sampling
        told: set[int] = set()
        cut: set[str] = set()

        def done(index: int, text: str, tokens: int) -> None:
            told.add(index)
            if tokens > chosen.max_new_tokens:  # the token that ends an answer counts
                cut.add(text)
            on_answer(questions[index], Cut(text) if text in cut else text, tokens)

        answers = answer_chats(
            self.llm,
            self.tokenizer,
            [question.messages() for question in questions],
            max_new_tokens=chosen.max_new_tokens,
            batch_tokens=self.batch_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            seeds=[chosen.seed_of(question) for question in questions],
            on_answer=done,
        )
        for index, question in enumerate(questions):
            if index not in told:  # put in the same words as another, so answered with it
                on_answer(question, Cut(answers[index]) if answers[index] in cut else answers[index], 0)

    def close(self) -> None:
        """Nothing: who lent the LLM goes on using it."""


def open_teacher(
    settings: TargetsSection,
    llm_reference: str,
    seed: int,
    load: Callable[[str], Any],
    precision: str = "auto",
) -> Teacher:
    """The teacher that `targets.teacher` names; without a model of its own it is the base LLM.

    `load(reference)`: the LLM and its tokenizer, for transformers; `precision`: for vLLM. Raises `UserError` when a backend is not installed.
    """
    chosen = settings.teacher
    sampling = settings.sampling(seed)
    backend = chosen.backend if chosen is not None else "transformers"
    name = (chosen.model if chosen is not None else None) or llm_reference
    if backend == "transformers" or chosen is None:
        llm, tokenizer = load(name)
        return TransformersTeacher(llm, tokenizer, name, sampling, settings.batch_tokens)
    if backend == "vllm":
        from speech_llm.targets.teacher_vllm import VllmTeacher

        return VllmTeacher(name, sampling, precision, chosen.engine)
    from speech_llm.targets.teacher_server import ServerTeacher

    if chosen.url is None:
        raise UserError("targets.teacher.backend is 'openai', but targets.teacher.url is missing")
    return ServerTeacher(
        chosen.url,
        name,
        sampling,
        api_key_env=chosen.api_key_env,
        concurrency=chosen.concurrency,
        retries=chosen.retries,
        timeout_s=chosen.timeout_s,
    )

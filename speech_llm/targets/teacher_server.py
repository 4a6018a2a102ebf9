"""A teacher behind any server that speaks OpenAI's protocol (`speech_llm.chat_server`).

In: questions. Out: answers, in whatever order they come; a question that gets none costs its own rows only. When nothing
gets through any more the stage stops with a sentence, and goes on later from its journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speech_llm.assets import resolve
from speech_llm.chat_server import ChatServer, NoAnswer
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import Cut, OnAnswer, Sampling


class ServerTeacher:
    """A model by name on a server by URL; the further arguments are `ChatServer`'s.

    Raises `UserError`: the client library or the key is missing, the server refuses key or model, or nothing gets through.
    """

    def __init__(self, url: str, name: str, sampling: Sampling, **settings: Any) -> None:
        self.name, self.sampling = name, sampling
        # A package's model is known to a local server by its folder.
        served = str(resolve(name)) if name.startswith("pypi:") else name
        self.server = ChatServer(
            url,
            served,
            asked_by="targets.teacher.backend is 'openai'",
            settings="targets.teacher.url, model and api_key_env",
            **settings,
        )

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        chosen = self.sampling

        def options(index: int) -> dict[str, Any]:
            if chosen.temperature == 0:
                return {"temperature": 0}
            seed = chosen.seed_of(questions[index])
            return {"temperature": chosen.temperature, "top_p": chosen.top_p, "seed": seed}

        def done(index: int, answer: str | NoAnswer, tokens: int) -> None:
            cut = isinstance(answer, str) and tokens >= chosen.max_new_tokens
            on_answer(questions[index], Cut(answer) if cut else answer, tokens)

        self.server.ask_all(
            len(questions),
            lambda index: questions[index].messages(),
            done,
            max_tokens=chosen.max_new_tokens,
            options_of=options,
            empty_counts=False,
        )

    def close(self) -> None:
        """Nothing: connections end with the questions."""

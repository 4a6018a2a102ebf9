"""A model for tests of judging, which answers without thinking."""

from __future__ import annotations

from typing import Any


class Says:
    """Says the same to everything; `asked` are the conversations that it was given."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[Any] = []

    def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
        self.asked += conversations
        for place in range(len(conversations)):
            if on_answer is not None:
                on_answer(place, self.text)
        return [self.text] * len(conversations)

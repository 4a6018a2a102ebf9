"""Who is served next: one at a time, in the order in which they came, and no more waiting than a few."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from speech_llm.errors import UserError

# How often one who waits is told where they stand, which also finds out who has gone.
TELL_EVERY_S = 1.0


class LineFull(UserError):
    """Too many are waiting."""


class Line:
    """A queue of threads. `longest`: how many may stand in it, the one being served included."""

    def __init__(self, longest: int = 16) -> None:
        self.longest = longest
        self._standing: list[object] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, on_place: Callable[[int], None] = lambda _: None) -> Iterator[None]:
        """Wait for one's turn and have it for the time of a block.

        `on_place(n)`: n others are before this one; told every second, and what it raises leaves the line. Raises `LineFull`.
        """
        ticket = object()
        with self._changed:
            if len(self._standing) >= self.longest:
                raise LineFull(
                    f"{len(self._standing)} others are waiting for an answer already; try again in a minute"
                )
            self._standing.append(ticket)
        try:
            while place := self._place(ticket):
                on_place(place)
                with self._changed:
                    if self._standing.index(ticket) == place:
                        self._changed.wait(TELL_EVERY_S)
            yield
        finally:
            with self._changed:
                self._standing.remove(ticket)
                self._changed.notify_all()

    def is_empty(self) -> bool:
        with self._changed:
            return not self._standing

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether everyone has left the line within this time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._standing, timeout_s)

    def _place(self, ticket: object) -> int:
        with self._changed:
            return self._standing.index(ticket)

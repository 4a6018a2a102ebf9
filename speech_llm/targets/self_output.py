"""Strategy `self_output`: a right answer among several of the LLM's own, else a person's (2409.04787; baseline of 2501.14315).

In: description, prompt, a person's answer. Out: the first of n sampled answers that is right, by the same check that every
target passes. Drawn one after the other, since the first right one ends the search: the same result as drawing n and
taking the first that is right, for less.
"""

from __future__ import annotations

from speech_llm.targets.given import human_target
from speech_llm.targets.rows import Desk, Row, Target, Writing


def self_output(row: Row, desk: Desk) -> Writing:
    """Draw until an answer is right, at most `desk.samples` times; then fall back on the person's answer."""
    outcome = ""
    for draw in range(desk.samples):
        question = desk.ask(row, draw)
        (answer,) = yield [question]
        outcome = desk.judge(answer, row)
        if outcome == "ok":
            return Target(answer, question.context, draw, notes={"kept": "own"})
    return human_target(row, desk, desk.samples - 1, outcome, {"kept": "human"})
